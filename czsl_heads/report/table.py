"""The results of any command as tables: for the terminal, and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from czsl_heads._files import flatten
from czsl_heads._numbers import fraction, interval, markdown_table, percent

COLUMNS = (
    ("S", "seen"),
    ("U", "unseen"),
    ("HM", "harmonic_mean"),
    ("AUC", "auc"),
    ("attr", "attr_accuracy"),
    ("obj", "obj_accuracy"),
)
HEADINGS = ["row", "", *(heading for heading, _ in COLUMNS), "AUC exact", "trainable"]
# Beside the open world's, where its scores were masked, too.
FEASIBLE_COLUMNS = (
    ("HM, feasible", "standard", "harmonic_mean"),
    ("AUC, feasible", "standard", "auc"),
    ("AUC exact, feasible", "exact", "auc"),
)
SEARCH_HEADINGS = ["row", "", "threshold", "unseen pairs kept", "of", "AUC without, %", "AUC at threshold, %"]
TRANSDUCTIVE = "transductive: test images, without their labels, change the memory bank while it is tested."


class PageTable(NamedTuple):
    """A table of cells; a heading of "" is over words, any other over numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def worlds_of(results: dict[str, Any]) -> list[str]:
    """The worlds that the rows were scored in, without the one that feasibility masks."""
    return [world for world in ("closed", "open") if world in results["rows"][0]["summary"]]


def tables(results: dict[str, Any]) -> list[PageTable]:
    """All tables of a command, those of studies behind the others."""
    rows, seeds, split = results["rows"], seeds_in_words(results), results.get("split", "test")
    masked = has_feasibility(results)
    found = []
    for world in worlds_of(results):
        more = [heading for heading, _, _ in FEASIBLE_COLUMNS] if masked and world == "open" else []
        cells = [_cells(row, world) for row in rows]
        found.append(PageTable(f"{world.capitalize()} world, {split}, % ({seeds})", HEADINGS + more, cells))
    if masked:
        cells = [_search_cells(row) for row in rows]
        found.append(PageTable(f"Feasibility, searched on validation ({seeds})", SEARCH_HEADINGS, cells))
    if any(row["gap"] for row in rows):
        found.append(_gap_table(rows, seeds))
    if len(results["config"]["seeds"]) > 1 and results["comparisons"]:
        found.append(_differences_table(results, seeds))
    return found + [_study_table(study, seeds) for study in results["studies"].values()]


def _cells(row: dict[str, Any], world: str) -> list[str]:
    summary = row["summary"][world]
    numbers = [percent(summary["standard"][name]) for _, name in COLUMNS]
    masked = row["summary"].get("feasible") if world == "open" else None
    return [
        row["key"],
        row["title"],
        *numbers,
        percent(summary["exact"]["auc"]),
        f"{row['trainable_parameters']:,}",
        *([] if masked is None else [percent(masked[protocol][name]) for _, protocol, name in FEASIBLE_COLUMNS]),
    ]


def _search_cells(row: dict[str, Any]) -> list[str]:
    summary = row["feasibility"]
    kept = summary["kept_pairs"]
    return [
        row["key"],
        row["title"],
        fraction(summary["threshold"]),
        f"{kept['mean']:,.0f}" if kept["std"] is None else f"{kept['mean']:,.1f} ± {kept['std']:,.1f}",
        f"{row['by_seed'][0]['feasibility']['unseen_pairs']:,}",
        percent(summary["auc_unmasked"]),
        percent(summary["auc"]),
    ]


def _gap_table(rows: list[dict[str, Any]], seeds: str) -> PageTable:
    vectors = list(dict.fromkeys(name for row in rows for name in row["gap"]))
    cells = []
    for row in rows:
        gaps = [fraction(row["gap"].get(name)) for name in vectors]
        cells.append([row["key"], row["title"], *gaps, percent(row["summary"]["closed"]["standard"]["auc"])])
    return PageTable(f"Relative modality gap, closed world ({seeds})", ["row", "", *vectors, "AUC"], cells)


def _differences_table(results: dict[str, Any], seeds: str) -> PageTable:
    worlds = [*worlds_of(results), *(["feasible"] if has_feasibility(results) else [])]
    numbers = [(world, protocol) for world in worlds for protocol in ("standard", "exact")]
    cells = []
    for item in results["comparisons"]:
        found = [interval(item["differences"][world][protocol]["auc"]) for world, protocol in numbers]
        cells.append([f"{item['row']} - {item['against']}", *found])
    headings = ["rows", *(f"AUC {world}, {protocol}" for world, protocol in numbers)]
    return PageTable(f"Paired differences of the AUC, points, 95 % t intervals ({seeds})", headings, cells)


def _study_table(study: dict[str, Any], seeds: str) -> PageTable:
    numbers = [(world, protocol) for world in ("closed", "open") for protocol in ("standard", "exact")]
    cells = []
    for point in study["points"]:
        aucs = [percent(point["summary"][world][protocol]["auc"]) for world, protocol in numbers]
        gaps = [fraction(point["gap"].get(name)) for name in ("cls", "pred")]
        cells.append([str(point["value"]), point["series"], *aucs, *gaps])
    headings = [study["axis"], "", *(f"AUC {world}, {protocol}" for world, protocol in numbers), "RMG cls", "RMG pred"]
    return PageTable(f"{study['title']}, test, % ({seeds})", headings, cells)


def has_feasibility(results: dict[str, Any]) -> bool:
    """Whether the open world's scores were also masked by feasibility."""
    return bool(results["config"].get("world") == "open")


def print_results(results: dict[str, Any]) -> None:
    """Print all tables to the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 200 if has_feasibility(results) else 160  # a file or a pipe has no width to fit
    for title, headings, rows in tables(results):
        table = Table(title=title)
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "" else "right")
        for row in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(table)
    if any(row["transductive"] for row in results["rows"]):
        console.print(f"* {TRANSDUCTIVE}")
    if note := chance_note(results):
        console.print(note)
    if has_feasibility(results):
        console.print(feasibility_note(results))


def chance_note(results: dict[str, Any]) -> str:
    """A sentence that names the rows at chance; empty where there is none, or where nobody has looked."""
    chance = results.get("chance")
    rows = [row["key"] for row in results["rows"] if row.get("at_chance")]
    if not rows or chance is None:
        return ""
    levels = [
        f"{100 * level['accuracy']:.1f} % of images of {kind} pairs"
        for kind, level in chance.items()
        if level["accuracy"] is not None
    ]
    which = f"Row {rows[0]} is" if len(rows) == 1 else f"Rows {', '.join(rows)} are"
    return (
        f"{which} at chance: no better than always naming the same pair, which is right for {' and '.join(levels)}. "
        "The encoder may not know these images or words."
    )


def feasibility_note(results: dict[str, Any]) -> str:
    """What the columns of feasible pairs are."""
    config = results["config"]
    source = config["feasibility"]
    source = "the text features of the encoder" if source == "encoder" else Path(source).name
    fate = {"clean": "leaves the candidates", "official": "gets the score 0, as in the field's code"}[config["masking"]]
    return (
        f"feasible: the open world again; an unseen pair whose feasibility (by {source}) is below a threshold {fate}. "
        "Of 50 thresholds, each row and seed takes the one with the best AUC on validation images, by the standard "
        "protocol. The columns without that word have no feasibility in them."
    )


def seeds_in_words(results: dict[str, Any]) -> str:
    """Of which seeds the numbers are."""
    seeds = results["config"]["seeds"]
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean ± sd of {len(seeds)} seeds"


_SELECTED = {
    "auc": "by AUC on validation",
    "loss": "by the loss on validation",
    "last": "to be the last",
}
_BUDGETS = (
    " Rows 1+ and 2+ have the epochs of both stages, the rate of stage I decaying further; stage II starts at its own "
    "rate."
)
_SHARED = " cls, max and topk share seeds, data, budget and initial weights."
_BEHIND = " The condenser is trained behind the finished row max, for epochs of its own; the bank trains nothing."
_GAP = (
    "The modality gap depends on which vector stands for an image: cls is [CLS], pred the token that wins the "
    "predicted pair, true the token that wins the labelled pair, vac the condenser's vector. The third knows the label "
    "and is small by selection alone; no claim should rest on it."
)


def results_title(results: dict[str, Any]) -> str:
    """What a page is called: the method, the data and the encoder."""
    config = results["config"]
    name = "the shapes world" if config["shapes"] else f"`{config['data']}`"
    if config["method"] == "sac" and config["table"] == "steps":
        return f"Ablation on {name}, encoder `{config['encoder']}`"
    what = {"alignment": " without and with Sparse Alignment", "one": ""}.get(config["table"], ", step by step")
    return f"{config['method']}{what} on {name}, encoder `{config['encoder']}`"


def results_markdown(results: dict[str, Any]) -> str:
    """The same as a Markdown page, with what a reader needs to judge it."""
    config = results["config"]
    lines = [f"# {results_title(results)}", ""]
    if config["shapes"]:
        lines += [
            f"The shapes world (information imbalance {config['shapes']['imbalance']}) is drawn by this package. "
            "Results on it say what the mechanism does there; they are not results on a published benchmark.",
            "",
        ]
    for title, headings, rows in tables(results):
        lines += [f"## {title}", "", *markdown_table(headings, rows), ""]
    lines += [*_notes(results), *_settings(results), "", "![Seen-unseen curves](curves.png)", ""]
    if has_feasibility(results):
        lines += ["![Validation AUC by threshold](feasibility.png)", ""]
    lines += [f"![{study['title']}](study-{name}.png)\n" for name, study in results["studies"].items()]
    return "\n".join(lines)


def _notes(results: dict[str, Any]) -> list[str]:
    """Paragraphs on what the columns are, and on what a reader might not expect."""
    rows, lines = results["rows"], []
    if any(row["transductive"] for row in rows):
        lines += [f"\\* {TRANSDUCTIVE}", ""]
    if note := chance_note(results):
        lines += [f"**{note}**", ""]
    if worst := max(of_seed.get("rejected", 0) for row in rows for of_seed in row["by_seed"]):
        lines += [f"{worst} image vectors were not finite and did not enter a memory bank.", ""]
    if has_feasibility(results):
        lines += [feasibility_note(results), ""]
    lines += [columns_note(results), ""]
    if any(row["gap"] for row in rows):
        lines += [_GAP, ""]
    if all(of_seed["best_epoch"] is None for row in rows for of_seed in row["by_seed"]):
        lines += ["Nothing is trained, so that all seeds would give the same numbers.", ""]
    return lines


def columns_note(results: dict[str, Any]) -> str:
    """What S, U, HM and the others are, and how the epoch was chosen."""
    config = results["config"]
    chosen = _SELECTED[config["options"].get("selection", "auc")]
    more = {"steps": _BUDGETS, "alignment": _SHARED}.get(config["table"], "")
    more += _BEHIND if config["table"] == "alignment" and config["add"] else ""
    return (
        "S, U: best accuracy on seen and on unseen pairs; HM: best harmonic mean; AUC: area under the seen-unseen "
        "curve, by the field's standard protocol (20 to 39 biases) and over the exact curve; attr, obj: accuracy of "
        f"the predicted pair's primitives at bias 0. The epoch was chosen {chosen}.{more}"
    )


def _settings(results: dict[str, Any]) -> list[str]:
    """Lines on data, encoder, options with their sources, versions and hardware."""
    config, data, environment = results["config"], results["data"], results["environment"]
    counts = f"{data['attributes']} attributes, {data['objects']} objects; " if "attributes" in data else ""
    return [
        f"- data: {counts}pairs {_listed(data['pairs'])}; images {_listed(data['images'])}",
        f"- encoder: `{config['encoder']}`{_random_weights(config['encoder'])}; preset: {config['preset']}; "
        f"trainer: {in_words(config['trainer']) or 'defaults, one device'}",
        f"- training: {options_in_words(results)}",
        f"- versions: {in_words(environment['versions'])}",
        f"- hardware: {environment['hardware']['cores']} cores, GPUs: {environment['hardware']['gpus'] or 'none'}",
    ]


def options_in_words(results: dict[str, Any]) -> str:
    """All options by the names that the command line has for them, each with its source where that is known."""
    sources = results["sources"]
    words = []
    for name, value in flatten(results["config"]["options"]).items():
        source = f" ({sources.get(name, 'default')})" if sources else ""
        words.append(f"{name} {value}{source}")
    return ", ".join(words)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def in_words(values: dict[str, Any]) -> str:
    """Names and values, with commas between."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def has_random_weights(encoder: str) -> bool:
    """Whether an encoder's name is an architecture alone."""
    return encoder != "tiny" and ":" not in encoder


def _random_weights(encoder: str) -> str:
    return " (**random weights**: no tag was given)" if has_random_weights(encoder) else ""
