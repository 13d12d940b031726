"""What numbers were found on: hardware and versions, for every file of results."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_CPU_INFO = Path("/proc/cpuinfo")


def environment() -> dict[str, Any]:
    """Hardware and versions, for a results file."""
    packages = ("czsl-heads", "torch", "open_clip_torch", "lightning", "torchmetrics", "numpy")
    return {
        "hardware": {
            "machine": platform.machine(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def processor() -> str:
    """The processor's name, and the widest instructions that torch and its products have there."""
    facts: dict[str, str] = {}
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    named = facts.get("model name") or platform.processor() or "unknown"
    kinds = [torch.backends.cpu.get_cpu_capability()]
    if "amx_tile" in facts.get("flags", "").split():
        kinds.append("AMX")
    return f"{named}, {', '.join(kinds)}"
