"""Files appear whole or not at all."""

import json
from pathlib import Path

import pytest

from czsl_heads._files import whole_file, write_json, write_text


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
