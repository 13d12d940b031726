"""The tables of EVA and of the gap, from the committed results; ``fill_tables.py`` puts them into their pages."""

import json
from pathlib import Path
from typing import Any

from czsl_heads._numbers import markdown_table, percent

DOCS = Path(__file__).parent
BENCHMARKS = DOCS.parent / "benchmarks" / "results"
METRICS = (
    *("relative_modality_gap", "l2m", "l2i", "alignment", "uniformity_images", "cross_uniformity"),
    *("linear_separability", "effective_rank_images"),
)
# Rows of the table of pretrained CLIPs: what it is called, where it is kept, and whether it is a share.
PRETRAINED = (
    ("zero-shot, captioned pairs (%)", "accuracy", "captioned", True),
    ("zero-shot, held-out pairs (%)", "accuracy", "held_out", True),
    ("image to text, 144 texts, R@1 (%)", "accuracy", "image_to_text", True),
    ("text to image, 3,600 images, R@1 (%)", "accuracy", "text_to_image", True),
    ("analogy: the nearest image is of the new pair (%)", "analogies", "to_image", True),
    ("analogy: the nearest text is the new pair's (%)", "analogies", "to_text", True),
    ("relative modality gap", "gap", "relative_modality_gap", False),
    ("L2M", "gap", "l2m", False),
    ("linear separability", "gap", "linear_separability", False),
    ("uniformity", "gap", "uniformity", False),
    ("effective rank of images", "gap", "effective_rank_images", False),
)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def table(headings: list[str], rows: list[list[str]]) -> str:
    return "\n".join(markdown_table(headings, rows))


def eva_table() -> str:
    """Every row of EVA's own table, closed world."""
    rows = []
    for row in read(DOCS / "eva_results" / "results.json")["rows"]:
        closed = row["summary"]["closed"]
        exact, standard = closed["exact"]["auc"], closed["standard"]
        numbers = (exact, standard["auc"], standard["attr_accuracy"], standard["obj_accuracy"])
        rows.append([row["key"], row["title"], *map(percent, numbers)])
    return table(["row", "", "AUC exact", "AUC", "attr", "obj"], rows)


def experts_table() -> str:
    """How much faster than a loop over all experts."""
    rows = []
    for way in read(BENCHMARKS / "experts-cpu.json")["ways"]:
        cells = []
        for name in ("sparse", "joined", "auto"):
            ratios = (way[part][f"loop / {name}"] for part in ("forward", "forward and backward"))
            cells.append(", ".join(f"{ratio:.1f}" for ratio in ratios))
        rows.append([*(str(way[name]) for name in ("experts", "rank", "k")), *cells])
    return table(["experts", "rank", "k", "sparse", "joined", "auto"], rows)


def experts_share() -> str:
    """The share of a training step, in per cent."""
    share = read(BENCHMARKS / "experts-cpu.json")["step"]["share of the step"]
    return f"{100 * share:.1f}"


def correlations_table() -> str:
    """Spearman's correlation of each metric with the AUC; in bold where the interval leaves zero out."""
    levels = read(BENCHMARKS / "gap_study.json")["correlations"]
    rows = []
    for metric in METRICS:
        cells = []
        for found in (level[metric] for level in levels.values()):
            words = f"{found['rho']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
            excludes_zero = found["low"] > 0 or found["high"] < 0
            cells.append(f"**{words}**" if excludes_zero else words)
        rows.append([metric.replace("_", " "), *cells])
    return table(["metric", *(f"imbalance {float(level):g}" for level in levels)], rows)


def changes_table() -> str:
    """What each loss changed, by what is compared with texts: mean and deviation over seeds."""
    rows = []
    for change in read(BENCHMARKS / "gap_study.json")["differences"]:
        auc = [100 * number for number in change["auc"]]
        cells = [f"{auc[0]:+.1f} ± {auc[1]:.1f}"]
        for metric in ("relative_modality_gap", "l2m", "linear_separability"):
            mean, deviation = change[metric]
            cells.append(f"{mean:+.3f} ± {deviation:.3f}")
        rows.append([change["compared"], change["loss"].upper(), f"{change['imbalance']:g}", *cells])
    order = {name: place for place, name in enumerate(("cls", "max", "topk", "logsumexp", "vac"))}
    rows.sort(key=lambda row: (order[row[0]], row[1], row[2]))
    return table(["compared", "loss", "imbalance", "AUC, points", "RMG", "L2M", "linear separability"], rows)


def pretraining_table() -> str:
    """Three CLIPs that differ by their loss."""
    losses = read(BENCHMARKS / "gap_pretraining.json")["losses"]
    rows = []
    for title, part, name, is_share in PRETRAINED:
        values = [found[part][name] for found in losses.values()]
        rows.append([title, *(f"{100 * value:.1f}" if is_share else f"{value:.3f}" for value in values)])
    return table(["", "contrastive", "CUA", "CUAXU"], rows)
