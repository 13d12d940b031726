"""Pictures decoded and resized once, in one memory-mapped file that commands share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from filelock import FileLock
from numpy.lib.format import open_memmap
from PIL import Image
from torch import Tensor

from czsl_heads._files import whole_file
from czsl_heads._sealed import DamagedError, file_sha256, read_sealed, write_sealed
from czsl_heads.data.digest import file_digest
from czsl_heads.data.layout import ImageSplit
from czsl_heads.encoders.transforms import split_transform

_VERSION = 1  # of what the files hold


class PackedImages(ImageSplit):
    """An :class:`~czsl_heads.data.layout.ImageSplit` whose pictures are read from a packed file.

    It is pickled without the pictures: each process maps the file by itself.
    """

    def __init__(self, images: ImageSplit, path: Path, rest: Callable[[Any], Any]) -> None:
        super().__init__(images.samples, rest, seed=images.seed, upright=images.upright)
        self.path = path
        self._pixels: Any = None

    def picture(self, number: int) -> Any:
        self._map()
        return Image.fromarray(self._pixels[number])

    def pixels(self, numbers: list[int]) -> Tensor:
        """Pictures as they lie in the file, uint8 ``[n, height, width, 3]``."""
        self._map()
        return torch.from_numpy(self._pixels[numbers])

    def _map(self) -> None:
        if self._pixels is None:
            self._pixels = np.load(self.path, mmap_mode="r")  # [n, height, width, 3]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}


class PackedBatches(torch.utils.data.Dataset[Any]):
    """Packed pictures of which nothing random is made: whole batches at once, to the bit what single ones give.

    Indexed by lists of numbers or of ``(epoch, number)``, as a ``DataLoader`` asks for batches.
    """

    def __init__(self, images: PackedImages, normalize: Any) -> None:
        self.images = images
        self.mean, self.std = (torch.tensor(part)[:, None, None] for part in (normalize.mean, normalize.std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int] | list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        numbers = [index[1] if isinstance(index, tuple) else index for index in indices]
        pixels = self.images.pixels(numbers).permute(0, 3, 1, 2)
        floats = pixels.to(torch.float32, memory_format=torch.contiguous_format)  # [batch, 3, height, width]
        return floats.div_(255).sub_(self.mean).div_(self.std), self.images.columns[numbers]


def in_batches(images: Any) -> PackedBatches | None:
    """The same images in whole batches; None if they are not packed, or if more than normalising is left to do."""
    from torchvision.transforms import Normalize

    if not isinstance(images, PackedImages):
        return None
    steps: list[Any] = getattr(images.transform, "transforms", [])
    if [type(step).__name__ for step in steps] != ["MaybeConvertMode", "MaybeToTensor", "Normalize"]:
        return None  # the first of open_clip's two has nothing to do: a packed file is RGB
    return PackedBatches(images, steps[-1]) if type(steps[-1]) is Normalize else None


def packed(images: ImageSplit, folder: Path) -> ImageSplit:
    """The same images, decoded and resized once; from a file in ``folder``, which is made if it is not there yet.

    The file is named by the content of the pictures and by what the transform does to their geometry. What is random,
    and what becomes of the pixels behind that, runs at each access, so every number is the same as without. Where a
    transform does not begin with resizing and cropping to one size, the images come back as they are.

    Args:
        images: The images of a split, with a transform.
        folder: Folder of such files.

    Returns:
        The images, to the bit.

    Raises:
        DataError: A picture does not decode; no file is left.
        OSError: ``folder`` cannot be written.

    Example:
        >>> from tempfile import mkdtemp
        >>> from czsl_heads import wrap
        >>> from czsl_heads.data import make_shapes, read_dataset
        >>> dataset = read_dataset(make_shapes(f"{mkdtemp()}/w", train_per_pair=1, val_per_pair=1, test_per_pair=1))
        >>> images = dataset.images("val", wrap("tiny").transform())
        >>> bool((packed(images, Path(mkdtemp()))[3][0] == images[3][0]).all())
        True
    """
    parts = split_transform(images.transform)
    if parts is None or not len(images):
        return images
    geometry, rest = parts
    about = f"{_VERSION} {PIL.__version__} {geometry!r} upright={images.upright}"

    def fill(path: Path) -> None:
        _pack(images, geometry, path)

    path = built_once(folder, f"pixels-{content_key(images, about)}.npy", fill)
    return PackedImages(images, path, rest)


def content_key(images: ImageSplit, about: str) -> str:
    """What a file of these pictures is named by: their bytes, in order, and what was done to them."""
    paths = [os.path.join(sample.folder, sample.name) for sample in images.samples]
    whole = hashlib.sha256(about.encode())
    with ThreadPoolExecutor() as pool:  # reading and hashing release the interpreter's lock
        for digest in pool.map(file_digest, paths):
            whole.update(digest.encode())
    return whole.hexdigest()[:40]


def built_once(folder: Path, name: str, build: Callable[[Path], None]) -> Path:
    """A file of a folder of caches, built if it is not there, by one process at a time.

    It appears whole or not at all: what was killed in the middle leaves a temporary file, which the next one removes. A
    small file beside it holds its digest, and its size and times when it had that: where these differ, its bytes are
    read again, and a file that was damaged is built anew.

    Args:
        folder: The folder.
        name: Of the ``.npy`` file.
        build: Writes it to the path that it is given.

    Raises:
        OSError: ``folder`` cannot be written.
    """
    path = folder / name
    if _is_whole(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        with lock:  # the system lets go of it when a process dies
            if not _is_whole(path):
                _build(path, build)
    except OSError as error:
        raise OSError(
            f"expected `cache_dir` to be a folder that can be written, got {folder} ({error.strerror or error})"
        ) from error
    return path


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """A memory-mapped ``.npy`` file, whose place on the disk is taken at once: a full one would kill the process later.

    Raises:
        OSError: The disk has no room.
    """
    array = open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, os.stat(path).st_size)
    return array


def _build(path: Path, build: Callable[[Path], None]) -> None:
    _seal_of(path).unlink(missing_ok=True)
    with whole_file(path) as temporary:
        build(temporary)
        digest = file_sha256(temporary)
    write_sealed(_seal_of(path), {"digest": digest, "stat": _stat(path)})


def _seal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _is_whole(path: Path) -> bool:
    """Whether a file is there, and as it was built; one of an earlier version, or of a process that was killed, is not.

    Bytes are read only where size or times are not those of the last look.
    """
    try:
        known = read_sealed(_seal_of(path), ("digest", "stat"))
        stat = _stat(path)
        if stat == known["stat"]:
            return True
        if file_sha256(path) != known["digest"]:
            return False
    except (OSError, DamagedError):
        return False
    with suppress(OSError):  # of a folder that may only be read
        write_sealed(_seal_of(path), {**known, "stat": stat})
    return True


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _pack(images: ImageSplit, geometry: Callable[[Any], Any], path: Path) -> None:
    def picture(number: int) -> np.ndarray:
        return np.asarray(geometry(images.picture(number)).convert("RGB"))

    first = picture(0)
    pixels = new_array(path, np.uint8, (len(images), *first.shape))

    def write(number: int) -> None:
        pixels[number] = picture(number)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and resizing release the interpreter's lock
        for _ in pool.map(write, range(len(images))):
            pass
    pixels.flush()
