"""The field's evaluation: accuracy on seen and on unseen pairs while a bias for the unseen ones sweeps.

The sweep needs few numbers of each sample, whatever the number of pairs: the score of the true pair and, among seen and
among unseen candidates, the best scores before and after its column (a tie goes to the lower column, so the side
matters). Adding a bias in float32 is monotone, so the best score stays the best, and what collapses at a bias of 1e3
collapses here too. Hence :class:`Evidence`, which streams over samples and over blocks of pairs, and :func:`sweep`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from czsl_heads._checks import check_choice, check_integer, check_shapes, check_tensor

Protocol = Literal["standard", "exact"]
Scores: TypeAlias = Tensor | Iterable[tuple[int, Tensor]]

FIRST_BIAS = 1e3  # the bias of the official code's first pass, at which no seen pair is predicted
_OFFSET = 1e-4
_BINS = 20
_CHUNK = 1 << 22  # scores that are masked and ranked at once
_GROUPS = 4  # (seen, unseen) x (before, after the true column)


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

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, dicts and lists, ready for JSON, which has no infinity and no NaN: None here."""
        values = dict(vars(self))
        values["unbiased"], values["biased"] = self.unbiased._asdict(), self.biased._asdict()
        values["curve"] = self.curve.tolist()
        return {name: _finite(value) for name, value in values.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return value if math.isfinite(value) else None


class Evidence(NamedTuple):
    """What the sweep needs of each sample. ``k`` is the top-k of the evaluation; absent rivals are -inf.

    Attributes:
        target: Column of the true pair ``[n]``.
        score: Its score, float32 ``[n]``; NaN if any score of the sample is NaN or +inf.
        rivals: The ``k`` best other scores, best first, among candidates that are seen and stand before the true
            column, seen and after, unseen and before, unseen and after: ``[n, 4, k]``.
        best_seen: The ``k``-th best score of a seen pair ``[n]``, the true one and non-candidates included.
        primitives: Whether (attribute, object) are right in the top ``k``, at bias 0 and 1e3: bool ``[n, 2, 2]``.
    """

    target: Tensor
    score: Tensor
    rivals: Tensor
    best_seen: Tensor
    primitives: Tensor


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
    evidence = gather_evidence(scores, target_pair, pair_attr, pair_obj, seen_mask, eval_mask, topk=topk)
    return sweep(evidence, seen_mask, protocol=protocol)


def gather_evidence(
    scores: Scores,
    target_pair: Tensor,
    pair_attr: Tensor,
    pair_obj: Tensor,
    seen_mask: Tensor,
    eval_mask: Tensor | None = None,
    *,
    topk: int = 1,
) -> Evidence:
    """Reduce scores to :class:`Evidence`, seeing each block once. Arguments and errors as in :func:`czsl_scores`."""
    for name, index in (("target_pair", target_pair), ("pair_attr", pair_attr), ("pair_obj", pair_obj)):
        check_tensor(name, index, dtypes=(torch.long,))
    for name, mask in (("seen_mask", seen_mask), ("eval_mask", eval_mask)):
        if mask is not None:
            check_tensor(name, mask, dtypes=(torch.bool,))
    eval_mask = torch.ones_like(seen_mask) if eval_mask is None else eval_mask
    sizes = check_shapes(
        target_pair=(target_pair, "samples"),
        pair_attr=(pair_attr, "pairs"),
        pair_obj=(pair_obj, "pairs"),
        seen_mask=(seen_mask, "pairs"),
        eval_mask=(eval_mask, "pairs"),
    )
    num_pairs = sizes["pairs"]
    check_integer("topk", topk, 1, num_pairs)
    _check_targets(target_pair, eval_mask)

    gathered: _Gathering | None = None
    covered = torch.zeros(num_pairs, dtype=torch.bool)
    for first, block in _blocks(scores, sizes["samples"]):
        width = block.shape[1]
        if first < 0 or first + width > num_pairs:
            raise ValueError(f"expected `scores` of {num_pairs} columns, got columns {first} to {first + width - 1}")
        if covered[first : first + width].any():
            raise ValueError(f"expected `scores` to cover each column once, got columns from {first} on again")
        covered[first : first + width] = True
        if gathered is None:
            gathered = _Gathering(target_pair, pair_attr, pair_obj, seen_mask, eval_mask, topk, block.device)
        gathered.add(first, block)
    if gathered is None or not covered.all():
        missing = int((~covered).nonzero()[0]) if num_pairs else 0
        raise ValueError(f"expected `scores` to cover all {num_pairs} columns, got none for column {missing}")
    return gathered.finish()


def _check_targets(target_pair: Tensor, eval_mask: Tensor) -> None:
    if not len(target_pair):
        return
    low, high = int(target_pair.min()), int(target_pair.max())
    if low < 0 or high >= len(eval_mask):
        wrong = low if low < 0 else high
        raise ValueError(f"expected `target_pair` to hold columns below {len(eval_mask)}, got {wrong}")
    outside = ~eval_mask.to(target_pair.device)[target_pair]
    if outside.any():
        sample = int(outside.nonzero()[0])
        raise ValueError(
            f"expected `target_pair` to be candidates under `eval_mask`, got column {int(target_pair[sample])} "
            f"of sample {sample}, which is masked out"
        )


def _blocks(scores: Scores, samples: int) -> Iterator[tuple[int, Tensor]]:
    if not isinstance(scores, (Tensor, Iterable)):
        raise TypeError(f"expected `scores` to be a tensor or an iterable of blocks, got {type(scores).__name__}")
    for part in [(0, scores)] if isinstance(scores, Tensor) else scores:
        if not isinstance(part, (tuple, list)) or len(part) != 2 or not hasattr(part[0], "__index__"):
            raise TypeError(f"expected `scores` to hold (first_column, block) pairs, got {type(part).__name__}")
        first, block = part
        check_tensor("scores", block)
        check_shapes(scores=(block, f"{samples} pairs"))
        if block.shape[1]:
            yield first, block.detach()


class _Gathering:
    """Evidence under construction, on the device of the scores."""

    def __init__(
        self,
        target: Tensor,
        pair_attr: Tensor,
        pair_obj: Tensor,
        seen_mask: Tensor,
        eval_mask: Tensor,
        topk: int,
        device: torch.device,
    ) -> None:
        self.target, self.seen, self.candidates = target.to(device), seen_mask.to(device), eval_mask.to(device)
        self.attr, self.obj, self.topk = pair_attr.to(device), pair_obj.to(device), topk
        samples = len(target)
        self.score = torch.full((samples,), torch.nan, device=device)
        self.rivals = torch.full((samples, _GROUPS, topk), -torch.inf, device=device)
        self.best_seen = torch.full((samples, topk), -torch.inf, device=device)
        self.top_scores = torch.full((samples, 2, topk), -torch.inf, device=device)
        self.top_columns = torch.zeros((samples, 2, topk), dtype=torch.long, device=device)
        self.unranked = torch.zeros(samples, dtype=torch.bool, device=device)

    def add(self, first: int, block: Tensor) -> None:
        rows = max(1, _CHUNK // max(1, block.shape[1]))
        for start in range(0, len(block), rows):
            part = slice(start, start + rows)
            self._add_rows(part, first, block[part].float())

    def _add_rows(self, part: slice, first: int, block: Tensor) -> None:
        columns = torch.arange(first, first + block.shape[1], device=block.device)
        target = self.target[part, None]
        here = (target >= first) & (target < first + block.shape[1])
        own = block.gather(1, (target - first).clamp(0, block.shape[1] - 1))
        self.score[part] = torch.where(here, own, self.score[part, None])[:, 0]
        self.unranked[part] |= (~(block < torch.inf)).any(dim=1)

        seen, candidates = self.seen[columns], self.candidates[columns]
        self.best_seen[part] = _largest(torch.cat([self.best_seen[part], block[:, seen]], dim=1), self.topk)
        for group, members in enumerate((candidates & seen, candidates & ~seen)):
            others, their_columns = block[:, members], columns[members]
            for side, own_side in enumerate((their_columns >= target, their_columns <= target)):
                known = self.rivals[part, 2 * group + side]
                rivals = torch.cat([known, others.masked_fill(own_side, -torch.inf)], dim=1)
                self.rivals[part, 2 * group + side] = _largest(rivals, self.topk)

        bias = torch.where(seen, 0.0, FIRST_BIAS)
        for point, biased in enumerate((block, block + bias)):
            values, order = _first_largest(biased[:, candidates], self.topk)
            pool = torch.cat([self.top_scores[part, point], values], dim=1)
            pool_columns = torch.cat([self.top_columns[part, point], columns[candidates][order]], dim=1)
            by_column = pool_columns.argsort(dim=1, stable=True)
            kept, rank = _first_largest(pool.gather(1, by_column), self.topk)
            self.top_scores[part, point] = kept
            self.top_columns[part, point] = pool_columns.gather(1, by_column.gather(1, rank))

    def finish(self) -> Evidence:
        found = self.top_scores > -torch.inf
        true_attr, true_obj = self.attr[self.target], self.obj[self.target]
        attr_hit = ((self.attr[self.top_columns] == true_attr[:, None, None]) & found).any(dim=2)
        obj_hit = ((self.obj[self.top_columns] == true_obj[:, None, None]) & found).any(dim=2)
        score = self.score.masked_fill(self.unranked, torch.nan)
        return Evidence(
            target=self.target,
            score=score,
            rivals=self.rivals,
            best_seen=self.best_seen[:, -1],
            primitives=torch.stack([attr_hit, obj_hit], dim=2),
        )


def _largest(values: Tensor, k: int) -> Tensor:
    return values.amax(dim=1, keepdim=True) if k == 1 else values.topk(k, dim=1).values


def _first_largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest values and their indices, the lowest index first among equals (topk promises no order)."""
    if k == 1 and values.shape[1]:
        best = values.max(dim=1, keepdim=True)
        return best.values, best.indices
    ordered = values.sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


def sweep(evidence: Evidence, seen_mask: Tensor, *, protocol: Protocol = "standard") -> CZSLResult:
    """The curve and its summary from the evidence of all samples. Arguments and errors as in :func:`czsl_scores`."""
    check_choice("protocol", protocol, ("standard", "exact"))
    if not len(evidence.target):
        raise ValueError("expected at least one sample, got none")
    if evidence.score.isnan().any():
        sample = int(evidence.score.isnan().nonzero()[0])
        raise ValueError(f"expected `scores` without NaN and +inf, got one in sample {sample}")
    evidence = Evidence(*(part.cpu() for part in evidence))
    seen_sample = seen_mask.cpu()[evidence.target]
    points = [
        _point_at(evidence, seen_sample, bias, primitives)
        for bias, primitives in ((0.0, evidence.primitives[:, 0]), (FIRST_BIAS, evidence.primitives[:, 1]))
    ]
    curve = _standard_curve if protocol == "standard" else _exact_curve
    seen, unseen, biases = curve(evidence, seen_sample)
    # The official code ranks float32 accuracies: where two points tie, their rounding decides between them.
    ranked = (seen, unseen) if protocol == "exact" else (_rounded(seen), _rounded(unseen))
    best = int(_harmonic_mean(*ranked).argmax())
    return CZSLResult(
        seen=float(seen.max()),
        unseen=float(unseen.max()),
        harmonic_mean=float(_harmonic_mean(seen, unseen)[best]),
        auc=float(np.trapezoid(seen, unseen)) if not np.isnan(seen + unseen).any() else float("nan"),
        hm_seen=float(seen[best]),
        hm_unseen=float(unseen[best]),
        bias=float(biases[best]),
        attr_accuracy=points[0].attr,
        obj_accuracy=points[0].obj,
        unbiased=points[0],
        biased=points[1],
        curve=torch.from_numpy(np.stack([seen, unseen], axis=1)),
    )


def _rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(np.float64)


def _harmonic_mean(seen: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        mean: np.ndarray = 2 / (1 / seen + 1 / unseen)  # 0 where one of them is
    return mean


def _right_at(evidence: Evidence, seen_sample: Tensor, bias: Tensor) -> Tensor:
    """Whether the true pair is among the top k once ``bias`` is added, in float32, to all unseen pairs."""
    own = torch.where(seen_sample, evidence.score, evidence.score + bias)[:, None]
    seen_before, seen_after, unseen_before, unseen_after = evidence.rivals.unbind(dim=1)
    ahead = (seen_before >= own).sum(1) + (seen_after > own).sum(1)
    ahead += (unseen_before + bias >= own).sum(1) + (unseen_after + bias > own).sum(1)
    return (ahead < evidence.rivals.shape[2]) & (evidence.score > -torch.inf)


def _mean(hits: Tensor) -> float:
    return hits.double().mean().item()  # NaN for no sample, as the official code has it


def _point_at(evidence: Evidence, seen_sample: Tensor, bias: float, primitives: Tensor) -> BiasPoint:
    right = _right_at(evidence, seen_sample, torch.tensor(bias))
    attr, obj = primitives.unbind(dim=1)
    return BiasPoint(_mean(right), _mean(right[seen_sample]), _mean(right[~seen_sample]), _mean(attr), _mean(obj))


_Curve: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


def _standard_curve(evidence: Evidence, seen_sample: Tensor) -> _Curve:
    first = torch.tensor(FIRST_BIAS)
    reachable = _right_at(evidence, seen_sample, first) & ~seen_sample
    margins = (evidence.best_seen - evidence.score)[reachable] - _OFFSET
    margins = margins.sort().values
    biases = [*margins[:: max(len(margins) // _BINS, 1)].unbind(), first]
    right = [_right_at(evidence, seen_sample, bias) for bias in biases]
    seen = np.array([_mean(hits[seen_sample]) for hits in right])
    unseen = np.array([_mean(hits[~seen_sample]) for hits in right])
    return seen, unseen, np.array([bias.item() for bias in biases])


def _exact_curve(evidence: Evidence, seen_sample: Tensor) -> _Curve:
    """A seen sample is right below a threshold of the bias, an unseen one above it; points lie between thresholds."""
    own = evidence.score
    seen_before, seen_after, unseen_before, unseen_after = evidence.rivals.unbind(dim=1)
    thresholds = torch.where(
        seen_sample,
        own.double() - _deciding_rival(seen_before, seen_after, unseen_before, unseen_after, own),
        _deciding_rival(unseen_before, unseen_after, seen_before, seen_after, own) - own.double(),
    )
    finite = thresholds[thresholds.isfinite()].unique()
    edges = torch.cat([finite.new_tensor([-torch.inf]), finite])

    def share(values: Tensor, count: int) -> np.ndarray:
        ordered = values.sort().values
        below = torch.searchsorted(ordered, edges, right=True).numpy()
        return below / count if count else np.full(len(edges), np.nan)

    num_seen, num_unseen = int(seen_sample.sum()), int((~seen_sample).sum())
    lost = share(thresholds[seen_sample], num_seen)
    gained = share(thresholds[~seen_sample], num_unseen)
    middles = torch.cat([(edges[1:-1] + edges[2:]) / 2, edges.new_tensor([torch.inf])]) if len(finite) else edges[:0]
    return 1 - lost, gained, torch.cat([edges[:1], middles]).numpy()


def _deciding_rival(
    own_before: Tensor, own_after: Tensor, other_before: Tensor, other_after: Tensor, own: Tensor
) -> Tensor:
    """The score of the other group that must be beaten to be in the top k, given the better ones of the own group.

    +inf if the own group alone fills the top k (or the score is -inf): no bias helps then.
    """
    k = own_before.shape[1]
    ahead = (own_before >= own[:, None]).sum(1) + (own_after > own[:, None]).sum(1)
    others = torch.cat([other_before, other_after], dim=1).sort(dim=1, descending=True).values
    deciding = others.gather(1, (k - 1 - ahead).clamp(min=0)[:, None])[:, 0].double()
    return deciding.masked_fill((ahead >= k) | (own == -torch.inf), torch.inf)
