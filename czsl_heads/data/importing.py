"""Makes a data set in the field's layout of what people have: a table, folders named by labels, a `datasets` folder."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from czsl_heads._checks import check_choice, check_kind
from czsl_heads._files import native, whole_folder, write_json
from czsl_heads.data.files import IMPORT
from czsl_heads.data.images import DataError
from czsl_heads.data.layout import ABSENT, SPLITS, write_metadata
from czsl_heads.data.splitting import write_pairs

Case = Literal["keep", "lower"]
TABLES = (".csv", ".tsv", ".jsonl")
COLUMNS = {
    "image": ("image", "path", "file", "filename", "file_name", "image_path"),
    "attribute": ("attribute", "attr", "state", "adjective"),
    "object": ("object", "obj", "noun"),
    "split": ("split", "set", "subset"),
}
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "": ABSENT,
    "na": ABSENT,
}
_SEVERAL = re.compile(r"[|;,]")
_SHOWN = 3


class _Row(NamedTuple):
    """A picture with its labels as they stand in the source; ``place`` is the line or folder, for errors."""

    place: str
    image: str
    attributes: list[str]
    object: str
    split: str | None


@dataclass(frozen=True)
class Imported:
    """What :func:`import_dataset` made.

    Attributes:
        root: Folder of the data set.
        rows, pictures, pairs: How many there are.
        has_split: Whether the source says which pictures are for training, validation and test.
        notes: What its owner should know.
    """

    root: Path
    rows: int
    pictures: int
    pairs: int
    has_split: bool
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"wrote {self.root}: {self.rows} rows, {self.pictures} pictures, {self.pairs} pairs", *self.notes]
        if not self.has_split:
            lines.append(f"no split yet: czsl split {self.root} draws one")
        return "\n".join(lines)


def import_dataset(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    case: Case = "keep",
    copy: bool = False,
    link: bool = False,
    ignore_split: bool = False,
) -> Imported:
    """Make a data set in the field's layout. Pictures stay where they are, unless ``copy`` or ``link`` is asked for.

    Sources: a CSV, TSV or JSONL file with columns image, attribute, object and, if there is one, split; a folder of
    folders named ``attribute_object`` or ``attribute/object``; a folder that Hugging Face's ``datasets`` saved. Several
    attributes of a picture (``red|striped``, or a list) become a row each. Names are put into one Unicode form (NFC),
    and their blanks are trimmed.

    Args:
        source: The file or folder.
        out: Folder for the data set: new or empty.
        case: ``"lower"`` puts names into lower case; ``"keep"`` leaves them.
        copy: Copy the pictures into the data set.
        link: Put links to the pictures into the data set.
        ignore_split: Leave out the source's split, so that :func:`~czsl_heads.data.split_dataset` can draw one.

    Returns:
        What was made; print it.

    Raises:
        DataError: The source is of another kind, or a row is wrong or its picture missing; the line is named, and
            nothing is written.
        ValueError: ``copy`` and ``link`` are both asked for, or ``out`` holds something.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> (folder / "ripe_apple").mkdir()
        >>> Image.new("RGB", (8, 8)).save(folder / "ripe_apple" / "1.png")
        >>> made = import_dataset(folder, f"{mkdtemp()}/data")
        >>> made.rows, made.pairs, made.has_split
        (1, 1, False)
    """
    check_choice("case", case, ("keep", "lower"))
    for name, switch in (("copy", copy), ("link", link), ("ignore_split", ignore_split)):
        check_kind(name, switch, bool)
    if copy and link:
        raise ValueError("expected `copy` or `link`, got both")
    source, out = Path(native(os.fspath(source))), Path(native(os.fspath(out)))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"expected `out` to be a new or empty folder, got {out}, which holds something")
    with whole_folder(out) as folder:
        return _import(source, folder, _Wanted(case, copy, link, ignore_split), out)


class _Wanted(NamedTuple):
    case: Case
    copy: bool
    link: bool
    ignore_split: bool


def _import(source: Path, folder: Path, wanted: _Wanted, out: Path) -> Imported:
    """The whole data set in a folder that is not in its place yet."""
    notes: list[str] = []
    rows, home, saved = _read(source, folder, notes)
    if wanted.ignore_split:
        rows = [row._replace(split=None) for row in rows]
    names = _Names(wanted.case)
    files = _images_root(rows, home)
    entries = _entries(rows, names, files, notes)
    has_split = _check_splits(source, entries)
    notes += names.notes()

    pictures = list(dict.fromkeys(entry["image"] for entry in entries))
    about: dict[str, Any] = {"version": 1, "source": str(source.resolve()), "images": None, "case": wanted.case}
    if not saved:
        about |= _bring(pictures, files, folder, wanted, notes)
    write_json(folder / IMPORT, about | {"names": names.changed})
    write_metadata(folder, entries)
    pairs = {(entry["attr"], entry["obj"]) for entry in entries}
    write_pairs(folder, _pairs_of(entries) if has_split else {"all": pairs})
    if not has_split:
        shutil.rmtree(folder / "compositional-split-natural")  # they were tried, and are czsl split's to write
    return Imported(out, len(entries), len(pictures), len(pairs), has_split, notes)


def _read(source: Path, folder: Path, notes: list[str]) -> tuple[list[_Row], Path, bool]:
    """The rows, what their pictures are relative to, and whether these were written into the data set."""
    if source.is_file():
        if source.suffix.lower() not in TABLES:
            raise DataError(f"{source}: expected a file that ends in {', '.join(TABLES)}, or a folder")
        records = _jsonl(source) if source.suffix.lower() == ".jsonl" else _table(source)
        return _labelled(source, records, notes), source.parent, False
    if not source.is_dir():
        raise DataError(f"{source}: expected a file or a folder, got nothing")
    if (source / "dataset_dict.json").exists() or (source / "dataset_info.json").exists():
        notes.append("the pictures were written into the data set, since they are no files in their source")
        return _hugging_face(source, folder / "images"), folder / "images", True
    return _folders(source, notes), source, False


def _table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    between = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=between, strict=True)
            for record in reader:
                if None in record or None in record.values():
                    columns = len(reader.fieldnames or ())
                    raise DataError(f"{path}, line {reader.line_num}: expected {columns} columns, got another number")
                yield reader.line_num, record
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a table in UTF-8, got one that cannot be read ({error})") from error


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected JSON lines in UTF-8, got a file that cannot be read ({error})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: expected JSON, got {line[:60]!r} ({error})") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path}, line {number}: expected an object with image, attribute, object, got {line[:60]!r}"
            )
        yield number, record


def _labelled(path: Path, records: Iterator[tuple[int, dict[str, Any]]], notes: list[str]) -> list[_Row]:
    rows: list[_Row] = []
    others: dict[str, None] = {}
    for number, record in records:
        place = f"{path}, line {number}"
        found = _columns(place, record)
        others |= dict.fromkeys(name for name in record if name not in found.values())
        values = {kind: record[name] for kind, name in found.items()}
        for kind in ("image", "object"):
            if not isinstance(values[kind], str) or not values[kind].strip():
                raise DataError(f"{place}: expected a text for {kind}, got {values[kind]!r}")
        split = values.get("split", ABSENT) if "split" in found else None
        attributes = _several(place, values["attribute"])
        rows.append(_Row(place, values["image"], attributes, values["object"], split))
    if not rows:
        raise DataError(f"{path}: expected rows of image, attribute, object, got none")
    if others:
        notes.append(f"columns left out: {', '.join(map(str, others))}")
    return rows


def _columns(place: str, record: dict[str, Any]) -> dict[str, str]:
    """The names of the columns by what they hold."""
    known = {str(name).strip().lower(): name for name in record}
    found: dict[str, str] = {}
    for kind, names in COLUMNS.items():
        name = next((name for name in names if name in known), None)
        if name is not None:
            found[kind] = known[name]
        elif kind != "split":
            raise DataError(f"{place}: expected a column {kind} (or {', '.join(names[1:])}), got {', '.join(record)}")
    return found


def _several(place: str, value: Any) -> list[str]:
    """The attributes of a cell, which may list several."""
    parts = _SEVERAL.split(value) if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise DataError(f"{place}: expected a text, or a list of texts, for attribute, got {value!r}")
    named = [part for part in parts if part.strip()]
    if not named:
        raise DataError(f"{place}: expected an attribute, got {value!r}")
    return named


def _folders(source: Path, notes: list[str]) -> list[_Row]:
    """Rows of folders named ``attribute_object`` or ``attribute/object``."""
    kinds = set(Image.registered_extensions())
    rows: list[_Row] = []
    skipped = 0
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        if path.suffix.lower() not in kinds:
            skipped += 1
            continue
        attribute, obj = _labels_of(path.parent, inside.parts[:-1])
        rows.append(_Row(str(path.parent), inside.as_posix(), [attribute], obj, None))
    if not rows:
        raise DataError(
            f"{source}: expected folders of images named attribute_object or attribute/object, got no image"
        )
    if skipped:
        notes.append(f"files left out that are no images: {skipped}")
    return rows


def _labels_of(folder: Path, parts: tuple[str, ...]) -> tuple[str, str]:
    if len(parts) == 2:
        return parts[0], parts[1]
    names = parts[0].split("_") if len(parts) == 1 else []
    if len(names) != 2 or not all(names):
        raise DataError(
            f"{folder}: expected a folder named attribute_object, with one underscore, or attribute/object, got "
            f"{'/'.join(parts) or 'images outside of any'}; or list the images in a CSV file"
        )
    return names[0], names[1]


def _hugging_face(source: Path, images: Path) -> list[_Row]:
    """Rows of a folder that ``datasets`` saved; its pictures are written as files."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"expected the package datasets to read {source}, got none: pip install datasets"
        ) from error

    found = datasets.load_from_disk(str(source))
    groups = dict(found) if isinstance(found, datasets.DatasetDict) else {None: found}
    images.mkdir()
    rows: list[_Row] = []
    for split, group in groups.items():
        columns = _columns(str(source), dict.fromkeys(group.features))
        group = group.cast_column(columns["image"], datasets.Image(decode=False))
        for number, record in enumerate(group):
            place = f"{source}, {split or 'row'} {number}"
            values = {kind: _named(group.features[name], record[name]) for kind, name in columns.items()}
            name = _write_picture(images, f"{split or 'image'}-{number}", values["image"], place)
            own = values.get("split") if split is None else split
            rows.append(_Row(place, name, _several(place, values["attribute"]), str(values["object"]), own))
    return rows


def _named(feature: Any, value: Any) -> Any:
    """A label by its name."""
    if hasattr(feature, "int2str"):
        return feature.int2str(value)
    inner = getattr(feature, "feature", None)
    return [_named(inner, each) for each in value] if inner is not None else value


def _write_picture(images: Path, stem: str, picture: Any, place: str) -> str:
    """The bytes of a picture as they are; the name of the file."""
    content = picture.get("bytes") if isinstance(picture, dict) else None
    if content is None and isinstance(picture, dict) and picture.get("path"):
        content = Path(picture["path"]).read_bytes()
    if content is None:
        raise DataError(f"{place}: expected a picture in the image column, got {type(picture).__name__}")
    ending = Path(picture.get("path") or "").suffix or ".png"
    (images / f"{stem}{ending}").write_bytes(content)
    return f"{stem}{ending}"


class _Names:
    """Normalises names, and keeps what became what."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.changed: dict[str, dict[str, str]] = {"attributes": {}, "objects": {}}
        self.used: dict[str, dict[str, None]] = {"attributes": {}, "objects": {}}

    def of(self, kind: str, name: str, place: str) -> str:
        plain = " ".join(unicodedata.normalize("NFC", name).split())
        if self.case == "lower":
            plain = plain.lower()
        if not plain or plain == ABSENT:
            raise DataError(f"{place}: expected a name, got {name!r}")
        if plain != name:
            self.changed[kind][name] = plain
        self.used[kind][plain] = None
        return plain

    def notes(self) -> list[str]:
        lines = []
        count = sum(map(len, self.changed.values()))
        if count:
            lines.append(f"names that were changed: {count}; {IMPORT} has what became what")
        for names in self.used.values():
            groups: dict[str, list[str]] = {}
            for name in names:
                groups.setdefault(name.casefold(), []).append(name)
            for group in groups.values():
                if len(group) > 1:
                    lines.append(f"{' and '.join(map(repr, group))} are several names; --case lower makes them one")
        return lines


def _images_root(rows: list[_Row], home: Path) -> dict[str, Path]:
    """The file of every picture by its name in the source; DataError names those that are missing."""
    for folder in (home, home / "images"):
        found = {row.image: _file(folder, row.image) for row in rows}
        missing = [row for row in rows if found[row.image] is None]
        if not missing:
            return {name: path for name, path in found.items() if path is not None}
        if folder == home:
            first = missing
    best = min(first, missing, key=len)
    raise DataError(
        f"{best[0].place}: expected an image file {best[0].image} in {home} or {home / 'images'}, got none "
        f"({len(best)} of {len(rows)} rows are without their image)"
    )


def _file(folder: Path, name: str) -> Path | None:
    for spelling in (name, name.replace("\\", "/")):
        path = folder / native(spelling)
        if path.is_file():
            return Path(os.path.abspath(path))
    return None


def _entries(rows: list[_Row], names: _Names, files: dict[str, Path], notes: list[str]) -> list[dict[str, str]]:
    """Rows of the metadata: one for each attribute of a picture, and each once."""
    home = _common_folder(files)
    entries: dict[tuple[str, str, str], dict[str, str]] = {}
    several: dict[str, None] = {}
    count = 0
    for row in rows:
        obj = names.of("objects", row.object, row.place)
        image = files[row.image].relative_to(home).as_posix()
        if len(row.attributes) > 1:
            several[image] = None
        for attribute in row.attributes:
            attr = names.of("attributes", attribute, row.place)
            entry = {"image": image, "attr": attr, "obj": obj, "set": _split_of(row)}
            before = entries.setdefault((image, attr, obj), entry)
            if before["set"] != entry["set"]:
                raise DataError(
                    f"{row.place}: expected a picture of one split, got {image} of {before['set']} and {entry['set']}"
                )
            count += 1
    if several:
        notes.append(f"pictures with several attributes: {len(several)}; each attribute has become a row")
    if count > len(entries):
        notes.append(f"rows that were there before, left out: {count - len(entries)}")
    return list(entries.values())


def _split_of(row: _Row) -> str:
    if row.split is None:
        return ABSENT
    name = _SPLITS.get(str(row.split).strip().lower())
    if name is None:
        raise DataError(f"{row.place}: expected a split train, val, test or nothing, got {row.split!r}")
    return name


def _check_splits(source: Path, entries: list[dict[str, str]]) -> bool:
    """Whether there is a split; one that lacks a part is refused."""
    counts = Counter(entry["set"] for entry in entries)
    there = [name for name in SPLITS if counts[name]]
    if there and len(there) < len(SPLITS):
        missing = ", ".join(name for name in SPLITS if not counts[name])
        raise DataError(
            f"{source}: expected a split of train, val and test, got none for {missing}; --ignore_split true leaves it "
            "out, and czsl split draws one"
        )
    return bool(there)


def _pairs_of(entries: list[dict[str, str]]) -> dict[str, set[tuple[str, str]]]:
    pairs: dict[str, set[tuple[str, str]]] = {name: set() for name in SPLITS}
    for entry in entries:
        if entry["set"] in pairs:
            pairs[entry["set"]].add((entry["attr"], entry["obj"]))
    return pairs


def _common_folder(files: dict[str, Path]) -> Path:
    return Path(os.path.commonpath([path.parent for path in files.values()]))


def _bring(
    pictures: list[str], files: dict[str, Path], folder: Path, wanted: _Wanted, notes: list[str]
) -> dict[str, Any]:
    """Copy or link the pictures, if asked to; what the data set's reader must know of their place."""
    home = _common_folder(files)
    if not (wanted.copy or wanted.link):
        notes.append(f"pictures stay in {home}")
        return {"images": os.fsencode(home).decode()}
    for name in pictures:
        target = folder / "images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if wanted.copy:
            shutil.copyfile(home / name, target)
        else:
            target.symlink_to(home / name)
    return {} if wanted.copy else {"links_to": os.fsencode(home).decode()}
