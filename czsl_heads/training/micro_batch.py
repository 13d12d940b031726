"""A training step in parts: texts encoded once, images a few at a time, the gradients of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from czsl_heads._checks import check_integer, check_positive
from czsl_heads.functional.precision import no_autocast
from czsl_heads.prompts.soft import TextFeatures

Losses = Callable[[Any, TextFeatures], dict[str, Tensor]]


def losses_in_parts(
    losses: Losses,
    batch: Sequence[Any],
    texts: TextFeatures,
    parameters: Sequence[Tensor],
    *,
    size: int,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    r"""Losses of a batch of which only a part is held in memory at once.

    .. math:: \mathcal L = \sum_m \frac{B_m}{B} \mathcal L_m

    Each part is run forward and backward before the next one, as far as the parameters and the text features; what is
    left for ``backward()`` of the result is to multiply those gradients and to run what made the text features, once.
    So it is a loss like any other to an optimiser, to gradient accumulation, to hooks on parameters and to a gradient
    scaler, but it has no second derivative, and ``torch.compile`` is for ``losses`` alone.

    Args:
        losses: From a part of the batch and text features to scalars, means over the images of the part, of which
            ``"loss"`` is minimised.
        batch: Tensors, or sequences of such, which have one row an image; the last one is a tensor.
        texts: Features that ``losses`` takes, with the graph that made them.
        parameters: Leaves that need a gradient and that ``losses`` may depend on otherwise than through the texts.
        size: Images of a part, at least 1; the last part may have fewer.
        scale: The loss is multiplied by it in its backward passes, and the gradients divided: the factor of a gradient
            scaler, without which small gradients of float16 activations would be lost.

    Returns:
        The scalars of the whole batch; only ``"loss"`` has gradients.

    Raises:
        TypeError, ValueError: ``size`` or ``scale`` is no number or out of range.

    Example:
        >>> weight = torch.tensor([2.0], requires_grad=True)
        >>> texts = TextFeatures(*(torch.ones(3, 1, requires_grad=True) for _ in range(3)))
        >>> def losses(part, texts):
        ...     return {"loss": (weight * part[0] * texts.pairs[0]).mean()}
        >>> whole = losses_in_parts(losses, [torch.tensor([1.0, 2.0, 6.0])], texts, [weight], size=2)
        >>> whole["loss"].backward()
        >>> whole["loss"].item(), weight.grad
        (6.0, tensor([3.]))
    """
    check_integer("size", size, 1)
    check_positive("scale", scale)
    leaves = TextFeatures(*(rows.detach().requires_grad_(rows.requires_grad) for rows in texts))
    needed = [rows.requires_grad for rows in texts]
    inputs = [*(leaf for leaf, need in zip(leaves, needed) if need), *parameters]
    totals: dict[str, Tensor] = {}
    gradients: list[Tensor | None] = [None] * len(inputs)
    for part in _split(batch, size):
        share = len(part[-1]) / len(batch[-1])
        terms = losses(part, leaves)
        with no_autocast(terms["loss"].device):  # a backward pass has the dtypes of its forward pass
            found = torch.autograd.grad(scale * share * terms["loss"], inputs, allow_unused=True)
        gradients = [*map(_sum, gradients, found)]
        totals = {name: _sum(totals.get(name), share * value.detach()) for name, value in terms.items()}  # type: ignore[misc]
    sources = [*(rows for rows, need in zip(texts, needed) if need), *parameters]
    return totals | {"loss": _Known.apply(totals["loss"], scale, gradients, *sources)}


def _split(batch: Any, size: int) -> list[Any]:
    if isinstance(batch, Tensor):
        return [*batch.split(size)]
    parts = zip(*(_split(part, size) for part in batch))
    return [*(map(batch._make, parts) if hasattr(batch, "_make") else parts)]


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    # Not in place: gradients may share their memory.
    return total if more is None else more if total is None else total + more


class _Known(torch.autograd.Function):
    """A number whose gradients, times a scale, are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float, gradients: list[Tensor | None], *sources: Tensor) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad / ctx.scale
        return None, None, None, *(None if known is None else factor * known for known in ctx.saved_tensors)
