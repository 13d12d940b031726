"""In how many directions vectors vary: what each principal component explains, and the effective rank."""

from __future__ import annotations

import torch
from torch import Tensor

from czsl_heads._checks import check_integer, check_shapes, check_tensor
from czsl_heads.functional.unit import wide_unit_rows


def explained_variance(vectors: Tensor) -> Tensor:
    """The share of the variance that each principal component explains, of vectors of length one.

    Args:
        vectors: ``[vectors, dim]``; any norm but zero.

    Returns:
        Shares ``[min(vectors, dim)]``, largest first, with sum one; all zero if the vectors are equal. Computed and
        returned in float64 (float32 on devices without it).

    Raises:
        TypeError: ``vectors`` is no float tensor.
        ValueError: It has another shape or fewer than two rows, or a row is zero.

    Example:
        >>> explained_variance(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([1., 0.], dtype=torch.float64)

    References:
        Schrodi et al., Two Effects, One Trigger, ICLR 2025: few components make up most of the gap.
    """
    return _shares(_singular_values(vectors).square())


def effective_rank(vectors: Tensor) -> Tensor:
    r"""In how many directions vectors vary: the exponential of the entropy of their singular values.

    .. math:: \exp\Bigl(-\sum_k p_k \log p_k\Bigr), \qquad p_k = \sigma_k / \sum_l \sigma_l

    Args:
        vectors: ``[vectors, dim]``; any norm but zero; scaled to length one, and their mean is taken away.

    Returns:
        Scalar in [1, dim]: ``dim`` if they vary in all directions alike, 0 if they do not vary. Computed and returned
        in float64 (float32 on devices without it).

    Raises:
        TypeError, ValueError: As :func:`explained_variance`.

    Example:
        >>> round(effective_rank(torch.cat([torch.eye(3), -torch.eye(3)])).item(), 4)
        3.0

    References:
        Roy and Vetterli, The Effective Rank, EUSIPCO 2007.
    """
    shares = _shares(_singular_values(vectors))
    if not shares.any():
        return shares.sum()
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy.exp()


def _singular_values(vectors: Tensor) -> Tensor:
    check_tensor("vectors", vectors)
    check_integer("vectors.shape[0]", check_shapes(vectors=(vectors, "vectors dim"))["vectors"], 2)
    unit = wide_unit_rows("vectors", vectors)
    if not unit.isfinite().all():
        return unit.new_full((min(unit.shape),), torch.nan)
    values: Tensor = torch.linalg.svdvals(unit - unit.mean(dim=0))
    # what rounding leaves of directions in which nothing varies
    noise = torch.finfo(values.dtype).eps * len(unit)
    return values.masked_fill(values <= noise, 0.0)


def _shares(values: Tensor) -> Tensor:
    total = values.sum()
    return values / total if total != 0 else values
