"""How many threads of the CPU a small model is trained by: as many as are fastest now, on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import lightning
import torch
from torch import Tensor

SMALL = 0.5  # seconds: a model that takes longer for a few images gains from all threads, or is alone on its machine
_IMAGES = 16
_ROUNDS = 3


@contextmanager
def fitting_threads(encoder: Any, trainer: lightning.Trainer) -> Iterator[None]:
    """Within the block, torch has the number of threads that encodes a few images fastest.

    Threads wait for each other at the end of each product. Where somebody else has one of the cores, all wait for the
    one that has to share, and a small model is then slower on two threads than on one. Nothing is measured, and nothing
    changed, on a GPU, by several processes, with one thread, or if ``OMP_NUM_THREADS`` says how many.

    Args:
        encoder: What images are encoded by.
        trainer: What trains.
    """
    most = torch.get_num_threads()
    if trainer.strategy.root_device.type != "cpu" or trainer.world_size > 1 or is_settled():
        yield
        return
    size = encoder.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.zeros(_IMAGES, 3, height, width)
    try:
        with torch.random.fork_rng(devices=[]):  # an encoder that drops patches draws
            number = fastest(encoder.encode_tokens, images, most)
        torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(most)


def is_settled() -> bool:
    """Whether there is no choice: one thread, or as many as somebody has said."""
    return torch.get_num_threads() == 1 or "OMP_NUM_THREADS" in os.environ


def take_up(number: int) -> None:
    """Go on with the threads of an interrupted training: on others, sums would be rounded in another way."""
    if "OMP_NUM_THREADS" not in os.environ and number <= (os.cpu_count() or 1):
        torch.set_num_threads(number)


@torch.no_grad()
def fastest(encode: Callable[[Tensor], object], images: Tensor, most: int) -> int:
    """The number of threads, 1 or doubled up to ``most``, that encodes images fastest; ``most`` if that takes long."""
    numbers = {most, *(2**power for power in range(most.bit_length()) if 2**power < most)}
    for some in (images[:1], images):  # the first time, much is made that stays
        if _seconds(encode, some) > SMALL:
            return most
    seconds: dict[int, list[float]] = {number: [] for number in sorted(numbers)}
    for _ in range(_ROUNDS):
        for number, measured in seconds.items():
            torch.set_num_threads(number)
            encode(images)  # threads are started at the first call
            measured.append(_seconds(encode, images))
    return min(seconds, key=lambda number: median(seconds[number]))


def _seconds(encode: Callable[[Tensor], object], images: Tensor) -> float:
    start = time.perf_counter()
    encode(images)
    return time.perf_counter() - start
