"""Files appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import socket
import stat
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

# Lists of numbers, and lists of those (the points of a curve), which indentation would give a line each.
_NUMBERS = r"\[[\s\d.,eE+-]+\]"
_PLAIN_LIST = re.compile(rf"{_NUMBERS}|\[\s*{_NUMBERS}(,\s*{_NUMBERS})*\s*\]")


# Of unfinished files and folders: the machine and the process that write them tell whether they still do.
_UNFINISHED = ".unfinished"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; it takes the place of ``path`` if the block ends well.

    What is written reaches the disk before it takes that place. What a killed process left beside it is removed.

    Raises:
        OSError: It cannot be written; the error names ``path``.
    """
    temporary = _unfinished(path)
    with naming(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path.parent)
        try:
            yield temporary
            _settle(temporary)
            temporary.replace(path)
            with suppress(PermissionError):  # of a folder that may be written to, but not read
                _settle(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a new folder beside ``path``; it becomes ``path``, which is new or empty, if the block ends well.

    Raises:
        OSError: ``path`` holds something, or cannot be written.
    """
    temporary = _unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path.parent)
        temporary.mkdir()
    except OSError as error:
        raise OSError(f"expected `out` to be a folder that can be written, got {path} ({error.strerror})") from error
    try:
        with naming(path, temporary):
            yield temporary
            if path.exists():
                path.rmdir()
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes of this machine that are no more left in a folder, half written."""
    prefix = f"{_UNFINISHED}-{_host()}-"
    try:
        names = os.listdir(folder)
    except PermissionError:
        return  # of a folder that may be written to, but not read
    for name in names:
        if not name.startswith(prefix):
            continue
        pid = name.removeprefix(prefix).partition("-")[0]
        if pid.isdecimal() and not is_running(int(pid)):
            _remove(folder / name)


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    if os.name == "nt":
        return True  # os.kill would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return True


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:40]


def _unfinished(path: Path) -> Path:
    """Where a process writes what will be ``path``; short, for names of files may not be longer than 255 bytes."""
    number = zlib.crc32(os.fsencode(path.name))
    return path.with_name(f"{_UNFINISHED}-{_host()}-{os.getpid()}-{number:08x}{path.suffix[:20]}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """Let what was written to a file or folder reach the disk, where the system can be asked for it."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such call
            raise
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Errors that name no file, as those of a full disk, or that name the temporary one, name this path."""
    try:
        yield
    except OSError as error:
        known = error.filename is not None and error.filename != str(temporary)
        if error.errno is None or known:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError for a pipe, a socket or a device: whoever opens one may wait, or read, without end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # which the opening of it will say
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "a pipe, a socket or a device", os.fspath(path))


def write_text(path: Path, text: str) -> None:
    """Write a page for people; what is no Unicode in it, as bytes of a path may be, is spelled."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> Any:
    """Write ``content`` and return it as a reader will find it (tuples have become lists)."""
    text = json.dumps(content, indent=2, ensure_ascii=not _is_unicode(content), allow_nan=False)
    read = json.loads(text)
    compact = _PLAIN_LIST.sub(lambda found: " ".join(found[0].split()), text)
    # A string that looks like a list of numbers stays as it is.
    write_text(path, (compact if json.loads(compact) == read else text) + "\n")
    return read


def _is_unicode(content: Any) -> bool:
    """Whether all strings can be written as UTF-8; a path of other bytes cannot."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote; UTF-8 whatever the locale. ValueError names a file that is no JSON."""
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got another or a damaged file ({error})") from error


def save_figure(figure: Any, target: Path | IO[bytes], *, dpi: int = 130) -> None:
    """Write a figure of matplotlib as PNG to a path, or into an open file."""
    if not isinstance(target, Path):
        figure.savefig(target, dpi=dpi, format="png")
        return
    with whole_file(target) as temporary:
        figure.savefig(temporary, dpi=dpi)


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


def write_table(rows: Sequence[dict[str, Any]], columns: Sequence[str], path: Path) -> None:
    """Write a CSV file, whole or not at all; what a row lacks is left empty."""
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
