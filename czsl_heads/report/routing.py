"""Which words, and which images, go to which expert of a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from czsl_heads._files import save_figure
from czsl_heads.adapters.experts import mixtures_of, watch_routing
from czsl_heads.encoders.blocks import BlockParts
from czsl_heads.encoders.protocol import Tower
from czsl_heads.functional.experts import gates, route
from czsl_heads.models.method import Method
from czsl_heads.prompts.soft import SoftPrompts


class Routing(NamedTuple):
    """How the tokens of a model load its routed experts; the shares of a row sum to one.

    Attributes:
        words: Attributes, then objects.
        by_word: Share of each expert in the gates of each word's own token, mean over text blocks,
            ``[words, experts]``.
        by_block: Share of each expert in all tokens of a block, by tower, ``[blocks, experts]``.
    """

    words: list[str]
    by_word: Tensor
    by_block: dict[str, Tensor]

    def as_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        named = {word: _rounded(shares) for word, shares in zip(self.words, self.by_word)}
        return {"by_word": named, "by_block": {tower: _rounded(loads) for tower, loads in self.by_block.items()}}


def _rounded(shares: Tensor) -> Any:
    return (shares * 10_000).round().div(10_000).tolist()


@torch.no_grad()
def routing_of(model: Method, images: Tensor) -> Routing | None:
    """Where the words of a model and the tokens of images go; None for a model without experts or soft prompts.

    Args:
        model: In eval mode.
        images: ``[batch, 3, height, width]``, on the device of the model.
    """
    method: Any = getattr(model, "method", model)
    prompts = getattr(method, "prompts", None)
    if not isinstance(prompts, SoftPrompts) or not all(mixtures_of(model.encoder, each) for each in ("vision", "text")):
        return None
    encode = prompts.encode
    prompts.encode = "plain"  # each prompt by itself, so that a word's token is found by its place
    try:
        with watch_routing(model.encoder, "text") as of_texts:
            method.texts(model.space.pairs_on(images.device)[:1])
    finally:
        prompts.encode = encode
    with watch_routing(model.encoder, "vision") as of_images:
        model.encoder.encode_tokens(images)

    counts = len(model.space.attributes), len(model.space.objects)
    contexts = prompts.attribute_context, prompts.object_context
    by_word = []
    for kind, (count, context) in enumerate(zip(counts, contexts), start=1):  # call 0 is of the pair
        place = prompts.get_buffer("_start").shape[0] + len(context)
        by_word.append(_at(model, of_texts, kind, count)[:, :, place].mean(dim=0))
    by_block = {
        "text": torch.cat([_at(model, of_texts, kind, counts[kind - 1]).flatten(1, 2) for kind in (1, 2)], dim=1),
        "vision": _at(model, of_images, 0, len(images), tower="vision").flatten(1, 2),
    }
    words = [*model.space.attributes, *model.space.objects]
    loads = {tower: shares.mean(dim=1).cpu() for tower, shares in by_block.items()}
    return Routing(words, torch.cat(by_word).cpu(), loads)


def _at(model: Method, calls: list[list[Tensor]], call: int, batch: int, *, tower: Tower = "text") -> Tensor:
    """The gates of one call, ``[blocks, batch, length, experts]``."""
    found = []
    for block, mixture, own in zip(model.encoder.blocks(tower), mixtures_of(model.encoder, tower), calls):
        shares = gates(*route(own[call], mixture.topk), mixture.experts)
        if BlockParts(block).batch_first:
            found.append(shares.unflatten(0, (batch, -1)))
        else:
            found.append(shares.unflatten(0, (-1, batch)).transpose(0, 1))
    return torch.stack(found)


def plot_routing(routing: Routing, path: Path | IO[bytes]) -> None:
    """Draw the shares: words by expert, and the load of the experts in each block of both towers."""
    from matplotlib.figure import Figure

    most = 60  # words whose names can still be read
    words, shares = routing.words[:most], routing.by_word[:most]
    figure = Figure(figsize=(9, 2 + 0.2 * len(words)), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    axis = figure.add_subplot(grid[:, 0])
    style: dict[str, Any] = {"aspect": "auto", "cmap": "viridis", "vmin": 0.0}
    top = max(float(shares.max()), *(float(loads.max()) for loads in routing.by_block.values()))
    image = axis.imshow(shares.numpy(), vmax=top, **style)
    axis.set_yticks(range(len(words)), words, fontsize=8)
    axis.set(title="share of a word's token, mean over text blocks", xlabel="routed expert")
    for place, (tower, loads) in enumerate(routing.by_block.items()):
        axis = figure.add_subplot(grid[place, 1])
        axis.imshow(loads.numpy(), vmax=top, **style)
        axis.set(title=f"load of all tokens, {tower} tower", xlabel="routed expert", ylabel="block")
        axis.set_yticks(range(len(loads)))
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="share of the gates")
    save_figure(figure, path, dpi=110)
