"""What does a gradient cost on its way through a frozen tower? ``python -m benchmarks.frozen_towers`` (15 minutes).

Prompts are trained through the text tower and adapters through the vision tower, whose own weights stay as they are.
Towers of every family at their true sizes, with random weights, by themselves: forward, and backward to what goes in.
Ours, that is, a wrapped one, is timed in turn with two others of the same weights: the container's own, and, where
blocks are open_clip's, the same with the sequence first, as the code of CLIP has it, on which CSP, CoOp and Troika
were released. What is written is how many times ours the others take, the median over rounds with its quartiles; and
the largest difference between gradients, relative to their norm.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.encoders import OPEN_CLIP, SEED, of_transformers, stand_in
from benchmarks.measure import seconds_in_turn, write_results
from czsl_heads import wrap
from czsl_heads.adapters.bottleneck import add_bottlenecks
from czsl_heads.encoders.attention import FusedAttention

ADAPTED = "ViT-B-32 with bottleneck adapters"


def towers(name: str) -> dict[str, Any]:
    """Encoders of the same weights, by whose way they run: ``ours``, ``own`` and, if it can be, ``sequence_first``."""
    if name in ("CLIP", "Siglip"):
        return {"ours": of_transformers(name), "own": _plain(of_transformers(name))}
    ours = wrap(name.partition(" ")[0], tokenizer=stand_in)
    if name == ADAPTED:
        add_bottlenecks(ours)
    found = {"ours": ours, "own": _plain(copy.deepcopy(ours))}
    if any(isinstance(layer, FusedAttention) for layer in ours.blocks("vision").modules()):
        found["sequence_first"] = _sequence_first(_plain(copy.deepcopy(ours)))
    return found


def _plain(encoder: Any) -> Any:
    """With torch's own attention, as the container makes it."""
    for layer in encoder.modules():
        if isinstance(layer, FusedAttention):
            layer.__class__ = nn.MultiheadAttention
    return encoder


def _sequence_first(encoder: Any) -> Any:
    """With tokens as ``[length, batch, width]`` in the blocks of both towers."""
    from open_clip.transformer import Transformer

    for layer in encoder.modules():
        if isinstance(layer, (Transformer, nn.MultiheadAttention)):
            layer.batch_first = False
    return encoder


def images_through(encoder: Any, images: Tensor) -> Tensor:
    """The gradient at images ``[batch, 3, height, width]``, of some sum over their features."""
    leaf = images.clone().requires_grad_()
    _summed(encoder.encode_images(leaf)).backward()
    return _gradient(leaf)


def texts_through(encoder: Any, embeddings: Tensor, end: Tensor) -> Tensor:
    """The gradient at token embeddings ``[texts, length, width]``, likewise."""
    leaf = embeddings.clone().requires_grad_()
    _summed(encoder.encode_embeddings(leaf, end)).backward()
    return _gradient(leaf)


def _summed(features: Tensor) -> Tensor:
    return (features * torch.linspace(-1, 1, features.shape[-1], device=features.device)).sum()


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def measure(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, Any]:
    expected = runs["own"]()
    norm = float(expected.norm())
    differences = [float((run() - expected).norm()) / norm for run in runs.values()]
    seconds = seconds_in_turn(runs, rounds=rounds)
    found: dict[str, Any] = {"seconds_of_ours": float(f"{median(seconds['ours']):.3g}")}
    for name in runs.keys() - {"ours"}:
        ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"])]
        first, middle, third = quantiles(ratios, n=4)
        found[name] = {"times_ours": round(middle, 3), "quartiles": [round(first, 3), round(third, 3)]}
    return found | {"relative_difference": float(f"{max(differences):.2g}")}


def main(batch: int = 4, texts: int = 8, rounds: int = 5, only: str = "", name: str = "frozen_towers") -> None:
    """Measure, print and write ``results/NAME-DEVICE.json``.

    Args:
        batch: Images at once.
        texts: Texts at once, of as many tokens as the tower has positions.
        rounds: How often each way is timed.
        only: Run those whose name has this in it, to try the script.
        name: Of the results.
    """
    logging.disable(logging.WARNING)  # the weights are random, which is what is wanted
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {}
    for title in (*OPEN_CLIP, ADAPTED, "CLIP", "Siglip"):
        too_large = device == "cpu" and "-L-" in title  # hours, and of a family that is here
        if only not in title or too_large:
            continue
        encoders = {way: encoder.to(device) for way, encoder in towers(title).items()}
        ours = encoders["ours"]
        generator = torch.Generator().manual_seed(SEED)
        images = torch.randn(batch, 3, *ours.vision.image_size, generator=generator).to(device)
        embeddings = 0.1 * torch.randn(texts, ours.context_length, ours.text_dim, generator=generator).to(device)
        end = torch.full((texts,), ours.context_length - 1, device=device)

        through = {
            "vision": {way: partial(images_through, each, images) for way, each in encoders.items()},
            "text": {way: partial(texts_through, each, embeddings, end) for way, each in encoders.items()},
        }
        shown = f"{title} of transformers" if title in ("CLIP", "Siglip") else title
        results[shown] = {tower: measure(runs, rounds) for tower, runs in through.items()}
        print(shown, results[shown], flush=True)
    question = "What does a gradient cost on its way through a frozen tower?"
    content = {"batch": batch, "texts": texts, "rounds": rounds, "dtype": "float32"}
    content["threads"] = torch.get_num_threads()
    write_results(f"{name}-{device}", question, SEED, {**content, "towers": results})


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
