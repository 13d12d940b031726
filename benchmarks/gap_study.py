"""Does a smaller gap go with better recognition? ``python -m benchmarks.gap_study --runs [RUN, ...]`` (minutes).

Each run is a folder of ``czsl ablate --gap true --seeds 3`` on the shapes world, of one level of imbalance. Of every
model of that study the gap between the test images and the texts of all pairs is measured, by the vector that the
model compares with its predicted pair, and set beside the exact AUC of the closed world. Correlations are Spearman's,
within a level of imbalance, over all models and seeds. Intervals of 95 % come from a bootstrap over models, whose seeds
stay together. Writes ``results/gap_study.json`` and ``docs/gap_study.png``.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.measure import write_results
from czsl_heads._files import read_json, whole_file
from czsl_heads.data import read_dataset
from czsl_heads.models.gap import gap_reports
from czsl_heads.models.saved import load_model

SEED = 0
DRAWS = 2000
METRICS = (
    *("relative_modality_gap", "l2m", "l2i", "centroid_distance", "alignment", "uniformity", "uniformity_images"),
    *("cross_uniformity", "linear_separability", "effective_rank_images"),
)
COMPARED = {"cls": "cls", "max": "pred", "topk": "read", "logsumexp": "read", "vac": "vac"}
LOSSES = {"no loss for the gap": "none", "CUA": "cua", "CUAXU": "cuaxu"}
Point = dict[str, Any]


def points_of(run: Path) -> list[Point]:
    """Every model and seed of the study of a run, with its AUC and its gap."""
    results = read_json(run / "results.json")
    imbalance = results["config"]["shapes"]["imbalance"]
    dataset = read_dataset(run / "shapes")
    points = []
    for point in results["studies"]["gap"]["points"]:
        for of_seed in point["by_seed"]:
            seed = of_seed["seed"]
            model = load_model(run / f"seed{seed}" / point["model"]).eval()
            report = gap_reports(model, dataset, seed=SEED)[COMPARED[point["value"]]]
            about = {"imbalance": imbalance, "compared": point["value"], "loss": LOSSES[point["series"]], "seed": seed}
            numbers = {name: round(value, 5) for name, value in report.numbers.items()}
            points.append({**about, "auc": of_seed["test"]["closed"]["exact"]["auc"], **numbers})
            print(about, round(points[-1]["auc"], 4), numbers["relative_modality_gap"], flush=True)
    return points


def correlation(points: list[Point], metric: str) -> dict[str, Any]:
    """Spearman's correlation of a metric with the AUC, and its interval over models."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point["compared"], point["loss"]), []).append(point)
    models = [*groups.values()]
    generator = np.random.default_rng(SEED)
    drawn = []
    for _ in range(DRAWS):
        chosen = generator.integers(len(models), size=len(models))
        sample = [point for number in chosen for point in models[number]]
        drawn.append(_spearman(sample, metric))
    low, high = np.nanquantile(drawn, [0.025, 0.975]).tolist()
    return {"rho": round(_spearman(points, metric), 3), "low": round(low, 3), "high": round(high, 3)}


def _spearman(points: list[Point], metric: str) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a draw in which a metric does not vary has no correlation, and is left out
        return float(spearmanr([point[metric] for point in points], [point["auc"] for point in points]).statistic)


def differences(points: list[Point]) -> list[dict[str, Any]]:
    """What each loss changed, against the same model without, mean and deviation over seeds."""
    known = {(p["imbalance"], p["compared"], p["loss"], p["seed"]): p for p in points}
    found = []
    for imbalance, compared, loss in dict.fromkeys((p["imbalance"], p["compared"], p["loss"]) for p in points):
        if loss == "none":
            continue
        row: dict[str, Any] = {"imbalance": imbalance, "compared": compared, "loss": loss}
        seeds = [seed for level, name, kind, seed in known if (level, name, kind) == (imbalance, compared, loss)]
        for metric in ("auc", "relative_modality_gap", "l2m", "linear_separability"):
            changes = []
            for seed in seeds:
                own = known[imbalance, compared, loss, seed][metric]
                changes.append(own - known[imbalance, compared, "none", seed][metric])
            row[metric] = [round(float(np.mean(changes)), 4), round(float(np.std(changes, ddof=1)), 4)]
        found.append(row)
    return found


def plot(points: list[Point], path: Path) -> None:
    """AUC against three metrics, a row for each level of imbalance."""
    from matplotlib.figure import Figure

    shown = ("relative_modality_gap", "l2m", "linear_separability")
    levels = sorted({point["imbalance"] for point in points})
    colours = dict(zip(COMPARED, ("#1f77b4", "#d62728", "#ff7f0e", "#9467bd", "#2ca02c")))
    markers = {"none": "o", "cua": "^", "cuaxu": "s"}
    figure = Figure(figsize=(10, 2.9 * len(levels)), layout="constrained")
    axes = figure.subplots(len(levels), len(shown), squeeze=False)
    for level, row in zip(levels, axes):
        for metric, axis in zip(shown, row):
            for point in points:
                if point["imbalance"] == level:
                    style = {"color": colours[point["compared"]], "marker": markers[point["loss"]]}
                    axis.plot(point[metric], 100 * point["auc"], linestyle="", markersize=5, alpha=0.7, **style)
            axis.set(xlabel=metric.replace("_", " "), ylabel=f"exact AUC (%), imbalance {level:g}")
            axis.grid(alpha=0.3)
    handles = [axes[0, 0].plot([], [], "o", color=colour, label=name)[0] for name, colour in colours.items()]
    handles += [axes[0, 0].plot([], [], mark, color="0.4", label=loss)[0] for loss, mark in markers.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def main(runs: list[Path], picture: Path = Path("docs/gap_study.png")) -> None:
    """Measure, print and write.

    Args:
        runs: Finished ablations with the study "gap", one for each level of imbalance.
        picture: Where the figure goes.
    """
    torch.manual_seed(SEED)
    points = [point for run in runs for point in points_of(run)]
    levels = sorted({point["imbalance"] for point in points})
    correlations = {}
    for level in levels:
        own = [point for point in points if point["imbalance"] == level]
        correlations[str(level)] = {metric: correlation(own, metric) for metric in METRICS}
        print(level, correlations[str(level)], flush=True)
    content = {"correlations": correlations, "differences": differences(points), "points": points}
    plot(points, picture)
    write_results("gap_study", "Does a smaller gap go with better recognition?", SEED, content)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
