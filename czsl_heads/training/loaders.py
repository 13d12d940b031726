"""Batches in an order that depends on (seed, epoch) alone, so that an interrupted epoch can be run again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from czsl_heads.data.layout import CompositionDataset
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.training.options import AlignOptions


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
    dataset: CompositionDataset,
    encoder: Encoder,
    options: AlignOptions,
    seed: int,
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> DataLoader[Any]:
    """Augmented training images, shuffled."""
    images = dataset.images("train", encoder.transform(train=True), seed=seed)
    sampler = EpochSampler(len(images), seed=seed, rank=rank, num_ranks=num_ranks)
    return DataLoader(images, options.batch_size, sampler=sampler, num_workers=options.workers)


def eval_loader(dataset: CompositionDataset, encoder: Encoder, options: AlignOptions, split: str) -> DataLoader[Any]:
    """The images of a split in file order."""
    images = dataset.images(split, encoder.transform())
    return DataLoader(images, options.eval_batch_size, num_workers=options.workers)
