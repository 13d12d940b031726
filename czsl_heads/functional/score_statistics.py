"""What the field's evaluation needs of each sample: a few numbers, whatever the number of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from czsl_heads._checks import check_integer, check_kind, check_shapes, check_tensor
from czsl_heads.functional.score_statistics_op import FIRST_BIAS, Found, Gathering, Layout, finish, join, lay_out

Scores: TypeAlias = Tensor | Iterable[tuple[int, Tensor]]


class ScoreStatistics(NamedTuple):
    """The sufficient statistics of samples ``n``: the evaluation depends on nothing else.

    Attributes:
        target: Column of the true pair ``[n]``.
        score: Its score, float32 ``[n]``; NaN if any score of the sample is NaN or +inf.
        negatives: The ``k`` best scores of wrong candidates, best first, -inf where there are fewer. There are four
            sorts, ``[n, 4, k]``: seen pairs before the true column, seen after, unseen before, unseen after. Where
            unseen candidates come in buckets, the last two of each bucket in turn: ``[n, 2 + 2 * buckets, k]``.
        best_seen: The ``k``-th best score of a seen pair ``[n]``, the true one and non-candidates included.
        primitives: Whether (attribute, object) are right in the top ``k``, at bias 0 and 1e3: bool ``[n, 2, 2]``;
            ``[n, 0, 2]`` where there are buckets.
    """

    target: Tensor
    score: Tensor
    negatives: Tensor
    best_seen: Tensor
    primitives: Tensor


class PartialStatistics(NamedTuple):
    """What some of the columns say of samples ``n``, until :func:`merge_statistics` has the others.

    Attributes:
        target: Column of the true pair ``[n]``.
        found: What the columns say.
        spans: First column, and the one after the last, of each run of columns.
    """

    target: Tensor
    found: Found
    spans: tuple[tuple[int, int], ...]


class PairColumns:
    """What the columns of scores are, checked once and laid out once for all samples.

    Args:
        pair_attr, pair_obj: Attribute and object of each column, long ``[P]``.
        seen_mask: True where the pair was trained on, bool ``[P]``.
        eval_mask: True where the pair is a candidate, bool ``[P]``; default: everywhere.
        bucket: For each column a number below ``num_buckets``, long ``[P]``: negatives among unseen candidates are
            then kept apart by it.
        num_buckets: How many there are; only with ``bucket``.

    Raises:
        TypeError: A tensor has the wrong kind.
        ValueError: Shapes do not fit.
    """

    def __init__(
        self,
        pair_attr: Tensor,
        pair_obj: Tensor,
        seen_mask: Tensor,
        eval_mask: Tensor | None = None,
        *,
        bucket: Tensor | None = None,
        num_buckets: int = 1,
    ) -> None:
        check_tensor("pair_attr", pair_attr, dtypes=(torch.long,))
        check_tensor("pair_obj", pair_obj, dtypes=(torch.long,))
        check_tensor("seen_mask", seen_mask, dtypes=(torch.bool,))
        if eval_mask is not None:
            check_tensor("eval_mask", eval_mask, dtypes=(torch.bool,))
        candidates = torch.ones_like(seen_mask) if eval_mask is None else eval_mask
        check_shapes(
            pair_attr=(pair_attr, "pairs"),
            pair_obj=(pair_obj, "pairs"),
            seen_mask=(seen_mask, "pairs"),
            eval_mask=(candidates, "pairs"),
        )
        self.attr, self.obj, self.seen, self.candidates = (
            part.cpu() for part in (pair_attr, pair_obj, seen_mask, candidates)
        )
        # Within buckets columns do not rise, so the first of equals, which decides on primitives, is not known.
        self.biases = (0.0, FIRST_BIAS) if bucket is None else ()
        self.num_buckets = num_buckets
        unseen = 2 + (torch.zeros_like(self.attr) if bucket is None else bucket.cpu())
        # Seen ones that are no candidates come second: what is seen lies together.
        self.groups = torch.where(
            self.candidates, unseen.masked_fill(self.seen, 0), torch.where(self.seen, 1, 2 + num_buckets)
        )
        self._layouts: dict[tuple[int, int, torch.device], Layout] = {}

    def __len__(self) -> int:
        return len(self.seen)

    def layout(self, first: int, width: int, device: torch.device) -> Layout:
        key = (first, width, device)
        if key not in self._layouts:
            laid_out = lay_out(self.groups[first : first + width], 3 + self.num_buckets, first)
            self._layouts[key] = laid_out.to(device)
        return self._layouts[key]


def score_statistics(
    scores: Scores, target_pair: Tensor, columns: PairColumns, *, topk: int = 1, name: str = "target_pair"
) -> ScoreStatistics:
    """Reduce scores to what the evaluation needs, reading each block once.

    Args:
        scores, target_pair, topk: As in :func:`~czsl_heads.functional.czsl_scores`.
        columns: What the columns are.
        name: What errors call ``target_pair``: the caller's own argument.

    Raises:
        TypeError, ValueError: As in :func:`~czsl_heads.functional.czsl_scores`. Scores that cannot be ranked are only
            marked, by a NaN in ``score``.

    Example:
        >>> seen = torch.tensor([True, False, False, True])  # old cat, old dog, young cat, young dog
        >>> columns = PairColumns(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), seen)
        >>> scores = torch.tensor([[0.4, 0.7, 0.3, 0.1], [0.2, 0.5, 0.6, 0.8]])
        >>> found = score_statistics(scores, torch.tensor([1, 0]), columns)  # an old dog, an old cat
        >>> found.score  # of the true pair: the first sample is right, the second is not
        tensor([0.7000, 0.2000])
        >>> found.negatives[:, :, 0]  # best wrong ones: seen before the true column, seen after, unseen before, after
        tensor([[0.4000, 0.1000,   -inf, 0.3000],
                [  -inf, 0.8000,   -inf, 0.6000]])
        >>> found.best_seen  # of all seen pairs: the first sample is right until its 0.7 is biased below 0.4
        tensor([0.4000, 0.8000])
        >>> found.primitives[:, 0]  # attribute and object at bias 0: the second sample is taken for a young dog
        tensor([[ True,  True],
                [False, False]])
        >>> found.primitives[:, 1]  # at bias 1e3 only unseen pairs win: the second is a young cat
        tensor([[ True,  True],
                [False,  True]])
    """
    return merge_statistics([partial_statistics(scores, target_pair, columns, topk=topk, name=name)], columns)


def partial_statistics(
    scores: Scores, target_pair: Tensor, columns: PairColumns, *, topk: int = 1, name: str = "target_pair"
) -> PartialStatistics:
    """What some of the columns say, where no process has them all; :func:`merge_statistics` joins them.

    Args:
        scores: An iterable of ``(first_column, block)``, or a tensor of all columns.
        target_pair, columns, topk, name: As in :func:`score_statistics`; the true column may be another process's.

    Raises:
        TypeError, ValueError: As :func:`score_statistics`, but columns may be missing.
    """
    check_tensor(name, target_pair, dtypes=(torch.long,))
    check_shapes(**{name: (target_pair, "samples")})
    check_kind("columns", columns, PairColumns)
    check_integer("topk", topk, 1, len(columns))
    _check_targets(name, target_pair, columns.candidates)

    gathering: Gathering | None = None
    spans: list[tuple[int, int]] = []
    for first, block in _blocks(scores, len(target_pair)):
        last = first + block.shape[1]
        if first < 0 or last > len(columns):
            raise ValueError(f"expected `scores` of {len(columns)} columns, got columns {first} to {last - 1}")
        spans.append((first, last))
        _check_once(spans)
        if gathering is None:
            gathering = Gathering(target_pair.to(block.device), columns.num_buckets, columns.biases, topk)
        gathering.add(block, columns.layout(first, block.shape[1], block.device))
    if gathering is None:
        gathering = Gathering(target_pair, columns.num_buckets, columns.biases, topk)
    return PartialStatistics(gathering.target, gathering.found, tuple(spans))


def merge_statistics(parts: Sequence[PartialStatistics], columns: PairColumns) -> ScoreStatistics:
    """The statistics of samples from what all columns say of them: equal to the bit to those of one pass.

    Args:
        parts: Of the same samples, by :func:`partial_statistics`; together they cover each column once.
        columns: What the columns are.

    Raises:
        ValueError: There is no part, the parts are of other samples, or a column is missing or there twice.

    Example:
        >>> columns = PairColumns(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), torch.tensor([True, False, False]))
        >>> scores, target = torch.tensor([[0.4, 0.7, 0.3]]), torch.tensor([1])
        >>> parts = [partial_statistics([(first, scores[:, first:first + 1])], target, columns) for first in range(3)]
        >>> merge_statistics(parts, columns).score
        tensor([0.7000])
    """
    if not parts:
        raise ValueError("expected `parts` to hold statistics, got none")
    target = parts[0].target
    for part in parts:
        if not torch.equal(part.target, target):
            raise ValueError("expected `parts` of the same samples, got others")
    spans = [span for part in parts for span in part.spans]
    _check_once(spans)
    covered = torch.zeros(len(columns), dtype=torch.bool)
    for first, last in spans:
        covered[first:last] = True
    if not spans or not covered.all():
        missing = int((~covered).nonzero()[0]) if len(columns) else 0
        raise ValueError(f"expected `scores` to cover all {len(columns)} columns, got none for column {missing}")
    found = reduce(join, (part.found for part in parts))
    return ScoreStatistics(*finish(found, target, (columns.attr, columns.obj)))


def _check_once(spans: Sequence[tuple[int, int]]) -> None:
    ordered = sorted(spans)
    for before, after in pairwise(ordered):
        if before[1] > after[0]:
            raise ValueError(f"expected `scores` to cover each column once, got columns from {after[0]} on again")


def _check_targets(name: str, target: Tensor, candidates: Tensor) -> None:
    if not len(target):
        return
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= len(candidates):
        wrong = low if low < 0 else high
        raise ValueError(f"expected `{name}` to hold columns below {len(candidates)}, got {wrong}")
    outside = ~candidates[target.cpu()]
    if outside.any():
        sample = int(outside.nonzero()[0])
        raise ValueError(
            f"expected `{name}` to be candidates under `eval_mask`, got column {int(target[sample])} of sample "
            f"{sample}, which is masked out"
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
            yield int(first), block.detach()
