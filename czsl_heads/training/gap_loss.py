"""A loss that closes the gap, beside whatever a method is trained by; over the batch of all processes together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from czsl_heads.functional.gap_losses import GapLoss, gap_loss


def add_gap_loss(
    losses: dict[str, Tensor], vectors: Tensor, texts: Tensor, targets: Tensor, *, kind: GapLoss, weight: float
) -> dict[str, Tensor]:
    """Losses with one more term, of the images of a batch and the texts of the pairs that are in it.

    The method's own cross-entropy is the contrastive part of CUA and CUAXU, so that only the rest is added. Under
    several processes the batch is that of all of them. Each computes the whole loss, and the mean of their gradients,
    which is what data-parallel training takes, is the gradient of one process with the whole batch.

    Args:
        losses: Terms, with their sum as ``"loss"``.
        vectors: What stands for each image, ``[batch, dim]``.
        texts: Of all training pairs, ``[pairs, dim]``.
        targets: Rows of texts, long ``[batch]``.
        kind: ``"cua"`` or ``"cuaxu"``.
        weight: Of the new term in the sum.

    Returns:
        The same with ``"loss_gap"``, unweighted, and the new sum.
    """
    vectors, targets = _of_all_processes(vectors, targets)
    present, labels = targets.unique(return_inverse=True)
    term = gap_loss(kind, vectors, texts[present], labels)
    return losses | {"loss_gap": term, "loss": losses["loss"] + weight * term}


def _of_all_processes(vectors: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all processes, in their order, with gradients; each has as many."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return vectors, targets
    rows: Tensor = _Gathered.apply(vectors)
    return rows, _gathered(targets)


class _Gathered(torch.autograd.Function):
    """The rows of all processes; a row's gradient is the sum of those that the processes have for it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _gathered(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def _gathered(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    of_ranks = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(of_ranks, rows)
    return torch.cat(of_ranks)
