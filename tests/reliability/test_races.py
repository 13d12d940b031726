"""Two processes on one folder, in an order that is forced: one of them works, the other one says who does."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from czsl_heads.data import make_shapes, read_dataset
from czsl_heads.models.saved import CONFIG, RECORD, RESULTS
from czsl_heads.training import holder
from czsl_heads.training.holder import HOLDER, LOCK, FolderBusyError, Holder
from tests.reliability.conftest import ROOT, TRAIN, Server, content, whole_run


@pytest.fixture(scope="module")
def other():
    """A second program, whose command goes on while the first one runs another."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(czsl, pictures, tmp_path_factory):
    return whole_run(czsl, pictures, tmp_path_factory.mktemp("races") / "out")


def wait_for(path: Path, seconds: float = 60) -> str:
    for _ in range(int(seconds / 0.01)):
        if path.exists() and path.read_text(encoding="utf-8"):
            return path.read_text(encoding="utf-8")
        time.sleep(0.01)
    raise TimeoutError(path)


def number_of(changes: list[str], start: str, place: str, which: int = 0) -> int:
    """The number of a change of a kind at a place; the names of files that are not whole say nothing."""
    found = [at for at, change in enumerate(changes, 1) if change.startswith(f"{start} ") and place in change]
    return found[which]


@pytest.mark.parametrize(
    ("start", "place", "which"),
    [("os.rename", "out/.unfinished", 1), ("os.mkdir", "seed0/max/checkpoints", 0), ("os.rename", "seed0/vac/", -1)],
    ids=["claimed", "in training", "before its record"],
)
def test_a_second_command_says_who_holds_the_folder(czsl, other, pictures, whole, tmp_path, start, place, which):
    out, expected, changes = whole
    shutil.rmtree(out, ignore_errors=True)
    command = ("train", "--data", pictures, "--out", out, *TRAIN)
    at = number_of(changes, start, place, which)
    gate = [str(tmp_path / "reached"), str(tmp_path / "go")]
    other.ask(*command, roots=[str(out)], at=at, how="wait", gate=gate)
    pid = wait_for(tmp_path / "reached")

    answer = czsl(*command)
    assert answer["status"] == 1
    who = rf"held by process {pid} on {re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    last = answer["said"].strip().splitlines()[-1]
    assert last.startswith(f"czsl train: expected `out` that no other command works on, got {out}, which is ")
    assert re.search(who, last)

    (tmp_path / "go").touch()
    answer = other.answer()
    assert answer["status"] == 0, answer["said"]
    assert content(out) == expected


def test_of_two_that_start_at_the_same_moment_the_later_one_finds_the_work_done(czsl, other, pictures, whole, tmp_path):
    """Both have looked at an empty place; one claims it and ends before the other one comes to claim it."""
    out, expected, _ = whole
    shutil.rmtree(out)
    command = ("train", "--data", pictures, "--out", out, *TRAIN)
    gate = [str(tmp_path / "reached"), str(tmp_path / "go")]
    other.ask(*command, roots=[str(out)], at=1, how="wait", gate=gate)
    wait_for(tmp_path / "reached")
    assert czsl(*command)["status"] == 0
    (tmp_path / "go").touch()
    answer = other.answer()
    assert answer["status"] == 0, answer["said"]
    assert "model max" in answer["said"]
    assert content(out) == expected
    assert not (out / "seed0/max/logs/version_1").exists()  # nothing was trained twice


def test_of_two_commands_with_other_settings_the_later_one_is_refused(czsl, other, pictures, whole, tmp_path):
    out, expected, _ = whole
    shutil.rmtree(out)
    command = ("train", "--data", pictures, "--out", out, *TRAIN)
    gate = [str(tmp_path / "reached"), str(tmp_path / "go")]
    other.ask(*command, "--options.alpha", "0.25", roots=[str(out)], at=1, how="wait", gate=gate)
    wait_for(tmp_path / "reached")
    assert czsl(*command)["status"] == 0
    (tmp_path / "go").touch()
    answer = other.answer()
    assert answer["status"] == 1
    assert "whose options.alpha is" in answer["said"].strip().splitlines()[-1]
    assert content(out) == expected


def test_a_reader_beside_a_command_sees_a_whole_run(czsl, other, pictures, whole, tmp_path):
    """An evaluation while the same command is given again, which changes nothing."""
    out, _, _ = whole
    command = ("train", "--data", pictures, "--out", out, *TRAIN)
    gate = [str(tmp_path / "reached"), str(tmp_path / "go")]
    other.ask(*command, roots=[str(out)], at=6, how="wait", gate=gate)
    wait_for(tmp_path / "reached")
    assert czsl("evaluate", out)["status"] == 0
    (tmp_path / "go").touch()
    assert other.answer()["status"] == 0


def test_a_lock_of_a_dead_process_is_taken_over_though_its_workers_live_on(tmp_path):
    """A child of the holder has the lock, too, until it notices that it is alone."""
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from czsl_heads.training.holder import Holder\n"
        "holder = Holder(Path(sys.argv[1]))\n"
        "holder.take()\n"
        "if os.fork() == 0:\n"
        "    time.sleep(3)\n"
        "    os._exit(0)\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    with process:
        assert process.stdout.readline() == "held\n"
        with Holder(tmp_path) as mine, pytest.raises(FolderBusyError, match=rf"held by process {process.pid} on"):
            mine.take()
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        with Holder(tmp_path) as mine:
            mine.take()
            assert (tmp_path / HOLDER).exists()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_lock_that_stays_with_a_dead_process_is_told_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(holder, "_PATIENCE", 0.1)
    with Holder(tmp_path) as mine:
        mine.take()
        monkeypatch.setattr(holder, "is_running", lambda pid: False)
        with Holder(tmp_path) as second, pytest.raises(FolderBusyError, match=f"held by process {os.getpid()} on"):
            second.take()
        (tmp_path / HOLDER).write_text("{", encoding="utf-8")
        with Holder(tmp_path) as second, pytest.raises(FolderBusyError, match=r"which is held by another process$"):
            second.take()


def test_a_folder_that_was_killed_before_it_was_claimed_is_empty(czsl, pictures, whole):
    out, expected, changes = whole
    shutil.rmtree(out)
    command = ("train", "--data", pictures, "--out", out, *TRAIN)
    at = number_of(changes, "os.rename", "out/.unfinished", 1)
    czsl(*command, roots=[str(out)], at=at, how="kill")
    assert not (out / CONFIG).exists()
    assert {path.name for path in out.iterdir()} > {LOCK, HOLDER}
    answer = czsl(*command, "--options.alpha", "0.25")  # it is nobody's yet
    assert answer["status"] == 0, answer["said"]
    assert content(out).keys() == expected.keys()
    assert {RESULTS, f"seed0/max/{RECORD}"} <= content(out).keys()


def test_of_two_that_draw_one_data_set_one_is_told(tmp_path):
    small = {"train_per_pair": 1, "val_per_pair": 1, "test_per_pair": 1}
    program = (
        "import sys; from czsl_heads.data import make_shapes\n"
        "make_shapes(sys.argv[1], train_per_pair=1, val_per_pair=1, test_per_pair=1)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "world")]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    states = sorted(process.returncode for process in both)
    assert states in ([0, 0], [0, 1])  # they may have met or not
    if states == [0, 1]:
        assert str(tmp_path / "world") in "".join(said).strip().splitlines()[-1]
    alone = make_shapes(tmp_path / "alone", **small)
    assert len(read_dataset(tmp_path / "world").samples["test"]) == len(read_dataset(alone).samples["test"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "world"]
