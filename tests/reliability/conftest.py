"""A data set of a few pictures, a command that trains on it in a second, and a program that runs it and lets it die."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from czsl_heads.data.layout import write_metadata
from tests.data.animals import row, write_pairs

ROOT = Path(__file__).parents[2]
PAIRS = {
    "train": ["wet dog", "old cat", "old dog"],
    "val": ["wet cat", "old cat"],
    "test": ["wet cat", "old dog"],
}
# Nothing that a run reads: what was logged on the way, and who held the folder.
LOGS = ("logs", "tensorboard", "checkpoints", ".lock", ".holder.json")
TRAIN = [
    *("--method", "sac", "--add", "vac", "--add", "bank", "--encoder", "tiny", "--preset", "shapes"),
    *("--options.epochs", "2", "--options.condense_epochs", "1", "--options.batch_size", "4"),
    *("--options.lora.rank", "1", "--options.workers", "0", "--options.condense_augment", "false"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
]


def write_pictures(root: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for split, pairs in PAIRS.items():
        for pair in pairs * (2 if split == "train" else 1):
            attribute, obj = pair.split()
            name = f"{attribute}_{obj}/{len(rows)}.png"
            path = root / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(path)
            rows.append(row(name, attribute, obj, split))
    for split, pairs in PAIRS.items():
        write_pairs(root, split, pairs)
    write_metadata(root, rows)
    return root


class Server:
    """Runs commands in children of a process that has imported everything."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            text=True,
        )

    def __call__(self, *arguments: object, **request: object) -> dict:
        self.ask(*arguments, **request)
        return self.answer()

    def ask(self, *arguments: object, **request: object) -> None:
        """Start a command, whose answer is taken later."""
        request["arguments"] = [str(each) for each in arguments]
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(30)


@pytest.fixture(scope="session")
def czsl(pictures, tmp_path_factory):
    """Runs ``czsl`` with arguments; gives its status, what it said, and which file operations it came to."""
    server = Server()
    out = tmp_path_factory.mktemp("warm") / "out"
    assert server("train", "--data", pictures, "--out", out, *TRAIN, here=True)["status"] == 0
    yield server
    server.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A data set of ten pictures; no test may change it."""
    return write_pictures(tmp_path_factory.mktemp("reliability") / "pictures")


def content(out: Path) -> dict[str, bytes]:
    """Every file of a run that is read again, by its name below the folder."""
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    return {str(name): (out / name).read_bytes() for name in files if not set(name.parts) & set(LOGS)}


def whole_run(czsl, pictures: Path, out: Path) -> tuple[Path, dict[str, bytes], list[str]]:
    """A run that nothing happens to: its folder, its files, and the changes that it makes there, in order."""
    answer = czsl("train", "--data", pictures, "--out", out, *TRAIN, roots=[str(out)])
    assert answer["status"] == 0, answer["said"]
    return out, content(out), answer["seen"]
