"""The table that a method brings of its own: rows as data, in a file beside its presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from czsl_heads._checks import check_choice, check_kind
from czsl_heads.models.registry import presets_path
from czsl_heads.training.rows import READOUTS, Row, Table, Trained


def tables_path(method: str) -> Path:
    """Where the own table of a method stands, if it has one: ``tables/NAME.yaml`` beside its module."""
    presets = presets_path(method)
    return presets.parent.parent / "tables" / presets.name


def has_own_table(method: str) -> bool:
    """Whether a method brings a table of its own."""
    return tables_path(method).is_file()


def own_table(method: str) -> Table:
    """The table that a method brings.

    The file has ``models``, by the name of their folder, with the fields of
    :class:`~czsl_heads.training.rows.Trained`; ``rows``, each with ``key``, ``title``, ``model`` and, where it is not
    the method alone, ``readout`` (``fused`` or ``bank``); ``comparisons`` of two keys; ``shown`` and ``baseline``.

    Raises:
        ValueError: There is no such file, or it names something that there is not.
        TypeError: A part of it is of another kind.

    Example:
        >>> [row.key for row in own_table("eva").rows][:3]
        ['base', 'words', 'experts']
    """
    path = tables_path(method)
    if not path.is_file():
        raise ValueError(f"expected `table` to be one of steps, alignment for {method}, which has none of its own")
    content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    check_kind(str(path), content, dict)
    models = _models(content["models"])
    rows = tuple(_row(row, models, path) for row in content["rows"])
    keys = [row.key for row in rows]
    for key in (key for pair in content["comparisons"] for key in pair):
        check_choice(f"{path}: comparisons", key, keys)
    for key in (*content["shown"], content["baseline"]):
        check_choice(f"{path}: shown and baseline", key, keys)
    comparisons = tuple((row, other) for row, other in content["comparisons"])
    return Table(rows, comparisons, tuple(content["shown"]), content["baseline"])


def _models(content: dict[str, dict[str, Any]]) -> dict[str, Trained]:
    """The models by name; one that builds on another comes behind it."""
    models: dict[str, Trained] = {}
    for name, fields in content.items():
        base = fields.get("base")
        if base is not None:
            check_choice(f"base of {name}", base, models)
        models[name] = Trained(name, **{**fields, "base": None if base is None else models[base]})
    return models


def _row(content: dict[str, Any], models: dict[str, Trained], path: Path) -> Row:
    check_choice(f"{path}: model", content["model"], models)
    readout = content.get("readout", "alone")
    check_choice(f"{path}: readout", readout, READOUTS)
    return Row(content["key"], content["title"], models[content["model"]], READOUTS[readout])
