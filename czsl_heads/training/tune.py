"""The weights of the fusion, chosen on validation images from one pass for each seed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from czsl_heads._files import write_json
from czsl_heads.data.layout import CompositionDataset, DataError
from czsl_heads.training.finished import trained_space
from czsl_heads.training.rows import BankPlan, Readout
from czsl_heads.training.train import evaluate_model, recorded_options
from czsl_heads.training.trainer import is_main_process

TUNED = "tune.json"
BETAS = tuple(step / 10 for step in range(11))
GAMMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def tune(
    run: Path, dataset: CompositionDataset, model: str, seeds: list[int], trainer: dict[str, Any]
) -> dict[str, Any]:
    """Score the validation images of a finished training by every beta and gamma, the memory bank being frozen.

    Args:
        run: Folder of the command.
        dataset: Its data set.
        model: Which of its models, by folder; it has a condenser.
        seeds: Which of its seeds; the AUC is averaged over them.
        trainer: Flags of Lightning's Trainer.

    Returns:
        What is also written to ``tune.json`` in ``run``: the ``grid`` of mean validation AUCs (closed world, standard
        protocol), the ``best`` of them, and what the command ``used``. Of equals the smallest gamma, then the largest
        beta is taken: the least machinery.

    Raises:
        ValueError: The data set is not that of the models.
    """
    folders = [run / f"seed{seed}" / model for seed in seeds]
    if dataset.space != trained_space(folders[0]):
        raise DataError(f"{dataset.root}: expected the data set that the models were trained on, got another")
    options = recorded_options(folders[0])
    plan = BankPlan(options.bank.slots)
    weights = [(beta, gamma) for gamma in _with(GAMMAS, options.gamma) for beta in _with(BETAS, options.beta)]
    readouts = {f"{beta} {gamma}": Readout(beta, gamma, plan) for beta, gamma in weights}
    passes = [
        evaluate_model(folder, dataset, readouts, split="val", worlds=("closed",), trainer=trainer).results
        for folder in folders
    ]
    grid = [
        {
            "beta": beta,
            "gamma": gamma,
            "auc": statistics.fmean(results[f"{beta} {gamma}"]["closed"]["standard"].auc for results in passes),
        }
        for beta, gamma in weights
    ]
    best = max(grid, key=lambda point: (point["auc"], -point["gamma"], point["beta"]))
    used = next(point for point in grid if (point["beta"], point["gamma"]) == (options.beta, options.gamma))
    content = {"seeds": seeds, "model": model, "slots": options.bank.slots, "best": best, "used": used, "grid": grid}
    if is_main_process():
        write_json(run / TUNED, content)
    return content


def _with(values: tuple[float, ...], own: float) -> list[float]:
    return sorted({*values, own})
