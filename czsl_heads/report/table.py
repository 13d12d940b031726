"""The ablation as a table: for the terminal, and as Markdown."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    ("S", "seen"),
    ("U", "unseen"),
    ("HM", "harmonic_mean"),
    ("AUC", "auc"),
    ("attr", "attr_accuracy"),
    ("obj", "obj_accuracy"),
)


def _cells(row: dict[str, Any], world: str) -> list[str]:
    summary = row["summary"][world]
    numbers = [percent(summary["standard"][name]) for _, name in COLUMNS]
    return [
        str(row["number"]),
        row["name"],
        *numbers,
        percent(summary["exact"]["auc"]),
        f"{row['trainable_parameters']:,}",
    ]


def percent(spread: dict[str, float | None]) -> str:
    """Mean, and deviation if there is one, of a fraction, in per cent."""
    mean, std = spread["mean"], spread["std"]
    if mean is None:
        return "none"
    return f"{100 * mean:.1f}" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f}"


HEADINGS = ["row", "", *(heading for heading, _ in COLUMNS), "AUC exact", "trainable"]


def print_ablation(results: dict[str, Any]) -> None:
    """Print one table a world to the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 140  # a file or a pipe has no width to fit
    for world in ("closed", "open"):
        table = Table(title=f"{world} world, test, % ({_seeds(results)})")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "" else "right")
        for row in results["rows"]:
            table.add_row(*(cell.replace("[", r"\[") for cell in _cells(row, world)))
        console.print(table)


def _seeds(results: dict[str, Any]) -> str:
    seeds = results["config"]["seeds"]
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean ± sd of {len(seeds)} seeds"


def ablation_markdown(results: dict[str, Any]) -> str:
    """The same as a Markdown page, with what a reader needs to judge it."""
    config, data, environment = results["config"], results["data"], results["environment"]
    name = "the shapes world" if config["shapes"] else f"`{config['data']}`"
    lines = [f"# Ablation on {name}, encoder `{config['encoder']}`", ""]
    if config["shapes"]:
        lines += [
            f"The shapes world (information imbalance {config['shapes']['imbalance']}) is drawn by this package. "
            "Results on it say what the mechanism does there; they are not results on a published benchmark.",
            "",
        ]
    for world in ("closed", "open"):
        lines += [f"## {world.capitalize()} world", "", _markdown_row(HEADINGS)]
        lines += [_markdown_row(["--:" if heading else ":--" for heading in HEADINGS])]
        lines += [*(_markdown_row(_cells(row, world)) for row in results["rows"]), ""]
    lines += [
        f"Test images, per cent, {_seeds(results)}. S, U: best accuracy on seen and on unseen pairs; HM: best harmonic "
        "mean; AUC: area under the seen-unseen curve, by the field's standard protocol (20 to 39 biases) and over the "
        "exact curve; attr, obj: accuracy of the predicted pair's primitives at bias 0. The epoch was chosen by AUC on "
        "validation.",
        "",
        f"- data: {data['attributes']} attributes, {data['objects']} objects; pairs {_splits(data['pairs'])}; "
        f"images {_splits(data['images'])}",
        f"- encoder: `{config['encoder']}`{_random_weights(config['encoder'])}; preset: {config['preset']}; "
        f"trainer: {_settings(config['trainer']) or 'defaults, one device'}",
        f"- training: {_settings(config['options'])}",
        f"- versions: {_settings(environment['versions'])}",
        f"- hardware: {environment['hardware']['cores']} cores, GPUs: {environment['hardware']['gpus'] or 'none'}",
        "",
        "![Seen-unseen curves](curves.png)",
        "",
    ]
    return "\n".join(lines)


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _splits(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _random_weights(encoder: str) -> str:
    return "" if encoder == "tiny" or ":" in encoder else " (**random weights**: no tag was given)"
