"""Variants of a training, given as rows of a table, which the engine trains and tests like those of its own tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from czsl_heads.heads.sparse_align import Reduce
from czsl_heads.training.ablate import run_ablation
from czsl_heads.training.config import Config, configure
from czsl_heads.training.rows import Row, Table, Trained

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


@dataclass(frozen=True)
class _Given(Config):
    """A configuration that brings its table along."""

    rows_given: tuple[Row, ...] = ()

    @property
    def whole_table(self) -> Table:
        first = self.rows_given[0].key
        return Table(self.rows_given, (), shown=(first,), baseline=first)


def variant(name: str, align: Reduce, changes: dict[str, Any] | None = None, base: Row | None = None) -> Row:
    """A model with options changed, scored by what its method ranks with; it may start from the weights of another."""
    folder = re.sub(r"\W+", "-", name).strip("-")
    return Row(name, name, Trained(folder, align, base=base and base.model, changes=changes or {}))


def run_variants(out: Path, rows: tuple[Row, ...], **arguments: Any) -> list[dict[str, Any]]:
    """Train and test variants on the shapes world, or read what was done before.

    Args:
        out: Folder of this method and encoder; runs of other settings there are refused.
        rows: Variants, each behind the one that it starts from.
        arguments: Of :func:`~czsl_heads.training.config.configure`.

    Returns:
        The rows of the record of results.
    """
    config = configure(preset="shapes", trainer=QUIET, **arguments)
    found: list[dict[str, Any]] = run_ablation(out, _Given(**vars(config), rows_given=rows))["rows"]
    return found
