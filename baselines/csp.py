"""CSP: the embeddings of attributes and objects are learned, everything around them is CLIP's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from baselines.official import check_table, read_clip, read_vocabulary
from czsl_heads import CompositionSpace
from czsl_heads._checks import check_kind
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.models.method import Align, PairMethod
from czsl_heads.prompts.soft import Encode, SoftPrompts, TextFeatures


class CSP(PairMethod):
    r"""Compositional soft prompts: "a photo of [attribute] [object]" with one learned vector a primitive.

    .. math:: \ell(x, (a, o)) = \tau \cos(v(x), t(\text{a photo of } \theta_a \theta_o))

    Args:
        encoder: A wrapped CLIP; only the table of primitives is trained.
        space: Gives the primitives; pairs are passed to each call.
        align: How an image is compared with texts: ``"cls"``, as published, or a :class:`~czsl_heads.SparseAlignHead`.
        context: The words in front, which stay as they are.
        primitives: The table to start from; default: of each name, the mean of its token embeddings.
        dropout: On the whole table, in training.
        official: Reproduce the released code. On a CPU its numbers are those of the clean reading, so that this only
            runs each prompt whole (``encode="plain"``), which is nearest in rounding.
        half_logits: Logits rounded to float16; the released code does so on a GPU.
        dropout_at_evaluation: Drop out at evaluation too; the released code does if its evaluation is told a rate.
        encode: Of :class:`~czsl_heads.prompts.soft.SoftPrompts`.
        checkpoint: Keep no activations of the blocks of both towers in training but run them again.

    Shape:
        images [batch, 3, height, width], pairs [K, 2] long (attribute index, object index); to logits [batch, K].

    Raises:
        TypeError, ValueError: An argument is of another kind or shape, or pairs name no primitives of ``space``.

    Example:
        >>> import torch
        >>> from czsl_heads import CompositionSpace, wrap
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")]).open_world()
        >>> csp = CSP(wrap("tiny"), space)
        >>> csp(torch.zeros(3, 3, 48, 48), space.pairs).shape
        torch.Size([3, 2])

    References:
        Nayak, Yu and Bach, Learning to Compose Soft Prompts for Compositional Zero-Shot Learning, ICLR 2023.
    """

    def __init__(
        self,
        encoder: Encoder,
        space: CompositionSpace,
        *,
        align: Align = "cls",
        context: str = "a photo of",
        primitives: Tensor | None = None,
        dropout: float = 0.0,
        official: bool = False,
        half_logits: bool = False,
        dropout_at_evaluation: bool = False,
        encode: Encode | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__(encoder, space, align=align, half_logits=half_logits)
        for name, switch in (("official", official), ("checkpoint", checkpoint)):
            check_kind(name, switch, bool)
        self.checkpoint = checkpoint
        self.prompts = SoftPrompts(
            encoder,
            space,
            span="pairs",
            context=context,
            primitives=primitives,
            dropout=dropout,
            encode=encode or ("plain" if official else "auto"),
            checkpoint=checkpoint,
            dropout_at_evaluation=dropout_at_evaluation,
        )
        self.prompts.pair_context.requires_grad_(False)

    def texts(self, pairs: Tensor) -> TextFeatures:
        return self.prompts.texts(pairs)

    @classmethod
    def from_official(
        cls,
        clip_state: Mapping[str, Tensor],
        soft_embeddings: Tensor,
        attributes: Sequence[str],
        objects: Sequence[str],
        **options: Any,
    ) -> CSP:
        """What the released code saved, in eval mode and with its numbers.

        Args:
            clip_state: State dict of the CLIP it was trained on, in OpenAI's layout, of any size.
            soft_embeddings: The learned table ``[A + O, text_dim]``, attributes first.
            attributes, objects: Names in the order of the table.
            options: Of the constructor, such as ``align``; ``official`` is True.

        Raises:
            TypeError, ValueError: A tensor is missing or unknown, or of a shape that cannot be right.
        """
        encoder, space = read_clip(clip_state), read_vocabulary(attributes, objects)
        rows = len(space.attributes) + len(space.objects)
        table = check_table("soft_embeddings", soft_embeddings, rows, encoder.text_dim)
        return cls(encoder, space, primitives=table, official=True, **options).eval()

    def official_tensors(self) -> dict[str, Tensor]:
        """Our tensors by the names under which the released code saves them."""
        return {"soft_embeddings": self.prompts.primitives}
