"""SAC, the reference pipeline as one module: a wrapped CLIP, soft prompts, and heads that compare the two."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from czsl_heads._checks import check_choice, check_shapes, check_tensor
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.functional.fusion import combine
from czsl_heads.heads.sparse_align import SparseAlignHead
from czsl_heads.prompts.soft import SoftPrompts, TextFeatures
from czsl_heads.space import CompositionSpace

Fusion = Literal["probs", "logits"]


class SpaceTexts(NamedTuple):
    """A label space and its text features; what :meth:`SAC.texts` returns and :meth:`SAC.forward` takes."""

    space: CompositionSpace
    features: TextFeatures


class BranchLogits(NamedTuple):
    """Logits of one branch: ``pairs`` [batch, P], ``attrs`` [batch, A], ``objs`` [batch, O]."""

    pairs: Tensor
    attrs: Tensor
    objs: Tensor


class SACOutput(NamedTuple):
    """What :class:`SAC` says of a batch.

    Attributes:
        space: The label space of the columns.
        sa: Logits of the alignment branch.
        scores: One score a pair ``[batch, P]``, for ranking: Eq. 13 of the alignment branch.
        tokens: Projected tokens of the images ``[batch, tokens, dim]``.
    """

    space: CompositionSpace
    sa: BranchLogits
    scores: Tensor
    tokens: Tensor


class SAC(nn.Module):
    """Compositional recognition by aligning the tokens of an image with soft prompts.

    Args:
        encoder: A wrapped CLIP, with or without adapters.
        space: Gives the primitives; spaces for training and evaluation are passed to :meth:`texts`.
        head: How tokens meet texts; ``SparseAlignHead("cls")`` is the baseline. Its ``logit_scale`` is taken as it is.
            Default: ``SparseAlignHead()`` with the encoder's scale.
        context, prompt_dropout: Of :class:`~czsl_heads.SoftPrompts`.
        fusion: ``"probs"`` scores a pair by p(pair) + p(attribute) p(object), as the paper prints it; ``"logits"`` by
            the pair's logit plus that product, as Troika's released code does.

    Raises:
        ValueError: An option is unknown.

    Example:
        >>> import torch
        >>> from czsl_heads import CompositionSpace, wrap
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")], unseen=[("blue", "circle")])
        >>> sac = SAC(wrap("tiny"), space)
        >>> out = sac(torch.zeros(1, 3, 48, 48), sac.texts(space.open_world()))
        >>> out.scores.shape
        torch.Size([1, 2])

    References:
        Zhang et al., SAM, CVPR 2026 (circulated as SAC): Eqs. 1-4 and 13, stage I of its Algorithm 1.
    """

    def __init__(
        self,
        encoder: Encoder,
        space: CompositionSpace,
        *,
        head: nn.Module | None = None,
        context: str = "a photo of",
        prompt_dropout: float = 0.0,
        fusion: Fusion = "probs",
    ) -> None:
        super().__init__()
        check_choice("fusion", fusion, ("probs", "logits"))
        self.encoder = encoder
        self.prompts = SoftPrompts(encoder, space, context=context, dropout=prompt_dropout)
        self.head = SparseAlignHead(logit_scale=encoder.logit_scale) if head is None else head
        self.fusion = fusion

    def texts(self, space: CompositionSpace) -> SpaceTexts:
        """Encode the prompts of a space; once for a whole evaluation, anew at each training step."""
        return SpaceTexts(space, self.prompts(space))

    def forward(self, images: Tensor, texts: SpaceTexts) -> SACOutput:
        """Compare images ``[batch, 3, height, width]`` with encoded texts; nothing is written."""
        return self.compare(self.encoder.encode_tokens(images), texts)

    def compare(self, tokens: Tensor, texts: SpaceTexts) -> SACOutput:
        """:meth:`forward` from encoded tokens, for evaluating the same images in several label spaces."""
        sa = BranchLogits(*(self.head(tokens, features) for features in texts.features))
        return SACOutput(texts.space, sa, self._scores(sa, texts.space), tokens)

    def _scores(self, logits: BranchLogits, space: CompositionSpace) -> Tensor:
        pairs = logits.pairs.softmax(dim=1) if self.fusion == "probs" else logits.pairs
        return combine(pairs, logits.attrs.softmax(dim=1), logits.objs.softmax(dim=1), space.pairs)

    def losses(self, out: SACOutput, pair_target: Tensor, *, stage: Literal["align"] = "align") -> dict[str, Tensor]:
        """The training losses of a stage.

        Args:
            out: Of this module, on the texts of the training space, ``space.subset(space.seen_mask)``.
            pair_target: Columns of the true pairs in that space, long ``[batch]``.
            stage: ``"align"``: cross-entropy over pairs, attributes and objects (Eq. 4).

        Returns:
            Scalars: each term, and their sum as ``"loss"``.
        """
        check_choice("stage", stage, ("align",))
        check_tensor("pair_target", pair_target, dtypes=(torch.long,))
        check_shapes(logits=(out.sa.pairs, "batch pairs"), pair_target=(pair_target, "batch"))
        attr, obj = out.space.pairs.to(pair_target.device)[pair_target].unbind(dim=1)
        targets = BranchLogits(pair_target, attr, obj)
        terms = {
            f"loss_{name}": F.cross_entropy(logits, target)
            for name, logits, target in zip(BranchLogits._fields, out.sa, targets)
        }
        terms["loss"] = sum(terms.values(), start=out.scores.new_zeros(()))
        return terms
