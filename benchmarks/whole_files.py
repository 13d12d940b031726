"""What does it cost that files are whole, and are known by their bytes? ``python -m benchmarks.whole_files``.

Two questions. How long does our checkpoint take to write and to read, as a multiple of Lightning's own, which neither
forces it to the disk nor looks at its content? And how long does a command look at the pictures of a data set of the
size of C-GQA: when it reads all of them for the first time, and later, when none was touched?
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from benchmarks.measure import time_in_turn, write_results
from czsl_heads.data import CompositionDataset
from czsl_heads.data.digest import Pictures, look_at_pictures
from czsl_heads.training.checkpoints import WholeCheckpoints

SEED = 0
PICTURES = 39_298  # C-GQA's


def main(rounds: int = 5, megabytes: int = 100, pictures: int = PICTURES, kilobytes: int = 20) -> None:
    """Time checkpoints and looks at pictures.

    Args:
        rounds: Rounds of timing.
        megabytes: Size of the checkpoint.
        pictures: How many files are looked at.
        kilobytes: Size of each.
    """
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = _checkpoints(Path(folder), rounds, megabytes)
        looks = _looks(Path(folder), rounds, pictures, kilobytes)
    content = {"megabytes": megabytes, "checkpoints": checkpoints, "looks": looks}
    write_results("whole_files", "What does it cost that files are whole, and are known by their bytes?", SEED, content)


def _checkpoints(folder: Path, rounds: int, megabytes: int) -> dict[str, float]:
    """Times of ours over those of Lightning's."""
    generator = torch.Generator().manual_seed(SEED)
    parts = [torch.randn(25, 10_000, generator=generator) for _ in range(megabytes)]
    checkpoint = {"epoch": 3, "state_dict": {f"part{number}": part for number, part in enumerate(parts)}}
    ours, lightning = WholeCheckpoints(), TorchCheckpointIO()
    paths = folder / "ours.ckpt", folder / "lightning.ckpt"

    write = {
        "ours": lambda: ours.save_checkpoint(checkpoint, paths[0]),
        "lightning": lambda: lightning.save_checkpoint(checkpoint, str(paths[1])),
    }
    read = {
        "ours": lambda: ours.load_checkpoint(paths[0]),
        "lightning": lambda: lightning.load_checkpoint(str(paths[1]), weights_only=True),
    }
    found = {}
    for name, rivals in (("write", write), ("read", read)):
        seconds = time_in_turn(rivals, rounds=rounds)
        found[name] = round(seconds["ours"] / seconds["lightning"], 2)
        print(f"to {name} a checkpoint of {megabytes} MB takes {found[name]} times as long as Lightning's")
    return found


def _looks(folder: Path, rounds: int, pictures: int, kilobytes: int) -> dict[str, float]:
    """Time of a look at pictures that were not touched, over that of one which reads them all."""
    dataset = _files(folder / "pictures", pictures, kilobytes)
    index = folder / "pictures.npz"
    first = look_at_pictures(dataset, "all")
    first.write(index)

    def again() -> None:
        assert look_at_pictures(dataset, "all", Pictures.read(index, first.names)).digest == first.digest

    rivals = {"all": lambda: look_at_pictures(dataset, "all").digest, "again": again}
    seconds = time_in_turn(rivals, rounds=rounds)
    share = round(seconds["again"] / seconds["all"], 3)
    print(f"to look again at {pictures} pictures takes {share} of the time to read them from memory")
    return {"pictures": pictures, "kilobytes": kilobytes, "again_over_all": share, "index_bytes": index.stat().st_size}


def _files(folder: Path, pictures: int, kilobytes: int) -> CompositionDataset:
    rng = np.random.default_rng(SEED)
    folder.mkdir()
    samples = []
    for number in range(pictures):
        name = f"{number:06}.jpg"
        (folder / name).write_bytes(rng.bytes(1000 * kilobytes))
        samples.append(SimpleNamespace(name=name, folder=str(folder)))
    splits: dict[str, Any] = {"train": samples, "val": [], "test": []}
    return cast(CompositionDataset, SimpleNamespace(root=folder.parent, samples=splits))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
