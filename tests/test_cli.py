"""The `czsl` command as a user runs it: in a process of its own, in a clean folder."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from czsl_heads.cli import main

FAST = ["--options.epochs=2", "--options.batch_size=48", "--trainer.accelerator=cpu"]


def czsl(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "czsl_heads.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_make_shapes_writes_a_data_set_that_check_accepts(tmp_path: Path) -> None:
    sizes = ["--train_per_pair=1", "--val_per_pair=1", "--test_per_pair=2"]
    made = czsl("make-shapes", "--out", "world", *sizes, "--seed=3", "--imbalance=0.2", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert json.loads((tmp_path / "world" / "shapes.json").read_text())["seed"] == 3
    checked = czsl("check", "world", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "test      48 pairs      96 images (48 of seen pairs)" in checked.stdout
    again = czsl("make-shapes", "--out", "world", cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.strip() == (
        "czsl make-shapes: expected `out` to be a new or empty folder, got world, which holds something"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["world"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["make-shapes", "--out", "w", "--imbalance=3"], 1, "expected `imbalance` to be in [0, 1], got 3"),
        (["check", "nowhere"], 1, "nowhere: expected the folder of a data set, got nothing"),
        (["ablate", "--out", "o", "--data", "nowhere"], 1, "expected the folder of a data set, got nothing"),
        (["ablate", "--out", "o", "--options.epoch=3"], 1, "expected `options` to be one of epochs"),
        (["ablate", "--out", "o", "--encoder=ViT-Z"], 1, "expected `model_or_name`"),
        (
            ["ablate", "--out", "o", "--encoder=RN50"],
            1,
            "expected a vision tower of kind VisionTransformer, got Modified",
        ),
        (["ablate", "--out", "o", "--trainer.accelerator=nope"], 1, "expected `trainer` to hold flags"),
        (["ablate", "--out", "file/o", "--quick"], 1, "expected `out` to be a folder that can be written, got file/o"),
        (["make-shapes", "--out", "file/w"], 1, "expected `out` to be a folder that can be written, got file/w"),
        (["ablate"], 2, "arguments are required: ablate.out"),
        (["train"], 2, "invalid choice"),
        (["ablate", "--out", "o", "--seeds", "many"], 2, "seeds"),
    ],
)
def test_wrong_input_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path,
    arguments: list[str],
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    try:
        returned = main(arguments)
    except SystemExit as stopped:  # the parser's own way
        returned = stopped.code
    complaint = capsys.readouterr().err
    assert returned == status
    assert message in complaint
    assert "Traceback" not in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_ablation_is_resumed_by_the_same_command(tmp_path: Path, shapes_root: Path) -> None:
    command = ["ablate", "--data", str(shapes_root), *FAST]
    whole = czsl(*command, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    for name in ("results.json", "ablation.md", "curves.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 0
    assert "+ Sparse Alignment" in whole.stdout

    process = subprocess.Popen(
        [sys.executable, "-m", "czsl_heads.cli", *command, "--out", "cut"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a shell ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("cut/**/last.ckpt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted; the same command resumes it" in errors
    assert not (tmp_path / "cut" / "results.json").exists()

    resumed = czsl(*command, "--out", "cut", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    results = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("whole", "cut")]
    assert results[0]["rows"] == results[1]["rows"]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["check", "x"]) == 1
    assert "czsl-heads[train]" in capsys.readouterr().err
