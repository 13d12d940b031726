"""Every Python block of the README and of docs/ runs, in the order of its page."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "my-data" / "images"  # what docs/data.md asks its reader for
    images.mkdir(parents=True)
    for number in range(1, 5):
        Image.new("RGB", (60, 50), (number * 50, 20, 30)).save(images / f"{number:04d}.jpg")
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


def test_relative_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
