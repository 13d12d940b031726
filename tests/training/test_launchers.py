"""Processes that a launcher starts together: torchrun, and SLURM by the variables that it sets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from czsl_heads.training.trainer import check_trainer

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
FLAGS = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
BOTH = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def training(root: Path, out: str, *flags: str) -> list[str]:
    options = ("--options.epochs", "1", "--options.batch_size", "24")
    return ["train", "--method", "csp", "--data", str(root), "--out", out, *options, *FLAGS, *flags]


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=-1, stderr=-1)


def torchrun(folder: Path, *arguments: str) -> tuple[int, str, str]:
    started = start(folder, *TORCHRUN, "-m", "czsl_heads.cli", *arguments)
    out, err = started.communicate(timeout=400)
    return started.returncode, out, err


def slurm(folder: Path, *arguments: str) -> list[tuple[int, str, str]]:
    """What the two tasks of a step said, from the variables that srun gives each."""
    step = {
        "SLURM_JOB_ID": "15407",
        "SLURM_JOB_NAME": "czsl",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1",
    }
    tasks = [{**step, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} for number in range(2)]
    started = [start(folder, "-m", "czsl_heads.cli", *arguments, **variables) for variables in tasks]
    said = [process.communicate(timeout=400) for process in started]
    return [(process.returncode, *words) for process, words in zip(started, said)]


def budgets(folder: Path) -> dict:
    (path,) = folder.glob("seed0/*/training.json")
    return json.loads(path.read_text())["budgets"]


def test_torchrun_and_slurm_train_the_same_model_and_score_it_again(shapes_root: Path, tmp_path: Path) -> None:
    status, out, err = torchrun(tmp_path, *training(shapes_root, "torchrun", *BOTH))
    assert status == 0, ascii(err[-3000:])
    assert err.count("model cls (rows model)") == 1
    assert out.count("wrote results.json") == 1

    tasks = slurm(tmp_path, *training(shapes_root, "slurm", *BOTH))
    assert [status for status, *_ in tasks] == [0, 0], ascii(tasks)
    assert [out.count("wrote results.json") for _, out, _ in tasks] == [1, 0]
    assert budgets(tmp_path / "slurm") == budgets(tmp_path / "torchrun")
    weights = [(tmp_path / name / "seed0/cls/model.safetensors").read_bytes() for name in ("slurm", "torchrun")]
    assert weights[0] == weights[1]

    # Both work on the folder again, and on what it holds.
    status, _, err = torchrun(tmp_path, *training(shapes_root, "torchrun", *BOTH))
    assert status == 0, ascii(err[-3000:])
    scoring = ["evaluate", "torchrun", *FLAGS, *BOTH, "--out", "again.json"]
    status, out, err = torchrun(tmp_path, *scoring)
    assert status == 0, ascii(err[-3000:])
    assert out.count("wrote again.json") == 1
    again = json.loads((tmp_path / "again.json").read_text())
    before = json.loads((tmp_path / "torchrun" / "results.json").read_text())
    assert again["rows"] == before["rows"]


def test_processes_leave_when_the_first_one_refuses_the_command(shapes_root: Path, tmp_path: Path) -> None:
    wrong = ("--options.optimizer.lr", "-1")
    tasks = slurm(tmp_path, *training(shapes_root, "out", *BOTH, *wrong))
    assert [status for status, *_ in tasks] == [1, 1]
    assert not (tmp_path / "out").exists()

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    first, second = slurm(tmp_path, *training(shapes_root, "taken", *BOTH))
    assert (first[0], second[0]) == (1, 1)
    assert "expected `out` to be a new or empty folder" in first[2]
    assert second[2] == ""
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]


def test_devices_that_do_not_make_up_the_processes_are_refused(shapes_root: Path, tmp_path: Path) -> None:
    status, _, err = torchrun(tmp_path, *training(shapes_root, "out", "--trainer.devices", "1"))
    assert status != 0
    assert "`trainer.num_nodes` that make up the 2 processes which were started together, got" in err
    assert not (tmp_path / "out").exists()


def test_several_nodes_ask_for_a_launcher() -> None:
    with pytest.raises(ValueError, match="expected torchrun or srun to start the processes of several nodes"):
        check_trainer({"accelerator": "cpu", "devices": 1, "num_nodes": 2, "strategy": "ddp"})
