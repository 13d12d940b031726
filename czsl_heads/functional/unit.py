"""Vectors of length one, whatever length they come with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from czsl_heads._checks import check_integer, check_shapes, check_tensor, has_values
from czsl_heads.functional.precision import score_dtype

_SMALLEST = 1e-12  # divides what has no length
# Of each dtype: between which lengths their squares keep all digits, and a power of two that leads there from outside.
_SAFE = {torch.float32: (1e-12, 1e19, 2.0**100), torch.float64: (1e-100, 1e150, 2.0**800)}


def unit_vectors(vectors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Scale vectors to length one along the last axis.

    As ``torch.nn.functional.normalize``, to the bit, but also where the squares of a vector's elements overflow or
    vanish: such vectors are multiplied by a power of two first, which is exact.

    Args:
        vectors: ``[..., dim]``; any length. Zero vectors stay zero.
        dtype: In which to compute, float32 or float64; default: float64 if ``vectors`` are, else float32.

    Returns:
        ``[..., dim]`` in ``dtype``. A vector with NaN or an infinity gives NaN. The gradient grows as 1 / length.
        Torch's ``eps`` bounds it by 1e12; here this is so for zero vectors only.

    Example:
        >>> unit_vectors(torch.tensor([[3e-30, 4e-30], [3e30, 4e30], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    dtype = score_dtype(vectors) if dtype is None else dtype
    if vectors.dtype == torch.float16:  # too narrow a range to leave the safe one
        return F.normalize(vectors.to(dtype), dim=-1)

    vectors = vectors.to(dtype)
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    scale = _safe_scale(length)
    if scale is None:
        unit: Tensor = vectors / length
        return unit

    scaled = vectors * scale
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    # A zero vector is divided by what it was before scaling, so that its gradient is the usual one.
    return scaled / torch.where(length == 0, scale * _SMALLEST, length)


def unit_rows(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Scale rows to length one; a row gives the same bits whatever rows stand beside it.

    Args:
        vectors: ``[batch, dim]``.

    Returns:
        The unit rows, float64 if ``vectors`` is, else float32, and a bool ``[batch]``: True where there is a
        direction, that is where a row is finite and not zero. Other rows are left without meaning.

    Raises:
        TypeError, ValueError: ``vectors`` is no float tensor of two axes, or has no column.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [1.0, torch.nan]]))[1]
        tensor([ True, False])
    """
    check_tensor("vectors", vectors)
    check_integer("vectors.shape[1]", check_shapes(vectors=(vectors, "batch dim"))["dim"], 1)
    vectors = vectors.to(score_dtype(vectors))
    length = _lengths(vectors)

    scale = _safe_scale(length)
    if scale is not None:
        vectors = vectors * scale
        length = _lengths(vectors)
    return vectors / length, ((length > 0) & length.isfinite())[:, 0]


def wide_unit_rows(name: str, vectors: Tensor) -> Tensor:
    """Rows of length one in the widest float of the device; ValueError that names the argument if one is zero."""
    wide = vectors.to(torch.float32 if vectors.device.type == "mps" else torch.float64)
    zero = (wide == 0).all(dim=-1).nonzero()
    if len(zero):
        raise ValueError(f"expected `{name}` without zero vectors, got one in row {int(zero[0])}")
    return unit_vectors(wide)


def row_sums_in_place(values: Tensor) -> Tensor:
    """Sums over the last axis by halving: the order of torch's own sum depends, on a GPU, on the number of rows."""
    size = values.shape[1]
    while size > 1:
        half = (size + 1) // 2
        values[:, : size - half] += values[:, half:size]
        size = half
    return values[:, 0].clone()


def _lengths(vectors: Tensor) -> Tensor:
    """``[batch, dim]`` to ``[batch, 1]``."""
    return row_sums_in_place(vectors * vectors).sqrt()[:, None]


def _safe_scale(length: Tensor) -> Tensor | None:
    """By what to multiply vectors of these lengths, so that their squares keep all digits; None: by nothing."""
    length = length.detach()
    low, high, factor = _SAFE[length.dtype]
    looked_at = has_values(length) and length.device.type == "cpu"  # a GPU would be waited for
    if looked_at and _are_within(length, low, high):
        return None
    small, large = length < low, ~(length <= high)
    return torch.ones_like(length).masked_fill(small, factor).masked_fill(large, 1 / factor)


def _are_within(length: Tensor, low: float, high: float) -> bool:
    """Of NaN it is false."""
    if length.numel() == 0:
        return True
    least, most = torch.aminmax(length)
    return low <= least.item() and most.item() <= high
