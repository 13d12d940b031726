"""SAC: its stage I as a method, and the whole reference pipeline under the paper's words."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from czsl_heads._checks import check_choice, check_index, check_kind, check_shapes, check_tensor
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.functional.distill import Direction
from czsl_heads.functional.fusion import combine, fuse
from czsl_heads.heads.condenser import VACondenser
from czsl_heads.heads.memory_bank import DynamicMemoryBank
from czsl_heads.heads.sparse_align import SparseAlignHead
from czsl_heads.models.condensed import CondensedLogits, add_losses, check_weights, condenser_losses
from czsl_heads.models.method import Align, Logits, Method
from czsl_heads.prompts.soft import SoftPrompts, TextFeatures
from czsl_heads.space import CompositionSpace

Fusion = Literal["probs", "logits"]
Stage = Literal["align", "condense", "joint"]


class Aligned(Method):
    """Stage I of SAC: soft prompts of pairs, attributes and objects, compared with the tokens of an image.

    Args:
        encoder: A wrapped CLIP, with or without adapters.
        space: Gives the primitives.
        align: How tokens meet texts; default: a :class:`~czsl_heads.SparseAlignHead`. ``"cls"`` is the baseline.
        context, dropout: Of :class:`~czsl_heads.SoftPrompts`.
        fusion: ``"probs"`` ranks a pair by p(pair) + p(attribute) p(object), as the paper prints it; ``"logits"`` by
            the pair's logit plus that product, as Troika's released code does.
        checkpoint: Keep no activations of the towers' blocks in training but run them again in the backward pass: the
            same numbers for less memory and one forward pass more. The encoder itself is not changed by it.

    Shape:
        images [batch, 3, height, width], pairs [K, 2] long; to :class:`~czsl_heads.models.method.Logits`.

    Raises:
        TypeError, ValueError: An option is unknown or out of range.

    Example:
        >>> import torch
        >>> from czsl_heads import CompositionSpace, wrap
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")])
        >>> Aligned(wrap("tiny"), space)(torch.zeros(3, 3, 48, 48), space.pairs).attributes.shape
        torch.Size([3, 2])

    References:
        Zhang et al., SAM, CVPR 2026 (circulated as SAC): Eqs. 1-4 and 13.
    """

    def __init__(
        self,
        encoder: Encoder,
        space: CompositionSpace,
        *,
        align: Align | None = None,
        context: str = "a photo of",
        dropout: float = 0.0,
        fusion: Fusion = "probs",
        checkpoint: bool = False,
    ) -> None:
        super().__init__(encoder, space, align=SparseAlignHead() if align is None else align)
        check_kind("checkpoint", checkpoint, bool)
        check_choice("fusion", fusion, ("probs", "logits"))
        self.prompts = SoftPrompts(encoder, space, context=context, dropout=dropout, checkpoint=checkpoint)
        self.fusion, self.checkpoint = fusion, checkpoint

    @property
    def scores_apart(self) -> bool:
        return True

    def texts(self, pairs: Tensor) -> TextFeatures:
        return self.prompts.texts(pairs)

    def fuse(self, logits: Logits, pairs: Tensor) -> Tensor:
        if self.fusion == "probs":
            return self.probabilities(logits, pairs)
        return combine(logits.pairs, logits.attributes.softmax(dim=1), logits.objects.softmax(dim=1), pairs)


class SpaceTexts(NamedTuple):
    """A label space and its text features; what :meth:`SAC.texts` returns and :meth:`SAC.forward` takes."""

    space: CompositionSpace
    features: TextFeatures


class SACOutput(NamedTuple):
    """What :class:`SAC` says of a batch.

    Attributes:
        space: The label space of the columns.
        tokens: Projected tokens of the images ``[batch, tokens, dim]``.
        sa: Logits of the alignment branch.
        features: What the condenser makes of the tokens, unit rows ``[batch, dim]``; None without a condenser.
        vac: Logits of the condenser branch; None without a condenser.
        bank: Logits of the memory bank ``[batch, P]``; None without one, or in another label space than the bank's.
        scores: One score a pair ``[batch, P]``, for ranking: those of the alignment branch, or Eq. 12 of all.
    """

    space: CompositionSpace
    tokens: Tensor
    sa: Logits
    features: Tensor | None
    vac: Logits | None
    bank: Tensor | None
    scores: Tensor


class SAC(nn.Module):
    """Compositional recognition by aligning the tokens of an image with soft prompts, under the paper's words.

    It has the arithmetic of :class:`~czsl_heads.models.condensed.Condensed` behind :class:`Aligned`, which is what the
    commands train.

    Args:
        encoder: A wrapped CLIP, with or without adapters.
        space: Gives the primitives, and the label space of the bank; spaces for training and evaluation are passed to
            :meth:`texts`.
        head: How tokens meet texts; ``SparseAlignHead("cls")`` is the baseline. Logits have the encoder's scale.
            Default: ``SparseAlignHead()``.
        condenser: Gathers the tokens to one vector (VAC). ``True``: a new ``VACondenser(encoder.dim)``; ``False``:
            none, and no bank: the alignment branch alone.
        bank: Classifies that vector among those that it remembers; over the pairs of ``space``. ``True``: a new
            :class:`~czsl_heads.DynamicMemoryBank` that is read with the encoder's scale of now, also while that is
            trained; ``False``: none. A bank that is given has its own scale.
        context, prompt_dropout: Of :class:`~czsl_heads.SoftPrompts`.
        fusion, checkpoint: Of :class:`Aligned`. With a condenser, the scores of its branches are probabilities.
        alpha: Weight of the distillation from the alignment branch in the condenser's loss, in [0, 1].
        beta: Weight of the alignment branch against condenser and bank in the scores, in [0, 1].
        gamma: Weight of the bank beside the condenser in the scores, at least 0.
        direction: Of the :func:`~czsl_heads.functional.distillation`.

    Raises:
        TypeError, ValueError: An option is unknown or out of range; a bank without a condenser, or of another number of
            pairs.

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
        head: SparseAlignHead | None = None,
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
        check_weights(alpha=alpha, beta=beta, gamma=gamma, direction=direction)
        method = Aligned(
            encoder, space, align=head, context=context, dropout=prompt_dropout, fusion=fusion, checkpoint=checkpoint
        )
        self._method = (method,)  # in a tuple: its parts stand here under their own names
        self.encoder, self.prompts, self.head = encoder, method.prompts, method.seam.head
        made = VACondenser(encoder.dim) if condenser is True else condenser
        self.condenser = made if isinstance(made, VACondenser) else None
        self.alpha, self.beta, self.gamma, self.direction = alpha, beta, gamma, direction
        self._own_bank: tuple[DynamicMemoryBank, ...] = ()
        if bank is not True:
            self.use_bank(bank or None, space)
        elif self.condenser is None:
            self.use_bank(None, space)
        else:
            own = DynamicMemoryBank(len(space), encoder.dim, logit_scale=encoder.logit_scale.detach())
            self._own_bank = (own,)  # in a tuple: it is registered as `bank`
            self.use_bank(own, space)

    @property
    def method(self) -> Aligned:
        """The alignment branch by itself."""
        return self._method[0]

    def train(self, mode: bool = True) -> SAC:
        """As in torch, and of the alignment branch by itself, too."""
        self.method.train(mode)
        return super().train(mode)

    def use_bank(self, bank: DynamicMemoryBank | None, space: CompositionSpace) -> None:
        """Take another memory bank, over the pairs of ``space``; None takes it away. Errors as in the constructor."""
        if bank is not None:
            if self.condenser is None:
                raise ValueError("expected `bank` with a condenser, whose vectors it remembers, got no condenser")
            if bank.num_pairs != len(space):
                raise ValueError(f"expected `bank` over the {len(space)} pairs of the space, got {bank.num_pairs}")
        self.bank, self.bank_space = bank, space

    def texts(self, space: CompositionSpace) -> SpaceTexts:
        """Encode the prompts of a space; once for a whole evaluation, anew at each step that trains them."""
        return SpaceTexts(space, self.prompts(space))

    def forward(self, images: Tensor, texts: SpaceTexts) -> SACOutput:
        """Compare images ``[batch, 3, height, width]`` with encoded texts; nothing is written."""
        return self.compare(self.encode(images), texts)

    def encode(self, images: Tensor) -> Tensor:
        """Tokens ``[batch, tokens, dim]`` of images, by the encoder."""
        tokens: Tensor = self.method.encode(images)
        return tokens

    def compare(self, tokens: Tensor, texts: SpaceTexts, *, sa: Logits | None = None) -> SACOutput:
        """:meth:`forward` from encoded tokens, for images that are compared more than once.

        Args:
            tokens: Projected tokens ``[batch, tokens, dim]``.
            texts: Of :meth:`texts`.
            sa: Logits of the alignment branch for these, where they are known already.
        """
        method, (space, texts_of) = self.method, texts
        pairs = space.pairs_on(tokens.device)
        if sa is None:
            (sa,) = method.compare(tokens, texts_of)
        if self.condenser is None:
            return SACOutput(space, tokens, sa, None, None, None, method.fuse(sa, pairs))

        features = self.condenser(tokens)
        (vac,) = method.classify(tokens, texts_of, features)
        bank = self._read_bank(features, space)
        memory = None if bank is None else bank.softmax(dim=1)
        gamma = 0.0 if bank is None else self.gamma
        branches = method.probabilities(sa, pairs), method.probabilities(vac, pairs)
        scores = fuse(*branches, memory, beta=self.beta, gamma=gamma)
        return SACOutput(space, tokens, sa, features, vac, bank, scores)

    def _read_bank(self, features: Tensor, space: CompositionSpace) -> Tensor | None:
        """The bank's logits ``[batch, P]``; None without one, or in another label space."""
        if self.bank is None or not self._is_of_bank(space):
            return None
        # The default bank has the encoder's scale of now, which may have been trained since the bank was made.
        scale = self.encoder.logit_scale if self.bank in self._own_bank else None
        logits: Tensor = self.bank(features, logit_scale=scale)
        return logits

    def _is_of_bank(self, space: CompositionSpace) -> bool:
        return space is self.bank_space or space == self.bank_space  # the first is cheap in the open world

    def adapt(self, out: SACOutput) -> None:
        """Show the images of ``out`` to the bank: it keeps those of which the condenser is surest (Eq. 9).

        Raises:
            ValueError: There is no bank, or ``out`` is of another label space.
        """
        if self.bank is None or out.bank is None or out.features is None or out.vac is None:
            have = "no bank" if self.bank is None else "an output of another label space"
            raise ValueError(f"expected `out` in the label space of the bank, got {have}")
        self.bank.update(out.features, out.vac.pairs.softmax(dim=1))

    def losses(self, out: SACOutput, pair_target: Tensor, *, stage: Stage = "align") -> dict[str, Tensor]:
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
            TypeError, ValueError: A shape or dtype does not fit, the stage is unknown, the condenser is missing, or a
                target is no column of the space; -100 is none either.
        """
        check_choice("stage", stage, ("align", "condense", "joint"))
        check_tensor("pair_target", pair_target, dtypes=(torch.long,))
        check_shapes(logits=(out.sa.pairs, "batch pairs"), pair_target=(pair_target, "batch"))
        check_index("pair_target", pair_target, len(out.space))
        pairs = out.space.pairs_on(pair_target.device)
        known = {} if stage == "condense" else self.method.losses(out.sa, pairs, pair_target)
        if stage == "align":
            return known
        if out.vac is None or out.features is None:
            raise ValueError(f'expected `out` of a model with a condenser for stage "{stage}", got none')
        logits = CondensedLogits(out.sa, out.vac, out.features)
        weights: dict[str, Any] = {"alpha": self.alpha, "direction": self.direction}
        return add_losses(known, condenser_losses(self.method, logits, pairs, pair_target, **weights))
