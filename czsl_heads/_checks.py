"""The one place that turns a wrong argument into a sentence: argument, expected, got."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: Any, *, dtypes: tuple[torch.dtype, ...] | None = FLOATS) -> None:
    """Raise TypeError unless ``value`` is a tensor of one of ``dtypes`` (``None``: any)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected `{name}` to be a torch.Tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        wanted = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"expected `{name}` of dtype {wanted}, got {value.dtype}")


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise TypeError unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"expected `{name}` to be a {kind.__name__}, got {type(value).__name__}")


def check_shapes(**named: tuple[Tensor, str]) -> dict[str, int]:
    """Match tensors to axis names (``"batch tokens dim"``); a name means one size across all of them.

    Returns the sizes by name. Raises ValueError with the offending tensor, the axes expected and the sizes so far.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, axes) in named.items():
        expected = [int(axis) if axis.isdigit() else axis for axis in axes.split()]
        known = dict(sizes)
        fits = tensor.ndim == len(expected) and all(
            size == (axis if isinstance(axis, int) else sizes.setdefault(axis, size))
            for axis, size in zip(expected, tensor.shape)
        )
        if not fits:
            text = ", ".join(f"{axis}={size}" for axis, size in known.items())
            where = f" with {text}" if text else ""
            raise ValueError(
                f"expected `{name}` of shape ({axes.replace(' ', ', ')}){where}, got {tuple(tensor.shape)}"
            )
    return sizes


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise TypeError unless ``value`` is a real number, ValueError unless ``low <= value <= high``; NaN is not."""
    _check_number(name, value)
    _check_bounds(name, value, low, high)


def check_integer(name: str, value: Any, low: int, high: float = math.inf) -> None:
    """Raise TypeError unless ``value`` is an integer (of any library, but no bool), ValueError unless in range."""
    if not _is_integer(value):
        raise TypeError(f"expected `{name}` to be an integer, got {value!r}")
    _check_bounds(name, value, low, high)


def check_positive(name: str, value: float) -> None:
    """Raise TypeError unless ``value`` is a real number, ValueError unless it is above zero and finite."""
    _check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"expected `{name}` to be positive and finite, got {value}")


def check_scale(name: str, value: float | Tensor) -> float:
    """The number in ``value``, a positive number or a scalar tensor.

    Raise TypeError or ValueError unless it is one; ValueError too where a gradient would be lost by reading it.
    """
    if isinstance(value, Tensor):
        check_shapes(**{name: (value, "")})
        if value.requires_grad:
            raise ValueError(
                f"expected `{name}` to be a constant, got a tensor that requires grad, which would get no gradient; "
                f"pass it to each call, or its detached value here"
            )
        value = float(value)
    check_positive(name, value)
    return value


def check_index(name: str, index: Tensor, size: int, *, wait: bool = False) -> None:
    """Raise ValueError unless all of ``index`` are in ``[0, size - 1]``.

    A GPU is not waited for, unless ``wait``: there, and in a compiled graph, a wrong index stops the device instead.
    Where tensors have no values, as in a transform or on the meta device, nothing is checked.
    """
    message = f"expected `{name}` to be in [0, {size - 1}]" if size > 0 else f"expected `{name}` of no index at all"
    inside = ((index >= 0) & (index < size)).all()
    if has_values(index) and (wait or index.device.type != "cuda"):
        if not inside:
            wrong = index[(index < 0) | (index >= size)]
            raise ValueError(f"{message}, got {int(wrong[0])}")
    elif torch.compiler.is_compiling() or (type(index) is Tensor and index.device.type == "cuda"):
        torch._assert_async(inside, message)


def has_values(tensor: Tensor) -> bool:
    """Whether a branch may depend on the values of a tensor: not while a graph is written, nor inside a transform."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or tensor.is_meta:
        return False
    if not isinstance(tensor, torch.nn.Parameter) and type(tensor) is not Tensor:
        return False
    written = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    return not written and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_scalar(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a float tensor, ValueError unless it is a scalar."""
    check_tensor(name, value)
    check_shapes(**{name: (value, "")})


def _check_bounds(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        bound = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"expected `{name}` to be {bound}, got {value}")


def _is_integer(value: Any) -> bool:
    if isinstance(value, (int, torch.SymInt)):  # a size that torch.export leaves open must not be asked for its value
        return not isinstance(value, bool)
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"expected `{name}` to be a number, got {value!r}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"expected `{name}` to be one of {', '.join(choices)}, got {value!r}")
