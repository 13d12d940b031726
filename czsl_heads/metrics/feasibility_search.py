"""The search of the feasibility threshold as a torchmetrics metric that keeps O(samples x thresholds)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from czsl_heads._checks import check_integer, check_kind, check_shapes, check_tensor
from czsl_heads.functional.feasibility import FeasibilityCurve, Masking, ThresholdSearch
from czsl_heads.functional.protocol import Protocol
from czsl_heads.functional.score_statistics import ScoreStatistics
from czsl_heads.metrics.gathered import GatheredMetric
from czsl_heads.space import CompositionSpace


class FeasibilitySearch(GatheredMetric[FeasibilityCurve]):
    """The best of evenly spaced feasibility thresholds, gathered batch by batch.

    The class around :func:`czsl_heads.functional.search_threshold`. Of each sample some numbers for each threshold are
    kept, whatever the number of pairs.

    ``compute`` returns a dict of scalar tensors: ``threshold``, its area ``auc``, and ``auc_unmasked``, NaN where there
    is no such number; with ``key`` that one. ``result`` returns the :class:`~czsl_heads.functional.FeasibilityCurve`,
    with all trials.

    Args:
        space: The label space, the open world as a rule; its order is that of the columns of the scores.
        feasibility: Of each pair of the space, ``[P]``; what it says of seen pairs is not looked at.
        eval_mask: Which pairs are candidates, bool ``[P]``; default: all.
        masking: ``"clean"`` or ``"official"``, see :func:`czsl_heads.functional.mask_infeasible`.
        steps: Number of thresholds.
        protocol: ``"standard"`` (the official code's numbers) or ``"exact"``.
        topk: A sample counts as right if its pair is among the ``topk`` best.
        key: The one number that ``compute`` returns; default: a dict of all.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: An option or shape does not fit, ``key`` is unknown, or no pair is unseen; in ``update``, a true
            pair is no candidate; in ``compute`` and ``result``, there is no sample, or a score was NaN or +inf.
        TypeError: ``space`` is no :class:`~czsl_heads.CompositionSpace`, ``steps`` or ``topk`` no integer, or a tensor
            of the wrong kind.

    Example:
        >>> from czsl_heads import CompositionSpace
        >>> space = CompositionSpace(["old", "young"], ["cat"], seen=[("old", "cat")], unseen=[("young", "cat")])
        >>> search = FeasibilitySearch(space, torch.tensor([0.0, 0.5]), steps=3)
        >>> search.update(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1]))
        >>> search.compute()["threshold"]
        tensor(0.5000, dtype=torch.float64)
        >>> search.result().kept
        tensor([1, 1, 1])

    References:
        Mancini et al., Open World Compositional Zero-Shot Learning, CVPR 2021. Nayak et al., CSP, ICLR 2023.
    """

    keys: ClassVar[tuple[str, ...]] = ("threshold", "auc", "auc_unmasked")

    def __init__(
        self,
        space: CompositionSpace,
        feasibility: Tensor,
        *,
        eval_mask: Tensor | None = None,
        masking: Masking = "clean",
        steps: int = 50,
        protocol: Protocol = "standard",
        topk: int = 1,
        key: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_kind("space", space, CompositionSpace)
        check_integer("topk", topk, 1, len(space))
        check_tensor("feasibility", feasibility)
        check_shapes(feasibility=(feasibility, str(len(space))))
        if space.seen_mask.all():
            raise ValueError("expected `space` with an unseen pair, got none")
        attr, obj = space.pairs.unbind(dim=1)
        search = ThresholdSearch(
            attr, obj, space.seen_mask, eval_mask, feasibility, masking=masking, steps=steps, protocol=protocol
        )
        super().__init__(search.columns, topk, key, **kwargs)
        self.space, self.search = space, search

    def _result(self, statistics: ScoreStatistics) -> FeasibilityCurve:
        return self.search.curve(statistics)
