"""What prompts say of a data set's names: as the published code, in plain English, or by a table of one's own."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from czsl_heads._files import native
from czsl_heads.data.images import DataError
from czsl_heads.space import CompositionSpace, clean_name

# Names of UT-Zappos and C-GQA that no rule turns into English.
_CLEAN = {
    "Full.grain.leather": "full-grain leather",
    "Hair.Calf": "calf hair",
    "Boots.Ankle": "ankle boots",
    "Boots.Knee.High": "knee-high boots",
    "Boots.Mid-Calf": "mid-calf boots",
    "Shoes.Boat.Shoes": "boat shoes",
    "Shoes.Clogs.and.Mules": "clogs and mules",
    "Shoes.Flats": "flat shoes",
    "Shoes.Heels": "high heels",
    "Shoes.Loafers": "loafers",
    "Shoes.Oxfords": "oxford shoes",
    "Shoes.Sneakers.and.Athletic.Shoes": "sneakers and athletic shoes",
}
_FILES = (".json", ".yaml", ".yml", ".csv", ".tsv")


def prompt_names(names: Sequence[str], table: str = "published") -> dict[str, str]:
    """What prompts say in place of names, where that is not :func:`~czsl_heads.space.clean_name`.

    Args:
        names: Attributes and objects of a data set.
        table: ``"published"``: dots become blanks, and capitals lower case, as in the code of CSP and Troika.
            ``"clean"``: underscores become blanks too, and the names of UT-Zappos plain English. Or a file of
            replacements: a JSON or YAML mapping, or a CSV or TSV of two columns.

    Returns:
        Words by name.

    Raises:
        DataError: The file is missing or of another kind, or replaces something that is no name of the data set.

    Example:
        >>> prompt_names(["Boots.Mid-Calf", "black_and_white", "Suede"], "clean")
        {'Boots.Mid-Calf': 'mid-calf boots', 'black_and_white': 'black and white'}
        >>> prompt_names(["Boots.Mid-Calf", "black_and_white", "Suede"])
        {}
    """
    if table == "published":
        return {}
    if table == "clean":
        words = {name: _CLEAN.get(name, _plain(name)) for name in names}
        return {name: said for name, said in words.items() if said != clean_name(name)}
    words = _read(Path(native(table)))
    for name in words:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{table}: expected names of the data set, got {name!r}{hint}")
    return words


def same_prompts(space: CompositionSpace) -> list[tuple[str, ...]]:
    """Attributes, objects and pairs of which prompts say the same words, in groups.

    Example:
        >>> same_prompts(CompositionSpace(["Wet", "wet", "old"], ["dog"], seen=[("Wet", "dog")]))
        [('Wet', 'wet')]
    """
    kinds = [
        zip(space.attributes, space.attribute_words),
        zip(space.objects, space.object_words),
    ]
    found = [group for kind in kinds for group in _alike(dict(kind))]
    if found:  # their pairs are alike, too
        return found
    words = space.attribute_words, space.object_words
    said = {
        " ".join(names): f"{words[0][attribute]} {words[1][obj]}"
        for names, (attribute, obj) in zip(space.pair_names, space.pairs.tolist())
    }
    return _alike(said)


def _alike(said: dict[str, str]) -> list[tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name, words in said.items():
        groups.setdefault(words, []).append(name)
    return [tuple(sorted(group)) for group in groups.values() if len(group) > 1]


def _plain(name: str) -> str:
    return " ".join(clean_name(name).replace("_", " ").split())


def _read(path: Path) -> dict[str, str]:
    """The replacements of a file."""
    if not path.is_file() or path.suffix.lower() not in _FILES:
        raise DataError(
            f'{path}: expected `names` to be "published", "clean" or a file that ends in {", ".join(_FILES)}, got '
            f"{'none of these' if path.is_file() else 'no such file'}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        content: Any = _table(path, text) if path.suffix.lower() in (".csv", ".tsv") else _mapping(path, text)
    except (UnicodeDecodeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: expected names and words in UTF-8, got a file that cannot be read ({error})"
        ) from error
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: expected a mapping of names to words, got a {type(content).__name__}")
    for name, said in content.items():
        if not isinstance(name, str) or not isinstance(said, str) or not said.strip():
            raise DataError(f"{path}: expected words for each name, got {said!r} for {name!r}")
    return dict(content)


def _mapping(path: Path, text: str) -> Any:
    if path.suffix.lower() == ".json":
        return json.loads(text)

    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _table(path: Path, text: str) -> dict[str, str]:
    """Two columns, below a line of headings or not."""
    words: dict[str, str] = {}
    lines = csv.reader(text.splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and [part.strip().lower() for part in line] == ["name", "words"]):
            continue
        if len(line) != 2:
            raise DataError(f"{path}, line {number}: expected a name and its words, got {len(line)} columns")
        words[line[0].strip()] = line[1].strip()
    return words
