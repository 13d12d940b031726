"""What the metrics share: a ``forward`` that errors leave without trace, and statistics gathered batch by batch."""

from __future__ import annotations

import hashlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from czsl_heads._checks import check_choice
from czsl_heads.functional.score_statistics import (
    PairColumns,
    PartialStatistics,
    Scores,
    ScoreStatistics,
    merge_statistics,
    partial_statistics,
    score_statistics,
)


class SafeMetric(Metric):
    """A torchmetrics metric that an error in ``forward`` or ``compute`` leaves as it was."""

    is_differentiable = False
    full_state_update = False

    digest: Tensor
    _earlier: dict[str, Any] | None = None  # the states so far, while `forward` looks at one batch alone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch, as ``update`` does, and return the value of that batch alone; NaN where it is too small.

        If an error is raised, the batch is not added: all is as it was before the call.
        """
        # torchmetrics' own `forward` loses the states if there is an error, or sees the batch twice.
        if self._is_synced:
            raise TorchMetricsUserError("expected `forward` before `sync` or after `unsync`, got a call in between")
        before = self.__dict__.copy()
        self.reset()
        self._to_sync = self.dist_sync_on_step
        self._earlier = {name: before[name] for name in self._defaults}
        try:
            self.update(*args, **kwargs)
            value = self.compute()
            self._reduce_states(self._earlier)
        except BaseException:
            self.__dict__.update(before)
            raise
        finally:
            self._to_sync, self._earlier = before["_to_sync"], None

        self._update_count = before["_update_count"] + 1
        self._computed, self._forward_cache = None, value
        return value

    def reset(self) -> None:
        """Forget all samples."""
        # Lists are replaced, not emptied: in a collection metrics share them.
        for name, default in self._defaults.items():
            if isinstance(default, list):
                setattr(self, name, [])
        super().reset()

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the samples of another metric of the same labels and options, or of its states.

        Raises:
            ValueError: It is of others.
        """
        theirs = incoming_state.get("digest") if isinstance(incoming_state, dict) else incoming_state.digest
        self._check_digest("incoming_state", theirs)
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics keeps the value from before

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._check_digest("state_dict", state_dict.get(f"{prefix}digest"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._computed = None

    def _check_digest(self, name: str, theirs: Any) -> None:
        if isinstance(theirs, Tensor) and not torch.equal(theirs.cpu(), self.digest.cpu()):
            raise ValueError(f"expected `{name}` of a metric of the same labels and options, got another's")

    @contextmanager
    def sync_context(self, *args: Any, should_unsync: bool = True, **kwargs: Any) -> Iterator[None]:
        """As in torchmetrics, but an error too leaves the process with its own samples."""
        self.sync(*args, **kwargs)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and should_unsync)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw a value of ``compute`` or a list of them (default: the value now); see :class:`torchmetrics.Metric`."""
        return self._plot(val, ax)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = super()._wrap_compute(compute)

        @wraps(compute)
        def quiet(*args: Any, **kwargs: Any) -> Any:
            # torchmetrics warns that there was no update; `compute`, after gathering all processes, raises.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
                return wrapped(*args, **kwargs)

        return quiet

    def _keep_apart(self, *settings: Tensor | None) -> None:
        """Make a state of a digest of what decides what the states mean.

        A collection lets metrics share states if these are equal after the first batch. Metrics of other labels may
        have equal ones by chance, or after a batch without samples.
        """
        hashed = hashlib.sha256()
        for part in settings:
            hashed.update(b"" if part is None else part.detach().cpu().double().numpy().tobytes())
        self.add_state("digest", torch.tensor(list(hashed.digest()[:8])), dist_reduce_fx="max")


class HasScalars(Protocol):
    """What the metrics of the field's evaluation find."""

    def scalars(self) -> dict[str, float]:
        """Its single numbers by name."""


Result = TypeVar("Result", bound=HasScalars)


class ScalarTensors(dict[str, Tensor]):
    """What ``compute`` returns: scalar tensors by name."""

    def scalars(self) -> dict[str, float]:
        """The same as plain numbers."""
        return {name: value.item() for name, value in self.items()}


class GatheredMetric(SafeMetric, Generic[Result]):
    """A metric whose states are the :class:`~czsl_heads.functional.score_statistics.ScoreStatistics` of all samples.

    Args:
        columns: What the columns of the scores are.
        topk: A sample counts as right if its pair is among the ``topk`` best.
        key: The one number that ``compute`` returns; default: a dict of all.
        kwargs: Passed on to :class:`torchmetrics.Metric`.
    """

    keys: ClassVar[tuple[str, ...]]  # of what `compute` returns

    target: list[Tensor] | Tensor
    score: list[Tensor] | Tensor
    negatives: list[Tensor] | Tensor
    best_seen: list[Tensor] | Tensor
    primitives: list[Tensor] | Tensor

    def __init__(self, columns: PairColumns, topk: int, key: str | None, **kwargs: Any) -> None:
        if key is not None:
            check_choice("key", key, self.keys)
        super().__init__(**kwargs)
        self._columns, self.topk, self.key = columns, topk, key
        self._found: Result | None = None
        for name in ScoreStatistics._fields:
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self._keep_apart(columns.groups, columns.attr, columns.obj, torch.tensor(topk))

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """True; None if ``key`` names a bias or a threshold, of which none is best."""
        return None if self.key in _NO_FRACTIONS else True

    @abstractmethod
    def _result(self, statistics: ScoreStatistics) -> Result:
        """From the statistics of all samples."""

    def update(self, scores: Scores, target: Tensor) -> None:
        """Add samples; there may be none.

        Args:
            scores: Unbiased scores ``[batch, P]``, or an iterable of ``(first_column, block)`` that covers all columns
                of these samples once.
            target: Column of the true pair, long ``[batch]``.
        """
        self.add(self.statistics(scores, target))

    def statistics(self, scores: Scores, target: Tensor) -> ScoreStatistics:
        """What is kept of samples: what :meth:`update` adds. Metrics of the same labels and ``topk`` may share it."""
        return score_statistics(scores, target, self._columns, topk=self.topk, name="target")

    def partial(self, scores: Scores, target: Tensor) -> PartialStatistics:
        """What some of the columns say of samples, where no process has them all; for :meth:`merge`.

        Args:
            scores: An iterable of ``(first_column, block)``: the columns that this process has.
            target: Column of the true pair, long ``[batch]``, among all columns.
        """
        return partial_statistics(scores, target, self._columns, topk=self.topk, name="target")

    def merge(self, parts: Sequence[PartialStatistics]) -> ScoreStatistics:
        """What is kept of samples, from what all processes made of them by :meth:`partial`; for :meth:`add`.

        Raises:
            ValueError: The parts do not cover each column once, or are of other samples.
        """
        return merge_statistics(parts, self._columns)

    def add(self, statistics: ScoreStatistics) -> None:
        """Add samples of which the statistics are known."""
        for name, part in statistics._asdict().items():
            getattr(self, name).append(part)
        self._computed = None

    def kept(self) -> ScoreStatistics:
        """The statistics of the samples so far; there may be none."""
        if not len(self.target):
            empty = torch.empty(0, len(self._columns), device=self.device)
            return self.statistics(empty, torch.empty(0, dtype=torch.long, device=self.device))
        parts = [getattr(self, name) for name in ScoreStatistics._fields]
        # torchmetrics gathers lists of tensors into one tensor.
        return ScoreStatistics(*(torch.cat(part) if isinstance(part, list) else part for part in parts))

    def keep(self, statistics: ScoreStatistics) -> None:
        """Put samples in the place of those so far."""
        for name, part in statistics._asdict().items():
            setattr(self, name, [part])
        self._computed = None

    def compute(self) -> Tensor | ScalarTensors:
        """The numbers over all samples so far: a dict of scalar tensors by name, or the one of ``key``.

        They are float64 (float32 on devices without it) on the metric's device; NaN where there is no such number.
        """
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        tensors = ScalarTensors()
        for name, value in self._values().items():
            tensors[name] = torch.tensor(value, dtype=dtype, device=self.device)
        return tensors if self.key is None else tensors[self.key]

    def _values(self) -> dict[str, float]:
        statistics = self.kept()
        if not len(statistics.target):
            if self._earlier is not None:
                return dict.fromkeys(self.keys, torch.nan)
            raise ValueError("expected at least one sample before `compute`, got none")
        self._found = self._result(statistics)
        return self._found.scalars()

    def result(self) -> Result:
        """All that is found over all samples so far, of all processes: what ``compute`` takes its numbers from."""
        self.compute()  # gathers the processes, unless it was called since the last sample
        return cast(Result, self._found)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw a value of ``compute`` or a list of them (default: the value now); see :class:`torchmetrics.Metric`.

        A bias or a threshold is drawn only if it is the ``key``: it is no fraction.
        """
        val = self.compute() if val is None else val
        if isinstance(val, (list, tuple)):
            return self._plot([_fractions(value) for value in val], ax)
        return self._plot(_fractions(val), ax)

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
            self.keep(self.kept())
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)


_NO_FRACTIONS = ("bias", "threshold")  # numbers that are no fractions


def _fractions(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: part for name, part in value.items() if name not in _NO_FRACTIONS}
