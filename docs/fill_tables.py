"""Write the tables of docs/shapes_results.md from the committed results: ``python docs/fill_tables.py``.

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``.
"""

import json
import re
from pathlib import Path
from typing import Any

from czsl_heads._files import write_text
from czsl_heads.report.table import fraction, interval, percent

DOCS = Path(__file__).parent
PAGE = DOCS / "shapes_results.md"
RUNS = {
    "imbalance 0": "imbalance-0.0",
    "0.5": "imbalance-0.5",
    "1": "imbalance-1.0",
    "0.5, short tower": "short-tower",
}
DIFFERENCES = [("2", "1"), ("2+", "1+"), ("3", "2+"), ("4", "3"), ("5", "4"), ("6", "5"), ("5", "1+"), ("6", "1+")]


def load(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((DOCS / "results" / RUNS[name] / "results.json").read_text())
    return results


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["--:" if heading else ":--" for heading in headings], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def rows_table(world: str) -> str:
    runs = [load(name) for name in RUNS]
    cells = [
        [
            row["number"],
            row["name"],
            *(percent(run["rows"][index]["summary"][world]["standard"]["auc"]) for run in runs),
        ]
        for index, row in enumerate(runs[0]["rows"])
    ]
    return markdown(["row", "", *RUNS], cells)


def differences_table() -> str:
    runs = [load(name) for name in RUNS]
    cells = []
    for row, other in DIFFERENCES:
        found = [next(c for c in run["comparisons"] if (c["row"], c["against"]) == (row, other)) for run in runs]
        cells.append([f"{row} - {other}", *(interval(item["auc"]["closed"]["standard"]) for item in found)])
    return markdown(["rows", *RUNS], cells)


def gap_table() -> str:
    cells = []
    for name in RUNS:
        by_number = {row["number"]: row for row in load(name)["rows"]}
        for number in ("1", "2", "3", "4"):
            row = by_number[number]
            gaps = (fraction(row["gap"].get(readout)) for readout in ("cls", "pred", "true", "vac"))
            cells.append([name, number, *gaps, percent(row["summary"]["closed"]["standard"]["auc"])])
    return markdown(["run", "row", "cls", "pred", "true", "vac", "AUC"], cells)


def patches_table() -> str:
    cells = []
    for name in RUNS:
        by_number = {row["number"]: row for row in load(name)["rows"]}
        shares = []
        for number in ("1", "2"):
            runs = by_number[number]["runs"]
            shares += [
                f"{100 * sum(run['gap']['winners_that_are_patches'][kind] for run in runs) / len(runs):.1f}"
                for kind in ("true", "pred")
            ]
        cells.append([name, *shares])
    return markdown(["run", "row 1, labelled", "row 1, predicted", "row 2, labelled", "row 2, predicted"], cells)


def reasons_table() -> str:
    study = json.loads((DOCS.parent / "benchmarks" / "results" / "sparse_alignment.json").read_text())
    cells = [
        [
            row["name"],
            percent(row["numbers"]["closed"]["auc"]),
            percent(row["numbers"]["open"]["auc"]),
            percent(row["winners_that_are_patches"]),
            *(fraction(row["gap"][kind]) for kind in ("cls", "pred", "true")),
        ]
        for row in study["rows"]
    ]
    return markdown(["", "AUC closed", "AUC open", "patches win", "RMG cls", "pred", "true"], cells)


TABLES = {
    "closed": lambda: rows_table("closed"),
    "open": lambda: rows_table("open"),
    "differences": differences_table,
    "gap": gap_table,
    "patches": patches_table,
    "reasons": reasons_table,
}


def filled(page: str) -> str:
    """The page with every table made anew."""
    for name, table in TABLES.items():
        page, count = re.subn(
            rf"<!-- {name} -->\n.*?<!-- end -->",
            lambda _, name=name, table=table: f"<!-- {name} -->\n{table()}\n<!-- end -->",
            page,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"expected one table {name} in {PAGE}, got {count}")
    return page


if __name__ == "__main__":
    write_text(PAGE, filled(PAGE.read_text()))
