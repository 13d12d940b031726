"""Is the stream of images faster than the model that it feeds?"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from czsl_heads._checks import check_choice, check_integer
from czsl_heads._files import write_table
from czsl_heads.adapters.lora import add_lora
from czsl_heads.data.layout import SPLITS, CompositionDataset
from czsl_heads.encoders.wrap import wrap
from czsl_heads.training.loaders import count_workers, eval_loader, train_loader

Precision = Literal["32-true", "bf16-mixed"]
COLUMNS = (
    "use",
    "pictures",
    "workers",
    "loader_images_per_second",
    "encoder",
    "encoder_images_per_second",
    "loader_by_encoder",
)
USES = ("evaluation", "training")
_SECONDS = 2.0  # an encoder is run for at least so long


def loader_rates(
    encoders: Sequence[str],
    dataset: CompositionDataset,
    out: Path,
    *,
    split: str = "train",
    batch_size: int = 64,
    most_images: int = 2000,
    workers: Sequence[int] | None = None,
    precision: Precision = "32-true",
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Images per second that loaders give, beside those that encoders take, in evaluation and in training.

    The loaders are those of ``czsl train`` and ``czsl evaluate``. They read the files, or pictures decoded once (as
    with ``cache_dir``); in training they augment. Batches are copied to the device, from pinned memory on a GPU.
    An encoder gets one batch again and again: in evaluation it encodes all tokens, in training it also runs backward to
    LoRA in its vision tower. ``loader.csv`` in ``out`` has a row for each case.

    Args:
        encoders: Names that :func:`czsl_heads.wrap` takes. The first one's preparation of images is what is loaded.
        dataset: Whose split is read.
        out: Folder for ``loader.csv``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        batch_size: Images at once.
        most_images: Of the split; the first ones.
        workers: Processes that load; default: none, 1, and doubled up to what presets take here.
        precision: As Lightning names it: ``"32-true"`` or ``"bf16-mixed"``.
        device: Where encoders run; default: the GPU if there is one.

    Returns:
        The rows, by :data:`COLUMNS`.

    Raises:
        ValueError: No encoder, an option is out of range or unknown, or the split has no image.
        OSError: ``out`` cannot be written, or an image is broken.
    """
    if not encoders:
        raise ValueError("expected `encoders` to name at least one, got none")
    check_choice("split", split, SPLITS)
    check_choice("precision", precision, ("32-true", "bf16-mixed"))
    check_integer("batch_size", batch_size, 1)
    check_integer("most_images", most_images, 1)
    for number in workers or ():
        check_integer("workers", number, 0)
    if not dataset.samples[split]:
        raise ValueError(f"expected `split` with images, got {split!r} without any")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    few = replace(dataset, samples={**dataset.samples, split: dataset.samples[split][:most_images]})
    preprocess: Any = None
    rates: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys(encoders):
        encoder = wrap(name).to(device)
        preprocess = preprocess or encoder.preprocess
        rates[name] = {use: encoder_rate(encoder, use, batch_size, precision) for use in USES}
        del encoder  # the next one has its memory

    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(dir=out, prefix=".pictures-") as folder:
        ways = {"files": replace(few, cache_dir=None), "decoded once": replace(few, cache_dir=Path(folder))}
        for use in USES:
            transform = preprocess.transform(train=use == "training")
            for pictures, way in ways.items():
                images = way.images(split, transform, seed=0)
                for number in workers or _numbers_of_workers():
                    rate = _loader_rate(images, use, batch_size, number, device)
                    found = {"use": use, "pictures": pictures, "workers": number, "loader_images_per_second": rate}
                    rows.extend(found | _beside(rate, name, each[use]) for name, each in rates.items())
    write_table(rows, COLUMNS, out / "loader.csv")
    return rows


def encoder_rate(encoder: Any, use: str, batch_size: int, precision: Precision) -> int:
    """Images per second of a wrapped CLIP; for ``use="training"`` it gets LoRA."""
    device = encoder.logit_scale.device
    height, width = encoder.vision.image_size
    images = torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    if use == "training":
        add_lora(encoder)
    half: AbstractContextManager[Any] = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")

    def run() -> None:
        with half, torch.set_grad_enabled(use == "training"):
            tokens = encoder.encode_tokens(images)
        if use == "training":
            tokens.float().square().sum().backward()

    run()
    runs, seconds = 0, 0.0
    start = _now(device.type)
    while seconds < _SECONDS:
        run()
        runs += 1
        seconds = _now(device.type) - start
    return round(runs * batch_size / seconds)


def _loader_rate(images: Any, use: str, batch_size: int, workers: int, device: str) -> int:
    """Images per second of a pass, without the batches that workers had prepared before somebody asked for them."""
    if use == "training":
        loader = train_loader(images, batch_size, 0, workers=workers)
    else:
        loader = eval_loader(images, batch_size, workers=workers)
    ahead = min(1 + 2 * workers, len(loader) // 2)
    loaded, start = 0, _now(device)
    for turn, (batch, _) in enumerate(loader, start=1):
        batch.to(device, non_blocking=True)
        loaded += len(batch)
        if turn == ahead:
            loaded, start = 0, _now(device)
    return round(loaded / (_now(device) - start))


def _beside(rate: int, encoder: str, takes: int) -> dict[str, Any]:
    return {"encoder": encoder, "encoder_images_per_second": takes, "loader_by_encoder": round(rate / takes, 2)}


def _numbers_of_workers() -> list[int]:
    most = count_workers(None)
    doubled = [2**power for power in range(int(math.log2(most)) + 1)]
    return [0, *doubled] if doubled[-1] == most else [0, *doubled, most]


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
