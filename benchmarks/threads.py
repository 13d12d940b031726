"""How many threads should train a small model? ``python -m benchmarks.threads`` (two minutes on two cores).

A training step of the demo (SAC, the tiny CLIP, 64 images) on 1, 2 and more threads, up to as many as there are cores:
first alone on the machine, then with every second core kept busy by another program. Beside it, what a training takes
by itself: the number of threads that encoded a few images fastest when it was asked, and what a step costs on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.measure import time_in_turn, write_results
from benchmarks.whole_steps import draw_images
from czsl_heads.data import make_shapes, read_dataset
from czsl_heads.models.recipe import build
from czsl_heads.training.options import load_options
from czsl_heads.training.threads import fastest

SEED = 0
BUSY = [sys.executable, "-c", "while True: pass"]


def demo_step(images: int) -> tuple[Any, Callable[[], None]]:
    """The demo's model, and a training step without the optimiser."""
    with TemporaryDirectory() as folder:
        root = make_shapes(f"{folder}/shapes", train_per_pair=1, val_per_pair=1, test_per_pair=1)
        space = read_dataset(root).space
    options, _ = load_options("sac", "shapes")
    torch.manual_seed(SEED)
    model: Any = build(options.recipe("sac", "tiny", "max"), space).train()
    pairs = space.pairs[space.seen_mask]
    drawn, targets = draw_images(model, images, "cpu"), torch.arange(images) % len(pairs)
    return model, lambda: model.loss(drawn, pairs, targets).backward()


def on_threads(number: int, step: Callable[[], None]) -> None:
    torch.set_num_threads(number)
    step()


def main(images: int = 64, rounds: int = 9, name: str = "threads") -> None:
    """Measure, print and write ``results/NAME.json``.

    Args:
        images: A step.
        rounds: How often a step is timed.
        name: Of the results.
    """
    most = torch.get_num_threads()
    numbers = sorted({most, *(2**power for power in range(most.bit_length()) if 2**power < most)})
    model, step = demo_step(images)
    few = draw_images(model, 16, "cpu")
    found = []
    for busy in (0, (os.cpu_count() or 1) // 2):
        others = [subprocess.Popen(BUSY) for _ in range(busy)]
        try:
            torch.set_num_threads(most)
            chosen = fastest(model.encoder.encode_tokens, few, most)
            rivals: dict[str, Callable[[], object]] = {str(n): partial(on_threads, n, step) for n in numbers}
            seconds = time_in_turn(rivals, rounds=rounds)
        finally:
            for other in others:
                other.kill()
        ratios = {number: round(value / seconds["1"], 2) for number, value in seconds.items()}
        found.append({"busy_cores": busy, "times_one_thread": ratios, "chosen": chosen})
        print(found[-1], flush=True)
    content = {"images": images, "cores": os.cpu_count(), "rows": found}
    write_results(name, "How many threads should train a small model?", SEED, content)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
