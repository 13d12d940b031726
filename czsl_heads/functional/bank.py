"""A memory of the most certain vectors of every pair: what stays (best-N by entropy) and how it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from czsl_heads._checks import check_choice, check_integer, check_positive, check_shapes, check_tensor
from czsl_heads.functional.precision import no_autocast, score_dtype

Empty = Literal["mask", "zero"]
Sources = Sequence[tuple[Tensor, Tensor]]


def merge_best(pair_index: Tensor, entropy: Tensor, *, num_pairs: int, slots: int) -> Tensor:
    """Choose of every pair the ``slots`` entries of smallest entropy; among equals the earlier ones.

    The order is total, so what stays is the same whether entries come one by one (each replacing the worst of its row
    if strictly better), in batches (what stayed so far goes in front of what is new) or all at once.

    Args:
        pair_index: Row of each entry in order of arrival, long ``[entries]``; ``num_pairs`` marks what never stays.
        entropy: ``[entries]``.
        num_pairs: How many rows there are.
        slots: How many entries a row holds.

    Returns:
        Indices of the entries that stay, long, sorted by pair, then entropy, then arrival.

    Raises:
        TypeError: ``pair_index`` is not long, ``entropy`` no float tensor, or a size no integer.
        ValueError: The shapes do not fit, or a size is out of range.

    Example:
        >>> pair_index, entropy = torch.tensor([1, 0, 1, 1]), torch.tensor([0.5, 0.9, 0.1, 0.5])
        >>> merge_best(pair_index, entropy, num_pairs=2, slots=2)
        tensor([1, 2, 0])

    References:
        Zhang et al., SAM, CVPR 2026 (SAC), Eq. 9.
    """
    check_tensor("pair_index", pair_index, dtypes=(torch.long,))
    check_tensor("entropy", entropy)
    check_shapes(pair_index=(pair_index, "entries"), entropy=(entropy, "entries"))
    check_integer("num_pairs", num_pairs, 1)
    check_integer("slots", slots, 1)
    order = entropy.argsort(stable=True)
    order = order[pair_index[order].argsort(stable=True)]
    pair_index = pair_index[order]
    return order[(_sorted_ranks(pair_index) < slots) & (pair_index < num_pairs)]


def arrival_ranks(pair_index: Tensor) -> Tensor:
    """How many entries of the same pair came before each, long ``[entries]``.

    Example:
        >>> arrival_ranks(torch.tensor([4, 2, 4, 4, 2]))
        tensor([0, 0, 1, 2, 1])
    """
    order = pair_index.argsort(stable=True)
    return torch.empty_like(order).scatter(0, order, _sorted_ranks(pair_index[order]))


def _sorted_ranks(pair_index: Tensor) -> Tensor:
    position = torch.arange(len(pair_index), device=pair_index.device)
    begins = F.pad(pair_index[1:] != pair_index[:-1], (1, 0), value=True)[: len(pair_index)]
    return position - (position * begins).cummax(dim=0).values


def row_counts(pair_index: Tensor, num_pairs: int) -> Tensor:
    """How many entries each pair has, long ``[num_pairs + 1]``: the last counts those marked as unused.

    Example:
        >>> row_counts(torch.tensor([2, 0, 2, 3]), num_pairs=3)
        tensor([1, 0, 2, 1])
    """
    return pair_index.new_zeros(num_pairs + 1).index_add(0, pair_index, torch.ones_like(pair_index))


def prediction_entropy(probs: Tensor) -> Tensor:
    r"""Natural entropy of each row, with :math:`0 \log 0 = 0`.

    .. math:: H_b = -\sum_c p_{bc} \log p_{bc}

    A row gives the same bits whatever rows stand beside it.

    Args:
        probs: ``[batch, pairs]``.

    Returns:
        ``[batch]``, float64 if ``probs`` is, else float32.

    Raises:
        TypeError, ValueError: ``probs`` is no float tensor of two axes, or has no column.

    Example:
        >>> prediction_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.6931, 0.0000])
    """
    check_tensor("probs", probs)
    check_integer("probs.shape[1]", check_shapes(probs=(probs, "batch pairs"))["pairs"], 1)
    return _row_sums_in_place(torch.special.entr(probs.to(score_dtype(probs))))


def unit_rows(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Scale rows to length one; a row gives the same bits whatever rows stand beside it.

    Args:
        vectors: ``[batch, dim]``.

    Returns:
        The unit rows, float64 if ``vectors`` is, else float32, and a bool ``[batch]``: True where there is a
        direction, that is a length above zero and finite. Other rows are left without meaning.

    Raises:
        TypeError, ValueError: ``vectors`` is no float tensor of two axes, or has no column.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [1.0, torch.nan]]))[1]
        tensor([ True, False])
    """
    check_tensor("vectors", vectors)
    check_integer("vectors.shape[1]", check_shapes(vectors=(vectors, "batch dim"))["dim"], 1)
    vectors = vectors.to(score_dtype(vectors))
    length = _row_sums_in_place(vectors * vectors).sqrt()
    return vectors / length[:, None], (length > 0) & length.isfinite()


def _row_sums_in_place(values: Tensor) -> Tensor:
    """Sums over the last axis by halving: the order of torch's own sum depends, on a GPU, on the number of rows."""
    size = values.shape[1]
    while size > 1:
        half = (size + 1) // 2
        values[:, : size - half] += values[:, half:size]
        size = half
    return values[:, 0].clone()


def retrieve(
    features: Tensor,
    sources: Sources,
    *,
    num_pairs: int,
    slots: int,
    temperature: float = 0.1,
    empty: Empty = "mask",
    normalize: bool = False,
) -> Tensor:
    r"""Inner product of each feature with the prototype that it retrieves from the entries of each pair.

    With :math:`s_j = \langle f, B_{ij} \rangle` for the entries of pair :math:`i`,

    .. math:: w = \mathrm{softmax}_j(s_j / T), \qquad \langle f, \textstyle\sum_j w_j B_{ij} \rangle = \sum_j w_j s_j

    so that no prototype is built. On CUDA sums over a row are atomic, and repeat their bits only under
    :func:`torch.use_deterministic_algorithms`.

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
    _check_retrieval(features, sources, num_pairs, slots, temperature, empty)
    with no_autocast(features.device):
        weights, cosines, pair_index = _attend(features, sources, num_pairs, slots, temperature, empty, normalize)
        scores = _sum_by_pair(weights * cosines, pair_index, num_pairs)
        if normalize:
            scores = scores / _lengths(weights, sources, pair_index, num_pairs, slots)
    scores = scores[:, :num_pairs]
    if empty == "mask":
        vacant = row_counts(pair_index, num_pairs)[:num_pairs] == 0
        scores = scores.masked_fill(vacant & ~vacant.all(), -torch.inf)
    return scores


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
    _check_retrieval(features, sources, num_pairs, slots, temperature, empty)
    check_tensor("pair_index", pair_index, dtypes=(torch.long,))
    check_shapes(pair_index=(pair_index, "pairs"))
    with no_autocast(features.device):
        weights, _, pair_of = _attend(features, sources, num_pairs, slots, temperature, empty, normalize)
        counts = row_counts(pair_of, num_pairs)
        rank = torch.arange(slots, device=pair_of.device)
        position = (counts.cumsum(0) - counts)[pair_index][:, None] + rank  # [pairs, slots], among entries by pair
        # One entry more, of weight zero, stands for free slots.
        nothing = pair_of.shape[0]
        position = torch.where(rank < counts[pair_index][:, None], position, nothing)
        entry = F.pad(pair_of.argsort(stable=True), (0, 1), value=nothing)[position]
        vectors = _take(sources, entry).to(weights.dtype)
        prototypes = torch.einsum("bcn,cnd->bcd", F.pad(weights, (0, 1))[:, entry], vectors)
        return prototypes / _safe_root(prototypes.square().sum(dim=-1, keepdim=True)) if normalize else prototypes


def _check_retrieval(
    features: Tensor, sources: Sources, num_pairs: int, slots: int, temperature: float, empty: Empty
) -> None:
    check_tensor("features", features)
    for vectors, pair_index in sources:
        check_tensor("vectors", vectors)
        check_tensor("pair_index", pair_index, dtypes=(torch.long,))
        check_shapes(
            features=(features, "batch dim"), vectors=(vectors, "entries dim"), pair_index=(pair_index, "entries")
        )
    if not sources:
        raise ValueError("expected `sources` to be at least one block of entries, got none")
    check_integer("num_pairs", num_pairs, 1)
    check_integer("slots", slots, 1)
    check_positive("temperature", temperature)
    check_choice("empty", empty, ("mask", "zero"))


def _attend(
    features: Tensor,
    sources: Sources,
    num_pairs: int,
    slots: int,
    temperature: float,
    empty: Empty,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight of each entry in its pair's softmax, its cosine, both ``[batch, entries]``, and the pair of each."""
    dtype = score_dtype(features, *(vectors for vectors, _ in sources))
    features = F.normalize(features.to(dtype), dim=-1)
    cosines = torch.cat([features @ vectors.to(dtype).mT for vectors, _ in sources], dim=1)
    pair_index = torch.cat([pair_index for _, pair_index in sources])
    counts = row_counts(pair_index, num_pairs)
    # Divided by their length, prototypes with and without zero vectors are equal; without, they are never tiny.
    dilute = empty == "zero" and not normalize
    zeros = (slots - counts).clamp(min=0) if dilute else torch.zeros_like(counts)
    return _softmax_by_pair(cosines / temperature, pair_index, zeros), cosines, pair_index


def _softmax_by_pair(scores: Tensor, pair_index: Tensor, zeros: Tensor) -> Tensor:
    """Softmax over the entries of a pair and, beside them, ``zeros[pair]`` scores of 0."""
    floor = torch.zeros_like(zeros, dtype=scores.dtype).masked_fill(zeros == 0, -torch.inf)
    peak = floor.repeat(scores.shape[0], 1).scatter_reduce(1, pair_index.expand_as(scores), scores.detach(), "amax")
    weights = (scores - peak[:, pair_index]).exp()
    # Where there are zeros the peak is not negative, so that the clamp only keeps inf from the other rows.
    total = (zeros * (-peak.clamp(min=0)).exp()).index_add(1, pair_index, weights)
    return weights / total[:, pair_index]


def _sum_by_pair(values: Tensor, pair_index: Tensor, num_pairs: int) -> Tensor:
    return values.new_zeros(values.shape[0], num_pairs + 1).index_add(1, pair_index, values)


def _lengths(weights: Tensor, sources: Sources, pair_index: Tensor, num_pairs: int, slots: int) -> Tensor:
    """Length of each prototype from the products of its entries, without a prototype of each sample and pair."""
    order = pair_index.argsort(stable=True)
    weights, pair_index, vectors = weights[:, order], pair_index[order], _take(sources, order).to(weights.dtype)
    squared = _sum_by_pair(weights.square() * vectors.square().sum(dim=1), pair_index, num_pairs)
    for step in range(
        1, min(slots, pair_index.shape[0])
    ):  # entries of one pair are neighbours, less than `slots` apart
        products = (vectors[:-step] * vectors[step:]).sum(dim=1) * (pair_index[:-step] == pair_index[step:])
        both = 2 * weights[:, :-step] * weights[:, step:] * products
        squared = squared + _sum_by_pair(both, pair_index[step:], num_pairs)
    return _safe_root(squared)


def _safe_root(squared: Tensor) -> Tensor:
    return squared.clamp(min=torch.finfo(squared.dtype).eps).sqrt()


def _take(sources: Sources, entry: Tensor) -> Tensor:
    """Rows of the blocks as if concatenated, which would copy them; zeros for the index after the last."""
    dtype = score_dtype(*(vectors for vectors, _ in sources))
    rows = torch.zeros(*entry.shape, sources[0][0].shape[1], dtype=dtype, device=entry.device)
    first = 0
    for vectors, _ in sources:
        inside = (entry >= first) & (entry < first + len(vectors))
        if len(vectors) > 0:
            found = vectors[(entry - first).clamp(0, len(vectors) - 1)].to(dtype)
            rows = torch.where(inside[..., None], found, rows)
        first += len(vectors)
    return rows
