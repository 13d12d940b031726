"""Batches in an order that depends on (seed, epoch) alone, so that an interrupted epoch can be run again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from czsl_heads.data.packed import in_batches
from czsl_heads.training.shares import Processes, Shares, ShareSampler

MOST_WORKERS = 8


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields ``(epoch, number)`` over a permutation drawn from (seed, epoch), of which each rank takes its share.

    Lightning calls :meth:`set_epoch` before each epoch. The data set gets the epoch along with the number, so that its
    augmentation is seeded alike in every worker process.
    """

    def __init__(self, size: int, *, seed: int, rank: int = 0, num_ranks: int = 1) -> None:
        self.size, self.seed, self.rank, self.num_ranks, self.epoch = size, seed, rank, num_ranks, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.num_ranks if self.num_ranks > 1 else self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        share = order[self.rank :: self.num_ranks][: len(self)]
        return iter([(self.epoch, number) for number in share])


def train_loader(
    images: Dataset[Any], batch_size: int, seed: int, *, workers: int | None = 0, rank: int = 0, num_ranks: int = 1
) -> DataLoader[Any]:
    """Training images, shuffled; ``workers`` as :func:`count_workers` takes them."""
    sampler = EpochSampler(len(images), seed=seed, rank=rank, num_ranks=num_ranks)  # type: ignore[arg-type]
    return _loader(images, workers, batch_size=batch_size, sampler=sampler)


def eval_loader(images: Dataset[Any], shares: Shares | int, *, workers: int | None = 0) -> DataLoader[Any]:
    """Images in file order: the batches of one process, or all of so many images each."""
    if isinstance(shares, int):
        shares = Shares(len(images), shares, Processes())  # type: ignore[arg-type]
    return _loader(images, workers, batch_sampler=ShareSampler(shares))


def _loader(images: Dataset[Any], workers: int | None, **batches: Any) -> DataLoader[Any]:
    in_memory = hasattr(images, "__getitems__")  # workers would only copy it
    whole = images if in_memory else in_batches(images)
    number = 0 if in_memory else count_workers(workers)
    return DataLoader(
        images if whole is None else whole,
        **batches,
        num_workers=number,
        pin_memory=torch.cuda.is_available() and not in_memory,  # without, a GPU is waited for at each copy
        collate_fn=None if whole is None else _as_it_is,
        # Its own, or it would draw from the one that an epoch is seeded with, before that or after.
        generator=torch.Generator(),
    )


def count_workers(workers: int | None) -> int:
    """Processes that load images; None: as many as there are cores for this process, at most 8."""
    if workers is not None:
        return workers
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(len(cores), MOST_WORKERS)


def _as_it_is(batch: Any) -> Any:
    return batch
