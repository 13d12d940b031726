"""Large tensors in large pages of memory, which Linux hands out many times faster than small ones."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_HUGE = 2 * 2**20  # bytes of a page
_MADV_HUGEPAGE = 14


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As ``torch.empty`` on the CPU, of which pages may be large where the system has such: not on every one.

    A tensor of more than 32 MB is always new memory, and every 4 kB of it interrupts the process at the first touch.

    Args:
        shape, dtype: Of the tensor.

    Example:
        >>> empty_in_huge_pages((2, 3), torch.float32).shape
        torch.Size([2, 3])
    """
    tensor = torch.empty(shape, dtype=dtype)
    start = -(-tensor.data_ptr() // _HUGE) * _HUGE
    whole = (tensor.data_ptr() + tensor.nbytes - start) // _HUGE * _HUGE
    advise = _advise()
    if whole > 0 and advise is not None:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(whole), _MADV_HUGEPAGE)  # a wish, whose refusal changes nothing
    return tensor


@lru_cache
def _advise() -> Any:
    """The system's ``madvise``; None where it is not Linux."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
