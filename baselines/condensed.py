"""The condenser and the memory bank behind the seam of any baseline, whose own part is frozen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from baselines.method import Method
from czsl_heads import DynamicMemoryBank, VACondenser
from czsl_heads._checks import check_choice, check_kind, check_range
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.functional.distill import Direction, distillation
from czsl_heads.functional.fusion import fuse


class CondensedLogits(NamedTuple):
    """What :class:`Condensed` says of a batch.

    Attributes:
        aligned: The logits of the method itself.
        condensed: Those of the condenser's vectors in place of the image's tokens; of the same form.
        features: The condenser's vectors, unit rows ``[batch, dim]``.
        memory: Logits of the memory bank ``[batch, K]``; None without one.
    """

    aligned: Any
    condensed: Any
    features: Tensor
    memory: Tensor | None


class Condensed(Method):
    r"""A method whose images are also seen through a condenser (VAC), and remembered in a bank.

    The condenser gathers all tokens of an image to one vector, which then takes the place of [CLS] wherever the method
    compares images with texts; the bank compares it with the vectors that it remembers. Scores are added as
    probabilities, also where the method itself ranks by logits:

    .. math:: \beta \, p_{method} + (1 - \beta) (p_{condenser} + \gamma \, p_{bank})

    Args:
        method: Trained before; it is frozen, and stays in eval mode.
        condenser: Default: a new ``VACondenser(dim)``.
        bank: Over the pairs that scores are asked for; None: none.
        alpha: Weight of the distillation from the method's own logits in the loss, in [0, 1].
        beta: Weight of the method itself in the scores, in [0, 1].
        gamma: Weight of the bank beside the condenser in the scores, at least 0.
        direction: Of the :func:`~czsl_heads.functional.distillation`.

    Shape:
        As the method; :meth:`forward` gives :class:`CondensedLogits`.

    Raises:
        TypeError, ValueError: An argument is of another kind, width or range; in :meth:`fuse`, a bank over another
            number of pairs.

    Example:
        >>> import torch
        >>> from baselines.csp import CSP
        >>> from czsl_heads import CompositionSpace, DynamicMemoryBank, SparseAlignHead, wrap
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")]).open_world()
        >>> csp = CSP(wrap("tiny"), space, align=SparseAlignHead())
        >>> model = Condensed(csp, bank=DynamicMemoryBank(len(space), csp.encoder.dim)).eval()
        >>> model.adapt(model(torch.zeros(3, 3, 48, 48), space.pairs))
        >>> model.scores(torch.zeros(3, 3, 48, 48), space.pairs).shape, int(model.bank.counts.sum())
        (torch.Size([3, 2]), 3)

    References:
        Zhang et al., SAM, CVPR 2026 (SAC): Eqs. 5-10 and 12, there on the paper's own prompts and adapters.
    """

    def __init__(
        self,
        method: Method,
        condenser: VACondenser | None = None,
        *,
        bank: DynamicMemoryBank | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 0.5,
        direction: Direction = "reverse",
    ) -> None:
        super().__init__()
        check_kind("method", method, Method)
        for name, weight in (("alpha", alpha), ("beta", beta)):
            check_range(name, weight, 0, 1)
        check_range("gamma", gamma, 0)
        check_choice("direction", direction, ("reverse", "forward"))
        dim = method.encoder.dim
        condenser = VACondenser(dim) if condenser is None else condenser
        check_kind("condenser", condenser, VACondenser)
        if bank is not None:
            check_kind("bank", bank, DynamicMemoryBank)
        for name, width in (("condenser", condenser.dim), ("bank", dim if bank is None else bank.dim)):
            if width != dim:
                raise ValueError(f"expected `{name}` of the encoder's width {dim}, got {width}")
        self.method, self.condenser, self.bank = method.requires_grad_(False), condenser, bank
        self.alpha, self.beta, self.gamma, self.direction = alpha, beta, gamma, direction
        self.train(self.training)

    def train(self, mode: bool = True) -> Condensed:
        """As in torch, but that the frozen method stays in eval mode, so that what teaches is deterministic."""
        super().train(mode)
        self.method.eval()
        return self

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]
        """The method's."""
        return self.method.encoder

    @torch.no_grad()
    def texts(self, pairs: Tensor) -> Any:
        return self.method.texts(pairs)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.method.encode(images)

    def compare(self, tokens: Tensor, texts: Any, *vectors: Tensor) -> list[Any]:
        features = self.condenser(tokens)
        aligned, condensed, *others = self.method.compare(tokens, texts, features, *vectors)
        memory = None if self.bank is None else self.bank(features)
        return [CondensedLogits(aligned, condensed, features, memory), *others]

    def fuse(self, logits: CondensedLogits, pairs: Tensor) -> Tensor:
        """Eq. 12."""
        return self.probabilities(logits, pairs)

    def probabilities(self, logits: CondensedLogits, pairs: Tensor) -> Tensor:
        aligned, condensed = (self.method.probabilities(part, pairs) for part in (logits.aligned, logits.condensed))
        if logits.memory is None:
            return fuse(aligned, condensed, None, beta=self.beta, gamma=0.0)
        if logits.memory.shape[1] != len(pairs):
            raise ValueError(f"expected `pairs` to be the {logits.memory.shape[1]} pairs of the bank, got {len(pairs)}")
        return fuse(aligned, condensed, logits.memory.softmax(dim=1), beta=self.beta, gamma=self.gamma)

    def loss_of(self, logits: CondensedLogits, pairs: Tensor, targets: Tensor) -> Tensor:
        """The method's own loss of the condenser's vectors, and distillation from its logits of pairs (Eqs. 7-8)."""
        by_labels = self.method.loss_of(logits.condensed, pairs, targets)
        student, teacher = (self.method.pair_logits(part) for part in (logits.condensed, logits.aligned))
        taught = distillation(student, teacher, direction=self.direction)
        return (1 - self.alpha) * by_labels + self.alpha * taught

    def pair_texts(self, texts: Any) -> Tensor:
        return self.method.pair_texts(texts)

    def pair_logits(self, logits: CondensedLogits) -> Tensor:
        """Those of the method itself."""
        return self.method.pair_logits(logits.aligned)

    def adapt(self, logits: CondensedLogits) -> None:
        """Show images to the bank: it keeps those of which the condenser is surest (Eq. 9).

        Raises:
            ValueError: There is no bank, or the logits are over another number of pairs.
        """
        if self.bank is None:
            raise ValueError("expected `bank` to be a memory bank, got None")
        self.bank.update(logits.features, self.method.pair_logits(logits.condensed).softmax(dim=1))
