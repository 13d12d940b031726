"""The gap between the images of a data set and the texts of its pairs, by what stands for an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from czsl_heads._checks import check_integer
from czsl_heads.data.layout import CompositionDataset
from czsl_heads.functional.maxsim import maxsim
from czsl_heads.functional.unit import unit_vectors
from czsl_heads.metrics.gap_report import GapReport, gap_report
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Method, tokens_of

# What stands for an image, by the names that tables have for it.
MEANINGS = {
    "cls": "the image feature, [CLS]",
    "pred": "the token that wins the predicted pair",
    "true": "the token that wins the labelled pair: an oracle, small by that selection alone",
    "read": "what the method compares with the predicted pair",
    "vac": "the condenser's vector",
}


def winning_tokens(tokens: Tensor, texts: Tensor, *, include_cls: bool = True) -> tuple[Tensor, Tensor]:
    """The token of each image ``[batch, tokens, dim]`` that is nearest to its text ``[batch, dim]``, and its number."""
    first = 0 if include_cls else 1
    _, index = maxsim(tokens[:, first:], texts[:, None], return_index=True)
    winner = index[:, 0] + first
    return tokens[torch.arange(len(tokens), device=tokens.device), winner], winner


@torch.no_grad()
def image_vectors(model: Method, images: Tensor, columns: Tensor, texts: Any, candidates: Tensor) -> dict[str, Tensor]:
    """What may stand for each image, by the names of :data:`MEANINGS`, each ``[batch, dim]``.

    Args:
        model: In eval mode.
        images: ``[batch, 3, height, width]``.
        columns: The labelled pair of each image, long ``[batch]``.
        texts: Of ``model.texts`` of the model's pairs.
        candidates: The pairs that may be predicted, bool ``[pairs]``.
    """
    encoded = model.encode(images)
    logits = model.compare(encoded, texts)[0]
    scores = model.fuse(logits, model.space.pairs_on(images.device))
    predicted = scores.masked_fill(~candidates, -torch.inf).argmax(dim=1)

    rows = texts.pairs.float()
    tokens = unit_vectors(tokens_of(encoded), torch.float32)
    head = model.seam.head
    vectors = {"cls": tokens[:, 0]}
    for name, own in (("pred", predicted), ("true", columns)):
        vectors[name], _ = winning_tokens(tokens, rows[own], include_cls=head.include_cls)
    if head.reduce not in ("cls", "max"):  # which are there already
        vectors["read"] = model.seam.vectors(tokens_of(encoded), texts.pairs[predicted])
    if isinstance(model, Condensed):
        vectors["vac"] = logits.features
    return vectors


def gap_reports(
    model: Method,
    dataset: CompositionDataset,
    *,
    split: str = "test",
    batch_size: int = 64,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, GapReport]:
    """All metrics of the gap on a split, for each vector that may stand for an image.

    Texts are those of all pairs of the data set, one for each pair, before a method draws them to an image.

    Args:
        model: In eval mode, of the space of ``dataset``.
        dataset: Its images are looked at, on the device of the model.
        split: ``"train"``, ``"val"`` or ``"test"``.
        batch_size: Images at once.
        limit: Look at so many images, drawn by ``seed``; None: all.
        seed: Also draws the split of the linear separability.

    Returns:
        Reports by the names of :data:`MEANINGS`.

    Raises:
        ValueError: The model is in training mode or of another space, a number is out of range, or the split has fewer
            than two images.
        DataError: An image is broken.
    """
    check_integer("batch_size", batch_size, 1)
    if model.training:
        raise ValueError("expected a model in eval mode, got one in training mode: call model.eval()")
    if model.space != dataset.space:
        raise ValueError("expected `model` of the pairs of `dataset`, got one of others")
    images = dataset.images(split, model.encoder.transform())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    if limit is not None:
        check_integer("limit", limit, 2)
        order = order[:limit]
    order = order.sort().values

    device = model.encoder.logit_scale.device
    candidates = dataset.eval_mask(split).to(device)
    with torch.no_grad():
        texts = model.texts(dataset.space.pairs_on(device))
    found: list[dict[str, Tensor]] = []
    labels = []
    for part in order.split(batch_size):
        opened = [images[number] for number in part.tolist()]
        batch = torch.stack([picture for picture, _ in opened]).to(device)
        columns = torch.tensor([int(column) for _, column in opened])
        vectors = image_vectors(model, batch, columns.to(device), texts, candidates)
        found.append({name: each.float().cpu() for name, each in vectors.items()})
        labels.append(columns)

    matched, of_pairs = torch.cat(labels), texts.pairs.float().cpu()
    reports = {}
    for name in found[0]:
        gathered = torch.cat([vectors[name] for vectors in found])
        reports[name] = gap_report(gathered, of_pairs, matched, seed=seed)
    return reports
