"""Every Python block of the README and of docs/ runs, in the order of its page."""

import json
import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

from czsl_heads._files import flatten
from czsl_heads._numbers import percent
from czsl_heads.models.saved import SCHEMA
from czsl_heads.report.table import results_markdown
from czsl_heads.training.ablate import compared
from czsl_heads.training.finished import config_of
from czsl_heads.training.options import Options
from czsl_heads.training.rows import TABLES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "my-data" / "images"  # what docs/data.md asks its reader for
    images.mkdir(parents=True)
    for number in range(1, 6):
        Image.new("RGB", (60, 50), (number * 40, 20, 30)).save(images / f"{number:04d}.jpg")
    names: dict[str, object] = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


def test_the_model_card_quotes_its_record() -> None:
    record = json.loads((ROOT / "czsl_heads" / "encoders" / "assets" / "tiny_clip.json").read_text())
    card = (ROOT / "docs" / "tiny_clip.md").read_text()
    for level, accuracies in record["zero_shot"].items():
        cells = [f"{100 * accuracies[name]:.1f}" for name in ("seen", "held_out", "attribute", "object")]
        assert f"| {level} | {' | '.join(cells)} |" in card
    assert f"{record['spec']['images']:,} scenes" in card
    assert f"{record['spec']['steps']:,} steps of {record['spec']['batch_size']}" in card
    assert f"{record['minutes']:.0f} minutes" in card
    assert f"logit scale {record['logit_scale']:.1f}" in card


RESULTS = sorted((ROOT / "docs" / "results").iterdir())
BASELINE_RESULTS = sorted((ROOT / "docs" / "baseline_results").iterdir())


@pytest.mark.parametrize("folder", [*RESULTS, *BASELINE_RESULTS], ids=lambda folder: folder.name)
def test_committed_tables_are_those_of_the_committed_numbers(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert (folder / "ablation.md").read_text() == results_markdown(results)
    assert len(results["config"]["seeds"]) == len(results["rows"][0]["by_seed"])


@pytest.mark.parametrize("folder", [*RESULTS, *BASELINE_RESULTS], ids=lambda folder: folder.name)
def test_committed_results_are_of_the_schema_of_today(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert results["schema"] == SCHEMA
    assert config_of(results).as_dict().keys() - {"shapes"} <= results["config"].keys()
    table = TABLES[results["config"]["table"]]
    rows = table.asked(results["config"]["add"])
    assert [row["key"] for row in results["rows"]] == [row.key for row in rows]
    assert [row["model"] for row in results["rows"]] == [row.model.folder for row in rows]
    assert results["comparisons"] == compared(table, results["rows"])


def test_the_readme_quotes_the_committed_results() -> None:
    results = json.loads((ROOT / "docs" / "results" / "imbalance-0.5" / "results.json").read_text())
    auc = {row["key"]: percent(row["summary"]["closed"]["standard"]["auc"]) for row in results["rows"]}
    text = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"AUC is {auc['1']} with [CLS], {auc['2']} with Sparse Alignment, {auc['4']} with condenser and distillation, "
        f"{auc['5']} with the memory bank."
    ) in text


def test_the_tables_of_results_are_made_from_the_committed_numbers() -> None:
    names = runpy.run_path(str(ROOT / "docs" / "fill_tables.py"))
    for page in names["PAGES"]:
        text = (ROOT / "docs" / page).read_text()
        assert names["filled"](page, text) == text, page
    assert len(names["RUNS"]) == len(RESULTS)


def test_every_option_of_training_is_on_its_page() -> None:
    page = (ROOT / "docs" / "ablation.md").read_text()
    for name in flatten(Options().as_dict()):
        assert f"`{name}`" in page, name


def test_relative_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
