"""What a model says of single images: the best pairs with their parts, and the maps that go with them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from czsl_heads._checks import check_integer
from czsl_heads.models.sac import SAC, SACOutput, SpaceTexts
from czsl_heads.report.maps import TokenMap, alignment_map, encode_with_attention, token_map


class Prediction(NamedTuple):
    """A pair and its scores: of all branches together, and of each; None for a branch that took no part."""

    attribute: str
    object: str
    score: float
    sa: float
    vac: float | None
    bank: float | None


class Finding(NamedTuple):
    """One image.

    Attributes:
        predictions: The best pairs, best first.
        maps: By name: ``"alignment"``, cosines with the text of the best pair; ``"labelled"``, with that of the true
            pair, where it was given; ``"condenser"``, how much it reads of each token, where there is one;
            ``"attention"``, how much [CLS] reads in the last block.
    """

    predictions: list[Prediction]
    maps: dict[str, TokenMap]


@torch.no_grad()
def examine(
    sac: SAC,
    images: Tensor,
    texts: SpaceTexts,
    *,
    top: int = 5,
    candidates: Tensor | None = None,
    target: Tensor | None = None,
) -> list[Finding]:
    """Look at a batch of images; the model is left as it was.

    Args:
        sac: In eval mode.
        images: ``[batch, 3, height, width]``, on the device of the model.
        texts: Of ``sac.texts``.
        top: How many pairs to name, at most.
        candidates: The pairs that may be predicted, bool ``[P]``; default: all.
        target: Columns of the true pairs, long ``[batch]``.

    Raises:
        TypeError, ValueError: ``top`` is no positive integer, or a shape does not fit.
    """
    check_integer("top", top, 1)
    tokens, attention = encode_with_attention(sac.encoder, images)
    out = sac.compare(tokens, texts)
    scores = out.scores
    if candidates is not None:
        scores = scores.masked_fill(~candidates.to(scores.device), -torch.inf)
        top = min(top, int(candidates.sum()))
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices
    maps = {"alignment": alignment_map(tokens, texts.features.pairs[best[:, 0]], sac.encoder)}
    if target is not None:
        maps["labelled"] = alignment_map(tokens, texts.features.pairs[target.to(best.device)], sac.encoder)
    if not getattr(sac.head, "include_cls", True):
        # [CLS] takes no part in the alignment: it cannot win.
        maps = {name: each._replace(prefix=torch.full_like(each.prefix, -torch.inf)) for name, each in maps.items()}
    if sac.condenser is not None:
        maps["condenser"] = token_map(sac.condenser.attention(tokens), sac.encoder)
    maps["attention"] = attention
    named = _predictions(sac, out, best)
    return [
        Finding(predictions, {name: each.image(index) for name, each in maps.items()})
        for index, predictions in enumerate(named)
    ]


def _predictions(sac: SAC, out: SACOutput, columns: Tensor) -> list[list[Prediction]]:
    """The pairs of ``columns`` [batch, top], with their parts."""
    parts = (
        out.scores,
        sac.pair_scores(out.sa, out.space),
        None if out.vac is None else sac.pair_scores(out.vac, out.space),
        None if out.bank is None else sac.bank_scores(out.bank),
    )
    numbers = [
        [[None] * columns.shape[1]] * len(columns) if part is None else part.gather(1, columns).tolist()
        for part in parts
    ]
    names = out.space.pair_names
    return [
        [Prediction(*names[column], *scores) for column, scores in zip(row, zip(*(part[index] for part in numbers)))]
        for index, row in enumerate(columns.tolist())
    ]
