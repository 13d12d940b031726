"""The page holds all it shows, says what the files say, and no name of a data set can break it."""

import copy
import dataclasses
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from czsl_heads import CompositionSpace
from czsl_heads.data import DataError, read_dataset
from czsl_heads.models.recipe import CondenserOptions, Recipe, build
from czsl_heads.models.saved import load
from czsl_heads.report.page import look_at, pointing_scores, results_page
from czsl_heads.report.table import tables
from tests.references import reference_pointing

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A page, read: its elements, its text, and whether every element that was opened was closed in turn."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)

    def attributes(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def dataset(shapes_root: Path):
    return read_dataset(shapes_root)


@pytest.fixture(scope="module")
def content(small_ablation: Path) -> dict:
    return json.loads((small_ablation / "results.json").read_text())


@pytest.fixture(scope="module")
def models(small_ablation: Path):
    return [load(small_ablation, row=row) for row in ("5", "1")]


@pytest.fixture(scope="module")
def html(content, dataset, models) -> str:
    return results_page(content, dataset, *models, images=2)


@pytest.fixture(scope="module")
def found(dataset, models):
    return look_at(models, dataset, list(range(len(dataset.samples["test"]))))


def test_the_page_is_whole_and_asks_for_nothing(html: str) -> None:
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    for tag in ("script", "iframe", "object", "base", "form"):
        assert page.attributes(tag) == []
    images = page.attributes("img")
    assert len(images) >= 2 + 2 * 6
    for image in images:
        assert image["src"].startswith("data:image/")
        assert image["alt"]
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "url(" not in html
    assert "@import" not in html
    anchors = {link["href"][1:] for link in page.attributes("a")}
    assert anchors == {attributes["id"] for _, attributes in page.elements if "id" in attributes}


def test_the_page_fits_a_phone(html: str) -> None:
    page = Page(html)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.attributes("meta")
    assert html.count("<table>") == len(page.attributes("table"))
    assert html.count('<div class="scroll" tabindex="0"><table>') == html.count("<table>")


def test_the_page_shows_every_cell_of_the_tables(html: str, content: dict) -> None:
    words = [word.strip() for word in Page(html).words]
    for title, headings, rows in tables(content):
        assert title in words
        for cell in [*headings, *(cell for row in rows for cell in row)]:
            assert cell in words or cell == ""
    assert "Paired differences need two seeds" in Page(html).text


def test_transductive_rows_are_marked(html: str, content: dict) -> None:
    marked = [row for row in content["rows"] if row["transductive"]]
    assert len(marked) == 1
    assert html.count('<tr class="transductive"><td>6</td>') == html.count('<tr class="transductive">') == 3
    assert "test images, without their labels, change the memory bank" in Page(html).text


def test_what_is_computed_on_the_spot_agrees_with_the_results(found, content: dict, html: str) -> None:
    by_key = {row["key"]: row["by_seed"][0] for row in content["rows"]}
    share = sum(image.right for image in found) / len(found)
    assert share == pytest.approx(by_key["5"]["test"]["closed"]["standard"]["unbiased"]["match"])
    winners = [int(image.finding.maps["labelled"].winner) > 0 for image in found]
    assert sum(winners) / len(found) == pytest.approx(by_key["4"]["gap"]["winners_that_are_patches"]["true"])
    winners = [int(image.baseline.maps["alignment"].winner) > 0 for image in found]
    assert sum(winners) / len(found) == pytest.approx(by_key["1"]["gap"]["winners_that_are_patches"]["pred"])
    assert f"Of 48 test images, which is all, {100 * share:.1f} % got the right pair" in Page(html).text


def test_pointing_scores_equal_a_loop_over_mask_files(found, dataset, html: str) -> None:
    masks = [
        dataset.root / "masks" / image.sample.path.relative_to(dataset.root / "images").with_suffix(".png")
        for image in found
    ]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in masks])
    scores = {score.name: score for score in pointing_scores(found, ("5", "1"))}
    for model, name, title in (
        ("finding", "alignment", "row 5: cosine with the predicted pair"),
        ("finding", "condenser", "row 5: attention of the condenser (VAC)"),
        ("baseline", "attention", "row 1: attention of [CLS], last block"),
    ):
        maps = torch.stack([getattr(image, model).maps[name].patches for image in found])
        share = reference_pointing(maps, pixels == 255) / 48
        assert scores[title].score == pytest.approx(share)
        assert scores[title].error == pytest.approx((share * (1 - share) / 48) ** 0.5)
        assert f"{title} {100 * share:.1f}" in Page(html).text
    centres = (pixels[:, 4::8, 4::8] == 255).float()
    assert scores["chance: a patch drawn at random"].score == pytest.approx(float(centres.mean()))
    best = scores["always the same patch, the best one in hindsight"]
    assert best.score == pytest.approx(float(centres.mean(dim=0).max()))


def test_images_without_masks_are_left_out_of_pointing(found) -> None:
    fewer = [image._replace(inside=None) if index % 2 else image for index, image in enumerate(found)]
    assert pointing_scores(fewer, ("5", "1")) == pointing_scores(found[::2], ("5", "1"))
    assert pointing_scores([image._replace(inside=None) for image in found], ("5", "1")) == []


def test_the_seed_draws_the_sample(html: str, content: dict, dataset, models) -> None:
    assert results_page(content, dataset, *models, images=2) == html
    other = results_page(content, dataset, *models, seed=1, images=2)
    assert Page(other).text != Page(html).text


def test_a_data_set_without_masks_has_no_pointing_and_a_sample_of_images(
    tmp_path: Path, shapes_root: Path, content: dict, models
) -> None:
    shutil.copytree(shapes_root, tmp_path / "bare", ignore=shutil.ignore_patterns("masks"))
    text = Page(results_page(content, read_dataset(tmp_path / "bare"), *models, images=2)).text
    assert "Pointing" not in text
    assert "Do the maps point" not in text
    assert "Of 16 test images that were drawn at random" in text


def test_studies_have_a_plot_and_a_table(content: dict, dataset, models) -> None:
    row = content["rows"][0]
    runs = [{"seed": 0, "test": row["summary"], "gap": row["by_seed"][0]["gap"]}]
    points = [
        {"value": value, "series": "<one>", "summary": row["summary"], "gap": row["gap"], "by_seed": runs}
        for value in (0.25, 0.75)
    ]
    study = {"title": "A <study>", "axis": "share & more", "points": points}
    page = Page(results_page({**content, "studies": {"own": study}}, dataset, *models, images=1))
    assert {"#studies"} <= {link["href"] for link in page.attributes("a")}
    for words in ("A <study>", "share & more", "<one>", "0.25"):
        assert words in page.text
    assert "A <study>, test, % (seed 0)" in [image["alt"] for image in page.attributes("img")]


HOSTILE = '<b onclick="x">&amp;\'{{'


def test_hostile_names_are_shown_as_they_are(content: dict, dataset) -> None:
    """Words of a data set, on models that were never trained: what they predict does not matter here."""
    space = dataset.space
    attributes, objects = ([f"{HOSTILE}{index}" for index in range(12)] for _ in range(2))
    pairs = [tuple(pair) for pair in space.pairs.tolist()]
    seen = [pair for pair, mark in zip(pairs, space.seen_mask) if mark]
    renamed = CompositionSpace(attributes, objects, seen, [pair for pair in pairs if pair not in seen]).subset(pairs)
    samples = [
        dataclasses.replace(sample, attribute=renamed.pair_names[sample.column][0], object=objects[0])
        for sample in dataset.samples["test"]
    ]
    names = {
        name: [renamed.pair_names[column] for column in space.index(own)] for name, own in dataset.split_pairs.items()
    }
    other = dataclasses.replace(dataset, space=renamed, split_pairs=names, samples={**dataset.samples, "test": samples})
    recipes = Recipe("sac", condenser=CondenserOptions()), Recipe("sac", align="cls")
    fresh = [build(recipe, renamed).eval() for recipe in recipes]
    results = copy.deepcopy(content)
    results["config"] |= {"data": f"/data/{HOSTILE}", "encoder": HOSTILE, "preset": HOSTILE}
    for row in results["rows"]:
        row["title"] = HOSTILE
    html = results_page(results, other, *fresh, images=1)
    page = Page(html)
    assert HOSTILE not in html
    assert page.text.count(HOSTILE) > 30
    assert not any("onclick" in attributes for _, attributes in page.elements)
    assert page.attributes("b") == []
    assert "random weights" in page.text


def test_the_world_and_its_kind_are_named(content: dict, html: str, dataset, models) -> None:
    assert "no published benchmark" not in Page(html).text  # a folder that was given: what is in it, we do not know
    drawn = copy.deepcopy(content)
    drawn["config"]["shapes"] = {"imbalance": 0.75}
    text = Page(results_page(drawn, dataset, *models, images=1)).text
    assert "Ablation on the shapes world, encoder tiny" in text
    assert "information imbalance 0.75) is drawn by this package, and no published benchmark" in text
    assert "random weights" not in text


def test_more_images_than_there_are_show_all(content: dict, dataset, models) -> None:
    html = results_page(content, dataset, *models, images=99)
    assert html.count("<article") == 48
    assert html.count("None among the images looked at.") == 2


def test_a_mask_that_does_not_fit_is_named(tmp_path: Path, shapes_root: Path, content: dict, models) -> None:
    root = tmp_path / "data"
    shutil.copytree(shapes_root, root)
    dataset = read_dataset(root)
    sample = dataset.samples["test"][5]
    mask = root / "masks" / sample.path.relative_to(root / "images")
    Image.new("L", (48, 47)).save(mask)
    with pytest.raises(
        DataError, match=rf"{mask}: expected a mask of the size of its image, \(48, 48\), got \(48, 47\)"
    ):
        results_page(content, dataset, *models, images=1)
    mask.write_text("no mask")
    with pytest.raises(DataError, match=f"{mask}: expected an image, got a file of another kind"):
        results_page(content, dataset, *models, images=1)


def test_wrong_arguments_raise(content: dict, dataset, models) -> None:
    with pytest.raises(ValueError, match="expected `images` to be at least 1, got 0"):
        results_page(content, dataset, *models, images=0)
    other = dataclasses.replace(dataset, space=dataset.space.subset(dataset.space.seen_mask))
    with pytest.raises(DataError, match="expected the data set that the models were trained on, got another"):
        results_page(content, other, *models)
