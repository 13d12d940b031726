"""Every run that has a gap and an AUC is a point; what does not exist is left out."""

import copy

import numpy as np
from PIL import Image

from czsl_heads.report.scatter import VECTORS, plot_gap


def run(gaps, auc):
    test = {"closed": {"standard": {"auc": auc}}}
    return {"gap": {"relative_modality_gap": gaps}, "test": test}


def rows():
    gaps = {"cls": 0.3, "pred": 0.4, "true": 0.2}
    plain = {"key": "1", "title": "first", "by_seed": [run(gaps, 0.5), run({**gaps, "cls": 0.35}, 0.6)]}
    condensed = {"key": "2", "title": "second", "by_seed": [run({**gaps, "vac": 0.5}, 0.55)]}
    return [plain, condensed]


def colored(path):
    """How many pixels are neither grey nor text: those of the points."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return int((pixels.max(axis=2) - pixels.min(axis=2) > 60).sum())


def test_each_vector_has_a_panel():
    assert set(VECTORS) == {"cls", "pred", "true", "vac"}


def test_points_are_drawn_and_missing_numbers_are_not(tmp_path):
    full, fewer = rows(), rows()
    fewer[0]["by_seed"][1]["test"]["closed"]["standard"]["auc"] = None
    for name, content in (("full", full), ("fewer", fewer)):
        before = copy.deepcopy(content)
        plot_gap({"rows": content}, tmp_path / f"{name}.png")
        assert content == before
    assert colored(tmp_path / "full.png") > colored(tmp_path / "fewer.png") > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fewer.png", "full.png"]
