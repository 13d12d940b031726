"""Files appear whole or not at all, in UTF-8 whatever the machine's own encoding is."""

import ast
import json
from pathlib import Path

import pytest

from czsl_heads._files import whole_file, write_json, write_text

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for room in ("czsl_heads", "baselines") for path in (ROOT / room).rglob("*.py"))


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "note.txt"
    write_text(path, "old")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["note.txt"]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_lists_of_numbers_take_a_line_and_strings_stay(tmp_path: Path) -> None:
    curve = [[0.1, -2e-5], [3, 4.5]]
    write_json(tmp_path / "a.json", {"curve": curve, "name": "b", "none": [1, None]})
    text = (tmp_path / "a.json").read_text()
    assert '"curve": [ [ 0.1, -2e-05 ], [ 3, 4.5 ] ]' in text
    odd = {"name": "[1,  2]", "curve": curve}
    assert write_json(tmp_path / "b.json", odd) == odd == json.loads((tmp_path / "b.json").read_text())


TEXT_CALLS = {"read_text", "write_text", "open"}


def text_calls_without_encoding(source: str) -> list[int]:
    """Lines that read or write text in whatever encoding the machine has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        named = {keyword.arg for keyword in node.keywords}
        owner = getattr(getattr(node.func, "value", None), "id", "")
        binary = any(isinstance(each, ast.Constant) and "b" in str(each.value) for each in node.args[:2])
        ours = isinstance(node.func, ast.Name) and name != "open"  # write_text of _files.py
        if (
            name in TEXT_CALLS
            and not ours
            and owner not in ("Image", "gzip", "os")
            and not binary
            and "encoding" not in named
        ):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_text_is_utf8_whatever_the_machine_has(path: Path) -> None:
    assert text_calls_without_encoding(path.read_text(encoding="utf-8")) == []


def test_a_call_in_the_encoding_of_the_machine_is_found() -> None:
    assert text_calls_without_encoding("path.read_text()\npath.read_text(encoding='utf-8')\nopen(path)") == [1, 3]
