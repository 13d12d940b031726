"""What prompts say of a data set's names: as the published code, in plain English, or by a table of one's own."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from czsl_heads._files import native
from czsl_heads.data.images import DataError
from czsl_heads.space import CompositionSpace, clean_name

# Names of UT-Zappos that no rule turns into English; those of C-GQA and MIT-States need none.
_CLEAN = {
    "Full.grain.leather": "full-grain leather",
    "Hair.Calf": "calf hair",
    "Boots.Ankle": "ankle boots",
    "Boots.Knee.High": "knee-high boots",
    "Boots.Mid-Calf": "mid-calf boots",
    "Shoes.Boat.Shoes": "boat shoes",
    "Shoes.Clogs.and.Mules": "clogs and mules",
    "Shoes.Flats": "flats",
    "Shoes.Heels": "heels",
    "Shoes.Loafers": "loafers",
    "Shoes.Oxfords": "oxford shoes",
    "Shoes.Sneakers.and.Athletic.Shoes": "sneakers and athletic shoes",
}
_FILES = (".json", ".yaml", ".yml", ".csv", ".tsv")


def prompt_names(names: Sequence[str], table: str | os.PathLike[str] = "published") -> dict[str, str]:
    """What prompts say in place of names, where that is not :func:`~czsl_heads.space.clean_name`.

    Args:
        names: Attributes and objects of a data set.
        table: ``"published"``: dots become blanks, and capitals lower case, as in the code of CSP and Troika.
            ``"clean"``: underscores become blanks too, and the names of UT-Zappos plain English. Or a file of
            replacements in UTF-8: a JSON or YAML mapping, or a CSV or TSV of two columns, below a line
            ``name,words`` or not.

    Returns:
        Words by name, as :class:`~czsl_heads.CompositionSpace` takes them.

    Raises:
        DataError: The file is missing, of another kind or no mapping of strings, or replaces something that is no
            name of the data set. The message names the file, and where it can the line.
        ModuleNotFoundError: The file is YAML, and there is no PyYAML (``pip install 'czsl-heads[train]'``).

    Example:
        >>> prompt_names(["Boots.Mid-Calf", "black_and_white", "Suede"], "clean")
        {'Boots.Mid-Calf': 'mid-calf boots', 'black_and_white': 'black and white'}
        >>> prompt_names(["Boots.Mid-Calf", "black_and_white", "Suede"])
        {}
    """
    if table == "published":
        return {}
    if table == "clean":
        words = {name: _CLEAN.get(name) or _plain(name) for name in names}
    else:
        path = Path(native(os.fspath(table)))
        words = _read(path)
        _check_known(path, words, names)
    return {name: said for name, said in words.items() if said and said != clean_name(name)}


def same_prompts(space: CompositionSpace) -> list[tuple[str, ...]]:
    """Attributes, objects and pairs of which prompts say the same words, in groups.

    Pairs that are alike because their attributes and objects are so by themselves are not listed again.

    Args:
        space: Gives names, pairs and their words.

    Returns:
        Groups of attributes, then of objects, then of pairs, which are written ``"attribute + object"``; each in the
        order of the space.

    Example:
        >>> same_prompts(CompositionSpace(["Wet", "wet", "old"], ["dog"], seen=[("Wet", "dog")]))
        [('Wet', 'wet')]
        >>> pairs = [("dark red", "car"), ("dark", "red car")]
        >>> same_prompts(CompositionSpace(["dark", "dark red"], ["car", "red car"], seen=pairs))
        [('dark red + car', 'dark + red car')]
    """
    attributes, objects = space.attribute_words, space.object_words
    alike = [
        *_alike(zip(space.attributes, attributes)),
        *_alike(zip(space.objects, objects)),
    ]

    # One pair for all whose attributes and objects say the same.
    distinct: dict[tuple[str, str], str] = {}
    for (attribute, obj), names in zip(space.pairs.tolist(), space.pair_names):
        distinct.setdefault((attributes[attribute], objects[obj]), " + ".join(names))
    return [*alike, *_alike((pair, " ".join(words)) for words, pair in distinct.items())]


def _alike(said: Iterable[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Names in groups of equal words, from names and their words."""
    groups: dict[str, list[str]] = {}
    for name, words in said:
        groups.setdefault(words, []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _check_known(path: Path, words: Iterable[str], names: Sequence[str]) -> None:
    known = set(names)
    for name in words:
        if name not in known:
            near = get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{path}: expected names of the data set, got {name!r}{hint}")


def _plain(name: str) -> str:
    return " ".join(clean_name(name).replace("_", " ").split())


def _read(path: Path) -> dict[str, str]:
    """The replacements of a file."""
    kind = path.suffix.lower()
    if not path.is_file() or kind not in _FILES:
        raise DataError(
            f'{path}: expected `names` to be "published", "clean" or a file that ends in {", ".join(_FILES)}, got '
            f"{'none of these' if path.is_file() else 'no such file'}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = _table(path, text) if kind in (".csv", ".tsv") else _mapping(kind, text)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: expected names and words in UTF-8, got a file that cannot be read ({error})"
        ) from error

    if not isinstance(content, Mapping):
        raise DataError(f"{path}: expected a mapping of names to words, got {type(content).__name__}")
    for name, said in content.items():
        if not isinstance(name, str) or not isinstance(said, str) or not said.strip():
            raise DataError(f"{path}: expected words for each name, got {said!r} for {name!r}")
    return dict(content)


def _mapping(kind: str, text: str) -> Any:
    """What a JSON or YAML file holds; ValueError tells the line where it is damaged."""
    if kind == ".json":
        return json.loads(text)

    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error  # in one line


def _table(path: Path, text: str) -> dict[str, str]:
    """Two columns, below a line of headings or not."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    words: dict[str, str] = {}
    try:
        for row in rows:
            cells = [cell.strip() for cell in row]
            if not any(cells) or (rows.line_num == 1 and [cell.lower() for cell in cells] == ["name", "words"]):
                continue
            problem = _wrong_row(cells, words)
            if problem:
                raise DataError(f"{path}, line {rows.line_num}: expected a name and its words, got {problem}")
            words[cells[0]] = cells[1]
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: expected a name and its words, got {error}") from error
    return words


def _wrong_row(cells: list[str], words: Mapping[str, str]) -> str:
    if len(cells) != 2:
        return f"{len(cells)} column{'s' * (len(cells) != 1)}"
    if not all(cells):
        return f"{cells[1]!r} for {cells[0]!r}"
    return f"{cells[0]!r} again" if cells[0] in words else ""
