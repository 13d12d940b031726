"""Table 6 of the SAC paper for one method: without and with Sparse Alignment, same seeds, same budget; and more."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from baselines.options import Config
from baselines.rows import COMPARISONS, ROWS, rows_with
from baselines.train import build, check_learning, train_row
from czsl_heads._files import write_json
from czsl_heads.data.layout import CompositionDataset, read_dataset
from czsl_heads.data.shapes import shapes_space
from czsl_heads.training.ablate import environment
from czsl_heads.training.evaluate import PROTOCOLS
from czsl_heads.training.folder import CONFIG, open_folder
from czsl_heads.training.summary import SUMMARY, paired_difference, summary_of
from czsl_heads.training.trainer import is_main_process

RESULTS = "results.json"


def run_ablation(out: Path, config: Config) -> dict[str, Any]:
    """Train and test all rows over all seeds, and write ``results.json``.

    Finished runs in ``out`` are kept, an interrupted one is resumed: calling again with the same settings completes
    the folder, and with more seeds or additions extends it.

    Returns:
        The content of ``results.json``.

    Raises:
        TypeError, ValueError, OSError: An argument is wrong, or ``out`` is of another comparison; nothing is written.
        KeyboardInterrupt: Interrupted; calling again resumes.
    """
    if not (out / CONFIG).exists():
        _rehearse(config)
    dataset = open_folder(out, config)
    names = _names(out, config)
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in config.seeds:
        for name in names:
            if is_main_process():
                print(f"seed {seed}, {config.method}, {name}: {_title(name, config)}", file=sys.stderr, flush=True)
            records[name].append(train_row(out / f"seed{seed}", dataset, config, name, seed))
    results = {
        "config": config.as_dict(),
        "sources": config.sources,
        "environment": environment(),
        "data": _counts(dataset),
        "rows": [_row(name, _title(name, config), records[name]) for name in names],
        "comparisons": [_compared(*both, records) for both in COMPARISONS if {*both} <= records.keys()],
    }
    return write_json(out / RESULTS, results) if is_main_process() else results


@torch.no_grad()
def _rehearse(config: Config) -> None:
    """Build every kind of row once and score with it, so that a wrong option is told before anything is written."""
    dataset = read_dataset(config.data) if config.shapes is None else None
    space = shapes_space() if dataset is None else dataset.space
    for name in ("topk", *(name for name in rows_with(config.add) if ROWS[name].base)):
        model = build(config, space, name).eval()
        if ROWS[name].base is None:
            check_learning(model, config.baseline, config.method)
        size = model.encoder.image_size
        pairs = space.pairs if ROWS[name].remembers else space.pairs[:1]
        model.scores(torch.zeros(1, 3, *((size, size) if isinstance(size, int) else size)), pairs)
    per_pair = 0 if config.shapes is None else config.shapes.train_per_pair
    images = per_pair * int(space.seen_mask.sum()) if dataset is None else len(dataset.samples["train"])
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if normed and config.baseline.epochs and images % config.baseline.batch_size == 1:
        size = config.baseline.batch_size
        raise ValueError(
            f"expected `options.batch_size` that leaves no batch of one of {images} images, for batch norm, got {size}"
        )


def _names(out: Path, config: Config) -> list[str]:
    """The rows that were asked for now or before."""
    before = json.loads((out / RESULTS).read_text())["rows"] if (out / RESULTS).exists() else []
    return [name for name in ROWS if name in rows_with(config.add) or name in [row["row"] for row in before]]


def _title(name: str, config: Config) -> str:
    return ROWS[name].title.format(k=config.baseline.topk)


def _counts(dataset: CompositionDataset) -> dict[str, Any]:
    return {
        "pairs": {name: len(pairs) for name, pairs in dataset.split_pairs.items()},
        "images": {name: len(samples) for name, samples in dataset.samples.items()},
    }


def _row(name: str, title: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    summary = summary_of([record["test"] for record in records])["closed"]
    learned = records[0]["trainable_parameters"]
    return {"row": name, "title": title, "trainable_parameters": learned, "summary": summary, "runs": records}


def _compared(row: str, other: str, records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Differences of two rows, seed by seed, of every number."""

    def values(name: str, protocol: str, number: str) -> list[float | None]:
        return [record["test"]["closed"][protocol][number] for record in records[name]]

    differences = {
        protocol: {
            number: paired_difference(values(row, protocol, number), values(other, protocol, number))
            for number in SUMMARY
        }
        for protocol in PROTOCOLS
    }
    return {"row": row, "against": other, "differences": differences}
