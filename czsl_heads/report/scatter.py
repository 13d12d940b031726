"""The modality gap against what a model scores, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from czsl_heads._files import save_figure

VECTORS = {
    "cls": "cls: [CLS] stands for the image",
    "pred": "pred: the token that wins the predicted pair",
    "true": "true: the token that wins the labelled pair (oracle)",
    "vac": "vac: the condenser's vector",
}
MARKERS = "osD^vPX*"


def plot_gap(results: dict[str, Any], path: Path | IO[bytes]) -> None:
    """Draw the AUC of every row and seed against its modality gap, a panel for each vector that stands for an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.5), layout="constrained")
    for axis, (vector, title) in zip(figure.subplots(2, 2, sharey=True).flat, VECTORS.items()):
        for color, row in enumerate(results["rows"]):
            style = {"color": f"C{color}", "marker": MARKERS[color % len(MARKERS)], "alpha": 0.75}
            axis.plot(*_points(row["by_seed"], vector), linestyle="", label=f"{row['key']}  {row['title']}", **style)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="relative modality gap", ylabel="AUC, closed world (%)")
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path, dpi=130)


def _points(by_seed: list[dict[str, Any]], vector: str) -> tuple[list[float], list[float]]:
    """Gap and AUC in per cent of the seeds that have both."""
    gaps = [of_seed["gap"].get("relative_modality_gap", {}).get(vector) for of_seed in by_seed]
    areas = [of_seed["test"]["closed"]["standard"]["auc"] for of_seed in by_seed]
    found = [(gap, 100 * area) for gap, area in zip(gaps, areas) if gap is not None and area is not None]
    return [gap for gap, _ in found], [area for _, area in found]
