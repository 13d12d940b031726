"""What a model says of single images: the best pairs with their parts, and the maps that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from czsl_heads._checks import check_integer
from czsl_heads.encoders.dense import Dense
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Method, Prediction, name_best, tokens_of
from czsl_heads.prompts.soft import TextFeatures
from czsl_heads.report.maps import TokenMap, alignment_map, encode_densely, encode_with_attention, token_map


class Finding(NamedTuple):
    """One image.

    Attributes:
        predictions: The best pairs, best first.
        maps: By name: ``"alignment"``, cosines with the text of the best pair; ``"labelled"``, with that of the true
            pair, where it was given; the name of each recipe in ``dense``, cosines of its tokens with the text of the
            best pair; ``"condenser"``, how much it reads of each token, where there is one; ``"attention"``, how much
            [CLS] reads in the last block, where there is one.
    """

    predictions: list[Prediction]
    maps: dict[str, TokenMap]


@torch.no_grad()
def examine(
    model: Method,
    images: Tensor,
    pairs: Tensor,
    texts: TextFeatures,
    *,
    top: int = 5,
    candidates: Tensor | None = None,
    target: Tensor | None = None,
    dense: Sequence[Dense] = (),
) -> list[Finding]:
    """Look at a batch of images; the model is left as it was.

    Args:
        model: In eval mode.
        images: ``[batch, 3, height, width]``, on the device of the model.
        pairs: What may be said ``[P, 2]``.
        texts: Of ``model.texts(pairs)``.
        top: How many pairs to name, at most.
        candidates: The pairs that may be predicted, bool ``[P]``; default: all.
        target: Rows of the true pairs, long ``[batch]``.
        dense: Recipes for dense patch tokens to show maps of besides; they have no part in the predictions.

    Raises:
        TypeError, ValueError: ``top`` is no positive integer, a recipe is unknown, or a shape does not fit.
    """
    check_integer("top", top, 1)
    encoded, attention = encode_with_attention(model, images)
    tokens = tokens_of(encoded)
    logits = model.compare(encoded, texts)[0]
    scores = model.fuse(logits, pairs)
    if candidates is not None:
        scores = scores.masked_fill(~candidates.to(scores.device), -torch.inf)
        top = min(top, int(candidates.sum()))

    best = scores.argmax(dim=1)
    maps = {"alignment": alignment_map(tokens, texts.pairs[best], model.encoder)}
    if target is not None:
        maps["labelled"] = alignment_map(tokens, texts.pairs[target.to(best.device)], model.encoder)
    for recipe in dense:
        dense_tokens = tokens_of(encode_densely(model, images, recipe))
        maps[recipe] = alignment_map(dense_tokens, texts.pairs[best], model.encoder)
    if not model.seam.head.include_cls:
        # [CLS] takes no part in the alignment: it cannot win.
        maps = {name: each._replace(prefix=torch.full_like(each.prefix, -torch.inf)) for name, each in maps.items()}
    if isinstance(model, Condensed):
        maps["condenser"] = token_map(model.condenser.attention(tokens), model.encoder)
    if attention is not None:
        maps["attention"] = attention

    names = model.space.attributes, model.space.objects
    named = name_best(scores, model.parts(logits, pairs), pairs, names, top)
    return [
        Finding(predictions, {name: each.image(index) for name, each in maps.items()})
        for index, predictions in enumerate(named)
    ]
