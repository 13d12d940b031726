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
        row["number"],
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


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """All tables of an ablation as (title, headings, rows of cells); a heading of "" is over words, not numbers."""
    rows, seeds = results["rows"], _seeds(results)
    found = [
        (f"{world.capitalize()} world, test, % ({seeds})", HEADINGS, [_cells(row, world) for row in rows])
        for world in ("closed", "open")
    ]
    readouts = list(rows[-1]["gap"])
    gaps = [
        [row["number"], row["name"], *(fraction(row["gap"].get(name)) for name in readouts), percent(_auc(row))]
        for row in rows
    ]
    found.append((f"Relative modality gap, closed world ({seeds})", ["row", "", *readouts, "AUC"], gaps))
    if len(results["config"]["seeds"]) > 1:
        differences = [
            [f"{item['row']} - {item['against']}", *(interval(item["auc"][world][name]) for world, name in _AUCS)]
            for item in results["comparisons"]
        ]
        headings = ["rows", *(f"AUC {world}, {name}" for world, name in _AUCS)]
        found.append((f"Paired differences of the AUC, points, 95 % t intervals ({seeds})", headings, differences))
    return found + [_study_table(study, seeds) for study in results["studies"].values()]


_AUCS = [(world, name) for world in ("closed", "open") for name in ("standard", "exact")]


def _auc(row: dict[str, Any]) -> dict[str, float | None]:
    auc: dict[str, float | None] = row["summary"]["closed"]["standard"]["auc"]
    return auc


def _study_table(study: dict[str, Any], seeds: str) -> tuple[str, list[str], list[list[str]]]:
    cells = [
        [
            str(point["value"]),
            point["series"],
            *(percent(point["summary"][world][name]["auc"]) for world, name in _AUCS),
            fraction(point["gap"].get("cls")),
            fraction(point["gap"].get("pred")),
        ]
        for point in study["points"]
    ]
    headings = [study["axis"], "", *(f"AUC {world}, {name}" for world, name in _AUCS), "RMG cls", "RMG pred"]
    return f"{study['title']}, test, % ({seeds})", headings, cells


def fraction(spread: dict[str, float | None] | None) -> str:
    """Mean, and deviation if there is one, as it is; a dash for what a row does not have."""
    if spread is None or spread["mean"] is None:
        return "-"
    return f"{spread['mean']:.3f}" if spread["std"] is None else f"{spread['mean']:.3f} ± {spread['std']:.3f}"


def interval(difference: dict[str, float | None]) -> str:
    """A paired difference of fractions in points, with the half-width of its interval."""
    mean, half = difference["mean"], difference["half_width"]
    if mean is None:
        return "none"
    return f"{100 * mean:+.1f}" if half is None else f"{100 * mean:+.1f} ± {100 * half:.1f}"


def print_ablation(results: dict[str, Any]) -> None:
    """Print all tables to the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width to fit
    for title, headings, rows in tables(results):
        table = Table(title=title)
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "" else "right")
        for row in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(table)
    console.print(f"* {TRANSDUCTIVE}")


TRANSDUCTIVE = "transductive: test images, without their labels, change the memory bank while it is tested."


def _rejections(results: dict[str, Any]) -> list[str]:
    """A line for vectors that did not enter a memory bank, if there were any."""
    worst = max(run.get("rejected", 0) for row in results["rows"] for run in row["runs"])
    return ["", f"{worst} image vectors were not finite and did not enter a memory bank."] if worst else []


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
    for title, headings, rows in tables(results):
        lines += [f"## {title}", "", _markdown_row(headings)]
        lines += [_markdown_row(["--:" if heading else ":--" for heading in headings])]
        lines += [*map(_markdown_row, rows), ""]
    lines += [
        f"\\* {TRANSDUCTIVE}",
        *_rejections(results),
        "",
        "S, U: best accuracy on seen and on unseen pairs; HM: best harmonic mean; AUC: area under the seen-unseen "
        "curve, by the field's standard protocol (20 to 39 biases) and over the exact curve; attr, obj: accuracy of "
        "the predicted pair's primitives at bias 0. The epoch was chosen by AUC on validation. Rows 1+ and 2+ have the "
        "epochs of both stages, the rate of stage I decaying further; stage II starts at its own rate.",
        "",
        "The modality gap depends on which vector stands for an image: cls is [CLS], pred the token that wins the "
        "predicted pair, true the token that wins the labelled pair, vac the condenser's vector. The third knows the "
        "label and is small by selection alone; no claim should rest on it.",
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
        *(f"![{study['title']}](study-{name}.png)\n" for name, study in results["studies"].items()),
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
