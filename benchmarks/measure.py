"""What every benchmark needs: rivals timed in turn, peak memory, and where it all ran."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from czsl_heads._files import write_json
from czsl_heads.training.environment import environment

RESULTS = Path(__file__).parent / "results"


def time_in_turn(rivals: dict[str, Callable[[], object]], *, rounds: int = 5) -> dict[str, float]:
    """Median seconds of each rival over ``rounds`` rounds, in each of which all run once, after one run unmeasured.

    In turn, because a noisy machine is then slow for all; so compare the figures of one call only. CUDA is waited for.
    """
    return {name: median(values) for name, values in seconds_in_turn(rivals, rounds=rounds).items()}


def seconds_in_turn(rivals: dict[str, Callable[[], object]], *, rounds: int = 5) -> dict[str, list[float]]:
    """The seconds of each round, as in :func:`time_in_turn`; those of one round belong together."""
    for run in rivals.values():
        _seconds(run)
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            seconds[name].append(_seconds(run))
    return seconds


def _seconds(run: Callable[[], object]) -> float:
    # Not torch.utils.benchmark.Timer, which runs everything twice more before each measurement.
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], object], device: str = "cpu", *, runs: int = 3) -> int:
    """Bytes that ``run`` takes at its peak beyond what was taken before, its result included; the median of some runs.

    On the CPU from the kernel's count of resident pages (Linux only): allocate the inputs beforehand, and touch them.
    """
    return int(median((_peak_on_cuda if device == "cuda" else _peak_on_cpu)(run) for _ in range(runs)))


def _peak_on_cuda(run: Callable[[], object]) -> int:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(run: Callable[[], object]) -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # pages that are free but kept would hide what is taken from them
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
    before = _resident("VmRSS")
    kept = run()
    peak = _resident("VmHWM")
    del kept
    return peak - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def write_results(name: str, question: str, seed: int, content: dict[str, Any]) -> None:
    """Write ``results/NAME.json`` with hardware, versions and the command, and say so."""
    command = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    head = {"question": question, "command": " ".join(command), "environment": environment(), "seed": seed}
    write_json(RESULTS / f"{name}.json", head | content)
    print(f"wrote {RESULTS / name}.json")
