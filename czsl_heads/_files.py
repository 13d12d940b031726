"""Files appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A list of numbers and nothing else, which indentation would give a line each: the points of a curve.
_PLAIN_LIST = re.compile(r"\[[\s\d.,eE+-]+\]")


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
    text = _PLAIN_LIST.sub(lambda found: " ".join(found[0].split()), text)
    write_text(path, text + "\n")
    return json.loads(text)
