"""The field's evaluation as a torchmetrics metric that keeps O(samples)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from czsl_heads._checks import check_choice, check_integer, check_kind, check_shapes, check_tensor
from czsl_heads.functional.protocol import CZSLResult, Evidence, Protocol, Scores, gather_evidence, sweep
from czsl_heads.space import CompositionSpace


class CZSLScore(Metric):
    """Seen and unseen accuracy, harmonic mean and area under the curve, gathered batch by batch.

    The class around :func:`czsl_heads.functional.czsl_scores`. Of each sample a handful of numbers is kept, whatever
    the number of pairs.

    Args:
        space: The label space; its order is that of the columns of the scores.
        eval_mask: Which pairs are candidates, bool ``[P]`` (``dataset.eval_mask(split)``); default: all.
        protocol: ``"standard"`` (the official code's numbers) or ``"exact"``.
        topk: A sample counts as right if its pair is among the ``topk`` best.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: An option or shape does not fit; in ``update``, a true pair is no candidate; in ``compute``, there
            is no sample, or a score was NaN or +inf.
        TypeError: ``space`` is no :class:`~czsl_heads.CompositionSpace`, ``topk`` no integer, or a tensor of the wrong
            kind.

    Example:
        >>> from czsl_heads import CompositionSpace
        >>> space = CompositionSpace(["old", "young"], ["cat"], seen=[("old", "cat")], unseen=[("young", "cat")])
        >>> score = CZSLScore(space)
        >>> score.update(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1]))
        >>> score.compute().unbiased.match
        1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    target: list[Tensor]
    score: list[Tensor]
    rivals: list[Tensor]
    best_seen: list[Tensor]
    primitives: list[Tensor]

    def __init__(
        self,
        space: CompositionSpace,
        *,
        eval_mask: Tensor | None = None,
        protocol: Protocol = "standard",
        topk: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_kind("space", space, CompositionSpace)
        check_choice("protocol", protocol, ("standard", "exact"))
        check_integer("topk", topk, 1, len(space))
        if eval_mask is not None:
            check_tensor("eval_mask", eval_mask, dtypes=(torch.bool,))
            check_shapes(eval_mask=(eval_mask, str(len(space))))
        self.space, self.eval_mask, self.protocol, self.topk = space, eval_mask, protocol, topk
        for name in Evidence._fields:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, scores: Scores, target: Tensor) -> None:
        """Add samples.

        Args:
            scores: Unbiased scores ``[batch, P]``, or an iterable of ``(first_column, block)`` that covers all columns
                of these samples once.
            target: Column of the true pair, long ``[batch]``.
        """
        for name, part in self._evidence(scores, target)._asdict().items():
            getattr(self, name).append(part)

    def _evidence(self, scores: Scores, target: Tensor) -> Evidence:
        attr, obj = self.space.pairs.unbind(dim=1)
        return gather_evidence(scores, target, attr, obj, self.space.seen_mask, self.eval_mask, topk=self.topk)

    def compute(self) -> CZSLResult:
        """The result over all samples so far."""
        parts = [getattr(self, name) for name in Evidence._fields]
        if any(len(part) == 0 for part in parts):
            raise ValueError("expected at least one sample before `compute`, got none")
        evidence = Evidence(*(part if isinstance(part, Tensor) else torch.cat(part) for part in parts))
        return sweep(evidence, self.space.seen_mask, protocol=self.protocol)

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable[..., Any] | None = None,
    ) -> None:
        """Gather the samples of all processes, as in torchmetrics; a process may have none."""
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        if should_sync and running and isinstance(self.target, list) and not self.target:
            # torchmetrics sends a float vector for an empty list, which the other processes cannot take.
            scores = torch.empty(0, len(self.space), device=self.device)
            for name, part in self._evidence(scores, torch.empty(0, dtype=torch.long))._asdict().items():
                setattr(self, name, [part])
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = super()._wrap_compute(compute)

        @wraps(compute)
        def quiet(*args: Any, **kwargs: Any) -> Any:
            # torchmetrics warns that there was no update; `compute`, after gathering all processes, raises.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
                return wrapped(*args, **kwargs)

        return quiet
