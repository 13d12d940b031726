"""A disk that is full, at every write: one line, nothing half written, and the same command goes on with more room."""

import contextlib
import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from czsl_heads._files import save_figure, whole_folder, write_json, write_text
from czsl_heads._sealed import write_sealed
from czsl_heads.data import make_shapes
from czsl_heads.data.digest import Pictures
from czsl_heads.data.importing import import_dataset
from czsl_heads.data.packed import built_once, new_array
from czsl_heads.models.saved import write_tensors
from czsl_heads.training.checkpoints import WholeCheckpoints
from tests.reliability.conftest import TRAIN, content


@contextlib.contextmanager
def mounted(folder: Path, size: int):
    """A file system of so many kB in a folder; the test is skipped where it may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def unfinished(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(".unfinished*")]


@pytest.mark.parametrize("size", [8, 40, 100, 200, 400, 800, 1200])
def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_where_there_is_room(czsl, pictures, tmp_path, size):
    with mounted(tmp_path / "disk", size) as disk:
        out = disk / "out"
        answer = czsl("train", "--data", pictures, "--out", out, *TRAIN)
        assert answer["status"] == 1, answer["said"]
        assert "Traceback" not in answer["said"], answer["said"]
        last = answer["said"].strip().splitlines()[-1]
        assert last.startswith("czsl train: "), answer["said"]
        assert "No space left on device" in last
        assert str(out) in last
        assert unfinished(disk) == []

        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        answer = czsl("train", "--data", pictures, "--out", out, *TRAIN)
        assert answer["status"] == 0, answer["said"]
        interrupted = content(out)
        shutil.rmtree(out)
        assert czsl("train", "--data", pictures, "--out", out, *TRAIN)["status"] == 0
        assert content(out) == interrupted


def test_a_disk_that_is_full_at_any_file_is_told(czsl, pictures, tmp_path):
    """Where no file system may be mounted, too."""
    out, expected = tmp_path / "out", tmp_path / "expected"
    command = ("train", "--data", pictures, "--out")
    answer = czsl(*command, expected, *TRAIN, roots=[str(expected)])
    files = [at for at, change in enumerate(answer["seen"], 1) if change.startswith("open ")]
    assert len(files) > 20
    for at in files:
        shutil.rmtree(out, ignore_errors=True)
        answer = czsl(*command, out, *TRAIN, roots=[str(out)], at=at, how="full")
        assert answer["status"] == 1, answer
        assert "Traceback" not in answer["said"], answer["said"]
        last = answer["said"].strip().splitlines()[-1]
        assert "No space left on device" in last
        assert str(out) in last
        assert unfinished(tmp_path) == []
    answer = czsl(*command, out, *TRAIN)
    assert answer["status"] == 0, answer["said"]
    assert content(out).keys() == content(expected).keys()
    for name in ("seed0/max/model.safetensors", "seed0/vac/model.safetensors", "seed0/vac/training.json"):
        assert content(out)[name] == content(expected)[name]


def figure(path: Path) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4, 4))
    drawn.subplots().plot([1, 2])
    save_figure(drawn, path, dpi=400)


def found(path: Path) -> None:
    names = [str(number) for number in range(5000)]
    rows = torch.randint(0, 255, (5000, 16), dtype=torch.uint8).numpy()
    Pictures("all", names, torch.zeros(5000, 3, dtype=torch.long).numpy(), rows).write(path)


def folder_of_text(path: Path) -> None:
    with whole_folder(path) as building:
        (building / "text").write_text("x" * 200_000, encoding="utf-8")


def imported(path: Path) -> None:
    source = path.parents[1] / "source"
    import_dataset(source, path, copy=True)


WRITERS = {
    "text": lambda path: write_text(path, "x" * 200_000),
    "json": lambda path: write_json(path, list(range(100_000))),
    "sealed": lambda path: write_sealed(path, {"numbers": list(range(100_000))}),
    "tensors": lambda path: write_tensors(path, {"weight": torch.zeros(50_000)}),
    "checkpoint": lambda path: WholeCheckpoints().save_checkpoint({"state_dict": torch.zeros(50_000)}, path),
    "figure": figure,
    "pictures": found,
    "array": lambda path: built_once(path.parent, f"{path.name}.npy", lambda to: new_array(to, "u1", (200_000,))),
    "folder": folder_of_text,
    "shapes": lambda path: make_shapes(path, train_per_pair=1, val_per_pair=1, test_per_pair=1),
    "import": imported,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_writer_names_its_file_and_leaves_the_old_one(tmp_path, kind):
    (tmp_path / "source" / "ripe_apple").mkdir(parents=True)
    from PIL import Image

    Image.effect_noise((400, 400), 90).save(tmp_path / "source" / "ripe_apple" / "1.png")
    with mounted(tmp_path / "disk", 60) as disk:
        path = disk / "file.png" if kind == "figure" else disk / "file"
        with pytest.raises(OSError, match="No space left on device") as raised:
            WRITERS[kind](path)
        assert str(disk) in str(raised.value)
        assert raised.value.errno in (errno.ENOSPC, None)
        left = {each.name for each in disk.iterdir()} - {"file.npy.lock"}
        assert left == set()


def test_a_file_that_does_not_fit_leaves_the_one_that_was_there(tmp_path):
    with mounted(tmp_path / "disk", 60) as disk:
        write_text(disk / "file", "old")
        with pytest.raises(OSError, match="file"):
            write_text(disk / "file", "x" * 200_000)
        assert (disk / "file").read_text(encoding="utf-8") == "old"
        assert os.listdir(disk) == ["file"]
