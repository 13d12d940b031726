"""What tells one data set from another: digests of its labels and of its pictures, wherever it lies."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

from czsl_heads._checks import check_choice
from czsl_heads.data.images import DataError
from czsl_heads.data.layout import SPLIT_NAME, SPLITS, CompositionDataset, layout_files

Pictures = Literal["sample", "all"]
_SAMPLE = 64  # pictures whose bytes are hashed


def labels_digest(root: Path, split: str = SPLIT_NAME) -> str:
    """SHA-256 of the files that say what the data set holds; the images are not read."""
    content = b"".join(path.read_bytes() for path in layout_files(root, split))
    return hashlib.sha256(content).hexdigest()


def pictures_digest(dataset: CompositionDataset, pictures: Pictures = "sample") -> str:
    """SHA-256 over the names and sizes of all picture files, and over the bytes of some or all of them.

    Args:
        dataset: The data set.
        pictures: ``"sample"`` reads 64 files, evenly spaced by name: a file of another size is noticed always, one of
            the same size mostly not. ``"all"`` reads every file.

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
    check_choice("pictures", pictures, get_args(Pictures))
    files = {
        sample.name: os.path.join(sample.folder, sample.name) for name in SPLITS for sample in dataset.samples[name]
    }
    names = sorted(files)
    step = 1 if pictures == "all" else max(1, len(names) // _SAMPLE)
    read = set(names[::step])

    def described(name: str) -> bytes:
        content = file_digest(files[name]) if name in read else ""
        return f"{name}\0{_size(files[name])}\0{content}\n".encode("utf-8", "surrogateescape")

    whole = hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # reading and hashing release the interpreter's lock
        for line in pool.map(described, names):
            whole.update(line)
    return f"{pictures}:{whole.hexdigest()}"


def file_digest(path: str) -> str:
    """BLAKE2b of a file's bytes.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.blake2b(file.read(), digest_size=16).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: expected an image file, got one that cannot be read ({error.strerror})") from error


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise DataError(f"{path}: expected an image file, got one that cannot be read ({error.strerror})") from error
