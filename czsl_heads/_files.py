"""Files appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Lists of numbers, and lists of those (the points of a curve), which indentation would give a line each.
_NUMBERS = r"\[[\s\d.,eE+-]+\]"
_PLAIN_LIST = re.compile(rf"{_NUMBERS}|\[\s*{_NUMBERS}(,\s*{_NUMBERS})*\s*\]")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; it takes the place of ``path`` if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> Any:
    """Write ``content`` and return it as a reader will find it (tuples have become lists)."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    read = json.loads(text)
    compact = _PLAIN_LIST.sub(lambda found: " ".join(found[0].split()), text)
    # A string that looks like a list of numbers stays as it is.
    write_text(path, (compact if json.loads(compact) == read else text) + "\n")
    return read


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote; UTF-8 whatever the locale. ValueError names a file that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got another or a damaged file ({error})") from error


def plain(content: Any) -> Any:
    """``content`` as a reader of a JSON file finds it: tuples have become lists."""
    return json.loads(json.dumps(content))


def native(path: str) -> str:
    """A path in letters that the file system's encoding can carry, whatever the locale."""
    if sys.getfilesystemencoding().lower() in ("utf-8", "utf8"):
        return path
    return os.fsdecode(path.encode("utf-8", "surrogateescape"))


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of mappings in mappings by names with dots; an empty mapping has none.

    Example:
        >>> flatten({"bank": {"slots": 2}, "epochs": 3})
        {'bank.slots': 2, 'epochs': 3}
    """
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        more = flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
        flat |= more
    return flat
