"""Images of a split shared among processes, whole batches in turn, and what was found put back into file order.

The batches are those of one process, so that every number is equal to the bit to that of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


@dataclass(frozen=True)
class Processes:
    """Those that work together, and which of them this one is.

    Args:
        rank: The number of this one.
        count: How many there are.
        device: Where this one computes, and what is sent lies.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def gather(self, parts: Sequence[Tensor], rows: Sequence[int]) -> list[list[Tensor]]:
        """What each process has: tensors of ``rows[i]`` rows of the ``i``-th, of the same other axes everywhere.

        Processes beyond ``rows`` take part, and nothing of theirs comes back. All must call this at the same time.
        """
        if self.count == 1:
            return [[*parts]][: len(rows)]

        most = max(rows)
        flat = [_as_bytes(part, self.device) for part in parts]  # each [own rows, bytes]
        sent = torch.zeros(most, sum(part.shape[1] for part in flat), dtype=torch.uint8, device=self.device)
        own = min(most, len(flat[0]))
        sent[:own] = torch.cat(flat, dim=1)[:own]
        received = [torch.empty_like(sent) for _ in range(self.count)]
        torch.distributed.all_gather(received, sent)

        widths = [part.shape[1] for part in flat]
        return [
            [_from_bytes(each, like) for each, like in zip(table[:count].split(widths, dim=1), parts)]
            for table, count in zip(received, rows)
        ]


def _as_bytes(part: Tensor, device: torch.device) -> Tensor:
    """``[rows, bytes]``: all dtypes travel in one message, also those that a backend does not know."""
    own = torch.empty(part.shape, dtype=part.dtype, device=device).copy_(part.detach())  # of plain strides
    return own.view(-1).view(torch.uint8).view(len(part), math.prod(part.shape[1:]) * part.element_size())


def _from_bytes(table: Tensor, like: Tensor) -> Tensor:
    found = torch.empty(len(table), *like.shape[1:], dtype=like.dtype, device=table.device)
    found.view(-1).view(torch.uint8).copy_(table.reshape(-1))
    return found.to(like.device)


class Shares:
    """How the batches of a split in file order fall to processes: in turn, one each a round.

    In the last round there may be too few. Who has none repeats the last batch, which then counts for nothing.

    Args:
        size: How many images there are.
        batch_size: Images at once.
        processes: Who takes part.
    """

    def __init__(self, size: int, batch_size: int, processes: Processes) -> None:
        starts = range(0, size, batch_size)
        self.batches = [range(start, min(start + batch_size, size)) for start in starts]
        self.processes = processes

    def __len__(self) -> int:
        """How many rounds there are."""
        return -(-len(self.batches) // self.processes.count)

    def rows(self, turn: int) -> list[int]:
        """How many images each batch of a round has."""
        first = turn * self.processes.count
        return [len(batch) for batch in self.batches[first : first + self.processes.count]]

    def has_own(self, turn: int) -> bool:
        """Whether the batch of this process is one of the round, and no repetition."""
        return self.processes.rank < len(self.rows(turn))

    def of_process(self, rank: int) -> list[range]:
        """The batches of a process."""
        return self.batches[rank :: self.processes.count]

    def in_turn(self, turn: int, parts: Sequence[Tensor]) -> list[list[Tensor]]:
        """Tensors of the batches of a round, in file order, from those of the own batch."""
        return self.processes.gather(parts, self.rows(turn))

    def joined(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of all images in file order, from those of the own images."""
        if self.processes.count == 1:
            return [*parts]
        numbers = [self._images(rank) for rank in range(self.processes.count)]
        found = self.processes.gather(parts, [len(each) for each in numbers])
        order = torch.cat(numbers).argsort()
        return [torch.cat(each)[order.to(each[0].device)] for each in zip(*found)]

    def joined_batches(self, numbers: Sequence[Tensor]) -> list[Tensor]:
        """A number of every batch in file order, from those of the own batches."""
        own = torch.stack([torch.zeros((), dtype=torch.float64), *numbers])[1:]
        counts = [len(self.of_process(rank)) for rank in range(self.processes.count)]
        columns = [found for (found,) in self.processes.gather([own], counts)]
        return [columns[number % len(columns)][number // len(columns)] for number in range(len(self.batches))]

    def _images(self, rank: int) -> Tensor:
        """The images of a process, as its batches have them."""
        own = [torch.arange(batch.start, batch.stop) for batch in self.of_process(rank)]
        return torch.cat([torch.empty(0, dtype=torch.long), *own])


class ShareSampler(Sampler[list[int]]):
    """The batches of one process, one a round."""

    def __init__(self, shares: Shares) -> None:
        self.shares = shares

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[list[int]]:
        batches, processes = self.shares.batches, self.shares.processes
        for turn in range(len(self.shares)):
            number = min(turn * processes.count + processes.rank, len(batches) - 1)
            yield [*batches[number]]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A tensor, or tuples of such, plain or named, with a function of each tensor in its place."""
    if isinstance(value, Tensor):
        return function(value)
    parts = [map_tensors(function, part) for part in value]
    return value._make(parts) if hasattr(value, "_make") else tuple(parts)


def with_tensors(value: Any, tensors: Sequence[Tensor]) -> Any:
    """The same tuples around other tensors, in the order in which :func:`map_tensors` comes to them."""
    others = iter(tensors)
    return map_tensors(lambda _: next(others), value)
