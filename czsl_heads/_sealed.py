"""Files that carry a digest of what they hold: damage is noticed when they are read, and never computed with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from czsl_heads._files import check_regular, plain, read_json, write_json

SEAL = "sha256"  # the name of the digest in a JSON file


class DamagedError(ValueError):
    """A file is not as it was written; the message names it."""


def write_sealed(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write a JSON file with a digest of its content, and return both as a reader will find them.

    Args:
        path: The file.
        content: Values of JSON, by name.
    """
    found: dict[str, Any] = plain({name: value for name, value in content.items() if name != SEAL})
    sealed = found | {SEAL: _seal(found)}
    write_json(path, sealed)
    return sealed


def read_sealed(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """What :func:`write_sealed` wrote. A file without a digest, of an earlier version, is taken as it is.

    Args:
        path: The file.
        keys: Names that it must hold.

    Raises:
        DamagedError: It is no JSON, or its content is not what it was.
        OSError: It cannot be read.
    """
    try:
        content = read_json(path)
    except (ValueError, RecursionError) as error:
        raise DamagedError(str(error)) from error
    if not isinstance(content, dict):
        raise DamagedError(f"expected {path} to hold an object of JSON, got a {type(content).__name__}")
    if SEAL in content and content[SEAL] != _seal(content):
        raise DamagedError(f"expected {path} as it was written, got other content: its digest does not fit")
    if missing := [name for name in keys if name not in content]:
        raise DamagedError(f"expected {path} with {', '.join(missing)}, got a file without")
    return content


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise DamagedError unless a folder has these files, by name, with these digests."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"expected the file {path}, got none")
        if file_sha256(path) != digest:
            raise DamagedError(f"expected {path} as it was written, got other bytes: its digest does not fit")


def _seal(content: Mapping[str, Any]) -> str:
    bare = {name: value for name, value in content.items() if name != SEAL}
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
