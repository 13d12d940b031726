"""How a memory of vectors is read: every pair's prototype, a softmax over its entries, against the feature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from czsl_heads._checks import check_choice, check_integer, check_positive, check_shapes, check_tensor
from czsl_heads.functional.bank import CACHED_COLUMNS, begins, row_counts
from czsl_heads.functional.precision import no_autocast, score_dtype

Empty = Literal["mask", "zero"]
Sources = Sequence[tuple[Tensor, Tensor]]

# Cosines are at most 2 apart: their exponentials keep all digits in float32 while the logits are not further apart.
SAFE_SPREAD = 80.0


class PairTexts(NamedTuple):
    """At most one text of each pair: entries that stand behind all others of their rows.

    Attributes:
        vectors: Of unit length ``[texts, dim]``.
        row: Which of them is a pair's, long ``[num_pairs]``, -1 for none; None where they are in the order of the
            pairs, one each.
    """

    vectors: Tensor
    row: Tensor | None = None


def retrieve(
    features: Tensor,
    sources: Sources,
    *,
    num_pairs: int,
    slots: int,
    temperature: float = 0.1,
    empty: Empty = "mask",
    normalize: bool = False,
    texts: PairTexts | None = None,
) -> Tensor:
    r"""Inner product of each feature with the prototype that it retrieves from the entries of each pair.

    With :math:`s_j = \langle f, B_{ij} \rangle` for the entries of pair :math:`i`,

    .. math:: w = \mathrm{softmax}_j(s_j / T), \qquad \langle f, \textstyle\sum_j w_j B_{ij} \rangle = \sum_j w_j s_j

    so that no prototype is built. A row whose one entry is a text has a closed form: its cosine :math:`s`, or
    :math:`s \, \sigma(s / T - \log(\mathrm{slots} - 1))` among zero vectors. So beside the product of features and
    texts, which is dense, the work is that of the rows that ``sources`` have entries in. Only first derivatives exist.

    Args:
        features: ``[batch, dim]``; any norm.
        sources: Where entries lie: blocks ``(vectors [entries, dim], pair_index [entries])``, the vectors of unit
            length, in any order, together at most ``slots`` a pair; index ``num_pairs`` marks an entry as unused.
        num_pairs: How many pairs there are.
        slots: Entries that a pair can have.
        temperature: :math:`T`, in units of cosine.
        empty: What free slots are. ``"mask"``: nothing, and a pair without entries scores -inf, unless all are without:
            then all score 0. ``"zero"``: zero vectors, which take part in the softmax and draw the score towards 0.
        normalize: Divide by the length of the prototype, taken as at least the root of the machine's precision. Zero
            vectors do not turn a prototype, so ``empty`` then matters to pairs without entries only.
        texts: One more entry of each pair, or of some, where ``sources`` leave a slot free.

    Returns:
        Scores ``[batch, num_pairs]``, cosines if ``normalize``; float64 if ``features`` or vectors are, else float32.

    Raises:
        TypeError: A tensor or option is of the wrong kind.
        ValueError: The shapes do not fit, or an option is out of range.

    Example:
        >>> entries = torch.eye(2), torch.tensor([0, 2])
        >>> retrieve(torch.tensor([[0.6, 0.8]]), [entries], num_pairs=3, slots=1)
        tensor([[0.6000,   -inf, 0.8000]])

    References:
        Zhang et al., SAM, CVPR 2026 (SAC), Eq. 10; free slots as zero vectors are the paper's.
    """
    _check_retrieval(features, sources, num_pairs, slots, temperature, empty, texts)
    with no_autocast(features.device):
        features = F.normalize(features.to(_dtype(features, sources, texts)), dim=-1)
        cosines, has_text = _text_cosines(features, texts, num_pairs)
        entries = _Entries(sources, num_pairs, features.device)
        dilute = empty == "zero" and not normalize
        weights = None
        if len(entries) > 0:
            weights = _weigh(features, entries, cosines, has_text, slots, temperature, dilute)
        scores = _among_zeros(cosines, slots, temperature) if dilute else cosines
        if has_text is not None:
            scores = torch.where(has_text, scores, _vacant(has_text, entries, empty))
        if weights is None:
            return scores
        found = weights.mean_cosine()
        if normalize:
            found = found / _safe_root(weights.squared_length(texts, slots))
        return _write_columns(scores, entries, found)


class _Entries:
    """The entries of all blocks by pair, in compact rows: as many as there are entries, in the order of the pairs."""

    def __init__(self, sources: Sources, num_pairs: int, device: torch.device) -> None:
        self.blocks = [vectors for vectors, _ in sources]
        pair_index = torch.cat([torch.empty(0, dtype=torch.long, device=device), *(index for _, index in sources)])
        size = len(pair_index)
        self.order = pair_index.argsort(stable=True)
        pair_index = pair_index[self.order]
        first = begins(pair_index)
        sorted_row = first.cumsum(dim=0) - 1
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
        squares = shares.square() * vectors.square().sum(dim=1, keepdim=True)
        for step in range(1, min(slots, len(entries))):  # entries of one row are neighbours, less than `slots` apart
            products = (vectors[:-step] * vectors[step:]).sum(dim=1) * (row[:-step] == row[step:])
            squares = squares + F.pad(2 * shares[:-step] * shares[step:] * products[:, None], (0, 0, step, 0))
        squared = F.embedding_bag(torch.arange(len(row), device=row.device), squares, entries.start, mode="sum")
        if texts is not None and len(texts.vectors) > 0:
            of_row = _rows_of(texts, entries.column)
            text = texts.vectors[of_row.clamp(min=0)].to(shares.dtype)
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
    own, text_cosines = entries.cosines(features), cosines.index_select(1, entries.column).mT.contiguous()
    with_text = entries.used & (entries.counts < slots)
    if has_text is not None:
        with_text = with_text & has_text[entries.column]
    zeros = (slots - entries.counts - with_text.long()).clamp(min=0)[:, None] if dilute else None
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


def _rows_of(texts: PairTexts, pair_index: Tensor) -> Tensor:
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


def retrieve_prototypes(
    features: Tensor,
    sources: Sources,
    pair_index: Tensor,
    *,
    num_pairs: int,
    slots: int,
    temperature: float = 0.1,
    empty: Empty = "mask",
    normalize: bool = False,
    texts: PairTexts | None = None,
) -> Tensor:
    """Build the prototypes whose products with the features are the scores of :func:`retrieve`.

    Args:
        features: ``[batch, dim]``; any norm.
        sources: As in :func:`retrieve`.
        pair_index: Which pairs' prototypes to build, long ``[pairs]``, each in ``[0, num_pairs)``.
        num_pairs: As in :func:`retrieve`, and so are the other options.
        slots: See there.
        temperature: See there.
        empty: See there.
        normalize: See there.
        texts: See there.

    Returns:
        ``[batch, pairs, dim]``; zeros for pairs without entries.

    Raises:
        TypeError, ValueError: As :func:`retrieve`.

    Example:
        >>> entries = torch.eye(2), torch.tensor([0, 2])
        >>> retrieve_prototypes(torch.ones(1, 2), [entries], torch.tensor([2, 1]), num_pairs=3, slots=1)
        tensor([[[0., 1.],
                 [0., 0.]]])
    """
    _check_retrieval(features, sources, num_pairs, slots, temperature, empty, texts)
    check_tensor("pair_index", pair_index, dtypes=(torch.long,))
    check_shapes(pair_index=(pair_index, "pairs"))
    with no_autocast(features.device):
        dtype = _dtype(features, sources, texts)
        features = F.normalize(features.to(dtype), dim=-1)
        rows, filled = _dense_rows(sources, texts, pair_index, slots, dtype, features)
        logits = torch.einsum("bd,cnd->bcn", features, rows) / temperature
        # Zero vectors take part in the softmax, but do not turn a prototype whose length is divided out.
        if empty == "mask" or normalize:
            logits = logits.masked_fill(~filled & filled.any(dim=1, keepdim=True), -torch.inf)
        prototypes = torch.einsum("bcn,cnd->bcd", logits.softmax(dim=-1), rows)
        return prototypes / _safe_root(prototypes.square().sum(dim=-1, keepdim=True)) if normalize else prototypes


def _dense_rows(
    sources: Sources,
    texts: PairTexts | None,
    pair_index: Tensor,
    slots: int,
    dtype: torch.dtype,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """The rows of some pairs with all slots, zeros in free ones ``[pairs, slots, dim]``, and which are filled."""
    blocks = [(like.new_zeros(0, like.shape[1]), pair_index[:0]), *sources]
    vectors = torch.cat([block.to(dtype) for block, _ in blocks])
    pair_of, order = torch.cat([index for _, index in blocks]).sort(stable=True)
    start, stop = (torch.searchsorted(pair_of, pair_index, right=right)[:, None] for right in (False, True))
    rank = torch.arange(slots, device=pair_index.device)
    filled = start + rank < stop
    rows = like.new_zeros(len(pair_index), slots, like.shape[1])
    if len(vectors) > 0:
        found = vectors[order[(start + rank).clamp(max=len(vectors) - 1)]]
        rows = torch.where(filled[..., None], found, rows)
    if texts is not None and len(texts.vectors) > 0:
        row = _rows_of(texts, pair_index)[:, None]
        free = (rank == stop - start) & (row >= 0)
        rows = torch.where(free[..., None], texts.vectors[row.clamp(min=0)].to(dtype), rows)
        filled = filled | free
    return rows, filled


def _check_retrieval(
    features: Tensor,
    sources: Sources,
    num_pairs: int,
    slots: int,
    temperature: float,
    empty: Empty,
    texts: PairTexts | None,
) -> None:
    check_tensor("features", features)
    for vectors, pair_index in sources:
        check_tensor("vectors", vectors)
        check_tensor("pair_index", pair_index, dtypes=(torch.long,))
        check_shapes(
            features=(features, "batch dim"), vectors=(vectors, "entries dim"), pair_index=(pair_index, "entries")
        )
    check_integer("num_pairs", num_pairs, 1)
    check_integer("slots", slots, 1)
    check_positive("temperature", temperature)
    check_choice("empty", empty, ("mask", "zero"))
    if texts is None and not sources:
        raise ValueError("expected `sources` to be at least one block of entries where there are no `texts`, got none")
    if texts is not None:
        check_tensor("texts.vectors", texts.vectors)
        axes = "texts" if texts.row is not None else str(num_pairs)
        check_shapes(**{"features": (features, "batch dim"), "texts.vectors": (texts.vectors, f"{axes} dim")})
        if texts.row is not None:
            check_tensor("texts.row", texts.row, dtypes=(torch.long,))
            check_shapes(**{"texts.row": (texts.row, str(num_pairs))})


def _dtype(features: Tensor, sources: Sources, texts: PairTexts | None) -> torch.dtype:
    others = [] if texts is None else [texts.vectors]
    return score_dtype(features, *(vectors for vectors, _ in sources), *others)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _safe_root(squared: Tensor) -> Tensor:
    return squared.clamp(min=torch.finfo(squared.dtype).eps).sqrt()
