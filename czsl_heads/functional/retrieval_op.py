"""How the rows of a memory are read: sums over the entries of each row, and never a prototype.

A row whose one entry is a text has a closed form, so that it is done with the product of features and texts. The rows
that have other entries are gathered behind each other in compact form, and alone cost more than that product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from czsl_heads.functional.bank import CACHED_COLUMNS, begins, row_counts

if TYPE_CHECKING:
    from czsl_heads.functional.retrieval import Empty, PairTexts

# Cosines are at most 2 apart: their exponentials keep all digits in float32 while the logits are not further apart.
SAFE_SPREAD = 80.0


def retrieved(
    features: Tensor,
    sources: Sequence[tuple[Tensor, Tensor]],
    texts: PairTexts | None,
    *,
    num_pairs: int,
    slots: int,
    temperature: float,
    empty: Empty,
    normalize: bool,
) -> Tensor:
    """Scores ``[batch, num_pairs]`` of unit features ``[batch, dim]``; all other arguments as in ``retrieve``."""
    cosines, has_text = _text_cosines(features, texts, num_pairs)
    entries = _Entries(sources, num_pairs, features.device)
    dilute = empty == "zero" and not normalize

    weights = None
    if len(entries) > 0:
        weights = _weigh(features, entries, cosines, has_text, slots, temperature, dilute)

    # First as if each pair had a text at most, then the columns of the rows that have other entries.
    scores = _among_zeros(cosines, slots, temperature) if dilute else cosines
    if has_text is not None:
        scores = torch.where(has_text, scores, _vacant(has_text, entries, empty))
    if weights is None:
        return scores

    found = weights.mean_cosine()
    if normalize:
        found = found / safe_root(weights.squared_length(texts, slots))
    return _write_columns(scores, entries, found)


class _Entries:
    """The entries of all blocks by pair, in compact rows: as many as there are entries, in the order of the pairs."""

    def __init__(self, sources: Sequence[tuple[Tensor, Tensor]], num_pairs: int, device: torch.device) -> None:
        self.blocks = [vectors for vectors, _ in sources]
        pair_index = torch.cat([torch.empty(0, dtype=torch.long, device=device), *(index for _, index in sources)])
        size = len(pair_index)
        self.order = pair_index.argsort(stable=True)
        pair_index = pair_index[self.order]
        sorted_row = begins(pair_index).cumsum(dim=0) - 1  # of each entry, sorted by pair

        self.row = torch.empty_like(sorted_row).scatter(0, self.order, sorted_row)
        self.counts = row_counts(sorted_row, size)[:size]
        self.start = self.counts.cumsum(dim=0) - self.counts

        # A row for each pair that has entries, one for entries without use, and blank ones.
        self.pair = pair_index.new_full((size,), num_pairs).scatter(0, sorted_row, pair_index)
        self.used = self.pair < num_pairs
        self.blank = (self.counts == 0)[:, None]
        self.column = self.pair.clamp(max=num_pairs - 1)

    def __len__(self) -> int:
        return len(self.order)

    def cosines(self, features: Tensor) -> Tensor:
        """``[entries, batch]``: the batch last, where sums over entries add vectors of it."""
        return _join([block.to(features.dtype) @ features.mT for block in self.blocks])

    def sums(self, values: Tensor) -> Tensor:
        """``[entries, batch]`` to ``[rows, batch]``; zero in blank rows. In fixed order, without atomics."""
        return F.embedding_bag(self.order, values, self.start, mode="sum")

    def peaks(self, values: Tensor) -> Tensor:
        return F.embedding_bag(self.order, values, self.start, mode="max")

    def vectors(self, dtype: torch.dtype) -> Tensor:
        """``[entries, dim]``, sorted by row."""
        return _join([block.to(dtype) for block in self.blocks])[self.order]


class _Weights(NamedTuple):
    """What entries weigh in the softmax of their row, up to the ``total`` of the row; the batch comes last in all."""

    entries: _Entries
    cosines: Tensor  # [entries, batch]
    shares: Tensor  # [entries, batch]
    text_cosines: Tensor  # [rows, batch]
    text_shares: Tensor  # [rows, batch], zero where there is no text
    total: Tensor  # [rows, batch]

    def mean_cosine(self) -> Tensor:
        own = self.entries.sums(self.shares * self.cosines)
        return torch.addcmul(own, self.text_shares, self.text_cosines) / self.total

    def squared_length(self, texts: PairTexts | None, slots: int) -> Tensor:
        """Of each prototype, from products of entries, without a prototype of each sample and row."""
        entries, order = self.entries, self.entries.order
        shares, row, vectors = self.shares[order], entries.row[order], entries.vectors(self.shares.dtype)

        squares = shares.square() * vectors.square().sum(dim=1, keepdim=True)  # [entries, batch], sorted by row
        for step in range(1, min(slots, len(entries))):  # entries of one row are neighbours, less than `slots` apart
            same_row = row[:-step] == row[step:]
            products = (vectors[:-step] * vectors[step:]).sum(dim=1) * same_row
            both = 2 * shares[:-step] * shares[step:] * products[:, None]
            squares = squares + F.pad(both, (0, 0, step, 0))
        position = torch.arange(len(row), device=row.device)
        squared = F.embedding_bag(position, squares, entries.start, mode="sum")  # [rows, batch]

        if texts is not None and len(texts.vectors) > 0:
            of_row = rows_of(texts, entries.column).clamp(min=0)
            text = texts.vectors[of_row].to(shares.dtype)  # [rows, dim]
            products = shares.new_empty(len(row)).scatter(0, order, (vectors * text[row]).sum(dim=1))
            both = 2 * entries.sums(self.shares * products[:, None]) * self.text_shares
            squared = squared + both + self.text_shares.square() * text.square().sum(dim=1, keepdim=True)
        return squared / self.total.square()


def _weigh(
    features: Tensor,
    entries: _Entries,
    cosines: Tensor,
    has_text: Tensor | None,
    slots: int,
    temperature: float,
    dilute: bool,
) -> _Weights:
    own = entries.cosines(features)  # [entries, batch]
    text_cosines = cosines.index_select(1, entries.column).mT.contiguous()  # [rows, batch]
    with_text = entries.used & (entries.counts < slots)
    if has_text is not None:
        with_text = with_text & has_text[entries.column]
    zeros = None
    if dilute:
        zeros = (slots - entries.counts - with_text.long()).clamp(min=0)[:, None]

    logits = own / temperature
    text_logits = (text_cosines / temperature).masked_fill_(~with_text[:, None], -torch.inf)
    peak = _peaks(logits.detach(), text_logits.detach(), zeros, entries, temperature)
    shares = logits.sub_(peak if peak.ndim == 0 else peak[entries.row]).exp_()
    text_shares = text_logits.sub_(peak).exp_()

    total = entries.sums(shares) + text_shares
    if zeros is not None:
        # Where there are zeros the peak is not negative, so that the clamp only keeps inf from the other rows.
        total = total + zeros * (-peak.clamp(min=0)).exp()
    return _Weights(entries, own, shares, text_cosines, text_shares, total.masked_fill_(entries.blank, 1.0))


def _peaks(logits: Tensor, text_logits: Tensor, zeros: Tensor | None, entries: _Entries, temperature: float) -> Tensor:
    """What to subtract so that no row overflows or vanishes: ``[rows, batch]``, or one number if that will do."""
    if 2 / temperature <= SAFE_SPREAD:
        return logits.new_full((), 1 / temperature)
    peak = torch.maximum(entries.peaks(logits), text_logits)
    return peak if zeros is None else torch.where(zeros > 0, peak.clamp(min=0), peak)


def _text_cosines(features: Tensor, texts: PairTexts | None, num_pairs: int) -> tuple[Tensor, Tensor | None]:
    """Cosines of each pair's text ``[batch, num_pairs]``, and which pairs have one ``[num_pairs]``; None: all."""
    if texts is None or len(texts.vectors) == 0:
        nothing = torch.zeros(num_pairs, dtype=torch.bool, device=features.device)
        return features.new_zeros(features.shape[0], num_pairs), nothing
    cosines = features @ texts.vectors.to(features.dtype).mT
    if texts.row is None:
        return cosines, None
    return cosines.index_select(1, texts.row.clamp(min=0)), texts.row >= 0


def rows_of(texts: PairTexts, pair_index: Tensor) -> Tensor:
    """Which of ``texts.vectors`` is each pair's, -1 for none."""
    return pair_index if texts.row is None else texts.row[pair_index]


def _among_zeros(cosines: Tensor, slots: int, temperature: float) -> Tensor:
    """What a text alone retrieves from its row, where all other slots are zero vectors; in place if it can be."""
    if slots == 1:
        return cosines
    if cosines.requires_grad:
        return cosines * (cosines / temperature - math.log(slots - 1)).sigmoid()
    width = CACHED_COLUMNS if cosines.device.type == "cpu" else cosines.shape[1]
    for columns in cosines.split(width, dim=1):
        columns.mul_((columns / temperature).sub_(math.log(slots - 1)).sigmoid_())
    return cosines


def _vacant(has_text: Tensor, entries: _Entries, empty: Empty) -> Tensor:
    """The score of a row without entries, a scalar."""
    anything = has_text.any() | entries.used.any()
    return torch.where(anything & (empty == "mask"), -torch.inf, 0.0)


def _write_columns(scores: Tensor, entries: _Entries, found: Tensor) -> Tensor:
    """Put what the rows found ``[rows, batch]`` in their pairs' columns, in place.

    Rows without use repeat the first row, or what stands in the last column if that has no use either, so that nothing
    depends on how many there are; gradients must come from one writer of a column alone.
    """
    used = entries.used[:, None]
    first = torch.where(used[:1], found[:1], scores[:, -1:].mT)
    rest = torch.where(used[1:], found[1:], first.detach())
    columns = torch.where(entries.used, entries.column, entries.column[:1])
    return scores.index_copy_(1, columns, torch.cat([first, rest]).mT.contiguous())


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def safe_root(squared: Tensor) -> Tensor:
    """Of squared lengths, which rounding may make negative."""
    return squared.clamp(min=torch.finfo(squared.dtype).eps).sqrt()
