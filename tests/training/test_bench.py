"""Many CLIPs, one table: equal to scoring each by hand, and an encoder that fails loses no other."""

import csv
from pathlib import Path

import pytest
import torch

from czsl_heads import wrap
from czsl_heads.cli import main
from czsl_heads.data import CompositionDataset, read_dataset
from czsl_heads.functional import alignment
from czsl_heads.metrics import CZSLScore
from czsl_heads.models.recipe import build
from czsl_heads.training import bench as module
from czsl_heads.training.bench import COLUMNS, bench, plot_bench

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def dataset(shapes_root: Path) -> CompositionDataset:
    return read_dataset(shapes_root)


def reference_scores(dataset: CompositionDataset, reduce: str, context: str) -> CZSLScore:
    """Image by image, sentence by sentence."""
    encoder = wrap("tiny")
    texts = encoder.encode_texts([f"{context} {attribute} {obj}" for attribute, obj in dataset.space])
    score = CZSLScore(dataset.space, eval_mask=dataset.eval_mask("val"), protocol="exact")
    images = dataset.images("val", encoder.transform())
    for image, column in (images[number] for number in range(len(images))):
        tokens = encoder.encode_tokens(image[None])
        score.update(alignment(tokens, texts, reduce=reduce), torch.tensor([column]))
    return score


def test_numbers_are_those_of_scoring_by_hand(dataset: CompositionDataset, tmp_path: Path) -> None:
    flags = {"accelerator": "cpu", "enable_progress_bar": False}
    rows = bench(["tiny"], dataset, tmp_path, context="a photo of a", split="val", batch_size=7, trainer=flags)
    assert [row["align"] for row in rows] == ["cls", "max"]
    for row in rows:
        result = reference_scores(dataset, row["align"], "a photo of a").result()
        for name in ("auc", "harmonic_mean", "seen", "unseen", "attr_accuracy", "obj_accuracy"):
            assert row[name] == pytest.approx(getattr(result, name), abs=1e-6)
        assert row["images"] == len(dataset.images("val", wrap("tiny").transform()))
        assert (row["pairs"], row["patches"], row["dim"], row["image_size"]) == (len(dataset.space), 36, 96, 48)


def test_an_encoder_that_fails_is_told_and_loses_no_other(
    dataset: CompositionDataset, tmp_path: Path, shapes_root: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    data = f"--encoders tinny,tiny --data {shapes_root} --out {out} --split val"
    flags = "--align cls --trainer.accelerator cpu --trainer.enable_progress_bar false"
    status = main(f"bench {data} {flags}".split())
    assert status == 1  # not all of what was asked for is there
    with (out / "bench.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert [row["encoder"] for row in rows] == ["tinny", "tiny"]
    assert "tinny" in rows[0]["error"]
    assert "\n" not in rows[0]["error"]
    assert rows[1]["error"] == ""
    assert 0 < float(rows[1]["auc"]) < 1
    assert (out / "bench.png").stat().st_size > 5000
    told = capsys.readouterr()
    assert "tinny" in told.out + told.err


def test_an_encoder_that_cannot_be_scored_loses_no_other(dataset, tmp_path: Path, monkeypatch) -> None:
    def build_or_fail(recipe, space, *, encoder):
        if recipe.encoder == "tiny:":
            raise RuntimeError("out of\nmemory")
        return build(recipe, space, encoder=encoder)

    monkeypatch.setattr(module, "wrap", lambda name: wrap("tiny"))
    monkeypatch.setattr(module, "build", build_or_fail)
    flags = {"accelerator": "cpu", "enable_progress_bar": False}
    rows = bench(["tiny:", "tiny", "tiny"], dataset, tmp_path, aligns=["cls"], split="val", trainer=flags)
    assert [(row["encoder"], row.get("error", "")) for row in rows] == [("tiny:", "out of memory"), ("tiny", "")]


def test_wrong_options_are_told(dataset: CompositionDataset, tmp_path: Path) -> None:
    for options, message in (
        ({"encoders": []}, "expected `encoders` to name at least one, got none"),
        ({"encoders": ["tiny", ""]}, "expected `encoders` to be names, got an empty one in 'tiny', ''"),
        ({"split": "train"}, "expected `split` with images of seen and of unseen pairs, got 'train' without unseen"),
        ({"split": "all"}, "expected `split` to be one of train, val, test, got 'all'"),
        ({"aligns": ["attention"]}, "expected `aligns` to be one of cls, max, topk, logsumexp, mean, got 'attention'"),
    ):
        arguments = {"encoders": ["tiny"], **options}
        with pytest.raises(ValueError, match=message):
            bench(arguments.pop("encoders"), dataset, tmp_path, **arguments)
    assert not (tmp_path / "bench.csv").exists()


def test_a_picture_of_no_row_is_one_too(tmp_path: Path) -> None:
    plot_bench([{"encoder": "none", "error": "not there"}], tmp_path / "bench.png")
    assert (tmp_path / "bench.png").is_file()
