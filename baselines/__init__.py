"""Baselines, one method a file, behind one list: a fifth is a file and a line."""

from __future__ import annotations

from baselines.clip import CLIP
from baselines.coop import CoOp
from baselines.csp import CSP
from baselines.troika import Troika

BASELINES: dict[str, type[CLIP] | type[CoOp] | type[CSP] | type[Troika]] = {
    "clip": CLIP,
    "coop": CoOp,
    "csp": CSP,
    "troika": Troika,
}
