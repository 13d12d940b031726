"""SAC, the reference pipeline as one module: a wrapped CLIP, soft prompts, and heads that compare the two."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from czsl_heads._checks import check_choice, check_kind, check_range, check_shapes, check_tensor
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.functional.distill import Direction, distillation
from czsl_heads.functional.fusion import combine, fuse
from czsl_heads.heads.condenser import VACondenser
from czsl_heads.heads.memory_bank import DynamicMemoryBank
from czsl_heads.heads.sparse_align import SparseAlignHead
from czsl_heads.prompts.soft import SoftPrompts, TextFeatures
from czsl_heads.space import CompositionSpace

Fusion = Literal["probs", "logits"]
TrainStage = Literal["align", "condense", "joint"]


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
        tokens: Projected tokens of the images ``[batch, tokens, dim]``.
        sa: Logits of the alignment branch.
        features: What the condenser makes of the tokens, unit rows ``[batch, dim]``; None without a condenser.
        vac: Logits of the condenser branch; None without a condenser.
        bank: Logits of the memory bank ``[batch, P]``; None without one, or in another label space than the bank's.
        scores: One score a pair ``[batch, P]``, for ranking: Eq. 13 of the alignment branch, or Eq. 12 of all.
    """

    space: CompositionSpace
    tokens: Tensor
    sa: BranchLogits
    features: Tensor | None
    vac: BranchLogits | None
    bank: Tensor | None
    scores: Tensor


class SAC(nn.Module):
    """Compositional recognition by aligning the tokens of an image with soft prompts.

    Args:
        encoder: A wrapped CLIP, with or without adapters.
        space: Gives the primitives, and the label space of the bank; spaces for training and evaluation are passed to
            :meth:`texts`.
        head: How tokens meet texts; ``SparseAlignHead("cls")`` is the baseline. Its ``logit_scale`` is taken as it is.
            Default: ``SparseAlignHead()`` with the encoder's scale.
        condenser: Gathers the tokens to one vector (VAC). ``True``: a new ``VACondenser(encoder.dim)``; ``False``:
            none, and no bank: the alignment branch alone.
        bank: Classifies that vector among those that it remembers; over the pairs of ``space``. ``True``: a new
            :class:`~czsl_heads.DynamicMemoryBank` with the encoder's scale; ``False``: none.
        context, prompt_dropout: Of :class:`~czsl_heads.SoftPrompts`.
        fusion: ``"probs"`` scores a pair by p(pair) + p(attribute) p(object), as the paper prints it; ``"logits"`` by
            the pair's logit plus that product, as Troika's released code does. The bank then gives logits too.
        alpha: Weight of the distillation from the alignment branch in the condenser's loss, in [0, 1].
        beta: Weight of the alignment branch against condenser and bank in the scores, in [0, 1].
        gamma: Weight of the bank beside the condenser in the scores, at least 0.
        direction: Of the :func:`~czsl_heads.functional.distillation`.
        checkpoint: Keep no activations of the towers' blocks in training but run them again in the backward pass: the
            same numbers for less memory and one forward pass more. The encoder itself is not changed by it.

    Raises:
        TypeError, ValueError: An option is unknown or out of range; a bank without a condenser, of another number of
            pairs, or one that masks empty rows although logits are added.

    Example:
        >>> import torch
        >>> from czsl_heads import CompositionSpace, wrap
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")], unseen=[("blue", "circle")])
        >>> sac = SAC(wrap("tiny"), space).eval()
        >>> out = sac(torch.zeros(1, 3, 48, 48), sac.texts(space))
        >>> sac.adapt(out)  # remember this image under the pair that the condenser sees in it
        >>> out.scores.shape, int(sac.bank.counts.sum())
        (torch.Size([1, 2]), 1)

    References:
        Zhang et al., SAM, CVPR 2026 (circulated as SAC): Eqs. 1-13 and its Algorithm 1.
    """

    def __init__(
        self,
        encoder: Encoder,
        space: CompositionSpace,
        *,
        head: nn.Module | None = None,
        condenser: VACondenser | bool = True,
        bank: DynamicMemoryBank | bool = True,
        context: str = "a photo of",
        prompt_dropout: float = 0.0,
        fusion: Fusion = "probs",
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 0.5,
        direction: Direction = "reverse",
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_kind("checkpoint", checkpoint, bool)
        check_choice("fusion", fusion, ("probs", "logits"))
        check_range("alpha", alpha, 0, 1)
        check_range("beta", beta, 0, 1)
        check_range("gamma", gamma, 0)
        check_choice("direction", direction, ("reverse", "forward"))
        self.encoder, self.checkpoint = encoder, checkpoint
        self.prompts = SoftPrompts(encoder, space, context=context, dropout=prompt_dropout, checkpoint=checkpoint)
        self.head = SparseAlignHead(logit_scale=encoder.logit_scale) if head is None else head
        made = VACondenser(encoder.dim) if condenser is True else condenser
        self.condenser = made if isinstance(made, VACondenser) else None
        self.condensed_head = SparseAlignHead("cls", logit_scale=encoder.logit_scale)  # its one vector is the [CLS]
        self.fusion, self.alpha, self.beta, self.gamma, self.direction = fusion, alpha, beta, gamma, direction
        if isinstance(bank, bool):
            self.use_bank(self._new_bank(space) if bank and self.condenser is not None else None, space)
        else:
            self.use_bank(bank, space)

    def _new_bank(self, space: CompositionSpace) -> DynamicMemoryBank:
        scale, empty = self.condensed_head.logit_scale, "zero" if self.fusion == "logits" else "mask"
        return DynamicMemoryBank(len(space), self.encoder.dim, logit_scale=scale, empty=empty)  # type: ignore[arg-type]

    def use_bank(self, bank: DynamicMemoryBank | None, space: CompositionSpace) -> None:
        """Take another memory bank, over the pairs of ``space``; None takes it away. Errors as in the constructor."""
        if bank is not None:
            if self.condenser is None:
                raise ValueError("expected `bank` with a condenser, whose vectors it remembers, got no condenser")
            if bank.num_pairs != len(space):
                raise ValueError(f"expected `bank` over the {len(space)} pairs of the space, got {bank.num_pairs}")
            if self.fusion == "logits" and bank.empty != "zero":
                raise ValueError(f'expected `bank` with empty="zero" where logits are added, got "{bank.empty}"')
        self.bank, self.bank_space = bank, space

    def texts(self, space: CompositionSpace) -> SpaceTexts:
        """Encode the prompts of a space; once for a whole evaluation, anew at each step that trains them."""
        return SpaceTexts(space, self.prompts(space))

    def forward(self, images: Tensor, texts: SpaceTexts) -> SACOutput:
        """Compare images ``[batch, 3, height, width]`` with encoded texts; nothing is written."""
        return self.compare(self.encode(images), texts)

    def encode(self, images: Tensor) -> Tensor:
        """Tokens ``[batch, tokens, dim]`` of images, by the encoder."""
        if self.checkpoint:
            return self.encoder.encode_tokens(images, checkpoint=True)
        return self.encoder.encode_tokens(images)  # so that an encoder that knows no checkpoints will do

    def compare(self, tokens: Tensor, texts: SpaceTexts, *, sa: BranchLogits | None = None) -> SACOutput:
        """:meth:`forward` from encoded tokens, for images that are compared more than once.

        Args:
            tokens: Projected tokens ``[batch, tokens, dim]``.
            texts: Of :meth:`texts`.
            sa: What :meth:`align` gave for these, where it is known already.
        """
        sa = self.align(tokens, texts) if sa is None else sa
        features = vac = bank = None
        scores = self.pair_scores(sa, texts.space)
        if self.condenser is not None:
            features = self.condenser(tokens)
            vac = self.classify(features, texts)
            if self.bank is not None and self._is_of_bank(texts.space):
                bank = self.bank(features)
            memory = None if bank is None else self.bank_scores(bank)
            gamma = 0.0 if bank is None else self.gamma
            scores = fuse(scores, self.pair_scores(vac, texts.space), memory, beta=self.beta, gamma=gamma)
        return SACOutput(texts.space, tokens, sa, features, vac, bank, scores)

    def _is_of_bank(self, space: CompositionSpace) -> bool:
        return space is self.bank_space or space == self.bank_space  # the first is cheap in the open world

    def align(self, tokens: Tensor, texts: SpaceTexts) -> BranchLogits:
        """Logits of the alignment branch."""
        return BranchLogits(*(self.head(tokens, features) for features in texts.features))

    def classify(self, features: Tensor, texts: SpaceTexts) -> BranchLogits:
        """Logits of what the condenser gathered, unit rows ``[batch, dim]``."""
        return BranchLogits(*(self.condensed_head(features[:, None], rows) for rows in texts.features))

    def pair_scores(self, logits: BranchLogits, space: CompositionSpace) -> Tensor:
        """One branch's scores of the pairs ``[batch, P]`` (Eq. 13)."""
        pairs = logits.pairs.softmax(dim=1) if self.fusion == "probs" else logits.pairs
        attrs, objs = logits.attrs.softmax(dim=1), logits.objs.softmax(dim=1)
        return combine(pairs, attrs, objs, space.pairs_on(pairs.device))

    def bank_scores(self, logits: Tensor) -> Tensor:
        """The bank's term of the scores ``[batch, P]``, which has no primitives in it."""
        return logits.softmax(dim=1) if self.fusion == "probs" else logits

    def adapt(self, out: SACOutput) -> None:
        """Show the images of ``out`` to the bank: it keeps those of which the condenser is surest (Eq. 9).

        Raises:
            ValueError: There is no bank, or ``out`` is of another label space.
        """
        if self.bank is None or out.bank is None or out.features is None or out.vac is None:
            have = "no bank" if self.bank is None else "an output of another label space"
            raise ValueError(f"expected `out` in the label space of the bank, got {have}")
        self.bank.update(out.features, out.vac.pairs.softmax(dim=1))

    def losses(self, out: SACOutput, pair_target: Tensor, *, stage: TrainStage = "align") -> dict[str, Tensor]:
        """The training losses of a stage.

        Args:
            out: Of this module, on the texts of the training space, ``space.subset(space.seen_mask)``.
            pair_target: Columns of the true pairs in that space, long ``[batch]``.
            stage: ``"align"``: cross-entropy over pairs, attributes and objects (Eq. 4). ``"condense"``: the same for
                the condenser, and distillation from the alignment branch, weighed by alpha (Eqs. 7-8). ``"joint"``:
                both (Eq. 11); the teacher is detached there too.

        Returns:
            Scalars: each term, and what is to be minimised as ``"loss"``.

        Raises:
            TypeError, ValueError: A shape or dtype does not fit, the stage is unknown, or the condenser is missing.
        """
        check_choice("stage", stage, ("align", "condense", "joint"))
        check_tensor("pair_target", pair_target, dtypes=(torch.long,))
        check_shapes(logits=(out.sa.pairs, "batch pairs"), pair_target=(pair_target, "batch"))
        attr, obj = out.space.pairs_on(pair_target.device)[pair_target].unbind(dim=1)
        targets = BranchLogits(pair_target, attr, obj)
        terms: dict[str, Tensor] = {}
        total = out.sa.pairs.new_zeros(())
        if stage != "condense":
            terms |= _cross_entropies("loss", out.sa, targets)
            total = total + sum(terms.values())
        if stage != "align":
            if out.vac is None:
                raise ValueError(f'expected `out` of a model with a condenser for stage "{stage}", got none')
            own = _cross_entropies("loss_vac", out.vac, targets)
            teacher = distillation(out.vac.pairs, out.sa.pairs, direction=self.direction)
            total = total + (1 - self.alpha) * sum(own.values()) + self.alpha * teacher
            terms |= own | {"loss_distill": teacher}
        return terms | {"loss": total}


def _cross_entropies(prefix: str, logits: BranchLogits, targets: BranchLogits) -> dict[str, Tensor]:
    return {
        f"{prefix}_{name}": F.cross_entropy(rows, target)
        for name, rows, target in zip(BranchLogits._fields, logits, targets)
    }
