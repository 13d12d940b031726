"""Everything that wants a GPU, in one command: ``make gpu``, or ``python -m benchmarks.gpu`` (within 20 minutes).

One after the other, each in a process of its own: the CUDA tests, the benchmarks that have a GPU's side, and one step
of every preset at its published size. Each benchmark writes ``results/NAME-cuda.json``. ``results/gpu.json`` says what
was run on which card, and how it ended; it is written behind each step. Called again, the command goes on behind what
has passed on a card of the same name; ``--again true`` runs all of it anew.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS
from czsl_heads._files import read_json, write_json
from czsl_heads.training.environment import environment

MINUTES = 20
Steps = dict[str, tuple[str, ...]]

# The quickest first, so that what fails shows soon. Rounds are few: a GPU is quiet.
STEPS: Steps = {
    "tests": ("pytest", "-m", "gpu", "tests/gpu", "-o", "filterwarnings=default"),
    "maxsim": ("benchmarks.maxsim",),
    "preset_steps": ("benchmarks.preset_steps",),
    "frozen_towers": ("benchmarks.frozen_towers", "--batch", "16", "--texts", "64"),
    "encoders": ("benchmarks.encoders", "--rounds", "7"),
    "loader": ("benchmarks.loader",),
    "troika_memory": ("benchmarks.troika_memory",),
    "prompts": ("benchmarks.prompts",),
    "memory_bank": ("benchmarks.memory_bank", "--rounds", "7"),
    "experts": ("benchmarks.experts",),
    "whole_steps": ("benchmarks.whole_steps", "--rounds", "2"),
}


def run_steps(steps: Steps, path: Path, *, device: str, again: bool = False, seconds: float = 60 * MINUTES) -> int:
    """Run what has not passed yet, and keep the record of each step.

    Args:
        steps: A module of Python with its arguments, by name.
        path: The record, a JSON file.
        device: The card's name; what passed on another is run anew.
        again: Run everything.
        seconds: When they are over, no step is started any more, and the one in work is ended.

    Returns:
        0 if all steps have passed, else 1.
    """
    before = read_json(path) if path.exists() else {}
    found: dict[str, Any] = before.get("steps", {}) if before.get("device") == device else {}
    wanted = [name for name in steps if again or not found.get(name, {"passed": False})["passed"]]
    end = time.monotonic() + seconds
    for name in wanted:
        left = end - time.monotonic()
        if left <= 0:
            break
        module, *arguments = steps[name]
        print(f"{name}: python -m {module} {' '.join(arguments)}", flush=True)
        found[name] = _run([sys.executable, "-m", module, *arguments], left)
        print(f"{name}: {'passed' if found[name]['passed'] else 'FAILED'} in {found[name]['seconds']} s", flush=True)
        ordered = {name: found[name] for name in dict.fromkeys([*STEPS, *found]) if name in found}
        write_json(path, {"device": device, "environment": environment(), "steps": ordered})
    missing = [name for name in steps if not found.get(name, {"passed": False})["passed"]]
    if missing:
        print(f"not passed: {', '.join(missing)}; the same command goes on there")
    return 1 if missing else 0


def _run(command: list[str], seconds: float) -> dict[str, Any]:
    start = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status: int | str = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = "out of time"
    finally:
        _end(process)
    return {
        "command": " ".join(["python", *command[1:]]),
        "passed": status == 0,
        "status": status,
        "seconds": round(time.monotonic() - start),
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started: a loader's workers would go on."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def main(again: bool = False, only: list[str] | None = None) -> int:
    """Run all steps, or those named, and write ``results/gpu.json``.

    Args:
        again: Run what has passed, too.
        only: Names of steps; default: all.
    """
    if not torch.cuda.is_available():
        print("expected a machine with a CUDA GPU, got none that torch sees", file=sys.stderr)
        return 2
    unknown = [name for name in only or () if name not in STEPS]
    if unknown:
        print(f"expected `only` to name some of {', '.join(STEPS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    steps = {name: step for name, step in STEPS.items() if not only or name in only}
    return run_steps(steps, RESULTS / "gpu.json", device=torch.cuda.get_device_name(0), again=again)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    sys.exit(auto_cli(main, as_positional=False))
