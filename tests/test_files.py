"""Files appear whole or not at all, in UTF-8 whatever the machine's own encoding is."""

import ast
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from czsl_heads._files import plain, read_json, whole_file, whole_folder, write_json, write_text
from czsl_heads._sealed import SEAL, DamagedError, read_sealed, write_sealed

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


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    host = socket.gethostname()
    living, other = f".unfinished-{host}-{os.getppid()}-0.json", ".unfinished-elsewhere-1-0.json"
    mine = [living, other, ".unfinished", f".unfinished-{host}-x-0", "note.txt"]
    for name in mine:
        (tmp_path / name).touch()
    dead = tmp_path / f".unfinished-{host}-{dead_process()}-7.json"
    dead.touch()
    folder = tmp_path / f".unfinished-{host}-{dead_process()}-8"
    (folder / "deep").mkdir(parents=True)
    write_text(tmp_path / "note.txt", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)


def test_a_folder_that_may_not_be_read_can_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refused)
    write_text(tmp_path / "note.txt", "new")
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "[a]*?.txt"])
def test_any_name_that_a_file_may_have_can_be_written(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "new")
    assert (tmp_path / name).read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"folder'$") as raised:
        write_text(tmp_path / "folder", "new")
    assert "unfinished" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_folder(tmp_path / "made") as building:
            (building / "half").touch()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "made") as building:
        (building / "note").touch()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["note"]


def test_paths_that_are_no_unicode_are_written_and_read(tmp_path: Path) -> None:
    odd = {"data": os.fsdecode(b"caf\xe9"), "word": "мокрая"}
    assert write_json(tmp_path / "a.json", odd) == odd == read_json(tmp_path / "a.json")
    assert "мокрая" in write_and_read(tmp_path / "b.json", {"word": "мокрая"})


def write_and_read(path: Path, content: dict) -> str:
    write_json(path, content)
    return path.read_text(encoding="utf-8")


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(st.none() | st.booleans() | NUMBERS | st.text(), st.lists, max_leaves=5)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_a_sealed_file_comes_back_as_it_was_written(content: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        written = write_sealed(path, content)
        assert read_sealed(path) == written
        kept = {name: value for name, value in content.items() if name != SEAL}
        assert {name: value for name, value in written.items() if name != SEAL} == plain(kept)
        bare = {name: value for name, value in written.items() if name != SEAL}
        path.write_text(json.dumps({**written, "another": 1}), encoding="utf-8")
        with pytest.raises(DamagedError, match="its digest does not fit"):
            read_sealed(path)
        path.write_text(json.dumps(bare), encoding="utf-8")  # of an earlier version
        assert read_sealed(path) == bare
