"""Tables say what the results say."""

import pytest

from czsl_heads.report.table import ablation_markdown, fraction, interval, percent, print_ablation


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
    table = table_of(ablation_markdown(results), f"{world.capitalize()} world, test, % (mean ± sd of 3 seeds)")
    assert len(table) == len(results["rows"]) == 8
    for row, cells in zip(results["rows"], table):
        summary = row["summary"][world]
        assert cells[:2] == [row["number"], row["name"]]
        assert cells[5] == percent(summary["standard"]["auc"])
        assert cells[8] == percent(summary["exact"]["auc"])


def test_the_gap_stands_beside_the_auc_by_readout(results: dict) -> None:
    for row, cells in zip(results["rows"], table_of(ablation_markdown(results), "Relative modality gap")):
        assert cells[2:] == [
            *(fraction(row["gap"][name]) for name in ("cls", "pred", "true")),
            fraction(row["gap"].get("vac")),
            percent(row["summary"]["closed"]["standard"]["auc"]),
        ]


def test_differences_have_their_intervals(results: dict) -> None:
    table = table_of(ablation_markdown(results), "Paired differences")
    for item, cells in zip(results["comparisons"], table):
        assert cells[0] == f"{item['row']} - {item['against']}"
        assert cells[1] == interval(item["auc"]["closed"]["standard"])
    assert len(table) == len(results["comparisons"])
    results["config"]["seeds"] = [0]
    assert "Paired differences" not in ablation_markdown(results)


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
    assert "random weights" not in ablation_markdown(results)
    results["config"]["encoder"] = "ViT-B-32"
    assert "random weights" in ablation_markdown(results)
    results["config"]["encoder"] = "ViT-B-32:openai"
    assert "random weights" not in ablation_markdown(results)


def test_the_terminal_shows_both_worlds_and_whole_names(results: dict, capsys: pytest.CaptureFixture) -> None:
    print_ablation(results)
    shown = capsys.readouterr().out
    for text in ("Closed world", "Open world", "[CLS] baseline", "+ Sparse Alignment", "* transductive"):
        assert text in shown
    for row in results["rows"]:
        assert row["name"] in shown
