"""Table 6 of the SAC paper for one method: without and with Sparse Alignment, same seeds, same budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from baselines.options import Config
from baselines.train import build, train_baseline
from czsl_heads._files import write_json
from czsl_heads.data.layout import CompositionDataset, read_dataset
from czsl_heads.data.shapes import shapes_space
from czsl_heads.training.ablate import environment
from czsl_heads.training.evaluate import PROTOCOLS
from czsl_heads.training.folder import CONFIG, open_folder
from czsl_heads.training.summary import SUMMARY, paired_difference, summary_of
from czsl_heads.training.trainer import is_main_process

RESULTS = "results.json"
ROWS = {"cls": "as published", "max": "+ Sparse Alignment", "topk": "+ Sparse Alignment, mean of the {k} best"}


def run_ablation(out: Path, config: Config) -> dict[str, Any]:
    """Train and test all rows over all seeds, and write ``results.json``.

    Finished runs in ``out`` are kept, an interrupted one is resumed: calling again with the same settings completes
    the folder, and with more seeds extends it.

    Returns:
        The content of ``results.json``.

    Raises:
        TypeError, ValueError, OSError: An argument is wrong, or ``out`` is of another comparison; nothing is written.
        KeyboardInterrupt: Interrupted; calling again resumes.
    """
    if not (out / CONFIG).exists():
        _rehearse(config)
    dataset = open_folder(out, config)
    records: dict[str, list[dict[str, Any]]] = {align: [] for align in ROWS}
    for seed in config.seeds:
        for align, name in ROWS.items():
            if is_main_process():
                print(f"seed {seed}, {config.method}, {_named(name, config)}", file=sys.stderr, flush=True)
            records[align].append(train_baseline(out / f"seed{seed}" / align, dataset, config, align, seed))
    results = {
        "config": config.as_dict(),
        "sources": config.sources,
        "environment": environment(),
        "data": _counts(dataset),
        "rows": [_row(align, _named(name, config), records[align]) for align, name in ROWS.items()],
        "comparisons": [_compared(align, records) for align in ROWS if align != "cls"],
    }
    return write_json(out / RESULTS, results) if is_main_process() else results


@torch.no_grad()
def _rehearse(config: Config) -> None:
    space = read_dataset(config.data).space if config.shapes is None else shapes_space()
    model = build(config, space, "topk").eval()
    size = model.encoder.image_size
    model.scores(torch.zeros(1, 3, *((size, size) if isinstance(size, int) else size)), space.pairs[:1])


def _named(name: str, config: Config) -> str:
    return name.format(k=config.baseline.topk)


def _counts(dataset: CompositionDataset) -> dict[str, Any]:
    return {
        "pairs": {name: len(pairs) for name, pairs in dataset.split_pairs.items()},
        "images": {name: len(samples) for name, samples in dataset.samples.items()},
    }


def _row(align: str, name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    summary = summary_of([record["test"] for record in records])["closed"]
    learned = records[0]["trainable_parameters"]
    return {"align": align, "name": name, "trainable_parameters": learned, "summary": summary, "runs": records}


def _compared(align: str, records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Differences to the published method, seed by seed, of every number."""

    def values(row: str, protocol: str, name: str) -> list[float | None]:
        return [record["test"]["closed"][protocol][name] for record in records[row]]

    differences = {
        protocol: {
            name: paired_difference(values(align, protocol, name), values("cls", protocol, name)) for name in SUMMARY
        }
        for protocol in PROTOCOLS
    }
    return {"row": align, "against": "cls", "differences": differences}
