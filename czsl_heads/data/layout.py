"""The field's on-disk layout, read and checked.

.. code-block:: text

    ROOT/images/...                                                 any tree of image files
    ROOT/compositional-split-natural/{train,val,test}_pairs.txt     "attribute object" a line ("+" between, for VAW)
    ROOT/metadata_compositional-split-natural.t7                    torch-saved list of {image, attr, obj, set}
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from czsl_heads._checks import check_choice, check_kind
from czsl_heads._files import check_regular, native, whole_file
from czsl_heads.data.files import IMPORT, ImageFiles
from czsl_heads.data.images import DataError as DataError
from czsl_heads.data.images import open_image as open_image
from czsl_heads.data.names import prompt_names
from czsl_heads.data.published import published_name
from czsl_heads.space import CompositionSpace

SPLIT_NAME = "compositional-split-natural"
SPLITS = ("train", "val", "test")
ABSENT = "NA"  # what the data sets write where an image has no attribute, or belongs to no split
KEYS = ("image", "attr", "obj", "set")

NamedPair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image: its file, its attribute and object, and the column of their pair in the data set's space.

    ``name`` is the path of the file below ``folder``.
    """

    folder: str
    name: str
    attribute: str
    object: str
    column: int

    @property
    def path(self) -> Path:
        return Path(self.folder, self.name)


@dataclass
class LeftOut:
    """Rows of the metadata that are no samples.

    Attributes:
        absent: How many have ``NA`` in place of an attribute or a split.
        unlisted: Rows whose pair is in no split file: their entries.
        respelled: Names of images that were found under another spelling, and that spelling.
    """

    absent: int = 0
    unlisted: list[int] = field(default_factory=list)
    respelled: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CompositionDataset:
    """A data set in the field's layout.

    Attributes:
        root: Its folder.
        space: Names and pairs sorted as the official code sorts them; a pair is seen if it is a training pair.
        split_pairs: The pairs of ``"train"``, ``"val"`` and ``"test"``, in file order.
        samples: Their images, in file order.
        upright: Whether images are turned as their EXIF orientation says.
        left_out: What the metadata holds besides.
        cache_dir: Folder for decoded images, which are then read from there; None: they are decoded each time.
    """

    root: Path
    space: CompositionSpace
    split_pairs: dict[str, list[NamedPair]]
    samples: dict[str, list[Sample]] = field(repr=False)
    upright: bool = True
    left_out: LeftOut = field(default_factory=LeftOut, repr=False, compare=False)
    cache_dir: Path | None = field(default=None, repr=False, compare=False)

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
        images = ImageSplit(self.samples[split], transform, seed=seed, upright=self.upright)
        if self.cache_dir is None or transform is None:
            return images

        from czsl_heads.data.packed import packed

        cached: ImageSplit = packed(images, self.cache_dir)
        return cached


class ImageSplit(torch.utils.data.Dataset[tuple[Any, int]]):
    """Images and the columns of their pairs.

    Indexed by a number, or by ``(epoch, number)``. With ``seed`` set, what the transform draws from torch's global
    generator depends on (seed, epoch, number) alone, whatever process loads it; the generator is left as it was.
    """

    def __init__(
        self,
        samples: list[Sample],
        transform: Callable[[Any], Tensor] | None = None,
        *,
        seed: int | None = None,
        upright: bool = True,
    ) -> None:
        self.samples, self.transform, self.seed, self.upright = samples, transform, seed, upright

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def columns(self) -> Tensor:
        """The column of every image, long ``[n]``."""
        return torch.tensor([sample.column for sample in self.samples])

    def picture(self, number: int) -> Any:
        """The image by itself, as a PIL image."""
        return open_image(self.samples[number].path, upright=self.upright)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Any, int]:
        epoch, number = index if isinstance(index, tuple) else (0, index)
        sample, image = self.samples[number], self.picture(number)
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


def read_dataset(
    root: str | os.PathLike[str],
    *,
    split: str = SPLIT_NAME,
    allow_untrained_primitives: bool = False,
    allow_outside: bool = False,
    upright: bool | None = None,
    names: str = "published",
) -> CompositionDataset:
    """Read a data set in the layout of MIT-States, UT-Zappos, C-GQA and VAW-CZSL.

    As in the official code, names and pairs are sorted, images whose attribute or split is ``NA`` or whose pair is in
    no split file are left out, and an image belongs to the split that its ``set`` says. Every image file must be
    there; whether it decodes is :func:`check`'s to say, or shows when it is loaded.

    Args:
        root: Folder with ``images``, the split folder and the metadata file.
        split: Name of the split.
        allow_untrained_primitives: Accept validation and test pairs whose attribute or object no training pair has.
        allow_outside: Accept images outside of the folder: absolute paths, ``..``, and links that lead out.
        upright: Turn images as their EXIF orientation says. None: yes, unless the pairs are those of MIT-States,
            UT-Zappos or C-GQA, whose published numbers were measured by code that ignores it.
        names: What prompts say of the names: ``"published"``, dots to blanks and lower case; ``"clean"``, plain
            English; or a file of replacements, see :func:`czsl_heads.data.names.prompt_names`.

    Returns:
        A :class:`CompositionDataset`.

    Raises:
        DataError: The folder is no data set, or a file is missing, unreadable or wrong; the message names it, with the
            line or entry.
    """
    for name, switch in (("allow_untrained_primitives", allow_untrained_primitives), ("allow_outside", allow_outside)):
        check_kind(name, switch, bool)
    dataset, problems = read_leniently(
        root, split=split, allow_outside=allow_outside, upright=upright, names=names, patience=1
    )
    if not allow_untrained_primitives and (untrained := untrained_words(dataset.split_pairs)):
        raise DataError(f"{Path(root) / split}: {untrained}")
    if problems:
        raise DataError(problems[0])
    return dataset


def read_leniently(
    root: str | os.PathLike[str],
    *,
    split: str = SPLIT_NAME,
    allow_outside: bool = False,
    upright: bool | None = None,
    names: str = "published",
    patience: int | None = None,
) -> tuple[CompositionDataset, list[str]]:
    """What can be read of a data set, and what is wrong with each row that cannot.

    Args:
        root, split, allow_outside, upright, names: As in :func:`read_dataset`.
        patience: How many wrong rows to read on for; None: all.

    Raises:
        DataError: The folder is no data set, or one of its files cannot be read at all.
    """
    root = Path(native(os.fspath(root)))
    pairs = _read_splits(root, split)
    space = _space(pairs)
    words = prompt_names([*space.attributes, *space.objects], names)
    if upright is None:
        upright = published_name(pairs) is None
    rows = read_metadata(root / f"metadata_{split}.t7")
    reader = _Rows(root, split, space, pairs, ImageFiles(root, allow_outside=allow_outside))
    samples, problems = reader.read(rows, patience)
    space = space.with_words(words) if words else space
    dataset = CompositionDataset(root, space, pairs, samples, upright, reader.left_out)
    return dataset, problems


def layout_files(root: Path, split: str = SPLIT_NAME) -> list[Path]:
    """The files that say what the data set holds: metadata, then the pairs of train, val and test."""
    return [root / f"metadata_{split}.t7", *(root / split / f"{name}_pairs.txt" for name in SPLITS)]


def untrained_words(pairs: dict[str, list[NamedPair]]) -> str:
    """A sentence that names all words of validation and test that no training pair has; empty if there is none."""
    trained = [{pair[kind] for pair in pairs["train"]} for kind in (0, 1)]
    found: list[str] = []
    for kind, word in ((0, "attribute"), (1, "object")):
        places: dict[str, str] = {}
        for name in ("val", "test"):
            for line, pair in enumerate(pairs[name], 1):  # every line is one pair
                if pair[kind] not in trained[kind]:
                    places.setdefault(pair[kind], f"{name}_pairs.txt, line {line}")
        found += [f"the {word} {unknown!r} ({place})" for unknown, place in places.items()]
    if not found:
        return ""
    return (
        f"expected words of the training pairs, got {len(found)} that are never trained: {', '.join(found)} "
        "(allow_untrained_primitives takes them all the same)"
    )


def _space(pairs: dict[str, list[NamedPair]]) -> CompositionSpace:
    train = dict.fromkeys(pairs["train"])
    union = sorted({pair for group in pairs.values() for pair in group})
    return CompositionSpace(
        sorted({attribute for attribute, _ in union}),
        sorted({obj for _, obj in union}),
        seen=list(train),
        unseen=[pair for pair in union if pair not in train],
    ).subset(union)


def _read_splits(root: Path, split: str) -> dict[str, list[NamedPair]]:
    if not root.is_dir():
        raise DataError(f"{root}: expected the folder of a data set, got {'a file' if root.exists() else 'nothing'}")
    needed = layout_files(root, split)
    if not (root / IMPORT).exists():
        needed = [root / "images", *needed]
    missing = [path.relative_to(root).as_posix() for path in needed if not path.exists()]
    if missing and needed[-4].exists() and (root / IMPORT).exists():
        raise DataError(f"{root}: expected a split, got none yet; czsl split {root} draws one")
    if missing:
        raise DataError(f"{root}: expected a data set in the field's layout, got a folder without {', '.join(missing)}")
    return {name: _read_pairs(root / split / f"{name}_pairs.txt") for name in SPLITS}


def _read_pairs(path: Path) -> list[NamedPair]:
    try:
        check_regular(path)
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


class _Rows:
    """Turns rows of the metadata into samples."""

    def __init__(
        self,
        root: Path,
        split: str,
        space: CompositionSpace,
        pairs: dict[str, list[NamedPair]],
        files: ImageFiles,
    ) -> None:
        self.metadata = root / f"metadata_{split}.t7"
        self.files = files
        self.left_out = LeftOut(respelled=files.respelled)
        self.members = {name: set(group) for name, group in pairs.items()}
        # The names of the space in place of each row's own: one string for all of its rows.
        names = space.pair_names
        self.known = {pair: (*pair, column) for column, pair in enumerate(names)}

    def read(self, rows: list[dict[str, Any]], patience: int | None) -> tuple[dict[str, list[Sample]], list[str]]:
        samples: dict[str, list[Sample]] = {name: [] for name in SPLITS}
        problems: list[str] = []
        for entry, row in enumerate(rows):
            try:
                sample = self._sample(entry, row)
            except DataError as error:
                problems.append(str(error))
                if patience is not None and len(problems) >= patience:
                    return samples, problems
                continue
            if sample is not None:
                samples[row["set"]].append(sample)
        bare = [name for name, group in samples.items() if not group]
        if not problems and bare:
            problems = [f"{self.metadata}: expected images of the {name} split, got none" for name in bare]
        return samples, problems

    def _sample(self, entry: int, row: dict[str, Any]) -> Sample | None:
        pair = row["attr"], row["obj"]
        name = row["set"]
        if pair[0] == ABSENT or name == ABSENT:
            self.left_out.absent += 1
            return None
        if pair not in self.known:
            self.left_out.unlisted.append(entry)
            return None
        where = f"{self.metadata}, entry {entry}"
        if name not in self.members:
            raise DataError(f"{where}: expected `set` to be one of train, val, test, NA, got {name!r}")
        if pair not in self.members[name]:
            raise DataError(f"{where}: expected a pair of {name}_pairs.txt, got {' '.join(pair)}")
        return Sample(self.files.folder, self._image(entry, row), *self.known[pair])

    def _image(self, entry: int, row: dict[str, Any]) -> str:
        try:
            found = self.files.find(row)
        except DataError as error:
            raise DataError(f"{self.metadata}, entry {entry}: {error}") from None
        if found is None:
            near = self.files.nearest(row["image"])
            hint = f"; there is {near}" if near else ""
            raise DataError(
                f"{os.path.join(self.files.folder, row['image'])}: expected an image file, got none "
                f"({self.metadata.name}, entry {entry}{hint})"
            )
        return found


def read_metadata(path: Path) -> list[dict[str, str]]:
    """The rows of a metadata file: each a dict with strings image, attr, obj and set.

    Raises:
        DataError: The file is missing or damaged, wants to run code, or a row is another thing.
    """
    try:
        check_regular(path)
        rows = torch.load(path, weights_only=True)
    except Exception as error:  # what the unpickler raises on damaged files is of every kind
        raise DataError(
            f"{path}: expected a torch-saved list of plain dicts, got an unreadable file ({_reason(error)})"
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list, got {type(rows).__name__}")
    for entry, row in enumerate(rows):
        if not _is_row(row):
            raise DataError(
                f"{path}, entry {entry}: expected a dict with strings image, attr, obj, set, got {repr(row)[:200]}"
            )
    return rows


def _is_row(row: Any) -> bool:
    try:
        kinds = {type(row["image"]), type(row["attr"]), type(row["obj"]), type(row["set"])}
    except (KeyError, TypeError, IndexError):
        return False
    return isinstance(row, dict) and kinds == {str}


def _reason(error: Exception) -> str:
    """Why a file was not read, in one line: torch's own message hides it behind advice and codes of the terminal."""
    text = str(error)
    refused = re.search(r"Unsupported (?:global|class):? (?:GLOBAL )?([\w.]+)", text)
    if refused is None:
        return text.partition("\n")[0]
    name = refused[1]
    whose = "numpy's " if name.startswith("numpy") else ""
    return f"expected plain str, got {whose}{name}; write_metadata writes plain rows"


def write_metadata(root: Path, rows: list[dict[str, str]], split: str = SPLIT_NAME) -> None:
    """Write the image list as the data sets ship it: a pickled list of dicts, readable with ``weights_only=True``.

    Strings of numpy and of other libraries become plain ones, which is all that such a reader takes.

    Raises:
        TypeError: A row holds another thing than strings.
    """
    plain = list(_plain_rows(rows))
    with whole_file(root / f"metadata_{split}.t7") as path:
        torch.save(plain, path)


def _plain_rows(rows: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    for entry, row in enumerate(rows):
        if not isinstance(row, dict):
            raise TypeError(f"expected `rows` of dicts, got {row!r} in entry {entry}")
        for key, value in row.items():
            if not isinstance(value, str):
                raise TypeError(f"expected `rows` of strings, got {key}={value!r} in entry {entry}")
        yield {str(key): str(value) for key, value in row.items()}
