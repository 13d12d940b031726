"""Baselines, one method a file, behind one list: another is a file, a preset and a line."""

from __future__ import annotations

from typing import Any

from baselines.clip import CLIP
from baselines.coop import CoOp
from baselines.csp import CSP
from baselines.troika import Troika

BASELINES: dict[str, type[Any]] = {
    "clip": CLIP,
    "coop": CoOp,
    "csp": CSP,
    "troika": Troika,
}
