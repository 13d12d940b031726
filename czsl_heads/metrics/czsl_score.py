"""The field's evaluation as a torchmetrics metric that keeps O(samples)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from czsl_heads._checks import check_choice, check_integer, check_kind, check_shapes, check_tensor
from czsl_heads.functional.protocol import SCALARS, CZSLResult, Protocol, sweep
from czsl_heads.functional.score_statistics import PairColumns, ScoreStatistics
from czsl_heads.metrics.gathered import GatheredMetric
from czsl_heads.space import CompositionSpace


class CZSLScore(GatheredMetric[CZSLResult]):
    """Seen and unseen accuracy, harmonic mean and area under the curve, gathered batch by batch.

    The class around :func:`czsl_heads.functional.czsl_scores`. Of each sample a handful of numbers is kept, whatever
    the number of pairs.

    ``compute`` returns a dict of scalar tensors: ``seen``, ``unseen``, ``harmonic_mean``, ``auc``, ``hm_seen``,
    ``hm_unseen``, ``bias``, ``attr_accuracy`` and ``obj_accuracy``, NaN where there is no such number. It is what
    Lightning's ``log_dict(score.compute())`` takes, and a ``MetricCollection``. With ``key`` it is that one tensor,
    which ``log("val_auc", score)``, ``log_dict(collection)`` and ``MetricTracker.best_metric`` need. ``result`` returns
    the :class:`~czsl_heads.functional.CZSLResult`, with the curve. In a collection, give a metric with ``key`` a name
    that none of these numbers has, such as ``"exact_auc"``: of two equal names torchmetrics keeps one.

    Args:
        space: The label space; its order is that of the columns of the scores.
        eval_mask: Which pairs are candidates, bool ``[P]`` (``dataset.eval_mask(split)``); default: all.
        protocol: ``"standard"`` (the official code's numbers) or ``"exact"``.
        topk: A sample counts as right if its pair is among the ``topk`` best.
        key: The one number that ``compute`` returns; default: a dict of all.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: An option or shape does not fit, or ``key`` is unknown; in ``update``, a true pair is no candidate;
            in ``compute`` and ``result``, there is no sample, or a score was NaN or +inf.
        TypeError: ``space`` is no :class:`~czsl_heads.CompositionSpace`, ``topk`` no integer, or a tensor of the wrong
            kind.

    Example:
        >>> from czsl_heads import CompositionSpace
        >>> space = CompositionSpace(["old", "young"], ["cat"], seen=[("old", "cat")], unseen=[("young", "cat")])
        >>> score = CZSLScore(space)
        >>> score.update(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1]))
        >>> score.compute()["auc"]
        tensor(0.5000, dtype=torch.float64)
        >>> score.result().unbiased.match
        1.0

    References:
        Purushwalkam et al., ICCV 2019 (the protocol); Mancini et al., CVPR 2021 (the code most papers descend from).
    """

    keys: ClassVar[tuple[str, ...]] = SCALARS

    def __init__(
        self,
        space: CompositionSpace,
        *,
        eval_mask: Tensor | None = None,
        protocol: Protocol = "standard",
        topk: int = 1,
        key: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_kind("space", space, CompositionSpace)
        check_choice("protocol", protocol, ("standard", "exact"))
        check_integer("topk", topk, 1, len(space))
        if eval_mask is not None:
            check_tensor("eval_mask", eval_mask, dtypes=(torch.bool,))
            check_shapes(eval_mask=(eval_mask, str(len(space))))
        attr, obj = space.pairs.unbind(dim=1)
        super().__init__(PairColumns(attr, obj, space.seen_mask, eval_mask), topk, key, **kwargs)
        self.space, self.eval_mask, self.protocol = space, eval_mask, protocol

    def _result(self, statistics: ScoreStatistics) -> CZSLResult:
        return sweep(statistics, self.space.seen_mask, protocol=self.protocol)
