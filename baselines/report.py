"""A comparison as Markdown and as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baselines.options import ADDED
from baselines.rows import ROWS
from czsl_heads._files import whole_file
from czsl_heads.report.table import interval, percent

COLUMNS = {"S": "seen", "U": "unseen", "HM": "harmonic_mean", "AUC": "auc"}
_PROTOCOLS = {"standard": "the field's protocol (20 to 39 biases)", "exact": "the exact curve"}


def comparison_markdown(results: dict[str, Any]) -> str:
    """The table, its differences, and what a reader needs to judge them."""
    config, method = results["config"], results["config"]["method"]
    name = "the shapes world" if config["shapes"] else f"`{config['data']}`"
    lines = [f"# {method} without and with Sparse Alignment on {name}, encoder `{config['encoder']}`", ""]
    if config["shapes"]:
        imbalance = config["shapes"]["imbalance"]
        lines += [
            f"The shapes world (information imbalance {imbalance}) is drawn by this package. Results on it say what "
            "the mechanism does there; they are not results on a published benchmark.",
            "",
        ]
    for protocol, words in _PROTOCOLS.items():
        lines += [f"## Closed world, test, %, {words} ({_seeds(config)})", "", *_table(results, protocol), ""]
    return "\n".join([*lines, *_notes(results), "", "![Seen-unseen curves](curves.png)", ""])


def _table(results: dict[str, Any], protocol: str) -> list[str]:
    rows = [_line("row", results["config"]["method"], *COLUMNS), _line(":--", ":--", *["--:"] * len(COLUMNS))]
    rows += [_line(row["row"], row["title"], *_cells(row["summary"][protocol], percent)) for row in results["rows"]]
    if len(results["config"]["seeds"]) > 1:
        rows += [
            _line(f"{item['row']} - {item['against']}", "difference", *_cells(item["differences"][protocol], interval))
            for item in results["comparisons"]
        ]
    return rows


def _cells(numbers: dict[str, Any], written: Callable[[Any], str]) -> list[str]:
    return [written(numbers[name]) for name in COLUMNS.values()]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _seeds(config: dict[str, Any]) -> str:
    seeds = config["seeds"]
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean ± sd of {len(seeds)} seeds"


def _notes(results: dict[str, Any]) -> list[str]:
    config, environment, rows = results["config"], results["environment"], results["rows"]
    options = {**config["options"], **config["options"]["model"]}
    added = any(ROWS[row["row"]].added for row in rows)
    for name in ("model", *(() if added else ADDED)):
        del options[name]
    settings = [f"{name} {value} ({results['sources'].get(name, 'default')})" for name, value in options.items()]
    trained = [row for row in rows if row["runs"][0]["best_epoch"] is not None]
    learned = {row["row"]: f"{row['trainable_parameters']:,}" for row in trained}
    return [
        "S, U: best accuracy on seen and on unseen pairs; HM: best harmonic mean; AUC: area under the seen-unseen "
        "curve. cls, max and topk share seeds, data, budget and initial weights. Differences are in points, of the "
        "same seeds, with 95 % intervals by Student's t.",
        "",
        *([_ADDED, ""] if added else []),
        *([] if learned else ["Nothing is trained, so that all seeds would give the same numbers.", ""]),
        f"- trainable parameters: {_listed(learned) or 'none'}",
        f"- images: {_listed(results['data']['images'])}",
        f"- preset {config['preset']}: {', '.join(settings)}",
        f"- trainer: {_listed(config['trainer']) or 'defaults, one device'}",
        f"- versions: {_listed(environment['versions'])}",
        f"- hardware: {environment['hardware']['cores']} cores, GPUs: {environment['hardware']['gpus'] or 'none'}",
    ]


_ADDED = (
    "The condenser is trained behind the finished row max, for epochs of its own; the bank trains nothing. * Row "
    "adapted is transductive: its bank holds the texts of unseen pairs, and test images after they were predicted."
)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def plot_comparison(results: dict[str, Any], path: Path) -> None:
    """Draw the exact curve of every row and seed, and beside it the AUC of every seed, joined over the rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, row in enumerate(results["rows"]):
        for number, run in enumerate(row["runs"]):
            seen, unseen = zip(*run["test"]["closed"]["exact"]["curve"])
            label = None if number else f"{row['row']}: AUC {percent(row['summary']['exact']['auc'])}"
            left.plot(_points(unseen), _points(seen), color=f"C{color}", alpha=0.6, label=label)
    for runs in zip(*(row["runs"] for row in results["rows"])):
        right.plot(_points([run["test"]["closed"]["exact"]["auc"] for run in runs]), "o-", color="k", alpha=0.6)
    left.set(xlabel="accuracy on unseen pairs (%)", ylabel="accuracy on seen pairs (%)")
    left.legend(frameon=False, fontsize=8)
    right.set(ylabel="AUC, exact (%)", title="a line a seed")
    right.set_xticks(range(len(results["rows"])), [row["row"] for row in results["rows"]])
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(f"{results['config']['method']} without and with Sparse Alignment, closed world")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _points(values: Any) -> list[float]:
    """Per cent; what does not exist is not drawn."""
    return [math.nan if value is None else 100 * value for value in values]
