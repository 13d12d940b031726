"""What tells one data set from another: digests of its labels and of its pictures, wherever it lies."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np

from czsl_heads._checks import check_choice
from czsl_heads._files import check_regular, whole_file
from czsl_heads.data.images import DataError
from czsl_heads.data.layout import SPLIT_NAME, SPLITS, CompositionDataset, layout_files

PicturesRead = Literal["sample", "all"]
PICTURES = "pictures.npz"  # what a folder of results knows of each picture
_SAMPLE = 64  # pictures whose bytes are hashed
_DIGEST_BYTES = 16
_PART = 256  # files that a thread asks for at once


def labels_digest(root: Path, split: str = SPLIT_NAME) -> str:
    """SHA-256 of the files that say what the data set holds; the images are not read."""
    content = b"".join(path.read_bytes() for path in layout_files(root, split))
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Pictures:
    """What the picture files of a data set hold, by name in alphabetical order.

    Attributes:
        kind: Which files were read.
        names: Their names.
        stats: Size, and the times of the last change of content and of the file, in nanoseconds ``[n, 3]``.
        contents: BLAKE2b of the bytes ``[n, 16]``; zeros for a file that was not read.
    """

    kind: PicturesRead
    names: list[str]
    stats: np.ndarray
    contents: np.ndarray

    @property
    def digest(self) -> str:
        """The kind, and SHA-256 over names, sizes and contents: ``"sample:0f3c..."``."""
        whole = hashlib.sha256()
        content = self.contents.tobytes().hex()
        read = (self.contents != 0).any(axis=1)
        for number, (name, (size, *_)) in enumerate(zip(self.names, self.stats.tolist())):
            start = 2 * _DIGEST_BYTES * number
            digest = content[start : start + 2 * _DIGEST_BYTES] if read[number] else ""
            whole.update(f"{name}\0{size}\0{digest}\n".encode("utf-8", "surrogateescape"))
        return f"{self.kind}:{whole.hexdigest()}"

    def write(self, path: Path) -> None:
        """Keep it in a file, so that no picture has to be read again that was not touched."""
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, names=_names_digest(self.names), stats=self.stats, contents=self.contents)

    @staticmethod
    def read(path: Path, names: list[str]) -> Pictures | None:
        """What :meth:`write` kept of all these names; None if there is no such file, or a damaged one."""
        try:
            with np.load(path) as kept:
                found = Pictures("all", names, kept["stats"], kept["contents"])
                same = bool((kept["names"] == _names_digest(names)).all())
        except Exception:  # whatever the damaged bytes say
            return None
        whole = found.stats.shape == (len(names), 3) and found.contents.shape == (len(names), _DIGEST_BYTES)
        return found if same and whole else None


def look_at_pictures(dataset: CompositionDataset, read: PicturesRead, known: Pictures | None = None) -> Pictures:
    """Read the picture files of a data set, for their digest.

    Args:
        dataset: The data set.
        read: ``"sample"`` reads 64 files, evenly spaced by name: a file of another size is noticed always, one of the
            same size mostly not. ``"all"`` reads every file, and the masks of objects where there are any.
        known: What was found before, of the same names. A file whose size and times are as they were is not read.

    Raises:
        DataError: A file is gone.
    """
    check_choice("pictures", read, get_args(PicturesRead))
    files = _picture_files(dataset, masks=read == "all")
    names = sorted(files)
    paths = [files[name] for name in names]
    with ThreadPoolExecutor() as pool:  # waiting for files, reading and hashing release the interpreter's lock
        parts = [paths[start : start + _PART] for start in range(0, len(paths), _PART)]
        stats = np.array([stat for part in pool.map(_stats, parts) for stat in part], np.int64).reshape(-1, 3)

        contents = np.zeros((len(names), _DIGEST_BYTES), np.uint8)
        wanted = np.zeros(len(names), bool)
        wanted[:: 1 if read == "all" else max(1, len(names) // _SAMPLE)] = True
        if known is not None:
            same = (stats == known.stats).all(axis=1)
            contents[same] = known.contents[same]
            wanted &= ~same
        numbers = wanted.nonzero()[0].tolist()
        for number, digest in zip(numbers, pool.map(file_digest, [paths[number] for number in numbers])):
            contents[number] = np.frombuffer(bytes.fromhex(digest), np.uint8)
    return Pictures(read, names, stats, contents)


def pictures_digest(dataset: CompositionDataset, pictures: PicturesRead = "sample") -> str:
    """SHA-256 over the names and sizes of all picture files, and over the bytes of some or all of them.

    Args:
        dataset: The data set.
        pictures: Which files are read, as in :func:`look_at_pictures`.

    Returns:
        The kind and the digest: ``"sample:0f3c..."``.

    Raises:
        DataError: A file is gone.

    Example:
        >>> from tempfile import mkdtemp
        >>> from czsl_heads.data import make_shapes, read_dataset
        >>> root = make_shapes(f"{mkdtemp()}/world", train_per_pair=1, val_per_pair=1, test_per_pair=1)
        >>> pictures_digest(read_dataset(root))[:7]
        'sample:'
    """
    return look_at_pictures(dataset, pictures).digest


def check_pictures(dataset: CompositionDataset, recorded: str, index: Path) -> None:
    """Raise DataError unless the pictures of a data set are those of a recorded digest.

    Args:
        dataset: The data set.
        recorded: What :func:`pictures_digest` gave.
        index: File of what is known of each picture. Those that were not touched since are not read. It is written
            anew where that saves reading next time, and may be gone or damaged.
    """
    read = cast(PicturesRead, recorded.partition(":")[0])
    other = f"expected {dataset.root} with the pictures that {index.parent} was trained on, got other ones"
    if read != "all":
        if pictures_digest(dataset, read) != recorded:
            raise DataError(other)
        return
    known = Pictures.read(index, sorted(_picture_files(dataset, masks=True)))
    found = look_at_pictures(dataset, "all", known)
    if found.digest != recorded and known is not None:
        found = look_at_pictures(dataset, "all")  # the index itself may be what is damaged
    if found.digest != recorded:
        raise DataError(other + _changed(known, found))
    if known is None or (known.stats != found.stats).any():
        with suppress(OSError):  # of a folder that may only be read
            found.write(index)


def _changed(known: Pictures | None, found: Pictures) -> str:
    if known is None:
        return ""
    rows = (known.contents != found.contents).any(axis=1).nonzero()[0].tolist()
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return f": {found.names[rows[0]]}{more}" if rows else ""


def _picture_files(dataset: CompositionDataset, *, masks: bool) -> dict[str, str]:
    """The files of all samples by name, and those of their masks, where a data set has them."""
    samples = [sample for name in SPLITS for sample in dataset.samples[name]]
    files = {sample.name: os.path.join(sample.folder, sample.name) for sample in samples}
    folder = dataset.root / "masks"
    if masks and folder.is_dir():
        drawn = [Path(sample.name).with_suffix(".png") for sample in samples]
        files |= {f"masks: {name}": os.fspath(folder / name) for name in drawn if (folder / name).is_file()}
    return files


def _names_digest(names: list[str]) -> np.ndarray:
    whole = "\0".join(names).encode("utf-8", "surrogateescape")
    return np.frombuffer(hashlib.sha256(whole).digest(), np.uint8)


def file_digest(path: str) -> str:
    """BLAKE2b of a file's bytes.

    Raises:
        DataError: It cannot be read.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            return hashlib.blake2b(file.read(), digest_size=_DIGEST_BYTES).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: expected an image file, got one that cannot be read ({error.strerror})") from error


def _stats(paths: list[str]) -> list[tuple[int, int, int]]:
    return [_stat(path) for path in paths]


def _stat(path: str) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: expected an image file, got one that cannot be read ({error.strerror})") from error
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
