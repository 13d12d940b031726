"""The stream of images beside what eats it: every case has a row, and what is asked for wrongly is named."""

import csv
from pathlib import Path

import pytest
import torch

from czsl_heads import wrap
from czsl_heads.cli import main
from czsl_heads.data import CompositionDataset, read_dataset
from czsl_heads.data.layout import ImageSplit
from czsl_heads.training import loader_rates as module
from czsl_heads.training.loader_rates import COLUMNS, loader_rates

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def dataset(shapes_root: Path) -> CompositionDataset:
    return read_dataset(shapes_root)


@pytest.fixture
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.01)


@pytest.mark.usefixtures("_brief")
def test_every_case_has_a_row_and_nothing_else_is_left(shapes_root: Path, tmp_path: Path, capsys) -> None:
    given = f"--encoders tiny --data {shapes_root} --out {tmp_path / 'out'} --split val --batch_size 8"
    assert main(f"bench --loader true {given} --trainer.accelerator cpu".split()) == 0
    assert "images per second" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["loader.csv"]
    with (tmp_path / "out" / "loader.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    numbers = [str(number) for number in module._numbers_of_workers()]
    cases = [(use, way, number) for use in module.USES for way in ("files", "decoded once") for number in numbers]
    assert [(row["use"], row["pictures"], row["workers"]) for row in rows] == cases
    for row in rows:
        loader, takes = int(row["loader_images_per_second"]), int(row["encoder_images_per_second"])
        assert min(loader, takes) > 0
        assert float(row["loader_by_encoder"]) == pytest.approx(loader / takes, abs=0.006)


@pytest.mark.usefixtures("_brief")
def test_rates_count_images_by_the_clock(dataset, tmp_path, monkeypatch) -> None:
    """A clock that stands still but for one second a batch: each loader gives a batch per second, but for its start."""
    images, time = len(dataset.samples["val"]), iter(range(10**6))
    monkeypatch.setattr(module, "encoder_rate", lambda *given: 10)
    monkeypatch.setattr(module, "_now", lambda device: float(next(time)))
    (first, *others) = loader_rates(["tiny"], dataset, tmp_path, split="val", batch_size=images, workers=[0])
    # The only batch of the split: nothing is left out of the one second between the two looks at the clock but the look
    # at its arrival.
    assert first["loader_images_per_second"] == images
    assert {row["loader_images_per_second"] for row in others} == {images}
    (first, *_) = loader_rates(["tiny"], dataset, tmp_path, split="val", batch_size=1, most_images=4, workers=[0])
    assert first["loader_images_per_second"] == 3  # of four batches the first was not waited for


@pytest.mark.parametrize("batch_size", [1, 3, 5, 1000])
def test_what_was_loaded_while_nobody_looked_at_the_clock_is_not_counted(dataset, tmp_path, monkeypatch, batch_size):
    """A clock that goes on by one with each picture: whatever the batches, one picture is loaded per second."""
    read = []
    picture = ImageSplit.picture
    monkeypatch.setattr(ImageSplit, "picture", lambda self, number: read.append(number) or picture(self, number))
    monkeypatch.setattr(module, "encoder_rate", lambda *given: 1)
    monkeypatch.setattr(module, "_now", lambda device: float(len(read)))
    images = dataset.images("val", wrap("tiny").transform(), seed=0)
    for use in module.USES:
        assert module._loader_rate(images, use, batch_size, 0, "cpu") == 1


def test_an_encoder_that_is_not_there_leaves_no_folder(dataset, tmp_path) -> None:
    with pytest.raises(ValueError, match="did you mean tiny"):
        loader_rates(["tinny"], dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_the_numbers_of_workers_are_doubled_up_to_the_most(monkeypatch, most: int) -> None:
    monkeypatch.setattr(module, "count_workers", lambda workers: most)
    numbers = module._numbers_of_workers()
    assert numbers == {1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3], 8: [0, 1, 2, 4, 8]}[most]


def test_what_is_wrong_is_named(dataset: CompositionDataset, tmp_path: Path) -> None:
    def refused(words: str, encoders=("tiny",), **options) -> None:
        with pytest.raises(ValueError, match=words):
            loader_rates(list(encoders), dataset, tmp_path / "out", **options)

    refused("expected `encoders` to name at least one, got none", ())
    refused("expected `split` to be one of train, val, test, got 'dev'", split="dev")
    refused("expected `precision` to be one of 32-true, bf16-mixed, got '16-true'", precision="16-true")
    refused("expected `batch_size` to be at least 1, got 0", batch_size=0)
    refused("expected `most_images` to be at least 1, got 0", most_images=0)
    refused("expected `workers` to be at least 0, got -1", workers=[-1])
    assert not (tmp_path / "out").exists()


def test_flags_that_mean_nothing_to_loaders_are_refused(shapes_root: Path, tmp_path: Path, capsys) -> None:
    given = f"--encoders tiny --data {shapes_root} --out {tmp_path / 'out'} --trainer.devices 2"
    assert main(f"bench --loader true {given}".split()) == 1
    assert "expected no `trainer.devices` with --loader true, got 2" in capsys.readouterr().err


def test_training_runs_backward_and_evaluation_does_not() -> None:
    for use, adapted in (("evaluation", False), ("training", True)):
        encoder = wrap("tiny")
        assert module.encoder_rate(encoder, use, 2, "bf16-mixed") > 0
        trained = [weight for weight in encoder.parameters() if weight.requires_grad]
        assert bool(trained) == adapted
        assert all(weight.grad is not None for weight in trained)
        assert torch.is_grad_enabled()
