"""Text features of primitives by themselves, from words that are not learned."""

from __future__ import annotations

import torch
from torch import Tensor

from czsl_heads._checks import check_kind
from czsl_heads.encoders.protocol import Encoder, check_encoder
from czsl_heads.space import CompositionSpace

_ROWS = 256  # texts encoded at once


@torch.no_grad()
def encode_primitives(
    encoder: Encoder, space: CompositionSpace, *, context: str = "a photo of"
) -> tuple[Tensor, Tensor]:
    """The features of "[context] attribute" and of "[context] object" by a CLIP as it was pretrained.

    Args:
        encoder: A wrapped CLIP.
        space: Gives the primitives; their words stand for their names.
        context: The words before a name.

    Returns:
        Of attributes ``[A, dim]`` and of objects ``[O, dim]``; not normalised, without gradients.

    Raises:
        TypeError: ``encoder`` is no Encoder, or ``space`` no :class:`~czsl_heads.CompositionSpace`.

    Example:
        >>> from czsl_heads import CompositionSpace, wrap
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")])
        >>> [tuple(features.shape) for features in encode_primitives(wrap("tiny"), space)]
        [(2, 96), (1, 96)]
    """
    check_encoder("encoder", encoder)
    check_kind("space", space, CompositionSpace)
    texts = [f"{context} {words}".strip() for words in (*space.attribute_words, *space.object_words)]
    chunks = [texts[start : start + _ROWS] for start in range(0, len(texts), _ROWS)]
    features = torch.cat([encoder.encode_texts(chunk) for chunk in chunks])
    attributes, objects = features.split([len(space.attributes), len(space.objects)])
    return attributes, objects
