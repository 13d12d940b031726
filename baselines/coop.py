"""CoOp: the words in front of a pair are learned and shared by all pairs, which keep CLIP's own embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from baselines.official import check_context, check_table, read_clip, read_vocabulary
from czsl_heads import CompositionSpace
from czsl_heads._checks import check_kind
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.models.method import Align, PairMethod
from czsl_heads.prompts.soft import Encode, SoftPrompts, TextFeatures


class CoOp(PairMethod):
    r"""Context optimisation: "[v_1] ... [v_n] attribute object" with a learned context before frozen words.

    .. math:: \ell(x, (a, o)) = \tau \cos(v(x), t(\theta_1 \dots \theta_n \, e_a e_o))

    Args:
        encoder: A wrapped CLIP; only the context is trained.
        space: Gives the primitives; pairs are passed to each call.
        align: How an image is compared with texts: ``"cls"``, as published, or a :class:`~czsl_heads.SparseAlignHead`.
        context: The words that the context starts from.
        primitives: The frozen table; default: of each name, the mean of its token embeddings.
        official: Reproduce the released code. On a CPU its numbers are those of the clean reading, so that this only
            runs each prompt whole (``encode="plain"``), which is nearest in rounding.
        half_logits: Logits rounded to float16; the released code does so on a GPU.
        encode: Of :class:`~czsl_heads.prompts.soft.SoftPrompts`.
        checkpoint: Keep no activations of the blocks of both towers in training but run them again.

    Shape:
        images [batch, 3, height, width], pairs [K, 2] long (attribute index, object index); to logits [batch, K].

    Raises:
        TypeError, ValueError: An argument is of another kind or shape, or pairs name no primitives of ``space``.

    Example:
        >>> from czsl_heads import CompositionSpace, wrap
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")])
        >>> coop = CoOp(wrap("tiny"), space)
        >>> [tuple(p.shape) for p in coop.parameters() if p.requires_grad]
        [(3, 96)]

    References:
        Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022; for pairs as in Nayak et al., ICLR 2023.
    """

    def __init__(
        self,
        encoder: Encoder,
        space: CompositionSpace,
        *,
        align: Align = "cls",
        context: str = "a photo of",
        primitives: Tensor | None = None,
        official: bool = False,
        half_logits: bool = False,
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
            encode=encode or ("plain" if official else "auto"),
            checkpoint=checkpoint,
        )
        self.prompts.primitives.requires_grad_(False)

    def texts(self, pairs: Tensor) -> TextFeatures:
        return self.prompts.texts(pairs)

    @classmethod
    def from_official(
        cls,
        clip_state: Mapping[str, Tensor],
        context: Tensor,
        frozen_embeddings: Tensor,
        attributes: Sequence[str],
        objects: Sequence[str],
        **options: Any,
    ) -> CoOp:
        """What the released code saved, in eval mode and with its numbers.

        Args:
            clip_state: State dict of the CLIP it was trained on, in OpenAI's layout, of any size.
            context: The learned vectors ``[length, text_dim]``; the released code calls them ``soft_embeddings``.
            frozen_embeddings: One row a primitive ``[A + O, text_dim]``, attributes first.
            attributes, objects: Names in the order of the table.
            options: Of the constructor, such as ``align``; ``official`` is True.

        Raises:
            TypeError, ValueError: A tensor is missing or unknown, or of a shape that cannot be right.
        """
        encoder, space = read_clip(clip_state), read_vocabulary(attributes, objects)
        rows = len(space.attributes) + len(space.objects)
        table = check_table("frozen_embeddings", frozen_embeddings, rows, encoder.text_dim)
        model = cls(encoder, space, context="", primitives=table, official=True, **options)
        model.prompts.pair_context = nn.Parameter(check_context("context", context, encoder))
        return model.eval()

    def official_tensors(self) -> dict[str, Tensor]:
        """Our tensors by the names under which the released code saves them."""
        return {"soft_embeddings": self.prompts.pair_context, "frozen_embeddings": self.prompts.primitives}
