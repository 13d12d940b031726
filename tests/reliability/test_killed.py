"""A run that is killed, at every change that it makes to its folder, and given again ends in the same bytes."""

import shutil

import pytest

from czsl_heads.models.saved import RECORD, RESULTS
from tests.reliability.conftest import TRAIN, content, whole_run
from tests.reliability.server import KILLED


@pytest.fixture(scope="module")
def whole(czsl, pictures, tmp_path_factory):
    return whole_run(czsl, pictures, tmp_path_factory.mktemp("killed") / "out")


def killed_and_resumed(czsl, pictures, whole, at: int) -> None:
    out, expected, changes = whole
    shutil.rmtree(out)
    elsewhere = out.parent / "tmp"  # nothing may be left in the folder of temporary files
    elsewhere.mkdir(exist_ok=True)
    command = ("train", "--data", pictures, "--out", out, *TRAIN)
    answer = czsl(*command, roots=[str(out)], at=at, how="kill", tmpdir=str(elsewhere))
    assert answer["status"] == KILLED, changes[at - 1]

    answer = czsl(*command, tmpdir=str(elsewhere))
    assert answer["status"] == 0, f"{changes[at - 1]}: {answer['said']}"
    assert content(out) == expected, changes[at - 1]
    assert not list(out.parent.rglob(".unfinished*")), changes[at - 1]
    assert not [*elsewhere.iterdir()], changes[at - 1]


def test_every_file_of_a_run_appears_by_being_renamed(whole):
    _, files, changes = whole
    renamed = [change for change in changes if change.startswith("os.rename")]
    checkpoints = len([change for change in renamed if "/checkpoints/" in change])
    assert len(renamed) == len(files) + checkpoints + 1  # and once more who holds the folder
    assert checkpoints >= 4
    assert {f"seed0/max/{RECORD}", f"seed0/vac/{RECORD}", RESULTS} <= files.keys()


def test_a_run_killed_at_any_change_ends_in_the_same_bytes(czsl, pictures, whole):
    changes = whole[2]
    assert {change.split()[0] for change in changes} >= {"open", "os.rename", "os.mkdir"}
    for at in range(1, len(changes) + 1):
        killed_and_resumed(czsl, pictures, whole, at)


@pytest.mark.parametrize("times", [12])
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(czsl, pictures, whole, times):
    """Each attempt dies at its own next rename, so that what an attempt left is what the next one finds."""
    out, expected, _ = whole
    shutil.rmtree(out)
    command = ("train", "--data", pictures, "--out", out, *TRAIN)
    for attempt in range(times):
        answer = czsl(*command, roots=[str(out)], at=14 + 3 * attempt, how="kill")
        if answer["status"] == 0:
            break
        assert answer["status"] == KILLED, answer["said"]
    assert czsl(*command)["status"] == 0
    assert content(out) == expected
