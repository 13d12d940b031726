"""Each file of a run damaged in five ways, and the commands that read it: the right line, or the same numbers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reliability.conftest import TRAIN, content

DAMAGES = ("empty", "cut", "flipped", "another", "gone")
FILES = [
    *("config.json", "results.json", "pictures.npz"),
    *(f"seed0/{model}/{name}" for model in ("max", "vac") for name in ("config.json", "model.safetensors")),
    *(f"seed0/{model}/training.json" for model in ("max", "vac")),
]
CHECKPOINTS = [f"seed0/{model}/checkpoints/{name}.ckpt" for model in ("max", "vac") for name in ("best", "last")]


@pytest.fixture(scope="module")
def whole(czsl, pictures, tmp_path_factory):
    """A run, and a copy of its folder to take files from."""
    out = tmp_path_factory.mktemp("damaged") / "out"
    assert czsl("train", "--data", pictures, "--out", out, *TRAIN)["status"] == 0
    copy = out.parent / "copy"
    shutil.copytree(out, copy)
    return out, copy


def damage(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "flipped":
        path.write_bytes(flipped(path))
    else:
        write_another(path)


def flipped(path: Path) -> bytes:
    """A digit of a number is another one, or a bit of a tensor: a file that reads as well as before."""
    whole = bytearray(path.read_bytes())
    at = len(whole) // 2
    if path.suffix == ".json":
        at = [found.start() for found in re.finditer(rb"(?<=[ .])[1-8]", whole)][-1]
        whole[at] += 1
    else:
        whole[at] ^= 0x10
    return bytes(whole)


def write_another(path: Path) -> None:
    """A whole file of the same kind, that lacks something."""
    if path.suffix == ".json":
        found = json.loads(path.read_text(encoding="utf-8"))
        del found[next(iter(found))]
        path.write_text(json.dumps(found), encoding="utf-8")
    elif path.suffix == ".safetensors":
        tensors = load_file(path)
        del tensors[sorted(tensors)[0]]
        save_file(tensors, path)
    elif path.suffix == ".ckpt":
        found = torch.load(path, weights_only=True)
        del found["state_dict"][next(iter(found["state_dict"]))]
        torch.save(found, path)
    else:
        path.write_bytes(b"PK\x05\x06" + bytes(18))  # an archive of nothing


def restore(whole) -> Path:
    out, copy = whole
    shutil.rmtree(out)
    shutil.copytree(copy, out)
    return out


def told(answer: dict, name: str) -> str:
    """The one line that a command ended with; it names the file."""
    assert "Traceback" not in answer["said"], answer["said"]
    lines = answer["said"].strip().splitlines()
    assert lines[-1].startswith("czsl "), answer["said"]
    assert Path(name).name in lines[-1] or str(Path(name).parent) in lines[-1], answer["said"]
    return lines[-1]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, *CHECKPOINTS])
def test_the_same_command_makes_a_damaged_run_whole_or_says_what_is_wrong(czsl, pictures, whole, name, how):
    out = restore(whole)
    expected = content(out)
    damage(out / name, how)
    answer = czsl("train", "--data", pictures, "--out", out, *TRAIN)
    if answer["status"] == 0:
        assert content(out) == expected
        return
    assert answer["status"] == 1
    # Only what says which command it was cannot be made again.
    assert name == "config.json"
    assert how == "gone" or "give the czsl command another `out`" in told(answer, name)


@pytest.fixture(scope="module")
def answers(czsl, pictures, whole):
    """Gives what commands that read a run say of it, with what they wrote."""
    out, _ = whole
    found = out.parent / "found"
    image = pictures / "images" / "old_cat" / "1.png"
    commands = {
        "evaluate": ("evaluate", out, "--out", found / "evaluation.json"),
        "predict": ("predict", image, "--run", out, "--out", found),
        "tune": ("tune", out),
        "report": ("report", out, "--images", 1, "--out", found / "report.html"),
        "gap": ("gap", pictures, "--run", out, "--out", found),
    }

    def ask(command: str) -> tuple[dict, dict[str, bytes]]:
        shutil.rmtree(found, ignore_errors=True)
        found.mkdir()
        (out / "tune.json").unlink(missing_ok=True)
        answer = czsl(*commands[command])
        written = {path.name: path.read_bytes() for path in found.iterdir()}
        if (out / "tune.json").exists():
            written["tune.json"] = (out / "tune.json").read_bytes()
        return answer, written

    return {command: ask(command) for command in commands}, ask


READERS = [(command, how) for command in ("evaluate", "predict", "tune") for how in DAMAGES]
READERS += [("report", "flipped"), ("gap", "flipped")]  # which look at more, and take longer


@pytest.mark.parametrize(("command", "how"), READERS)
@pytest.mark.parametrize("name", FILES)
def test_a_command_on_a_damaged_run_says_what_is_wrong_or_the_same_as_before(whole, answers, command, name, how):
    known, ask = answers
    out = restore(whole)
    damage(out / name, how)
    answer, written = ask(command)
    if answer["status"] == 0:
        assert (answer["said"], written) == (known[command][0]["said"], known[command][1])
        return
    assert answer["status"] == 1
    told(answer, name)


@pytest.mark.parametrize("names", [("best",), ("last",), ("best", "last")])
def test_a_training_goes_on_from_the_last_good_checkpoint(czsl, pictures, whole, names):
    """As a run that was interrupted within its second epoch, one or both of whose checkpoints are damaged."""
    out = restore(whole)
    expected = content(out)
    for path in (out / "seed0/max/training.json", out / "results.json"):
        path.unlink()
    for name in names:
        damage(out / f"seed0/max/checkpoints/{name}.ckpt", "flipped")
    answer = czsl("train", "--data", pictures, "--out", out, *TRAIN)
    assert answer["status"] == 0, answer["said"]
    assert content(out) == expected
    on = "goes on from best.ckpt, the last good one" if names == ("last",) else "the training starts anew"
    assert on in answer["said"]
