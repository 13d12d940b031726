"""A table of remembered vectors: it grows, takes in what is better than what it has, and can be sorted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from czsl_heads.functional.bank import first_true, merge_best, rank_best


class SlotTable(NamedTuple):
    """Entries of rows, one row for each pair, in any order; the places that no entry has are free.

    All shapes are known before the values are, so that a GPU need not be waited for. The last place stays free: what
    is to be stored nowhere is written there.

    Attributes:
        features: Vectors ``[size, dim]``; without meaning in free places.
        entropy: By which entries of a row are ranked, the smallest first ``[size]``.
        pair: Row of each entry, long ``[size]``; the number of pairs marks a free place.
        arrival: Ranks entries of equal entropy, the earlier first, long ``[size]``.

    Example:
        >>> table = SlotTable.empty(torch.zeros(0, 2)).grow(5, num_pairs=3)
        >>> vectors, rows = torch.eye(2), torch.tensor([2, 0])
        >>> table = table.place(vectors, rows, torch.tensor([0.5, 0.9]), torch.arange(2), num_pairs=3, slots=1)
        >>> table.pair  # two entries, two free places, and the last one
        tensor([2, 0, 3, 3, 3])
        >>> better = torch.tensor([0.1]), torch.tensor([2])
        >>> table = table.place(-vectors[:1], rows[:1], *better, num_pairs=3, slots=1)
        >>> table.sort(num_pairs=3, slots=1).features  # row 0, then row 2, whose entry was replaced
        tensor([[ 0.,  1.],
                [-1., -0.]])
    """

    features: Tensor
    entropy: Tensor
    pair: Tensor
    arrival: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> SlotTable:
        """A table without places, of the device, dtype and width of vectors ``[n, dim]``."""
        none = like.new_zeros(0, dtype=torch.long)
        return cls(like.new_zeros(0, like.shape[1]), like.new_zeros(0, dtype=torch.float32), none, none)

    def grow(self, size: int, *, num_pairs: int) -> SlotTable:
        """A copy of ``size`` places, the new ones free."""
        return SlotTable(
            features=_grown(self.features, size),
            entropy=_grown(self.entropy, size),
            pair=_grown(self.pair, size, num_pairs),
            arrival=_grown(self.arrival, size),
        )

    def place(
        self, vectors: Tensor, pair: Tensor, entropy: Tensor, arrival: Tensor, *, num_pairs: int, slots: int
    ) -> SlotTable:
        """Merge new entries into the rows that they come to, each in one place; all others stay where they are.

        Args:
            vectors: ``[n, dim]``.
            pair: Row of each, long ``[n]``; ``num_pairs`` for what is not to be stored.
            entropy: ``[n]``.
            arrival: Long ``[n]``, above all that the table has.
            num_pairs: How many rows there are.
            slots: How many entries a row holds.

        Returns:
            The table. ``features`` are written in place; there must be ``n`` places free besides the last.
        """
        size, nowhere = len(self.pair) - 1, num_pairs
        old, old_stays, new_stays = self._merge(pair, entropy, arrival, num_pairs=num_pairs, slots=slots)
        left = self.pair.scatter(0, old, self.pair[old].where(old_stays, nowhere))

        # The new entries that stay, first to last, take the free places, first to last; the rest go nowhere.
        new = first_true(new_stays, min(size, len(vectors)))
        place = first_true(left[:size] == nowhere, len(new)).where(new < len(vectors), size)

        blank = len(vectors) + 1  # one row more, which stands for "none of them"
        dtype = torch.promote_types(entropy.dtype, self.entropy.dtype)
        return SlotTable(
            features=self.features.index_copy_(0, place, _grown(vectors, blank)[new]),
            entropy=self.entropy.to(dtype).scatter(0, place, _grown(entropy, blank)[new].to(dtype)),
            pair=left.scatter(0, place, _grown(pair, blank, nowhere)[new]),
            arrival=self.arrival.scatter(0, place, _grown(arrival, blank)[new]),
        )

    def _merge(
        self, pair: Tensor, entropy: Tensor, arrival: Tensor, *, num_pairs: int, slots: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Places of entries in rows that new ones come to, which of these stay, and which of the new ones do."""
        size = len(self.pair) - 1
        met = torch.zeros(num_pairs + 1, dtype=torch.bool, device=self.pair.device).index_fill(0, pair, True)
        met[num_pairs:] = False
        old = first_true(met[self.pair[:size]], min(size, len(pair) * slots))

        in_time = torch.cat([self.arrival[old], arrival]).argsort()
        ranked, stays = rank_best(
            torch.cat([self.pair[old], pair])[in_time],
            torch.cat([self.entropy[old], entropy])[in_time],
            num_pairs=num_pairs,
            slots=slots,
        )
        stays = torch.empty_like(stays).scatter(0, in_time[ranked], stays)
        return old, stays[: len(old)], stays[len(old) :]

    def sort(self, *, num_pairs: int, slots: int) -> SlotTable:
        """The entries alone, by (pair, entropy, arrival): equal for tables that hold the same."""
        in_time = self.arrival.argsort()
        best = merge_best(self.pair[in_time], self.entropy[in_time], num_pairs=num_pairs, slots=slots)
        order = in_time[best]
        return SlotTable(*(column[order] for column in self))


def _grown(rows: Tensor, size: int, value: float = 0) -> Tensor:
    """A copy with blank rows behind, until there are ``size``."""
    return torch.cat([rows, rows.new_full((size - len(rows), *rows.shape[1:]), value)])
