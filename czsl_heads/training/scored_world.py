"""A label space as an evaluation scores it: its texts, its banks, and every readout of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from torch import Tensor

from czsl_heads.functional.bank import Judged
from czsl_heads.functional.fusion import fuse
from czsl_heads.heads.memory_bank import DynamicMemoryBank
from czsl_heads.models.method import Logits, Method
from czsl_heads.models.recipe import BankOptions, new_bank
from czsl_heads.space import CompositionSpace
from czsl_heads.training.columns import Columns
from czsl_heads.training.rows import BankPlan, Readout


class Batch(NamedTuple):
    """Images as an evaluation knows them.

    Attributes:
        encoded: What the method makes of them.
        features: The condenser's vectors ``[batch, dim]``; None without a condenser.
        columns: Of their pairs in the data set's space, ``[batch]``.
    """

    encoded: Any
    features: Tensor | None
    columns: Tensor


class Compared(NamedTuple):
    """What a method says of a batch.

    Attributes:
        aligned: Logits over the own columns, and what a softmax needs of the others.
        pairs: Of the columns of ``aligned.pairs``.
        ranked: What the method ranks the own columns by ``[batch, columns]``.
        condensed: Logits of the condenser's vectors; None without a condenser.
    """

    aligned: Logits
    pairs: Tensor
    ranked: Tensor
    condensed: Logits | None


class Seen(NamedTuple):
    """Images that a bank is shown."""

    features: Tensor
    judged: Judged


# From the own images those before them, and themselves with those after them, in file order.
Exchange = Callable[[Seen], tuple[Sequence[Seen], Sequence[Seen]]]


class ScoredWorld:
    """Texts of the pairs of a space that this process has, and banks over them.

    Args:
        space: The whole space.
        columns: The pairs of it that this process has.
        method: Compares images with texts.
        bank: How banks are made.
        plans: The banks that readouts ask for.
    """

    def __init__(
        self,
        space: CompositionSpace,
        columns: Columns,
        method: Method,
        bank: BankOptions,
        plans: Sequence[BankPlan],
    ) -> None:
        device = method.encoder.logit_scale.device
        self.space, self.columns, self.method, self.plans = space, columns, method, plans
        self.pairs = space.pairs_on(device)[columns.first : columns.last]
        self.texts = method.texts(self.pairs)
        self.unseen = (~space.seen_mask)[columns.first : columns.last].nonzero().squeeze(1).to(device)
        self.labels = bank.labels
        self.filled: dict[int, DynamicMemoryBank] = {}
        self.banks: dict[BankPlan, DynamicMemoryBank] = {}
        if plans:
            own = space.subset(space.pairs[columns.first : columns.last])
            for slots in sorted({plan.slots for plan in plans if plan.slots is not None}):
                self.filled[slots] = new_bank(own, method.encoder, bank, slots).to(device)

    def fill(self, batch: Batch, labels: Tensor, exchange: Exchange) -> None:
        """Show training images to all banks, which are not read meanwhile; ``labels`` are columns of this space."""
        assert batch.features is not None
        (condensed,) = self.method.classify(batch.encoded, self.texts, batch.features)
        judged = self._judged(condensed, labels if self.labels else None)
        before, after = exchange(Seen(batch.features, judged))
        for seen in (*before, *after):
            for bank in self.filled.values():
                bank.take(*seen)

    def start_banks(self) -> None:
        """Begin to read: every plan gets a bank as the training images left it."""
        for plan in self.plans:
            assert plan.slots is not None
            bank = deepcopy(self.filled[plan.slots])
            if plan.texts:
                bank.fill_texts(self.texts.pairs[self.unseen], self.unseen)
            self.banks[plan] = bank

    def compare(self, batch: Batch) -> Compared:
        """What the method says of images, and of the condenser's vectors in their place."""
        vectors = () if batch.features is None else (batch.features,)
        aligned, *condensed = self.method.compare(batch.encoded, self.texts, *vectors)
        wide, pairs = self.columns.widen(aligned, self.pairs)
        ranked = self.columns.own(self.method.fuse(wide, pairs))
        return Compared(wide, pairs, ranked, condensed[0] if condensed else None)

    def scored(
        self, readouts: Mapping[str, Readout], batch: Batch, compared: Compared, exchange: Exchange
    ) -> Iterator[tuple[str, Tensor]]:
        """Scores of the own columns by every readout, one at a time; then the banks that adapt have seen the batch."""
        for name, readout in readouts.items():
            if readout.alone and not readout.probabilities:
                yield name, compared.ranked
        if all(readout.alone and not readout.probabilities for readout in readouts.values()):
            return

        probs = self.columns.own(self.method.probabilities(compared.aligned, compared.pairs))
        for name, readout in readouts.items():
            if readout.alone and readout.probabilities:
                yield name, probs
        if batch.features is not None and compared.condensed is not None:
            yield from self._behind(readouts, batch.features, probs, compared.condensed, exchange)

    def _behind(
        self,
        readouts: Mapping[str, Readout],
        features: Tensor,
        probs: Tensor,
        condensed: Logits,
        exchange: Exchange,
    ) -> Iterator[tuple[str, Tensor]]:
        """Scores by the readouts that a condenser or a bank has a say in."""
        behind = self.columns.own(self.method.probabilities(*self.columns.widen(condensed, self.pairs)))
        adapting = [bank for plan, bank in self.banks.items() if plan.updates]
        after: Sequence[Seen] = ()
        if adapting:
            before, after = exchange(Seen(features, self._judged(condensed, None)))
            _show(adapting, before)

        memories = {plan: self.columns.remembered(bank, features) for plan, bank in self.banks.items()}
        for name, readout in readouts.items():
            if not readout.alone:
                assert readout.beta is not None
                assert readout.gamma is not None
                memory = None if readout.bank is None else memories[readout.bank]
                yield name, fuse(probs, behind, memory, beta=readout.beta, gamma=readout.gamma)
        _show(adapting, after)

    def _judged(self, condensed: Logits, labels: Tensor | None) -> Judged:
        wide, _ = self.columns.widen(condensed, self.pairs)
        probs = self.columns.own(wide.pairs.softmax(dim=1))
        bank = next(iter(self.filled.values()))  # all are over the same pairs
        return self.columns.judge(bank, probs, labels)


def _show(banks: Sequence[DynamicMemoryBank], images: Sequence[Seen]) -> None:
    for seen in images:
        for bank in banks:
            bank.take(*seen)


def in_turn(own: int | None, parts: Sequence[Sequence[Tensor]]) -> tuple[list[Seen], list[Seen]]:
    """What an :data:`Exchange` gives, from the tensors of all batches of a round; the own one is the ``own``-th."""
    seen = [Seen(features, Judged(*judged)) for features, *judged in parts]
    first = len(seen) if own is None else own
    return seen[:first], seen[first:]


def alone(seen: Seen) -> tuple[Sequence[Seen], Sequence[Seen]]:
    """The :data:`Exchange` where every process sees every batch."""
    return (), (seen,)
