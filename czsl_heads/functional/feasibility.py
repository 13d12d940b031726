"""Which pairs of the open world can be: how close they are to seen ones, and the threshold below which they are masked.

The search of the threshold needs no pass of its own for each trial. A trial masks all unseen pairs below it. So unseen
pairs are put into buckets, by the last trial that keeps them. The best wrong score of each bucket is found once, and
the best one that a trial leaves is the best of the buckets from its own on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from czsl_heads._checks import check_choice, check_integer, check_range, check_shapes, check_tensor
from czsl_heads.functional.precision import no_autocast, score_dtype
from czsl_heads.functional.protocol import Protocol, SeenUnseen, area_under_curve, finite_or_none, split_by_seen
from czsl_heads.functional.score_statistics import PairColumns, Scores, ScoreStatistics, score_statistics
from czsl_heads.functional.score_statistics_op import merged
from czsl_heads.functional.unit import unit_vectors

Masking = Literal["clean", "official"]

NO_THRESHOLD = -10.0  # what the official search is left with if no trial has an area: every pair is kept


@dataclass(eq=False)
class FeasibilityCurve:
    """The area under the seen-unseen curve for each feasibility threshold tried, and the best one.

    Attributes:
        thresholds, auc: What was tried, ascending, and the area (a fraction) with it, ``[steps]``.
        kept: How many unseen pairs each keeps, long ``[steps]``.
        threshold: The one of the largest area, the first among equals; -10 if no area is above 0. That keeps all pairs
            (the official masking still doubles seen scores there).
        auc_unmasked: The area with no pair masked.
    """

    thresholds: Tensor
    auc: Tensor
    kept: Tensor
    threshold: float
    auc_unmasked: float

    def scalars(self) -> dict[str, float]:
        """The threshold, its area as ``auc`` and ``auc_unmasked``, for loggers; NaN where there is none."""
        return {"threshold": self.threshold, "auc": self.auc.max().item(), "auc_unmasked": self.auc_unmasked}

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and lists, ready for JSON, which has no NaN: None here."""
        values = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return {name: finite_or_none(value) for name, value in values.items()}


def feasibility(attr_vectors: Tensor, obj_vectors: Tensor, seen: Tensor) -> Tensor:
    r"""Rate each unseen pair by its closest seen relatives: pairs that share its attribute, and its object.

    .. math::
        f(a, o) = \frac{1}{2} \Big(\max_{o' \in O_a} \cos(o, o') + \max_{a' \in A_o} \cos(a, a')\Big)

    with :math:`O_a` the objects seen with attribute :math:`a` and :math:`A_o` the attributes seen with object
    :math:`o`; a maximum over none is -1. Seen pairs get 0, as in the tensors that authors ship.

    Args:
        attr_vectors: A vector for each attribute, ``[attrs, dim]``, of words or of texts; any norm.
        obj_vectors: A vector for each object, ``[objs, dim]``.
        seen: True where the pair was trained on, bool ``[attrs, objs]``.

    Returns:
        ``[attrs, objs]`` in [-1, 1], float32 (float64 for float64 vectors). A zero vector has cosine 0 with all.

    Raises:
        TypeError: A tensor has the wrong kind.
        ValueError: The shapes do not fit, there is no pair, or a vector is not finite.

    Example:
        >>> attr_vectors, obj_vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        >>> feasibility(attr_vectors, obj_vectors, torch.tensor([[True, True], [True, False]]))
        tensor([[0.0000, 0.0000],
                [0.0000, 0.7000]])

    References:
        Mancini et al., Open World Compositional Zero-Shot Learning, CVPR 2021. Nayak et al., CSP, ICLR 2023 (the
        version here: from word vectors alone).
    """
    for name, vectors in (("attr_vectors", attr_vectors), ("obj_vectors", obj_vectors)):
        check_tensor(name, vectors)
    check_tensor("seen", seen, dtypes=(torch.bool,))
    check_shapes(attr_vectors=(attr_vectors, "attrs dim"), obj_vectors=(obj_vectors, "objs dim"))
    check_shapes(seen=(seen, f"{len(attr_vectors)} {len(obj_vectors)}"))
    if not seen.numel():
        raise ValueError(f"expected `seen` of at least one attribute and object, got {tuple(seen.shape)}")
    dtype = score_dtype(attr_vectors, obj_vectors)
    by_attr = _closest_seen("attr_vectors", attr_vectors.to(dtype), seen.mT)
    by_obj = _closest_seen("obj_vectors", obj_vectors.to(dtype), seen)
    return ((by_attr.mT + by_obj) / 2).masked_fill(seen, 0.0)


def _closest_seen(name: str, vectors: Tensor, seen: Tensor) -> Tensor:
    """For each row of ``seen`` [rows, n] and each vector [n, dim] the highest cosine with a vector seen in that row."""
    _check_finite(name, vectors)
    with no_autocast(vectors.device):
        vectors = unit_vectors(vectors)
        cosines = vectors @ vectors.mT
    floor = cosines.new_full((1, len(cosines)), -1.0)
    # Row by row: of C-GQA's attributes x objects x objects there are 188 million.
    return torch.stack([torch.cat([floor, cosines[row]]).amax(dim=0) for row in seen])


def feasibility_thresholds(feasibility: Tensor, seen_mask: Tensor, *, steps: int = 50) -> Tensor:
    """Evenly spaced thresholds from the least to the most feasible unseen pair, both included.

    Args:
        feasibility: Of each column of the scores, ``[P]``.
        seen_mask: True where the pair was trained on, bool ``[P]``.
        steps: Number of thresholds; one alone is the least feasibility.

    Returns:
        ``[steps]``, ascending, float32 (float64 for float64 feasibility): the first keeps every pair.

    Raises:
        TypeError: A tensor has the wrong kind, or ``steps`` is no integer.
        ValueError: The shapes do not fit, ``steps`` is below 1, a feasibility is not finite, or no pair is unseen.

    Example:
        >>> feasibility = torch.tensor([0.0, 0.5, -0.25, 0.125])
        >>> feasibility_thresholds(feasibility, torch.tensor([True, False, False, False]), steps=4)
        tensor([-0.2500,  0.0000,  0.2500,  0.5000])
    """
    check_integer("steps", steps, 1)
    unseen = _ratings(feasibility, seen_mask)[~seen_mask.to(feasibility.device)]
    if not len(unseen):
        raise ValueError("expected `seen_mask` to leave a pair unseen, got none")
    least, most = float(unseen.min()), float(unseen.max())
    return torch.linspace(least, most, steps, dtype=torch.float64, device=unseen.device).to(unseen.dtype)


def mask_infeasible(
    scores: Tensor, feasibility: Tensor, seen_mask: Tensor, threshold: float, *, masking: Masking = "clean"
) -> Tensor:
    """Mask the scores of unseen pairs that are less feasible than a threshold.

    ``masking="clean"`` gives them -inf: they are never predicted. ``masking="official"`` multiplies the scores by
    ``[feasibility >= threshold] + seen``, as the code of CSP, DFSP and Troika does: infeasible pairs get 0, which is
    low only where all other scores are above it, and at thresholds of 0 and below seen pairs, of feasibility 0, are
    **doubled**. There -inf stays -inf, where that code has 0 x inf = NaN.

    Args:
        scores: ``[n, P]``.
        feasibility: Of each column, ``[P]``; what it says of seen pairs is not looked at, they count as 0.
        seen_mask: True where the pair was trained on, bool ``[P]``.
        threshold: The least feasibility that is kept; -inf keeps all.
        masking: ``"clean"`` or ``"official"``.

    Returns:
        ``[n, P]`` in the dtype of ``scores``; they are left alone.

    Raises:
        TypeError: A tensor has the wrong kind, or ``threshold`` is no number.
        ValueError: The shapes do not fit, a feasibility is not finite, ``threshold`` is NaN, or ``masking`` is unknown.

    Example:
        >>> scores, seen = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([True, False, False])
        >>> feasibility = torch.tensor([0.0, 0.5, 0.25])
        >>> mask_infeasible(scores, feasibility, seen, 0.4)
        tensor([[1., 2., -inf]])
        >>> mask_infeasible(scores, feasibility, seen, 0.4, masking="official")
        tensor([[1., 2., 0.]])
    """
    check_tensor("scores", scores)
    check_range("threshold", threshold, -torch.inf)
    check_choice("masking", masking, ("clean", "official"))
    ratings = _ratings(feasibility, seen_mask)
    check_shapes(scores=(scores, f"samples {len(ratings)}"))
    feasible, seen = (ratings >= threshold).to(scores.device), seen_mask.to(scores.device)
    if masking == "clean":
        return scores.masked_fill(~(feasible | seen), -torch.inf)
    factor = feasible.to(scores.dtype) + seen.to(scores.dtype)
    return (scores * factor).masked_fill(scores == -torch.inf, -torch.inf)


def _ratings(feasibility: Tensor, seen_mask: Tensor) -> Tensor:
    """Checked, float32 or float64, and 0 for seen pairs."""
    check_tensor("feasibility", feasibility)
    check_tensor("seen_mask", seen_mask, dtypes=(torch.bool,))
    check_shapes(feasibility=(feasibility, "pairs"), seen_mask=(seen_mask, "pairs"))
    ratings = feasibility.detach().to(score_dtype(feasibility)).masked_fill(seen_mask.to(feasibility.device), 0.0)
    _check_finite("feasibility", ratings)
    return ratings


def _check_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(f"expected `{name}` of finite numbers, got {int((~values.isfinite()).sum())} that are not")


def search_threshold(
    scores: Scores,
    target_pair: Tensor,
    pair_attr: Tensor,
    pair_obj: Tensor,
    seen_mask: Tensor,
    eval_mask: Tensor | None = None,
    *,
    feasibility: Tensor,
    masking: Masking = "clean",
    steps: int = 50,
    protocol: Protocol = "standard",
    topk: int = 1,
) -> FeasibilityCurve:
    """Try evenly spaced feasibility thresholds and take the one with the largest area under the curve.

    Each area is that of :func:`~czsl_heads.functional.czsl_scores` on the scores that :func:`mask_infeasible` gives,
    but the scores are read once for all of them. An unseen sample whose own pair is masked still counts, as wrong under
    ``masking="clean"``. The papers search on the validation images.

    Args:
        scores: As in :func:`~czsl_heads.functional.czsl_scores`, of every pair of the open world.
        target_pair, pair_attr, pair_obj, seen_mask, eval_mask: As there.
        feasibility: Of each column, ``[P]``; what it says of seen pairs is not looked at.
        masking: ``"clean"`` or ``"official"``, see :func:`mask_infeasible`.
        steps: Number of thresholds, see :func:`feasibility_thresholds`.
        protocol: ``"standard"`` or ``"exact"``.
        topk: A sample counts as right if its pair is among the ``topk`` best.

    Returns:
        A :class:`FeasibilityCurve`, on the CPU.

    Raises:
        TypeError: A tensor has the wrong kind, or ``steps`` or ``topk`` is no integer.
        ValueError: As in :func:`~czsl_heads.functional.czsl_scores` and :func:`feasibility_thresholds`.

    Example:
        >>> scores = torch.tensor([[0.9, 0.5, 0.1], [0.3, 0.2, 0.7]])  # the last pair scores high, and cannot be
        >>> seen, pair = torch.tensor([True, False, False]), torch.arange(3)
        >>> options = {"feasibility": torch.tensor([0.0, 0.5, -0.5]), "steps": 3, "protocol": "exact"}
        >>> curve = search_threshold(scores, torch.tensor([0, 1]), pair, pair, seen, **options)
        >>> curve.auc.tolist(), curve.threshold, curve.auc_unmasked
        ([0.0, 1.0, 1.0], 0.0, 0.0)

    References:
        Mancini et al., CVPR 2021; the code of CSP (Nayak et al., ICLR 2023), which this equals.
    """
    search = ThresholdSearch(
        pair_attr, pair_obj, seen_mask, eval_mask, feasibility, masking=masking, steps=steps, protocol=protocol
    )
    return search.curve(score_statistics(scores, target_pair, search.columns, topk=topk))


class ThresholdSearch:
    """What a search knows before it reads a score, checked once; see :func:`search_threshold`.

    Attributes:
        columns: For :func:`~czsl_heads.functional.score_statistics.score_statistics`, a bucket for each threshold.
    """

    def __init__(
        self,
        pair_attr: Tensor,
        pair_obj: Tensor,
        seen_mask: Tensor,
        eval_mask: Tensor | None,
        feasibility: Tensor,
        *,
        masking: Masking,
        steps: int,
        protocol: Protocol,
    ) -> None:
        check_choice("masking", masking, ("clean", "official"))
        check_choice("protocol", protocol, ("standard", "exact"))
        self.thresholds = feasibility_thresholds(feasibility, seen_mask, steps=steps).cpu()
        self.ratings, self.seen = _ratings(feasibility, seen_mask).cpu(), seen_mask.cpu()
        self.masking, self.protocol = masking, protocol
        last_kept = torch.searchsorted(self.thresholds, self.ratings, right=True) - 1
        bucket = last_kept.masked_fill(self.seen, 0)
        self.columns = PairColumns(pair_attr, pair_obj, seen_mask, eval_mask, bucket=bucket, num_buckets=steps)

    def curve(self, statistics: ScoreStatistics) -> FeasibilityCurve:
        """The areas, and the best, from the statistics of all samples."""
        samples = split_by_seen(statistics, self.seen)
        thresholds = self.thresholds.tolist()
        trials = zip(self._trials(samples.seen), self._trials(samples.unseen))
        areas = [area_under_curve(SeenUnseen(*trial), self.protocol) for trial in trials]
        unmasked = SeenUnseen(*(_with_unseen(group, _negatives_kept(group)[0]) for group in samples))
        return FeasibilityCurve(
            thresholds=self.thresholds,
            auc=torch.tensor(areas, dtype=torch.float64),
            kept=(self.ratings[~self.seen] >= self.thresholds[:, None]).sum(dim=1),
            threshold=_first_best(thresholds, areas),
            auc_unmasked=area_under_curve(unmasked, self.protocol),
        )

    def _trials(self, group: ScoreStatistics) -> Iterator[ScoreStatistics]:
        """The statistics of the scores masked at each threshold, of samples of seen or of unseen pairs."""
        kept, masked = _negatives_kept(group), _negatives_masked(group)
        seen, ratings = self.seen[group.target], self.ratings[group.target]
        for threshold, above, below in zip(self.thresholds.tolist(), kept, masked):
            infeasible = ~seen & (ratings < threshold)
            if self.masking == "clean":
                score = group.score.masked_fill(infeasible, -torch.inf)
                yield _with_unseen(group._replace(score=score), above)
            else:
                yield _as_official(group, infeasible, seen, threshold, merged(above, _zeroed(below)))


def _negatives_kept(group: ScoreStatistics) -> list[Tensor]:
    """At each threshold the best negatives before and after the true column ``[n, 2, k]`` among unseen pairs kept."""
    return [*accumulate(reversed(_buckets(group)), merged)][::-1]


def _negatives_masked(group: ScoreStatistics) -> list[Tensor]:
    """The same among those masked."""
    buckets = _buckets(group)
    return [torch.full_like(buckets[0], -torch.inf), *accumulate(buckets[:-1], merged)]


def _buckets(group: ScoreStatistics) -> tuple[Tensor, ...]:
    """The negatives of each bucket of unseen pairs, ``[n, 2, k]``."""
    return rearrange(group.negatives[:, 2:], "n (buckets sides) k -> buckets n sides k", sides=2).unbind()


def _with_unseen(group: ScoreStatistics, of_unseen: Tensor) -> ScoreStatistics:
    """With other negatives among unseen pairs."""
    return group._replace(negatives=torch.cat([group.negatives[:, :2], of_unseen], dim=1))


def _as_official(
    group: ScoreStatistics, infeasible: Tensor, seen: Tensor, threshold: float, of_unseen: Tensor
) -> ScoreStatistics:
    factor = 2.0 if threshold <= 0 else 1.0
    score = torch.where(infeasible, _zeroed(group.score), group.score) * torch.where(seen, factor, 1.0)
    negatives = torch.cat([group.negatives[:, :2] * factor, of_unseen], dim=1)
    return group._replace(score=score, negatives=negatives, best_seen=group.best_seen * factor)


def _zeroed(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores > -torch.inf, 0.0)


def _first_best(thresholds: list[float], areas: list[float]) -> float:
    best, threshold = 0.0, NO_THRESHOLD
    for tried, area in zip(thresholds, areas):
        if area > best:
            best, threshold = area, tried
    return threshold
