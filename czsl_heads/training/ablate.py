"""The ablation of the SAC paper (its Table 4), row by row, on one data set."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from czsl_heads._files import write_json
from czsl_heads.data.layout import CompositionDataset
from czsl_heads.heads.sparse_align import Reduce
from czsl_heads.training.align import PROTOCOLS, WORLDS
from czsl_heads.training.config import AblationConfig
from czsl_heads.training.folder import open_folder
from czsl_heads.training.run import is_main_process, train_align

RESULTS = "results.json"
SUMMARY = ("seen", "unseen", "harmonic_mean", "auc", "attr_accuracy", "obj_accuracy")


@dataclass(frozen=True)
class Row:
    """A row of the table: its number there, its name, and the reduction of its alignment head."""

    number: int
    name: str
    reduce: Reduce

    @property
    def folder(self) -> str:
        return f"row{self.number}-{self.reduce}"


ROWS = (Row(1, "[CLS] baseline", "cls"), Row(2, "+ Sparse Alignment", "max"))


def run_ablation(out: Path, config: AblationConfig) -> dict[str, Any]:
    """Train and test all rows over all seeds and write ``results.json``.

    Finished runs in ``out`` are kept, an interrupted one is resumed: calling again with the same settings completes
    the folder, and with more seeds extends it.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError, OSError: As :func:`czsl_heads.training.folder.open_folder`, before anything is written.
        KeyboardInterrupt: Interrupted; calling again resumes.
    """
    dataset = open_folder(out, config)
    records: dict[int, list[dict[str, Any]]] = {row.number: [] for row in ROWS}
    for seed in config.seeds:
        for row in ROWS:
            if is_main_process():
                print(f"row {row.number} ({row.name}), seed {seed}", file=sys.stderr, flush=True)
            records[row.number].append(
                train_align(
                    out / f"seed{seed}" / row.folder,
                    dataset,
                    config.options,
                    encoder=config.encoder,
                    reduce=row.reduce,
                    seed=seed,
                    trainer=config.trainer,
                )
            )
    results = {
        "config": asdict(config),
        "environment": environment(),
        "data": _describe(dataset),
        "rows": [_row_results(row, records[row.number]) for row in ROWS],
    }
    if is_main_process():
        results = write_json(out / RESULTS, results)
    return results


def _describe(dataset: CompositionDataset) -> dict[str, Any]:
    return {
        "attributes": len(dataset.space.attributes),
        "objects": len(dataset.space.objects),
        "pairs": {name: len(pairs) for name, pairs in dataset.split_pairs.items()},
        "images": {name: len(samples) for name, samples in dataset.samples.items()},
    }


def environment() -> dict[str, Any]:
    """Hardware and versions, for a results file."""
    packages = ("czsl-heads", "torch", "open_clip_torch", "lightning", "torchmetrics", "numpy")
    return {
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _row_results(row: Row, records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "number": row.number,
        "name": row.name,
        "reduce": row.reduce,
        "trainable_parameters": records[0]["trainable_parameters"],
        "summary": dict(_summaries(records)),
        "runs": records,
    }


def _summaries(records: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Mean and sample standard deviation of each number, by world and protocol."""
    for world in WORLDS:
        by_protocol = {}
        for protocol in PROTOCOLS:
            results = [record["test"][world][protocol] for record in records]
            by_protocol[protocol] = {name: _spread([result[name] for result in results]) for name in SUMMARY}
        yield world, by_protocol


def _spread(values: list[float | None]) -> dict[str, float | None]:
    """The deviation is None for one seed; both are None where a number does not exist (no unseen test images, say)."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return {"mean": None, "std": None}
    return {"mean": statistics.fmean(numbers), "std": statistics.stdev(numbers) if len(numbers) > 1 else None}
