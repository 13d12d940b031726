"""Tables say what the results say."""

import json
from pathlib import Path

import pytest

from czsl_heads._numbers import fraction, interval, percent
from czsl_heads.report.table import print_results, results_markdown, tables


@pytest.mark.parametrize(
    ("spread", "text"),
    [
        ({"mean": 0.1234, "std": None}, "12.3"),
        ({"mean": 0.5, "std": 0.0149}, "50.0 ± 1.5"),
        ({"mean": None, "std": None}, "none"),
    ],
)
def test_fractions_are_shown_in_per_cent(spread: dict, text: str) -> None:
    assert percent(spread) == text


def table_of(page: str, title: str) -> list[list[str]]:
    """The cells of the table under a heading, without the heading of the table."""
    lines = page.split(f"## {title}")[1].split("\n## ")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]


@pytest.mark.parametrize("world", ["closed", "open"])
def test_the_page_has_every_row_of_both_worlds(results: dict, world: str) -> None:
    table = table_of(results_markdown(results), f"{world.capitalize()} world, test, % (mean ± sd of 3 seeds)")
    assert len(table) == len(results["rows"]) == 8
    for row, cells in zip(results["rows"], table):
        summary = row["summary"][world]
        assert cells[:2] == [row["key"], row["title"]]
        assert cells[5] == percent(summary["standard"]["auc"])
        assert cells[8] == percent(summary["exact"]["auc"])


def test_the_gap_stands_beside_the_auc_by_vector(results: dict) -> None:
    for row, cells in zip(results["rows"], table_of(results_markdown(results), "Relative modality gap")):
        assert cells[2:] == [
            *(fraction(row["gap"][name]) for name in ("cls", "pred", "true")),
            fraction(row["gap"].get("vac")),
            percent(row["summary"]["closed"]["standard"]["auc"]),
        ]


def test_differences_have_their_intervals(results: dict) -> None:
    table = table_of(results_markdown(results), "Paired differences")
    for item, cells in zip(results["comparisons"], table):
        assert cells[0] == f"{item['row']} - {item['against']}"
        assert cells[1] == interval(item["differences"]["closed"]["standard"]["auc"])
    assert len(table) == len(results["comparisons"])
    results["config"]["seeds"] = [0]
    assert "Paired differences" not in results_markdown(results)


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        ({"mean": 0.0123, "half_width": 0.004}, "+1.2 ± 0.4"),
        ({"mean": -0.05, "half_width": None}, "-5.0"),
        ({"mean": None, "half_width": None}, "none"),
    ],
)
def test_a_difference_is_shown_in_points(difference: dict, text: str) -> None:
    assert interval(difference) == text


@pytest.mark.parametrize(
    ("spread", "text"),
    [({"mean": 0.26249, "std": 0.001}, "0.262 ± 0.001"), ({"mean": 0.3, "std": None}, "0.300"), (None, "-")],
)
def test_a_gap_is_shown_as_it_is(spread: dict | None, text: str) -> None:
    assert fraction(spread) == text


def test_the_page_says_when_weights_were_random(results: dict) -> None:
    assert "random weights" not in results_markdown(results)
    results["config"]["encoder"] = "ViT-B-32"
    assert "random weights" in results_markdown(results)
    results["config"]["encoder"] = "ViT-B-32:openai"
    assert "random weights" not in results_markdown(results)


def test_the_terminal_shows_both_worlds_and_whole_names(results: dict, capsys: pytest.CaptureFixture) -> None:
    print_results(results)
    shown = capsys.readouterr().out
    for text in ("Closed world", "Open world", "[CLS] baseline", "+ Sparse Alignment", "* transductive"):
        assert text in shown
    for row in results["rows"]:
        assert row["title"] in shown


def test_a_table_of_a_baseline_has_the_worlds_and_the_sources_that_it_has() -> None:
    path = Path(__file__).parents[2] / "docs" / "baseline_results" / "csp-0.5" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    titles = [table.title for table in tables(results)]
    assert [title.partition(",")[0] for title in titles] == ["Closed world", "Paired differences of the AUC"]
    page = results_markdown(results)
    assert page.startswith("# csp without and with Sparse Alignment on the shapes world")
    assert "learning_rate 0.0001 (guess)" in page
    assert "bank.slots 16 (sac)" in page
    assert "modality gap" not in page
    for run in (run for row in results["rows"] for run in row["by_seed"]):
        run["best_epoch"] = None
    assert "Nothing is trained" in results_markdown(results)
