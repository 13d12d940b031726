"""The condenser and the memory bank behind any method: stages II and III of SAC."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from czsl_heads._checks import check_choice, check_kind, check_range
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.functional.distill import Direction, distillation
from czsl_heads.functional.fusion import fuse
from czsl_heads.heads.condenser import VACondenser
from czsl_heads.heads.memory_bank import DynamicMemoryBank
from czsl_heads.models.method import Logits, Method, Seam, tokens_of
from czsl_heads.prompts.soft import TextFeatures
from czsl_heads.space import CompositionSpace


class CondensedLogits(NamedTuple):
    """What :class:`Condensed` says of a batch.

    Attributes:
        aligned: The logits of the method itself.
        condensed: Those of the condenser's vectors in place of the image's tokens; of the same form.
        features: The condenser's vectors, unit rows ``[batch, dim]``.
    """

    aligned: Logits
    condensed: Logits
    features: Tensor


class Condensed(Method):
    r"""A method whose images are also seen through a condenser (VAC), and remembered in a bank.

    The condenser gathers all tokens of an image to one vector, which then takes the place of [CLS] wherever the method
    compares images with texts; the bank compares it with the vectors that it remembers. Scores are added as
    probabilities, also where the method itself ranks by logits:

    .. math:: \beta \, p_{method} + (1 - \beta) (p_{condenser} + \gamma \, p_{bank})

    The bank is read when scores are asked for, and neither in training nor while it is filled.

    Args:
        method: Trained before; it is frozen, and stays in eval mode, unless ``joint``.
        condenser: Default: a new ``VACondenser(dim)``.
        bank: Over the pairs of the method's space; None: none.
        alpha: Weight of the distillation from the method's own logits in the loss, in [0, 1].
        beta: Weight of the method itself in the scores, in [0, 1].
        gamma: Weight of the bank beside the condenser in the scores, at least 0.
        direction: Of the :func:`~czsl_heads.functional.distillation`.
        joint: Train the method along with the condenser, by the sum of both losses (Eq. 11); the teacher is detached
            there too.

    Shape:
        As the method; :meth:`forward` gives :class:`CondensedLogits`.

    Raises:
        TypeError, ValueError: An argument is of another kind, width or range; or scores are asked of a model with a
            bank for other pairs than those of the bank.

    Example:
        >>> import torch
        >>> from czsl_heads import CompositionSpace, DynamicMemoryBank, wrap
        >>> from czsl_heads.models.sac import Aligned
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")]).open_world()
        >>> aligned = Aligned(wrap("tiny"), space)
        >>> model = Condensed(aligned, bank=DynamicMemoryBank(len(space), aligned.encoder.dim)).eval()
        >>> model.adapt(model(torch.zeros(3, 3, 48, 48), space.pairs))
        >>> model.scores(torch.zeros(3, 3, 48, 48), space.pairs).shape, int(model.bank.counts.sum())
        (torch.Size([3, 2]), 3)

    References:
        Zhang et al., SAM, CVPR 2026 (SAC): Eqs. 5-12, there on the paper's own prompts and adapters.
    """

    bank: DynamicMemoryBank | None

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
        joint: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        check_kind("method", method, Method)
        check_weights(alpha=alpha, beta=beta, gamma=gamma, direction=direction)
        check_kind("joint", joint, bool)
        dim = method.encoder.dim
        condenser = VACondenser(dim) if condenser is None else condenser
        check_kind("condenser", condenser, VACondenser)
        if bank is not None:
            check_kind("bank", bank, DynamicMemoryBank)
        for name, width in (("condenser", condenser.dim), ("bank", dim if bank is None else bank.dim)):
            if width != dim:
                raise ValueError(f"expected `{name}` of the encoder's width {dim}, got {width}")
        if bank is not None and bank.num_pairs != len(method.space):
            pairs = len(method.space)
            raise ValueError(f"expected `bank` over the {pairs} pairs of the method's space, got {bank.num_pairs}")
        self.method = method if joint else method.requires_grad_(False)
        self.condenser, self.bank = condenser, bank
        self.alpha, self.beta, self.gamma, self.direction, self.joint = alpha, beta, gamma, direction, joint
        self.train(self.training)

    def train(self, mode: bool = True) -> Condensed:
        """As in torch, but that a frozen method stays in eval mode, so that what teaches is deterministic."""
        super().train(mode)
        if not self.joint:
            self.method.eval()
        return self

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]
        """The method's."""
        return self.method.encoder

    @property
    def space(self) -> CompositionSpace:  # type: ignore[override]
        """The method's."""
        return self.method.space

    @property
    def seam(self) -> Seam:  # type: ignore[override]
        """The method's."""
        return self.method.seam

    def _frozen(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.joint else torch.no_grad()

    def texts(self, pairs: Tensor) -> TextFeatures:
        with self._frozen():
            return self.method.texts(pairs)

    def encode(self, images: Tensor) -> Any:
        with self._frozen():
            return self.method.encode(images)

    def compare(self, encoded: Any, texts: TextFeatures, *vectors: Tensor, aligned: Logits | None = None) -> list[Any]:
        """As :meth:`Method.compare`; ``aligned`` are the method's own logits of these images, where they are known."""
        features = self.condenser(tokens_of(encoded))
        if aligned is None:
            aligned, condensed, *others = self.method.compare(encoded, texts, features, *vectors)
        else:
            condensed, *others = self.method.classify(encoded, texts, features, *vectors)
        return [CondensedLogits(aligned, condensed, features), *others]

    def classify(self, encoded: Any, texts: TextFeatures, *vectors: Tensor) -> list[Any]:
        return self.method.classify(encoded, texts, *vectors)

    def vectors(self, encoded: Any, logits: CondensedLogits, texts: Tensor) -> Tensor:
        """The condenser's."""
        return logits.features

    def fuse(self, logits: CondensedLogits, pairs: Tensor) -> Tensor:
        """Eq. 12."""
        return self.probabilities(logits, pairs)

    def probabilities(self, logits: CondensedLogits, pairs: Tensor) -> Tensor:
        aligned, condensed = (self.method.probabilities(part, pairs) for part in logits[:2])
        memory = self._remembered(logits, pairs)
        gamma = 0.0 if memory is None else self.gamma
        return fuse(aligned, condensed, memory, beta=self.beta, gamma=gamma)

    def _remembered(self, logits: CondensedLogits, pairs: Tensor) -> Tensor | None:
        """What the bank makes of images, ``[batch, K]``; None without one."""
        if self.bank is None:
            return None
        if self.bank.num_pairs != len(pairs):
            raise ValueError(f"expected `pairs` to be the {self.bank.num_pairs} pairs of the bank, got {len(pairs)}")
        own = self.space.pairs_on(pairs.device)
        if pairs is not own and not torch.equal(pairs, own):  # a GPU is waited for where they are another tensor
            raise ValueError("expected `pairs` to be those of the bank, in their order, got others")
        memory: Tensor = self.bank(logits.features)
        return memory.softmax(dim=1)

    def losses(self, logits: CondensedLogits, pairs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Those of the condenser (:func:`condenser_losses`), and with ``joint`` those of the method before them."""
        known: dict[str, Tensor] = self.method.losses(logits.aligned, pairs, targets) if self.joint else {}
        found = condenser_losses(self.method, logits, pairs, targets, alpha=self.alpha, direction=self.direction)
        return add_losses(known, found)

    def parts(self, logits: CondensedLogits, pairs: Tensor) -> dict[str, Tensor]:
        memory = self._remembered(logits, pairs)
        found = {
            "alignment": self.method.probabilities(logits.aligned, pairs),
            "condenser": self.method.probabilities(logits.condensed, pairs),
        }
        return found if memory is None else found | {"bank": memory}

    def adapt(self, logits: CondensedLogits) -> None:
        """Show images to the bank: it keeps those of which the condenser is surest (Eq. 9).

        Raises:
            ValueError: There is no bank, or the logits are over another number of pairs.
        """
        if self.bank is None:
            raise ValueError("expected `bank` to be a memory bank, got None")
        self.bank.update(logits.features, logits.condensed.pairs.softmax(dim=1))
        self.record = {**self.record, "adapted": True}


def condenser_losses(
    method: Method, logits: CondensedLogits, pairs: Tensor, targets: Tensor, *, alpha: float, direction: Direction
) -> dict[str, Tensor]:
    """The method's own losses of the condenser's vectors, and distillation from its logits of pairs (Eqs. 7-8).

    Returns:
        The former as ``loss_vac_...``, the latter as ``loss_distill``, and as ``loss`` the sum weighed by ``alpha``.
    """
    own = method.losses(logits.condensed, pairs, targets)
    total = own.pop("loss")
    taught = distillation(logits.condensed.pairs, logits.aligned.pairs, direction=direction)
    named = {name.replace("loss_", "loss_vac_", 1): term for name, term in own.items()}
    return named | {"loss_distill": taught, "loss": (1 - alpha) * total + alpha * taught}


def add_losses(known: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms of both, and their sum as ``loss``."""
    if not known:
        return more
    return known | more | {"loss": known["loss"] + more["loss"]}


def check_weights(*, alpha: float, beta: float, gamma: float, direction: str) -> None:
    """Raise TypeError or ValueError unless these are weights of loss and scores, and a direction of distillation."""
    for name, weight in (("alpha", alpha), ("beta", beta)):
        check_range(name, weight, 0, 1)
    check_range("gamma", gamma, 0)
    check_choice("direction", direction, ("reverse", "forward"))
