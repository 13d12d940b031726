"""The pairs of a label space that a process has texts of: all, or a share where processes divide a large space.

Where they are divided, a process scores its own columns of every image. A softmax asks the other processes for one
number per image: the logarithm of what their columns would add to its denominator.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from czsl_heads.functional.bank import Judged, first_argmax, prediction_entropy
from czsl_heads.functional.score_statistics import PartialStatistics, ScoreStatistics
from czsl_heads.functional.score_statistics_op import Found
from czsl_heads.heads.memory_bank import DynamicMemoryBank
from czsl_heads.metrics.gathered import GatheredMetric
from czsl_heads.models.method import Logits
from czsl_heads.training.shares import Processes

Looked = list[tuple[GatheredMetric[Any], Any]]


class Columns:
    """All pairs of a space of ``count``."""

    shared = False

    def __init__(self, count: int) -> None:
        self.count, self.first, self.last = count, 0, count

    def widen(self, logits: Logits, pairs: Tensor) -> tuple[Logits, Tensor]:
        """Logits and pairs over which a method's softmax is right; :meth:`own` undoes it for the scores."""
        return logits, pairs

    def own(self, scores: Tensor) -> Tensor:
        """The own columns of scores of what :meth:`widen` gave."""
        return scores

    def remembered(self, bank: DynamicMemoryBank, features: Tensor) -> Tensor:
        """What a bank over the own columns makes of images ``[batch, columns]``, as probabilities over all columns."""
        logits: Tensor = bank(features)
        return logits.softmax(dim=1)

    def judge(self, bank: DynamicMemoryBank, probs: Tensor, labels: Tensor | None) -> Judged:
        """What a bank asks of predictions over the own columns; ``labels`` are columns of the whole space."""
        return bank.judge(probs, pair_index=labels)

    def look(self, metric: GatheredMetric[Any], scores: Tensor, target: Tensor) -> Any:
        """What a metric over all columns keeps of scores of the own ones, as :meth:`settle` takes it."""
        return metric.statistics(scores, target)

    def settle(self, looked: Looked, target: Tensor) -> list[ScoreStatistics]:
        """The statistics over all columns of everything that was looked at."""
        return [found for _, found in looked]


class SharedColumns(Columns):
    """One run of the columns, of which each process has about as many. All processes see the same images at once."""

    shared = True

    def __init__(self, count: int, processes: Processes) -> None:
        super().__init__(count)
        self.processes = processes
        edges = [count * rank // processes.count for rank in range(processes.count + 1)]
        self.spans = [*pairwise(edges)]
        self.first, self.last = self.spans[processes.rank]

    def _everyone(self, *parts: Tensor) -> list[list[Tensor]]:
        return self.processes.gather(parts, [len(parts[0])] * self.processes.count)

    def _with_rest(self, logits: Tensor) -> Tensor:
        """The own logits and, as one more column, the logarithm of the sum of the exponentials of all others."""
        own = logits.logsumexp(dim=1)  # [batch]
        sums = torch.stack([other for (other,) in self._everyone(own)])  # [processes, batch]
        sums[self.processes.rank] = -torch.inf
        return torch.cat([logits, sums.logsumexp(dim=0)[:, None]], dim=1)

    def widen(self, logits: Logits, pairs: Tensor) -> tuple[Logits, Tensor]:
        wide = logits._replace(pairs=self._with_rest(logits.pairs))
        return wide, torch.cat([pairs, pairs[:1]])  # of the last column no score is read

    def own(self, scores: Tensor) -> Tensor:
        return scores[:, : self.last - self.first]

    def remembered(self, bank: DynamicMemoryBank, features: Tensor) -> Tensor:
        logits: Tensor = bank(features)
        entries = bank.count + len(bank.texts)
        total = torch.stack([other for (other,) in self._everyone(entries[None])]).sum()
        # By itself a bank without entries gives zeros, as the whole one does only if no process has any.
        without = (entries == 0) & (total > 0)
        nothing = -torch.inf if bank.empty == "mask" else 0.0
        logits = torch.where(without, torch.full_like(logits, nothing), logits)
        return self.own(self._with_rest(logits).softmax(dim=1))

    def judge(self, bank: DynamicMemoryBank, probs: Tensor, labels: Tensor | None) -> Judged:
        column = first_argmax(probs)
        best = probs.gather(1, column[:, None])[:, 0]
        parts = [prediction_entropy(probs), best, column + self.first, probs.sum(dim=1)]
        entropy, best, column, total = (
            torch.stack(each) for each in zip(*self._everyone(*parts))
        )  # [processes, batch]

        rows = labels
        if rows is None:
            surest = first_argmax(best.T)  # of equal ones the first process, whose columns are lower
            rows = column.gather(0, surest[None])[0]
        elsewhere = (rows < self.first) | (rows >= self.last)
        rows = (rows - self.first).masked_fill(elsewhere, bank.num_pairs)
        finite = total.sum(dim=0).isfinite()
        return Judged(rows, entropy.sum(dim=0), finite, torch.ones_like(finite))

    def look(self, metric: GatheredMetric[Any], scores: Tensor, target: Tensor) -> Any:
        return metric.partial([(self.first, scores)], target).found

    def settle(self, looked: Looked, target: Tensor) -> list[ScoreStatistics]:
        flat = [part for _, found in looked for part in found]
        received = self._everyone(*flat)

        size = len(Found._fields)
        merged = []
        for number, (metric, _) in enumerate(looked):
            parts = []
            for span, tensors in zip(self.spans, received):
                found = Found(*tensors[number * size : (number + 1) * size])
                parts.append(PartialStatistics(target, found, (span,)))
            merged.append(metric.merge(parts))
        return merged


def columns_of(count: int, processes: Processes, *, shared: bool) -> Columns:
    """All columns, or a share of them."""
    return SharedColumns(count, processes) if shared and processes.count > 1 else Columns(count)
