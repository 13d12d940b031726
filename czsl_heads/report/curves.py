"""Seen-unseen curves, and studies, as pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Any

from czsl_heads._files import save_figure
from czsl_heads._numbers import percent
from czsl_heads.report.table import worlds_of


def plot_curves(results: dict[str, Any], path: Path | IO[bytes]) -> None:
    """Draw the exact curve of every row and seed, and the standard protocol's points on it, closed and open world."""
    from matplotlib.figure import Figure

    worlds = worlds_of(results)
    figure = Figure(figsize=(5 * len(worlds), 4.6), layout="constrained")
    axes = figure.subplots(1, len(worlds), sharey=True, squeeze=False)[0]
    for axis, world in zip(axes, worlds):
        for color, row in enumerate(_drawn(results)):
            auc = percent(row["summary"][world]["exact"]["auc"])
            label = f"row {row['key']}: {auc}"
            for number, of_seed in enumerate(row["by_seed"]):
                curves = {name: _points(of_seed["test"][world][name]["curve"]) for name in ("exact", "standard")}
                alpha = 0.9 if len(row["by_seed"]) == 1 else 0.55
                axis.plot(*curves["exact"], color=f"C{color}", alpha=alpha, label=None if number else label)
                axis.plot(*curves["standard"], ".", color=f"C{color}", markersize=4, alpha=0.6)
        axis.set(title=f"{world} world", xlabel="accuracy on unseen pairs (%)")
        axis.set_xlim(0, max(1.0, axis.get_xlim()[1]))
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left", frameon=False, title="exact AUC, %")
    axes[0].set_ylabel("accuracy on seen pairs (%)")
    figure.suptitle("Bias sweep: exact curves, and the points of the standard protocol")
    save_figure(figure, path, dpi=130)


def _drawn(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Without the rows that were trained longer, whose curves would hide the others."""
    return [row for row in results["rows"] if not row["key"].endswith("+")]


def _points(curve: list[list[float | None]]) -> tuple[list[float], list[float]]:
    """Per cent: unseen accuracies (x) and seen ones (y); what does not exist is not drawn."""
    seen, unseen = ([math.nan if value is None else 100 * value for value in column] for column in zip(*curve))
    return unseen, seen


def plot_feasibility(results: dict[str, Any], path: Path | IO[bytes]) -> None:
    """Draw validation AUC against the threshold of feasibility by row and seed, and how many pairs a threshold keeps.

    The AUC without feasibility is a horizontal line, and the threshold that was taken a dot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, row in enumerate(_drawn(results)):
        style = {"color": f"C{color}", "alpha": 0.9 if len(row["by_seed"]) == 1 else 0.55}
        for number, of_seed in enumerate(row["by_seed"]):
            found = of_seed["feasibility"]
            auc = [math.nan if value is None else 100 * value for value in found["auc"]]
            left.plot(found["thresholds"], auc, label=None if number else f"row {row['key']}", **style)
            left.axhline(100 * found["auc_unmasked"], linestyle=":", **style)
            if found["threshold"] in found["thresholds"]:
                left.plot(found["threshold"], auc[found["thresholds"].index(found["threshold"])], "o", **style)
    right.plot(found["thresholds"], found["kept"], color="k")  # those of all rows
    left.set(xlabel="threshold", ylabel="validation AUC, open world (%)", title="dotted: without feasibility")
    right.set(xlabel="threshold", ylabel=f"unseen pairs kept, of {found['unseen_pairs']:,}", ylim=(0, None))
    left.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle("Feasibility of unseen pairs: the threshold, searched on validation images")
    save_figure(figure, path, dpi=130)


def plot_study(study: dict[str, Any], path: Path | IO[bytes]) -> None:
    """Draw AUC (closed and open world) and modality gap against what the study varies, a line a series."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    series = list(dict.fromkeys(point["series"] for point in study["points"]))
    for color, name in enumerate(series):
        points = [point for point in study["points"] if point["series"] == name]
        values = [point["value"] for point in points]
        for axis, world in zip(axes, ("closed", "open")):
            _line(
                axis, values, [point["summary"][world]["standard"]["auc"] for point in points], 100, f"C{color}", name
            )
        for style, vector in zip(("-", "--", ":"), ("cls", "pred", "vac")):
            if vector in points[0]["gap"] and not color:  # series of one model share their gaps
                spreads = [point["gap"][vector] for point in points]
                _line(axes[2], values, spreads, 1, "k", vector, style)
    for axis, title in zip(axes, ("AUC, closed world (%)", "AUC, open world (%)", "relative modality gap")):
        axis.set(title=title, xlabel=study["axis"])
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        if isinstance(study["points"][0]["value"], str):
            axis.tick_params(axis="x", rotation=45)
    figure.suptitle(study["title"])
    save_figure(figure, path, dpi=130)


def _line(
    axis: Any, values: list[Any], spreads: list[Any], factor: float, color: str, label: str, style: str = "-"
) -> None:
    means = [math.nan if spread["mean"] is None else factor * spread["mean"] for spread in spreads]
    errors = [0.0 if spread["std"] is None else factor * spread["std"] for spread in spreads]
    axis.errorbar(values, means, errors, color=color, label=label, linestyle=style, marker="o", markersize=3, capsize=2)
