"""Where the picture of a row is: names as people write them, and none that leads out of the data set unasked."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from czsl_heads._files import native
from czsl_heads.data.images import DataError

IMPORT = "import.json"  # what czsl import has written down: where pictures are that it has not copied
_DRIVE = re.compile(r"[A-Za-z]:")


class ImageFiles:
    """Finds pictures by the names that rows give them, with one look at each folder.

    A name is a path below ``images``. Back-slashes, another Unicode form (NFC, NFD) and another case are found too,
    if one file fits. Names, and links, that lead out of the data set are refused.

    Args:
        root: Folder of the data set.
        allow_outside: Take pictures outside of the data set, too.

    Attributes:
        folder: What names are relative to.
        respelled: Names that were found under another spelling, and that spelling.
    """

    def __init__(self, root: Path, *, allow_outside: bool = False) -> None:
        self.allow_outside = allow_outside
        source = read_import(root)
        self.folder = os.fspath(root / "images")
        if source.get("images"):
            self.folder = native(source["images"])
        homes = [os.fspath(root), self.folder, *([native(source["links_to"])] if source.get("links_to") else ())]
        # A link in the place of `images` leads out, too; a folder that czsl import was given does not.
        if not source.get("images"):
            homes.remove(self.folder)
        self._homes = [os.path.realpath(home) for home in homes]
        self._listings: dict[str, dict[str, bool]] = {}
        self.respelled: dict[str, str] = {}

    def find(self, row: dict[str, Any]) -> str | None:
        """The path of a row's picture below :attr:`folder`; None if there is none.

        Raises:
            DataError: It leads out of the data set.
        """
        if self._there(native(row["image"])):
            return native(row["image"])
        for name in _spellings(row)[1:]:
            if self._there(name):
                return name
        for name in _spellings(row):
            if near := self._near(name):
                self.respelled[row["image"]] = near
                return near
        return None

    def nearest(self, name: str) -> str | None:
        """A file of the letters and digits of a missing one, whatever stands between them; for an error."""
        folder, _, last = name.replace("\\", "/").rpartition("/")
        wanted = _letters(last)
        for other in sorted(self._listing(native(folder))):
            if _letters(other) == wanted:
                return f"{folder}/{other}".lstrip("/")
        return None

    def _there(self, name: str) -> bool:
        if self._leaves(name):
            raise DataError(
                f"expected an image inside the data set, got {name!r}, which leads out of it "
                "(allow_outside takes it all the same)"
            )
        if self.allow_outside and (os.path.isabs(name) or ".." in name):
            return os.path.isfile(os.path.join(self.folder, name))
        folder, _, last = name.rpartition("/")
        link = self._listing(folder).get(last)
        if link:
            self._check_inside(os.path.join(self.folder, name))
        return link is not None

    def _leaves(self, name: str) -> bool:
        if self.allow_outside:
            return False
        up = ".." in name and ".." in name.replace("\\", "/").split("/")
        return up or name.startswith(("/", "\\")) or bool(_DRIVE.match(name))

    def _listing(self, folder: str) -> dict[str, bool]:
        """The files of a folder by name, and whether each is a link."""
        if folder not in self._listings:
            self._listings[folder] = self._scanned(folder)
        return self._listings[folder]

    def _scanned(self, folder: str) -> dict[str, bool]:
        path = os.path.join(self.folder, folder)
        try:
            with os.scandir(path) as entries:
                found = {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
        except OSError:
            return {}
        if found:
            self._check_inside(path)
        return found

    def _check_inside(self, path: str) -> None:
        if self.allow_outside:
            return
        real = os.path.realpath(path)
        if not any(real == home or real.startswith(home + os.sep) for home in self._homes):
            raise DataError(
                f"expected an image inside the data set, got a link that leads out of it, {path} to {real} "
                "(allow_outside takes it all the same)"
            )

    def _near(self, name: str) -> str | None:
        """The one file whose path differs in case or in its Unicode form only."""
        *folders, last = name.split("/")
        path = ""
        for part in folders:
            there = os.path.join(self.folder, path, part)
            found = part if os.path.isdir(there) else _only_alike(part, self._folders(path))
            if found is None:
                return None
            path = f"{path}/{found}".lstrip("/")
        found = _only_alike(last, self._listing(path))
        if found is None:
            return None
        near = f"{path}/{found}".lstrip("/")
        return near if self._there(near) else None

    def _folders(self, folder: str) -> list[str]:
        try:
            with os.scandir(os.path.join(self.folder, folder)) as entries:
                return [entry.name for entry in entries if entry.is_dir()]
        except OSError:
            return []


def read_import(root: Path) -> dict[str, Any]:
    """What ``czsl import`` has written down of a data set; empty where it was made otherwise.

    Raises:
        DataError: The file is damaged, or names a folder that is gone.
    """
    path = root / IMPORT
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        images = content.get("images")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: expected what czsl import wrote, got another or a damaged file ({error})") from error
    if images and not os.path.isdir(native(images)):
        raise DataError(
            f"{path}: expected the pictures in {images}, where they were when they were imported, got no such folder; "
            "import them again, or with --copy"
        )
    return content


def _spellings(row: dict[str, Any]) -> list[str]:
    """How the file of a row may be called; MIT-States' raw folders have blanks where its metadata has underscores."""
    name = native(row["image"])
    names = [name]
    if "\\" in name:
        names.append(name.replace("\\", "/"))
    folder, slash, rest = names[-1].partition("/")
    if slash and "_" in folder:
        names.append(f"{folder.replace('_', ' ')}/{rest}")
    if isinstance(row.get("_image"), str):
        names.append(native(row["_image"]))
    return names


def _only_alike(name: str, others: Any) -> str | None:
    """The one of ``others`` that is this name in another Unicode form; or else, in another case."""
    for form in (_composed, _folded):
        alike = [other for other in others if form(other) == form(name)]
        if len(alike) == 1:
            return str(alike[0])
    return None


def _letters(name: str) -> str:
    """The letters and digits of a file's name, without its ending."""
    stem = _folded(name).rpartition(".")[0]
    return "".join(letter for letter in stem if letter.isalnum())


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(name).casefold()
