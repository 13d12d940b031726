"""Tables say what the results say."""

import pytest

from czsl_heads.report.table import ablation_markdown, percent, print_ablation


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


def test_the_page_has_every_row_of_both_worlds(results: dict) -> None:
    lines = ablation_markdown(results).splitlines()
    for world in ("closed", "open"):
        start = lines.index(f"## {world.capitalize()} world")
        table = [line for line in lines[start : start + 7] if line.startswith("| ")]
        assert len(table) == 2 + len(results["rows"])
        for row, line in zip(results["rows"], table[2:]):
            summary = row["summary"][world]
            assert row["name"] in line
            assert percent(summary["standard"]["auc"]) in line
            assert percent(summary["exact"]["auc"]) in line
    assert any("mean ± sd of 3 seeds" in line for line in lines)


def test_the_page_says_when_weights_were_random(results: dict) -> None:
    assert "random weights" not in ablation_markdown(results)
    results["config"]["encoder"] = "ViT-B-32"
    assert "random weights" in ablation_markdown(results)
    results["config"]["encoder"] = "ViT-B-32:openai"
    assert "random weights" not in ablation_markdown(results)


def test_the_terminal_shows_both_worlds_and_whole_names(results: dict, capsys: pytest.CaptureFixture) -> None:
    print_ablation(results)
    shown = capsys.readouterr().out
    for text in ("closed world", "open world", "[CLS] baseline", "+ Sparse Alignment"):
        assert text in shown
