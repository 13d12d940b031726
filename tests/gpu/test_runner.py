"""``make gpu`` keeps what has passed, goes on where it stopped, and ends what takes too long. No GPU is needed here."""

import json
import time
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import STEPS, run_steps

NOTE = "from pathlib import Path\nimport sys\nwith open('ran.txt', 'a') as file:\n    file.write(sys.argv[1] + ' ')\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that note that they ran, that fail, and that never end."""
    (tmp_path / "noting.py").write_text(NOTE)
    (tmp_path / "failing.py").write_text(NOTE + "sys.exit(3)\n")
    (tmp_path / "endless.py").write_text(NOTE + "import time\ntime.sleep(600)\n")
    monkeypatch.chdir(tmp_path)


def ran() -> list[str]:
    path = Path("ran.txt")
    words = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return words


def record() -> dict:
    return json.loads(Path("gpu.json").read_text())


def test_what_has_passed_is_not_run_again() -> None:
    steps = {"one": ("noting", "one"), "two": ("failing", "two"), "three": ("noting", "three")}
    assert run_steps(steps, Path("gpu.json"), device="card") == 1
    assert ran() == ["one", "two", "three"]
    found = record()
    assert found["device"] == "card"
    assert [(name, step["passed"], step["status"]) for name, step in found["steps"].items()] == [
        ("one", True, 0),
        ("two", False, 3),
        ("three", True, 0),
    ]
    assert found["steps"]["one"]["command"] == "python -m noting one"

    steps["two"] = ("noting", "two")  # it was mended
    assert run_steps(steps, Path("gpu.json"), device="card") == 0
    assert ran() == ["two"]
    assert [*record()["steps"]] == ["one", "two", "three"]
    assert run_steps(steps, Path("gpu.json"), device="card") == 0
    assert ran() == []
    assert run_steps(steps, Path("gpu.json"), device="card", again=True) == 0
    assert ran() == ["one", "two", "three"]
    assert run_steps(steps, Path("gpu.json"), device="another card") == 0
    assert ran() == ["one", "two", "three"]


def test_a_part_loses_nothing_of_the_rest() -> None:
    steps = {"one": ("noting", "one"), "two": ("noting", "two")}
    assert run_steps(steps, Path("gpu.json"), device="card") == 0
    assert run_steps({"two": steps["two"]}, Path("gpu.json"), device="card", again=True) == 0
    assert [*record()["steps"]] == ["one", "two"]
    assert ran() == ["one", "two", "two"]


def test_what_takes_too_long_is_ended_and_the_rest_left_for_the_next_time() -> None:
    steps = {"one": ("noting", "one"), "two": ("endless", "two"), "three": ("noting", "three")}
    start = time.monotonic()
    assert run_steps(steps, Path("gpu.json"), device="card", seconds=4) == 1
    assert time.monotonic() - start < 60
    assert ran() == ["one", "two"]
    found = record()["steps"]
    assert found["one"]["passed"]
    assert (found["two"]["passed"], found["two"]["status"]) == (False, "out of time")
    steps["two"] = ("noting", "two")
    assert run_steps(steps, Path("gpu.json"), device="card") == 0
    assert ran() == ["two", "three"]


def test_every_step_is_a_module_with_arguments_that_it_takes() -> None:
    for name, (module, *arguments) in STEPS.items():
        if module == "pytest":
            continue
        imported = import_module(module)
        given = [argument.removeprefix("--") for argument in arguments if argument.startswith("--")]
        assert not given or set(given) <= signature(imported.main).parameters.keys(), name


def test_a_machine_without_a_gpu_is_told_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert capsys.readouterr().err == "expected a machine with a CUDA GPU, got none that torch sees\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.main(only=["tests", "nothing"]) == 2
    assert "expected `only` to name some of tests, maxsim" in capsys.readouterr().err
