"""What are caches on disk worth? ``python -m benchmarks.caches PHOTOS``.

On the photographs of a shop (``images.csv`` and ``images/``; 2,640 JPEGs of 224 pixels): images a second of one pass by
our data set without and with packed pictures, and by torchvision's ``ImageFolder`` with the same transform, for
training (augmented) and for evaluation, with no worker and with two. And the time of an epoch with its validation, of
a frozen ViT-B/32 of random weights under CSP, without and with packed pictures and tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.measure import time_in_turn, write_results
from czsl_heads.data import CompositionDataset, import_dataset, read_dataset, split_dataset
from czsl_heads.encoders.transforms import Preprocess
from czsl_heads.models.recipe import Recipe, build
from czsl_heads.training.options import load_options
from czsl_heads.training.stage import Stage
from czsl_heads.training.trainer import fitting_trainer, quiet

SEED = 0


def main(photos: Path, rounds: int = 3, images: int = 96) -> None:
    """Time passes over pictures, and epochs.

    Args:
        photos: Folder of images.csv and images/.
        rounds: Rounds of timing.
        images: Training images of the epochs.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        import_dataset(photos / "images.csv", root / "shop", link=True)
        split_dataset(root / "shop", seed=SEED)
        dataset = read_dataset(root / "shop")
        passes = _passes(dataset, root, rounds)
        epochs = _epochs(dataset, root, rounds, images)
    write_results("caches", "What are caches on disk worth?", SEED, {"passes": passes, "epochs": epochs})


def _passes(dataset: CompositionDataset, root: Path, rounds: int) -> list[dict[str, Any]]:
    """Images a second of each way to read the training pictures."""
    _write_folders(dataset, root / "folders")
    cached = replace(dataset, cache_dir=root / "cache")
    found = []
    for train in (False, True):
        transform = Preprocess((224, 224)).transform(train=train)
        ways = {
            "ImageFolder": ImageFolder(str(root / "folders"), transform),
            "ours": dataset.images("train", transform, seed=SEED),
            "ours, packed": cached.images("train", transform, seed=SEED),
        }
        for workers in (0, 2):
            rivals = {name: _reader(images, workers) for name, images in ways.items()}
            seconds = time_in_turn(rivals, rounds=rounds)
            speed = {name: len(dataset.samples["train"]) / value for name, value in seconds.items()}
            times = {name: round(value / speed["ImageFolder"], 2) for name, value in speed.items()}
            print(f"{'training' if train else 'evaluation'}, {workers} workers: times ImageFolder's speed {times}")
            rounded = {name: round(value) for name, value in speed.items()}
            found.append(
                {"train": train, "workers": workers, "images_per_second": rounded, "times_image_folder": times}
            )
    return found


def _reader(images: Any, workers: int) -> Callable[[], object]:
    loader = DataLoader(images, 64, num_workers=workers)
    return lambda: [len(batch) for batch, _ in loader]


def _write_folders(dataset: CompositionDataset, folder: Path) -> None:
    for number, sample in enumerate(dataset.samples["train"]):
        target = folder / f"{sample.column:03}" / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(sample.path.resolve())


def _epochs(dataset: CompositionDataset, root: Path, rounds: int, images: int) -> dict[str, float]:
    """Seconds of an epoch and its validation, as multiples of those without caches."""
    few = {name: group[:: max(1, len(group) * 2 // images)] for name, group in dataset.samples.items()}
    few["train"] = dataset.samples["train"][:: max(1, len(dataset.samples["train"]) // images)]
    plain = replace(dataset, samples=few)
    ways = {"without": plain, "with": replace(plain, cache_dir=root / "cache")}
    rivals = {name: _fit(each, root / name) for name, each in ways.items()}
    seconds = time_in_turn(rivals, rounds=rounds)
    share = round(seconds["with"] / seconds["without"], 2)
    print(f"an epoch of CSP on a frozen ViT-B/32 with caches takes {share} of the time without")
    counts = {f"{name}_images": len(few[name]) for name in ("train", "val")}
    return {"share_of_time": share, **counts}


def _fit(dataset: CompositionDataset, folder: Path) -> Callable[[], object]:
    options, _ = load_options("csp", "mit-states", {"epochs": 1, "batch_size": 32, "workers": 0})

    def fit() -> None:
        torch.manual_seed(SEED)
        stage = Stage(build(Recipe("csp", "ViT-B-32"), dataset.space), dataset, options, seed=SEED)
        with quiet():
            flags = {"accelerator": "cpu", "enable_progress_bar": False}
            trainer = fitting_trainer(folder, [], epochs=1, batches=999, accumulate=1, flags=flags)
            trainer.fit(stage)

    return fit


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
