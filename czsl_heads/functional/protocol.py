"""The field's evaluation: accuracy on seen and on unseen pairs while a bias for the unseen ones sweeps.

The sweep needs few numbers of each sample, whatever the number of pairs: the score of the true pair and, among seen and
among unseen candidates, the best wrong scores before and after its column. A tie goes to the lower column, so the side
matters. Adding a bias in float32 is monotone: the best score stays the best, and what collapses at a bias of 1e3
collapses here too. :func:`~czsl_heads.functional.score_statistics.score_statistics` finds these numbers in one pass
over the scores, and :func:`sweep` here makes the curve of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from czsl_heads._checks import check_choice
from czsl_heads.functional.score_statistics import PairColumns, Scores, ScoreStatistics, score_statistics
from czsl_heads.functional.score_statistics_op import FIRST_BIAS

Protocol = Literal["standard", "exact"]

SCALARS = ("seen", "unseen", "harmonic_mean", "auc", "hm_seen", "hm_unseen", "bias", "attr_accuracy", "obj_accuracy")
_OFFSET = 1e-4
_BINS = 20


class BiasPoint(NamedTuple):
    """Accuracies at one bias: of the pair (all, seen, unseen samples), of the attribute and of the object."""

    match: float
    seen: float
    unseen: float
    attr: float
    obj: float


@dataclass(eq=False)
class CZSLResult:
    """The numbers that papers report; fractions, not per cent.

    Attributes:
        seen, unseen: Best accuracy over the curve, on samples of seen and of unseen pairs.
        harmonic_mean: Best harmonic mean of the two over the curve.
        auc: Area under the curve, seen accuracy over unseen accuracy.
        hm_seen, hm_unseen, bias: The point of the best harmonic mean, and its bias.
        attr_accuracy, obj_accuracy: Of the predicted pair's primitives at bias 0, over all samples.
        unbiased, biased: All accuracies at bias 0 and at bias 1e3.
        curve: Points of the curve by rising bias, ``[points, 2]``: seen accuracy, unseen accuracy.

    With no sample of an unseen pair (or of a seen one) that accuracy, the harmonic mean and the area are NaN, and the
    point is the first of the curve.
    """

    seen: float
    unseen: float
    harmonic_mean: float
    auc: float
    hm_seen: float
    hm_unseen: float
    bias: float
    attr_accuracy: float
    obj_accuracy: float
    unbiased: BiasPoint
    biased: BiasPoint
    curve: Tensor

    def scalars(self) -> dict[str, float]:
        """The single numbers by name, for loggers; NaN where there is none.

        All attributes but ``unbiased``, ``biased`` and ``curve``.
        """
        return {name: getattr(self, name) for name in SCALARS}

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, dicts and lists, ready for JSON, which has no infinity and no NaN: None here."""
        values = dict(vars(self))
        values["unbiased"], values["biased"] = self.unbiased._asdict(), self.biased._asdict()
        values["curve"] = self.curve.tolist()
        return {name: finite_or_none(value) for name, value in values.items()}


def finite_or_none(value: Any) -> Any:
    """A number, dict or list with None for what JSON cannot say: NaN and the infinities."""
    if isinstance(value, dict):
        return {name: finite_or_none(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite_or_none(part) for part in value]
    return value if math.isfinite(value) else None


def czsl_scores(
    scores: Scores,
    target_pair: Tensor,
    pair_attr: Tensor,
    pair_obj: Tensor,
    seen_mask: Tensor,
    eval_mask: Tensor | None = None,
    *,
    protocol: Protocol = "standard",
    topk: int = 1,
) -> CZSLResult:
    """Evaluate compositional predictions: seen and unseen accuracy, harmonic mean, area under the curve.

    ``protocol="standard"`` gives the numbers of the official code of CSP, DFSP and Troika: 20 to 39 biases taken
    from the margins of the unseen samples, and a last point at 1e3; ties go to the lower column; float32 throughout.
    ``protocol="exact"`` sweeps the bias from -inf to +inf and takes every distinct point that holds over an interval
    of biases, with both ends; it depends neither on bins nor on the scale of the scores.

    Args:
        scores: Unbiased scores ``[n, P]``, or an iterable of ``(first_column, block [n, width])`` that covers every
            column once, of which no more than one block is held. Used as float32. -inf is allowed.
        target_pair: Column of the true pair, long ``[n]``.
        pair_attr, pair_obj: Attribute and object of each column, long ``[P]``.
        seen_mask: True where the pair was trained on, bool ``[P]``.
        eval_mask: True where the pair is a candidate, bool ``[P]``; default: everywhere (the open world).
        protocol: ``"standard"`` or ``"exact"``.
        topk: A sample counts as right if its pair is among the ``topk`` best.

    Returns:
        A :class:`CZSLResult`.

    Raises:
        TypeError: A tensor has the wrong kind, or ``topk`` is no integer.
        ValueError: Shapes do not fit, blocks overlap or leave columns out, there is no sample, a true pair is no
            candidate, or a score is NaN or, as float32, +inf.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.6, 0.5]])  # the second sample is of the unseen pair, scored too low
        >>> seen = torch.tensor([True, False])
        >>> pair = torch.tensor([0, 1])
        >>> result = czsl_scores(scores, pair, pair, pair, seen, protocol="exact")
        >>> result.unbiased.match, result.auc
        (0.5, 1.0)

    References:
        Purushwalkam et al., ICCV 2019 (the protocol); Mancini et al., CVPR 2021 (the code most papers descend from).
    """
    columns = PairColumns(pair_attr, pair_obj, seen_mask, eval_mask)
    return sweep(score_statistics(scores, target_pair, columns, topk=topk), seen_mask, protocol=protocol)


def sweep(statistics: ScoreStatistics, seen_mask: Tensor, *, protocol: Protocol = "standard") -> CZSLResult:
    """The curve and its summary from the statistics of all samples. Arguments and errors as in :func:`czsl_scores`."""
    check_choice("protocol", protocol, ("standard", "exact"))
    samples = split_by_seen(statistics, seen_mask)
    seen, unseen, biases = _CURVES[protocol](samples)
    # The official code ranks float32 accuracies: where two points tie, their rounding decides between them.
    ranked = (seen, unseen) if protocol == "exact" else (_rounded(seen), _rounded(unseen))
    best = int(_harmonic_mean(*ranked).argmax())
    points = _fixed_points(samples)
    return CZSLResult(
        seen=float(seen.max()),
        unseen=float(unseen.max()),
        harmonic_mean=float(_harmonic_mean(seen, unseen)[best]),
        auc=_area(seen, unseen),
        hm_seen=float(seen[best]),
        hm_unseen=float(unseen[best]),
        bias=float(biases[best]),
        attr_accuracy=points[0].attr,
        obj_accuracy=points[0].obj,
        unbiased=points[0],
        biased=points[1],
        curve=torch.from_numpy(np.stack([seen, unseen], axis=1)),
    )


class SeenUnseen(NamedTuple):
    """Statistics of the samples whose true pair is seen, and of those whose true pair is unseen."""

    seen: ScoreStatistics
    unseen: ScoreStatistics


def split_by_seen(statistics: ScoreStatistics, seen_mask: Tensor) -> SeenUnseen:
    """On the CPU; ValueError if there is no sample or some scores could not be ranked."""
    if not len(statistics.target):
        raise ValueError("expected at least one sample, got none")
    if statistics.score.isnan().any():
        sample = int(statistics.score.isnan().nonzero()[0])
        raise ValueError(f"expected `scores` without NaN and +inf, got one in sample {sample}")

    statistics = ScoreStatistics(*(part.cpu() for part in statistics))
    seen = seen_mask.cpu()[statistics.target]
    return SeenUnseen(
        ScoreStatistics(*(part[seen] for part in statistics)),
        ScoreStatistics(*(part[~seen] for part in statistics)),
    )


def area_under_curve(samples: SeenUnseen, protocol: Protocol) -> float:
    """The area alone."""
    seen, unseen, _ = _CURVES[protocol](samples)
    return _area(seen, unseen)


def _area(seen: np.ndarray, unseen: np.ndarray) -> float:
    return float(np.trapezoid(seen, unseen)) if not np.isnan(seen + unseen).any() else float("nan")


def _rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(np.float64)


def _harmonic_mean(seen: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        mean: np.ndarray = 2 / (1 / seen + 1 / unseen)  # 0 where one of them is
    return mean


def _fixed_points(samples: SeenUnseen) -> list[BiasPoint]:
    """At bias 0 and at 1e3."""
    biases = torch.tensor([0.0, FIRST_BIAS])
    seen, unseen = _seen_right(samples.seen, biases), _unseen_right(samples.unseen, biases)
    primitives = torch.cat([samples.seen.primitives, samples.unseen.primitives])  # [n, biases, 2]

    points = []
    for index in range(len(biases)):
        pair = torch.cat([seen[index], unseen[index]])
        attr, obj = primitives[:, index].unbind(dim=1)
        shares = [_shares(hits).item() for hits in (pair, seen[index], unseen[index], attr, obj)]
        points.append(BiasPoint(*shares))
    return points


def _shares(hits: Tensor) -> Tensor:
    """Of the last dimension; NaN for no sample, as the official code has it."""
    return hits.sum(dim=-1, dtype=torch.int32).double() / hits.shape[-1]


def _seen_right(statistics: ScoreStatistics, biases: Tensor) -> Tensor:
    """Whether each true pair, seen, is among the top k once a bias is added to unseen ones: bool ``[biases, n]``."""
    return _right_at(statistics, statistics.score, biases[:, None])


def _unseen_right(statistics: ScoreStatistics, biases: Tensor) -> Tensor:
    """The same where the true pairs are unseen."""
    return _right_at(statistics, statistics.score + biases[:, None], biases[:, None])


def _right_at(statistics: ScoreStatistics, own: Tensor, bias: Tensor) -> Tensor:
    """In float32, as on the whole matrix: a bias of 1e3 makes equals of scores that are close."""
    k = statistics.negatives.shape[2]
    ahead = torch.zeros(len(bias), len(statistics.score), dtype=torch.bool if k == 1 else torch.int32)
    add = ahead.logical_or_ if k == 1 else ahead.add_  # as numbers, bools add up five times slower
    for rank in statistics.negatives.unbind(dim=2):
        seen_before, seen_after, unseen_before, unseen_after = rank.unbind(dim=1)
        for hits in (seen_before >= own, seen_after > own, unseen_before + bias >= own, unseen_after + bias > own):
            add(hits)
    return (~ahead if k == 1 else ahead < k) & (statistics.score > -torch.inf)


_Curve: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


def _standard_curve(samples: SeenUnseen) -> _Curve:
    unseen, first = samples.unseen, torch.tensor([FIRST_BIAS])
    reachable = _unseen_right(unseen, first)[0]
    margins = (unseen.best_seen - unseen.score)[reachable] - _OFFSET
    margins = margins.sort().values
    biases = torch.cat([margins[:: max(len(margins) // _BINS, 1)], first])
    seen_right, unseen_right = _seen_right(samples.seen, biases), _unseen_right(unseen, biases)
    return _shares(seen_right).numpy(), _shares(unseen_right).numpy(), biases.numpy()


def _exact_curve(samples: SeenUnseen) -> _Curve:
    """A seen sample is right below a threshold of the bias, an unseen one above it; points lie between thresholds."""
    seen_until = samples.seen.score.double() - _deciding_negative(samples.seen, (0, 1), (2, 3))
    unseen_from = _deciding_negative(samples.unseen, (2, 3), (0, 1)) - samples.unseen.score.double()
    thresholds = torch.cat([seen_until, unseen_from])
    finite = thresholds[thresholds.isfinite()].unique()
    edges = torch.cat([finite.new_tensor([-torch.inf]), finite])
    passed = [
        torch.searchsorted(values.sort().values, edges, right=True).double() / len(values)
        for values in (seen_until, unseen_from)
    ]
    middles = torch.cat([(edges[1:-1] + edges[2:]) / 2, edges.new_tensor([torch.inf])]) if len(finite) else edges[:0]
    return 1 - passed[0].numpy(), passed[1].numpy(), torch.cat([edges[:1], middles]).numpy()


_CURVES = {"standard": _standard_curve, "exact": _exact_curve}


def _deciding_negative(statistics: ScoreStatistics, own_sides: tuple[int, int], other_sides: tuple[int, int]) -> Tensor:
    """The score of the other group that must be beaten to be in the top k, given the better ones of the own group.

    +inf if the own group alone fills the top k (or the score is -inf): no bias helps then.
    """
    own, k = statistics.score, statistics.negatives.shape[2]
    before, after = statistics.negatives[:, own_sides].unbind(dim=1)
    ahead = (before >= own[:, None]).sum(1) + (after > own[:, None]).sum(1)
    others = statistics.negatives[:, other_sides].flatten(1).sort(dim=1, descending=True).values
    deciding = others.gather(1, (k - 1 - ahead).clamp(min=0)[:, None])[:, 0].double()
    return deciding.masked_fill((ahead >= k) | (own == -torch.inf), torch.inf)
