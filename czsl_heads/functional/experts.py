"""Low-rank experts of which each token is sent to a few: routing, and the two ways to compute the mixture."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from czsl_heads._checks import check_choice, check_integer, check_shapes, check_tensor

Dispatch = Literal["auto", "sparse", "joined"]
DISPATCHES: tuple[Dispatch, ...] = ("auto", "sparse", "joined")
# On a CPU tokens are moved if each move spares at least so many hidden units (benchmarks/experts.py).
_SPARED_UNITS = 100


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    r"""Choose the ``k`` best experts of each token, and weigh them by a softmax over these alone.

    Args:
        logits: Of the router, ``[..., experts]``.
        k: Experts of each token, in ``[1, experts]``.

    Returns:
        Weights ``[..., k]``, which sum to one, best expert first, and the experts ``[..., k]``, long. Of equal logits
        the first expert wins.

    Raises:
        TypeError, ValueError: ``logits`` is no float tensor, or ``k`` out of range.

    Example:
        >>> weights, experts = route(torch.tensor([0.0, 2.0, 2.0]), 2)
        >>> weights, experts
        (tensor([0.5000, 0.5000]), tensor([1, 2]))

    References:
        Shazeer et al., Outrageously Large Neural Networks, ICLR 2017 (here without noise).
    """
    check_tensor("logits", logits)
    check_integer("k", k, 1, logits.shape[-1])
    best = logits.sort(dim=-1, descending=True, stable=True)  # topk leaves open which of equals it takes
    return best.values[..., :k].softmax(dim=-1), best.indices[..., :k]


def mix_experts(
    tokens: Tensor, down: Tensor, up: Tensor, weights: Tensor, experts: Tensor, *, dispatch: Dispatch = "auto"
) -> Tensor:
    r"""The weighed sum of what each token's experts make of it, :math:`\sum_i g_i B_i A_i x`.

    Args:
        tokens: ``[tokens, dim]``.
        down: The matrices :math:`A`, ``[experts, rank, dim]``.
        up: The matrices :math:`B`, ``[experts, dim, rank]``.
        weights: Of :func:`route`, ``[tokens, k]``.
        experts: Of :func:`route`, long ``[tokens, k]``; those of one token differ.
        dispatch: ``"sparse"``: each expert sees its own tokens, so that the cost grows with ``k`` and not with the
            number of experts. ``"joined"``: all experts are two products, in which those that were not chosen have
            weight zero; at low ranks this is less work than to move tokens. ``"auto"``: by the sizes, as measured on a
            CPU; joined on any other device.

    Returns:
        ``[tokens, dim]``, in the dtype of ``tokens``.

    Raises:
        TypeError, ValueError: An input is of another kind or shape, or ``dispatch`` is unknown.

    Example:
        >>> down, up = torch.ones(3, 1, 4), torch.ones(3, 4, 1)
        >>> weights, experts = route(torch.tensor([[0.0, 1.0, 1.0]]), 2)
        >>> mix_experts(torch.ones(1, 4), down, up, weights, experts)
        tensor([[4., 4., 4., 4.]])

    References:
        Zhang et al., EVA, ICLR 2026: mixture of LoRA experts.
    """
    for name, tensor in (("tokens", tokens), ("down", down), ("up", up), ("weights", weights)):
        check_tensor(name, tensor)
    check_tensor("experts", experts, dtypes=(torch.long,))
    sizes = check_shapes(
        tokens=(tokens, "tokens dim"),
        down=(down, "experts rank dim"),
        up=(up, "experts dim rank"),
        weights=(weights, "tokens k"),
        experts=(experts, "tokens k"),
    )
    check_choice("dispatch", dispatch, DISPATCHES)
    down, up, weights = (tensor.to(tokens.dtype) for tensor in (down, up, weights))
    sparse = moves_tokens(dispatch, tokens.device, experts=sizes["experts"], rank=sizes["rank"], k=sizes["k"])
    mix = _mix_sparse if sparse else _mix_joined
    return mix(tokens, down, up, weights, experts)


def moves_tokens(dispatch: Dispatch, device: torch.device, *, experts: int, rank: int, k: int) -> bool:
    """Whether tokens are moved to their experts (``"sparse"``), which ``"auto"`` decides by device and sizes."""
    if dispatch != "auto":
        return dispatch == "sparse"
    return device.type == "cpu" and (experts - k) * rank >= _SPARED_UNITS * k


def gates(weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Weights of all experts ``[..., experts]``, zero where one was not chosen, from those of :func:`route`."""
    return weights.new_zeros(*weights.shape[:-1], num_experts).scatter(-1, experts, weights)


def _mix_joined(tokens: Tensor, down: Tensor, up: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    num_experts, rank, _ = down.shape
    hidden = F.linear(tokens, down.flatten(0, 1))  # [tokens, experts * rank]
    of_units = gates(weights, experts, num_experts).repeat_interleave(rank, dim=1)
    mixed: Tensor = F.linear(hidden * of_units, up.transpose(0, 1).flatten(1))
    return mixed


def _mix_sparse(tokens: Tensor, down: Tensor, up: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Tokens are sorted by expert; each expert multiplies a slice of them."""
    count, k = experts.shape
    order = experts.flatten().argsort(stable=True)  # [tokens * k], of (token, choice)
    sizes = experts.flatten().bincount(minlength=len(down)).tolist()
    sorted_tokens = tokens.index_select(0, order // k)

    parts = []
    for number, own in enumerate(sorted_tokens.split(sizes)):
        if len(own):
            parts.append(F.linear(own, down[number]))
    hidden = torch.cat(parts) if parts else tokens.new_zeros(0, down.shape[1])
    hidden = hidden * weights.flatten().index_select(0, order)[:, None]  # where vectors are shortest

    raised = []
    for number, own in enumerate(hidden.split(sizes)):
        if len(own):
            raised.append(F.linear(own, up[number]))
    mixed = torch.cat(raised) if raised else tokens[:0]
    # Back by the inverse order, and summed over choices: a scatter-add would sum in any order on a GPU.
    by_choice: Tensor = mixed.index_select(0, order.argsort()).unflatten(0, (count, k))
    return by_choice.sum(dim=1)
