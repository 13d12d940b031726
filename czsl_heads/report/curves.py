"""Seen-unseen curves as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from czsl_heads._files import whole_file
from czsl_heads.report.table import percent


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Draw the exact curve of every row and seed, and the standard protocol's points on it, closed and open world."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, world in zip(axes, ("closed", "open")):
        for color, row in enumerate(results["rows"]):
            auc = percent(row["summary"][world]["exact"]["auc"])
            label = f"{row['number']}  {row['name']}: AUC {auc}"
            for number, run in enumerate(row["runs"]):
                curves = {name: _points(run["test"][world][name]["curve"]) for name in ("exact", "standard")}
                alpha = 0.9 if len(row["runs"]) == 1 else 0.55
                axis.plot(*curves["exact"], color=f"C{color}", alpha=alpha, label=None if number else label)
                axis.plot(*curves["standard"], ".", color=f"C{color}", markersize=4, alpha=0.6)
        axis.set(title=f"{world} world", xlabel="accuracy on unseen pairs (%)")
        axis.set_xlim(0, max(1.0, axis.get_xlim()[1]))
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left", frameon=False)
    axes[0].set_ylabel("accuracy on seen pairs (%)")
    figure.suptitle("Bias sweep: exact curves, and the points of the standard protocol")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _points(curve: list[list[float | None]]) -> tuple[list[float], list[float]]:
    """Per cent: unseen accuracies (x) and seen ones (y); what does not exist is not drawn."""
    seen, unseen = ([math.nan if value is None else 100 * value for value in column] for column in zip(*curve))
    return unseen, seen
