"""What a memory of the most certain vectors of every pair keeps: the best N by entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from czsl_heads._checks import check_integer, check_shapes, check_tensor
from czsl_heads.functional.precision import score_dtype
from czsl_heads.functional.unit import row_sums_in_place

# Columns that a CPU holds in its cache for a batch of usual size, where all pairs of an open world would not fit.
CACHED_COLUMNS = 2048


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
    order, stays = rank_best(pair_index, entropy, num_pairs=num_pairs, slots=slots)
    return order[stays]


def rank_best(pair_index: Tensor, entropy: Tensor, *, num_pairs: int, slots: int) -> tuple[Tensor, Tensor]:
    """All entries as :func:`merge_best` sorts them, and which of these it chooses.

    The shapes do not depend on values, so that a GPU need not be waited for.

    Args:
        pair_index, entropy, num_pairs, slots: As in :func:`merge_best`.

    Returns:
        Indices sorted by pair, entropy and arrival, long ``[entries]``, and a bool for each of them ``[entries]``.

    Raises:
        TypeError, ValueError: As :func:`merge_best`.

    Example:
        >>> rank_best(torch.tensor([1, 0, 1]), torch.tensor([0.5, 0.9, 0.1]), num_pairs=2, slots=1)
        (tensor([1, 2, 0]), tensor([ True,  True, False]))
    """
    check_tensor("pair_index", pair_index, dtypes=(torch.long,))
    check_tensor("entropy", entropy)
    check_shapes(pair_index=(pair_index, "entries"), entropy=(entropy, "entries"))
    check_integer("num_pairs", num_pairs, 1)
    check_integer("slots", slots, 1)
    order = entropy.argsort(stable=True)
    order = order[pair_index[order].argsort(stable=True)]
    pair_index = pair_index[order]
    return order, (_sorted_ranks(pair_index) < slots) & (pair_index < num_pairs)


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
    return position - (position * begins(pair_index)).cummax(dim=0).values


def begins(pair_index: Tensor) -> Tensor:
    """Which of sorted entries are the first of their pair."""
    return F.pad(pair_index[1:] != pair_index[:-1], (1, 0), value=True)[: len(pair_index)]


def row_counts(pair_index: Tensor, num_pairs: int) -> Tensor:
    """How many entries each pair has, long ``[num_pairs + 1]``: the last counts those marked as unused.

    Example:
        >>> row_counts(torch.tensor([2, 0, 2, 3]), num_pairs=3)
        tensor([1, 0, 2, 1])
    """
    return pair_index.new_zeros(num_pairs + 1).index_add(0, pair_index, torch.ones_like(pair_index))


class Judged(NamedTuple):
    """What a memory bank asks of predictions: all that decides on which vectors it keeps.

    Attributes:
        rows: The pair of each vector, long ``[batch]``; the number of pairs marks one that is not stored.
        entropy: ``[batch]``.
        finite: Whether the prediction is, bool ``[batch]``.
        good: Whether the batch that it came in has no fault, bool ``[batch]``.
    """

    rows: Tensor
    entropy: Tensor
    finite: Tensor
    good: Tensor


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
    size = check_shapes(probs=(probs, "batch pairs"))["pairs"]
    check_integer("probs.shape[1]", size, 1)
    dtype = score_dtype(probs)
    width = min(size, CACHED_COLUMNS) if probs.device.type == "cpu" else size
    total = torch.zeros(len(probs), width, dtype=dtype, device=probs.device)
    for columns in probs.split(width, dim=1):
        if columns.shape[1] < width:
            columns = F.pad(columns, (0, width - columns.shape[1]))
        columns = columns.to(dtype)
        total = torch.addcmul(total, columns, columns.clamp(min=torch.finfo(dtype).tiny).log(), value=-1)
    return row_sums_in_place(total)


def first_argmax(probs: Tensor) -> Tensor:
    """The first column of the largest value in each row, long ``[batch]``, as ``probs.argmax(dim=1)`` finds it.

    Of maxima over blocks of columns, which are vectorised on a CPU where the search for an index is not.

    Example:
        >>> first_argmax(torch.tensor([[0.1, 0.4, 0.1, 0.4]]))
        tensor([1])
    """
    width = min(probs.shape[1], CACHED_COLUMNS)
    blocks = torch.stack([columns.amax(dim=1) for columns in probs.split(width, dim=1)], dim=1)
    start = width * blocks.argmax(dim=1, keepdim=True)
    # Past the end the last column stands again; it is not the first of equals.
    columns = (start + torch.arange(width, device=probs.device)).clamp(max=probs.shape[1] - 1)
    return (start + probs.gather(1, columns).argmax(dim=1, keepdim=True)).squeeze(1)


def first_true(mask: Tensor, count: int) -> Tensor:
    """Where the first ``count`` true values are, long ``[count]``; ``len(mask)`` for those that there are not.

    Example:
        >>> first_true(torch.tensor([False, True, True, False]), 3)
        tensor([1, 2, 4])
    """
    rank = mask.cumsum(dim=0) - 1
    place = torch.arange(len(mask), device=mask.device)
    found = place.new_full((count + 1,), len(mask))
    return found.scatter(0, rank.where(mask & (rank < count), count), place)[:count]
