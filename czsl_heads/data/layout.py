"""The field's on-disk layout, read and checked.

.. code-block:: text

    ROOT/images/...                                                 any tree of image files
    ROOT/compositional-split-natural/{train,val,test}_pairs.txt     "attribute object" a line ("+" between, for VAW)
    ROOT/metadata_compositional-split-natural.t7                    torch-saved list of {image, attr, obj, set}
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from czsl_heads._checks import check_choice
from czsl_heads.space import CompositionSpace

SPLIT_NAME = "compositional-split-natural"
SPLITS = ("train", "val", "test")
ABSENT = "NA"  # what the data sets write where an image has no attribute, or belongs to no split

NamedPair = tuple[str, str]


class DataError(ValueError):
    """A data set on disk is not as the layout says; the message names the file and, where there is one, the line."""


@dataclass(frozen=True)
class Sample:
    """One labelled image: its file, its attribute and object, and the column of their pair in the data set's space."""

    path: Path
    attribute: str
    object: str
    column: int


@dataclass(frozen=True)
class CompositionDataset:
    """A data set in the field's layout.

    Attributes:
        root: Its folder.
        space: Names and pairs sorted as the official code sorts them; a pair is seen if it is a training pair.
        split_pairs: The pairs of ``"train"``, ``"val"`` and ``"test"``, in file order.
        samples: Their images, in file order.
    """

    root: Path
    space: CompositionSpace
    split_pairs: dict[str, list[NamedPair]]
    samples: dict[str, list[Sample]] = field(repr=False)

    def eval_mask(self, split: str) -> Tensor:
        """The candidates when a split is evaluated: its own pairs and the training pairs, bool ``[P]``."""
        check_choice("split", split, SPLITS)
        mask = torch.zeros(len(self.space), dtype=torch.bool)
        mask[self.space.index([*self.split_pairs["train"], *self.split_pairs[split]])] = True
        return mask

    def images(
        self, split: str, transform: Callable[[Any], Tensor] | None = None, *, seed: int | None = None
    ) -> ImageSplit:
        """The images of a split as a torch data set of ``(image, column)``; see :class:`ImageSplit`."""
        check_choice("split", split, SPLITS)
        return ImageSplit(self.samples[split], transform, seed=seed)


class ImageSplit(torch.utils.data.Dataset[tuple[Any, int]]):
    """Images and the columns of their pairs.

    Indexed by a number, or by ``(epoch, number)``. With ``seed`` set, what the transform draws from torch's global
    generator depends on (seed, epoch, number) alone, whatever process loads it; the generator is left as it was.
    """

    def __init__(
        self, samples: list[Sample], transform: Callable[[Any], Tensor] | None = None, *, seed: int | None = None
    ) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def columns(self) -> Tensor:
        """The column of every image, long ``[n]``."""
        return torch.tensor([sample.column for sample in self.samples])

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Any, int]:
        epoch, number = index if isinstance(index, tuple) else (0, index)
        sample = self.samples[number]
        image = open_image(sample.path)
        if self.transform is None:
            return image, sample.column
        if self.seed is None:
            return self.transform(image), sample.column
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mix(self.seed, epoch, number))  # and no accelerator's
            return self.transform(image), sample.column


def _mix(*parts: int) -> int:
    """One 63-bit seed from several numbers (the splitmix64 finaliser over a running state)."""
    state = 0
    for part in parts:
        state = (state ^ part) + 0x9E3779B97F4A7C15
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state >> 1


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        DataError: The file is missing, no image, or cut short.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: expected an image file, got none") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: expected an image, got a file of another kind") from None
    except Exception as error:  # decoders raise errors of every kind
        raise DataError(f"{path}: expected a whole image, got one that cannot be decoded ({error})") from error


def read_dataset(
    root: str | os.PathLike[str], *, split: str = SPLIT_NAME, allow_untrained_primitives: bool = False
) -> CompositionDataset:
    """Read a data set in the layout of MIT-States, UT-Zappos, C-GQA and VAW-CZSL.

    As in the official code, names and pairs are sorted, images whose attribute or split is ``NA`` or whose pair is in
    no split file are left out, and an image belongs to the split that its ``set`` says. Every image file must be
    there; whether it decodes is :func:`check`'s to say, or shows when it is loaded.

    Args:
        root: Folder with ``images``, the split folder and the metadata file.
        split: Name of the split.
        allow_untrained_primitives: Accept validation and test pairs whose attribute or object no training pair has.

    Returns:
        A :class:`CompositionDataset`.

    Raises:
        DataError: The folder is no data set, or a file is missing, unreadable or wrong; the message names it, with the
            line or entry.
    """
    root = Path(root)
    pairs = _read_splits(root, split, allow_untrained_primitives)
    train = dict.fromkeys(pairs["train"])
    union = sorted({pair for group in pairs.values() for pair in group})
    space = CompositionSpace(
        sorted({attribute for attribute, _ in union}),
        sorted({obj for _, obj in union}),
        seen=list(train),
        unseen=[pair for pair in union if pair not in train],
    ).subset(union)
    return CompositionDataset(root, space, pairs, _read_samples(root, split, space, pairs))


def layout_files(root: Path, split: str = SPLIT_NAME) -> list[Path]:
    """The files that say what the data set holds: metadata, then the pairs of train, val and test."""
    return [root / f"metadata_{split}.t7", *(root / split / f"{name}_pairs.txt" for name in SPLITS)]


def labels_digest(root: Path, split: str = SPLIT_NAME) -> str:
    """SHA-256 of the files that say what the data set holds; the images are not read."""
    content = b"".join(path.read_bytes() for path in layout_files(root, split))
    return hashlib.sha256(content).hexdigest()


def _read_splits(root: Path, split: str, allow_untrained: bool) -> dict[str, list[NamedPair]]:
    if not root.is_dir():
        raise DataError(f"{root}: expected the folder of a data set, got {'a file' if root.exists() else 'nothing'}")
    needed = [root / "images", *layout_files(root, split)]
    missing = [str(path.relative_to(root)) for path in needed if not path.exists()]
    if missing:
        raise DataError(f"{root}: expected a data set in the field's layout, got a folder without {', '.join(missing)}")
    files = {name: root / split / f"{name}_pairs.txt" for name in SPLITS}
    pairs = {name: _read_pairs(path) for name, path in files.items()}
    if not allow_untrained:
        trained = {kind: {pair[kind] for pair in pairs["train"]} for kind in (0, 1)}
        for name in ("val", "test"):
            for line, pair in enumerate(pairs[name], 1):  # every line is one pair
                for kind, word in ((0, "attribute"), (1, "object")):
                    if pair[kind] not in trained[kind]:
                        raise DataError(
                            f"{files[name]}, line {line}: expected an {word} of the training pairs, got the unknown "
                            f"{word} {pair[kind]!r} (read_dataset accepts it with allow_untrained_primitives=True)"
                        )
    return pairs


def _read_pairs(path: Path) -> list[NamedPair]:
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a text file of pairs, got one that cannot be read ({error})") from error
    if lines == [""]:
        raise DataError(f"{path}: expected at least one pair, got an empty file")
    plus = all("+" in line for line in lines)  # VAW-CZSL, whose names hold spaces
    pairs: dict[NamedPair, int] = {}
    for number, line in enumerate(lines, 1):
        parts = [part.strip() for part in line.split("+")] if plus else line.split()
        if len(parts) != 2 or not all(parts):
            raise DataError(f"{path}, line {number}: expected 'attribute object', got {line!r}")
        pair = (parts[0], parts[1])
        if pair in pairs:
            raise DataError(f"{path}, line {number}: expected each pair once, got {line!r} again (line {pairs[pair]})")
        pairs[pair] = number
    return list(pairs)


def _read_samples(
    root: Path, split: str, space: CompositionSpace, pairs: dict[str, list[NamedPair]]
) -> dict[str, list[Sample]]:
    path = root / f"metadata_{split}.t7"
    columns = {pair: column for column, pair in enumerate(space.pair_names)}
    members = {name: set(group) for name, group in pairs.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for entry, row in enumerate(_read_metadata(path)):
        attribute, obj, name = row["attr"], row["obj"], row["set"]
        pair = (attribute, obj)
        if attribute == ABSENT or name == ABSENT or pair not in columns:
            continue
        if name not in SPLITS:
            raise DataError(f"{path}, entry {entry}: expected `set` to be one of train, val, test, NA, got {name!r}")
        if pair not in members[name]:
            raise DataError(f"{path}, entry {entry}: expected a pair of {name}_pairs.txt, got {attribute} {obj}")
        samples[name].append(Sample(_image_path(root, row, path, entry), attribute, obj, columns[pair]))
    for name, group in samples.items():
        if not group:
            raise DataError(f"{path}: expected images of the {name} split, got none")
    return samples


def _read_metadata(path: Path) -> list[dict[str, str]]:
    try:
        rows = torch.load(path, weights_only=True)
    except Exception as error:  # what the unpickler raises on damaged files is of every kind
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{path}: expected a torch-saved list of plain dicts, got an unreadable file ({reason})"
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list, got {type(rows).__name__}")
    for entry, row in enumerate(rows):
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) for key in ("image", "attr", "obj", "set")
        ):
            raise DataError(f"{path}, entry {entry}: expected a dict with strings image, attr, obj, set, got {row!r}")
    return rows


def _image_path(root: Path, row: dict[str, str], metadata: Path, entry: int) -> Path:
    """The image's file; MIT-States' raw folders have spaces where its metadata has underscores."""
    folder, _, rest = row["image"].partition("/")
    for name in (row["image"], f"{folder.replace('_', ' ')}/{rest}", row.get("_image")):
        if name and (path := root / "images" / name).is_file():
            return path
    raise DataError(
        f"{root / 'images' / row['image']}: expected an image file, got none ({metadata.name}, entry {entry})"
    )


def write_metadata(root: Path, rows: list[dict[str, str]], split: str = SPLIT_NAME) -> None:
    """Write the image list as the data sets ship it: a pickled list of dicts, readable with ``weights_only=True``."""
    torch.save(rows, root / f"metadata_{split}.t7")
