"""CLIP zero-shot: a pair is the sentence "a photo of attribute object"; nothing is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from baselines.official import read_clip, read_vocabulary
from czsl_heads import CompositionSpace
from czsl_heads._checks import check_kind
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.functional.unit import unit_vectors
from czsl_heads.models.method import Align, PairMethod
from czsl_heads.prompts.soft import TextFeatures, check_pairs

_ROWS = 1024  # sentences encoded at once


class CLIP(PairMethod):
    r"""Zero-shot CLIP on pairs.

    .. math:: \ell(x, (a, o)) = \tau \cos(v(x), t(\text{a photo of } a \, o))

    Args:
        encoder: A wrapped CLIP.
        space: Gives the primitives, whose names are cleaned; pairs are passed to each call.
        align: How an image is compared with texts: ``"cls"``, as published, or a :class:`~czsl_heads.SparseAlignHead`.
        context: The words in front of a pair.
        official: As the other baselines have it; it changes nothing, for on a CPU the released code has these numbers.
        half_logits: Logits rounded to float16; the released code does so on a GPU.

    Shape:
        images [batch, 3, height, width], pairs [K, 2] long (attribute index, object index); to logits [batch, K].

    Raises:
        TypeError, ValueError: An argument is of another kind or shape, pairs name no primitives of ``space``, or a
            sentence does not fit the context of the text tower.

    Example:
        >>> import torch
        >>> from czsl_heads import CompositionSpace, wrap
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")]).open_world()
        >>> CLIP(wrap("tiny"), space)(torch.zeros(3, 3, 48, 48), space.pairs).shape
        torch.Size([3, 2])

    References:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021; for pairs as
        in Nayak et al., ICLR 2023.
    """

    def __init__(
        self,
        encoder: Encoder,
        space: CompositionSpace,
        *,
        align: Align = "cls",
        context: str = "a photo of",
        official: bool = False,
        half_logits: bool = False,
    ) -> None:
        super().__init__(encoder, space, align=align, half_logits=half_logits)
        check_kind("context", context, str)
        check_kind("official", official, bool)
        self.context = context
        self._words = space.attribute_words, space.object_words

    def sentence(self, pair: Sequence[int]) -> str:
        """What is said of a pair (attribute index, object index)."""
        attribute, obj = self._words[0][pair[0]], self._words[1][pair[1]]
        return f"{self.context} {attribute} {obj}".strip()

    def texts(self, pairs: Tensor) -> TextFeatures:
        check_pairs(pairs, len(self.space.attributes), len(self.space.objects))
        features = [
            self.encoder.encode_texts([self.sentence(pair) for pair in chunk.tolist()]) for chunk in pairs.split(_ROWS)
        ]
        encoded = torch.cat(features)  # [K, dim]
        of_pairs = unit_vectors(encoded).to(encoded.dtype)
        return TextFeatures(of_pairs, of_pairs[:0], of_pairs[:0])

    @classmethod
    def from_official(
        cls,
        clip_state: Mapping[str, Tensor],
        attributes: Sequence[str],
        objects: Sequence[str],
        **options: Any,
    ) -> CLIP:
        """A CLIP from its state dict in OpenAI's layout, of any size, in eval mode.

        Args:
            clip_state: State dict in OpenAI's layout, of any size.
            attributes, objects: Names.
            options: Of the constructor, such as ``align``; ``official`` is True.

        Raises:
            TypeError, ValueError: A tensor is missing or unknown, or of a shape that cannot be right.
        """
        encoder, space = read_clip(clip_state), read_vocabulary(attributes, objects)
        return cls(encoder, space, official=True, **options).eval()

    def official_tensors(self) -> dict[str, Tensor]:
        """Empty: the released code saves nothing."""
        return {}
