"""Is the stream of images faster than what eats it? ``python -m benchmarks.loader`` (two minutes on a GPU).

JPEGs of 500 x 375 pixels are drawn: smooth colours under noise, so that a file is as large as a photograph's. They
are read as ``czsl bench --loader true`` reads them, from files and decoded once, with more and more workers, beside a
ViT-B/32 of random weights, which encodes (evaluation) or runs forward and backward with LoRA (training); on CUDA also
beside a ViT-L/14, in float32 and under bfloat16 autocast.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import write_results
from czsl_heads.data import read_dataset
from czsl_heads.training.loader_rates import Precision, loader_rates

SEED = 0
QUESTION = "Is the stream of images faster than what eats it?"
PAIRS = [("old", "car"), ("new", "car"), ("old", "house"), ("new", "house")]
SIZE = (500, 375)


def draw_dataset(root: Path, images: int) -> Path:
    """A data set of MIT-States' layout, of so many training images."""
    (root / "images").mkdir(parents=True)
    (root / "compositional-split-natural").mkdir()
    lines = "".join(f"{attribute} {obj}\n" for attribute, obj in PAIRS)
    for split in ("train", "val", "test"):
        (root / "compositional-split-natural" / f"{split}_pairs.txt").write_text(lines, encoding="utf-8")

    def draw(number: int) -> dict[str, Any]:
        attribute, obj = PAIRS[number % len(PAIRS)]
        name = f"{attribute} {obj}/{number}.jpg"
        _draw(root / "images" / name, number)
        split = ("val", "test")[number] if number < 2 else "train"
        return {"image": name, "attr": attribute, "obj": obj, "set": split}

    for attribute, obj in PAIRS:
        (root / "images" / f"{attribute} {obj}").mkdir()
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(draw, range(images + 2)))
    torch.save(rows, root / "metadata_compositional-split-natural.t7")
    return root


def _draw(path: Path, number: int) -> None:
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        SIZE, Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, dtype=np.int16) + generator.integers(-10, 11, (SIZE[1], SIZE[0], 3), dtype=np.int16)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def main(
    encoders: list[str] | None = None,
    images: int = 4000,
    batch_size: int = 64,
    workers: list[int] | None = None,
    name: str = "loader",
) -> None:
    """Measure, print and write ``results/NAME-DEVICE.json``.

    Args:
        encoders: Names that ``wrap`` takes; default: ViT-B/32, on CUDA also ViT-L/14, with random weights.
        images: How many are drawn, and read in each pass.
        batch_size: Images at once.
        workers: Processes that load; default: none, 1, and doubled up to what presets take.
        name: Of the results.
    """
    logging.disable(logging.WARNING)  # the weights are random, which is what is wanted
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = ["ViT-L-14-quickgelu"] if device == "cuda" else []  # a batch takes minutes on a CPU
    tried = encoders or ["ViT-B-32-quickgelu", *large]
    precisions: tuple[Precision, ...] = ("32-true", "bf16-mixed") if device == "cuda" else ("32-true",)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        root = draw_dataset(Path(folder) / "drawn", images)
        kilobytes = sum(path.stat().st_size for path in root.rglob("*.jpg")) / images / 1000
        dataset = read_dataset(root)
        for precision in precisions:
            options: dict[str, Any] = {"batch_size": batch_size, "most_images": images, "precision": precision}
            options["workers"] = workers
            found = loader_rates(tried, dataset, Path(folder) / precision, device=device, **options)
            rows.extend({"precision": precision, **row} for row in found)
            for row in found:
                print(row, flush=True)
    content = {"pixels": SIZE, "kilobytes_per_image": round(kilobytes), "images": images, "batch": batch_size}
    write_results(f"{name}-{device}", QUESTION, SEED, {**content, "rows": rows})


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
