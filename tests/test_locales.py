"""Text is UTF-8 whatever the locale: in the code, and in commands that are run under others."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from czsl_heads.data.layout import write_metadata
from tests.data.animals import picture, row, write_pairs

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("czsl_heads", "baselines", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def without_encoding(source: str) -> list[int]:
    """Lines that open a text file in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        plain_open = name == "open" and isinstance(node.func, ast.Name)
        if name not in ("read_text", "write_text") and not plain_open:
            continue
        mode = node.args[1] if plain_open and len(node.args) > 1 else None
        binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
        own = plain_open is False and isinstance(node.func, ast.Name)  # a function of ours of that name
        if not binary and not own and "encoding" not in {keyword.arg for keyword in node.keywords}:
            found.append(node.lineno)
    return found


def test_the_search_finds_what_it_looks_for() -> None:
    lines = ["open('a')", "open('a', 'rb')", "open('a', encoding='utf-8')", "p.read_text()", "p.write_text('a')"]
    assert without_encoding("\n".join(lines)) == [1, 4, 5]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_read_or_written_in_the_encoding_of_the_locale(path: Path) -> None:
    assert without_encoding(path.read_text(encoding="utf-8")) == []


@pytest.fixture(scope="module")
def latin1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A Latin-1 locale, where one can be made; else the C locale again."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef"):
        command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return {"LC_ALL": "en_US.ISO-8859-1", "LOCPATH": str(folder)}
    return {"LC_ALL": "C"}


def run(cwd: Path, locale: dict[str, str], *arguments: str) -> str:
    strict = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "czsl_heads.cli", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, timeout=200, env={**os.environ, **strict, **locale})
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    return done.stdout.decode("utf-8")


@pytest.mark.engine
def test_commands_run_under_any_locale(tmp_path: Path, latin1: dict[str, str]) -> None:
    root, rows = tmp_path / "données", []
    (root / "images").mkdir(parents=True)
    for name, pairs in {"train": ["crème apple", "old 日本"], "val": ["old apple", "old 日本"]}.items():
        write_pairs(root, name, pairs)
        rows += [row(f"{pair.replace(' ', '_')}/{name}.png", *pair.split(), name) for pair in pairs]
    write_pairs(root, "test", ["old apple", "old 日本"])
    rows += [{**each, "set": "test", "image": each["image"].replace("val", "test")} for each in rows[2:]]
    for number, each in enumerate(rows):
        picture(root / "images" / each["image"], value=10 * number)
    write_metadata(root, rows)
    ascii_only = {"LC_ALL": "C"}
    assert "fit to train on" in run(tmp_path, ascii_only, "check", "données")
    train = ["train", "--method=clip", "--data=données", "--out=run", "--trainer.accelerator=cpu"]
    run(tmp_path, ascii_only, *train)
    assert '"crème"' in (tmp_path / "run" / "seed0" / "cls" / "config.json").read_text(encoding="utf-8")
    run(tmp_path, latin1, *train)  # the same command goes on
    told = run(tmp_path, latin1, "predict", "données/images/crème_apple/train.png", "--run=run", "--out=maps")
    assert "crème apple" in told
    assert "日本" in told
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["train-maps.png"]
