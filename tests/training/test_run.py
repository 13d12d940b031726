"""A run in a folder: it trains, keeps the best epoch, resumes to the bit, and loads back."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from czsl_heads.data import CompositionDataset
from czsl_heads.functional import czsl_scores
from czsl_heads.training.align import AlignStage
from czsl_heads.training.loaders import eval_loader
from czsl_heads.training.options import AlignOptions
from czsl_heads.training.run import RECORD, WEIGHTS, build_sac, load_align, train_align


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, dataset: CompositionDataset, options: AlignOptions, flags: dict
) -> Path:
    """A finished run, shared: no test may change it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train_align(folder, dataset, options, trainer=flags)
    return folder


def test_a_run_leaves_its_record_weights_and_logs(finished: Path, options: AlignOptions) -> None:
    record = json.loads((finished / RECORD).read_text())
    weights = load_file(finished / WEIGHTS)
    assert sum(tensor.numel() for tensor in weights.values()) == record["trainable_parameters"]
    assert all("deltas" in name or name.startswith("prompts.") for name in weights)
    assert 1 <= record["best_epoch"] <= options.epochs
    assert record["options"]["learning_rate"] == options.learning_rate
    assert list(finished.glob("logs/*/metrics.csv"))
    assert list(finished.glob("tensorboard/*/events*"))


def test_the_loaded_model_gives_the_recorded_numbers(finished: Path, dataset: CompositionDataset) -> None:
    sac = load_align(finished, dataset.space)
    record = json.loads((finished / RECORD).read_text())
    with torch.no_grad():
        for world, space in (("closed", dataset.space), ("open", dataset.space.open_world())):
            texts = sac.texts(space)
            loader = eval_loader(dataset, sac.encoder, AlignOptions(), "test")
            scores = torch.cat([sac(images, texts).scores for images, _ in loader])
            target = space.index(dataset.space.pairs[dataset.images("test").columns])
            mask = dataset.eval_mask("test") if world == "closed" else None
            result = czsl_scores(scores, target, *space.pairs.unbind(1), space.seen_mask, mask)
            assert result.auc == pytest.approx(record["test"][world]["standard"]["auc"], abs=1e-6)
            assert result.attr_accuracy == pytest.approx(record["test"][world]["standard"]["attr_accuracy"], abs=1e-6)


def test_training_changes_what_trains_and_nothing_else(finished: Path, dataset: CompositionDataset) -> None:
    record = json.loads((finished / RECORD).read_text())
    trained = load_align(finished, dataset.space)
    fresh = build_sac("tiny", dataset.space, AlignOptions(**record["options"]))
    for (name, before), after in zip(fresh.named_parameters(), trained.parameters()):
        assert torch.equal(before, after) != before.requires_grad, name


def test_the_same_seed_gives_the_same_bits(
    finished: Path, tmp_path: Path, dataset: CompositionDataset, options: AlignOptions, flags: dict
) -> None:
    torch.rand(7)
    train_align(tmp_path / "again", dataset, options, trainer=flags)
    assert (tmp_path / "again" / RECORD).read_bytes() == (finished / RECORD).read_bytes()
    other = train_align(tmp_path / "other", dataset, options, seed=1, trainer=flags)
    first, second = load_file(finished / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    third = load_file(tmp_path / "other" / WEIGHTS)
    assert other["seed"] == 1
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first)


def test_an_interrupted_run_resumes_to_the_same_numbers(
    finished: Path,
    tmp_path: Path,
    dataset: CompositionDataset,
    options: AlignOptions,
    flags: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, calls = AlignStage.training_step, 0

    def interrupted(self: AlignStage, batch):
        nonlocal calls
        calls += 1
        if calls == 4:  # the second of two batches of the second epoch
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(AlignStage, "training_step", interrupted)
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train_align(folder, dataset, options, trainer=flags)
    assert not (folder / RECORD).exists()
    assert not (folder / WEIGHTS).exists()
    train_align(folder, dataset, options, trainer=flags)
    assert calls == 6  # one epoch was run again, not two
    assert (folder / RECORD).read_bytes() == (finished / RECORD).read_bytes()
    assert len(list(folder.glob("logs/*"))) == 2  # what the first attempt logged is kept


def test_a_finished_run_is_not_repeated(
    finished: Path, dataset: CompositionDataset, options: AlignOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AlignStage, "training_step", None)
    assert train_align(finished, dataset, options) == json.loads((finished / RECORD).read_text())


def test_the_best_epoch_by_validation_auc_is_kept(
    tmp_path: Path, dataset: CompositionDataset, options: AlignOptions, flags: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    aucs = iter([0.2, 0.7, 0.4])
    log = AlignStage.log
    monkeypatch.setattr(
        AlignStage,
        "log",
        lambda self, name, value, **kwargs: log(self, name, next(aucs) if name == "val/auc" else value, **kwargs),
    )
    longer = dataclasses.replace(options, epochs=3)
    record = train_align(tmp_path / "best", dataset, longer, trainer=flags)
    assert record["best_epoch"] == 2
    assert record["validation_auc"] == pytest.approx(0.7)


def test_bf16_runs_by_lightnings_flag(
    tmp_path: Path, dataset: CompositionDataset, options: AlignOptions, flags: dict
) -> None:
    short = dataclasses.replace(options, epochs=1)
    record = train_align(tmp_path / "half", dataset, short, trainer={**flags, "precision": "bf16-mixed"})
    assert 0 <= record["test"]["closed"]["exact"]["auc"] <= 1


def test_loading_for_another_space_raises(finished: Path, dataset: CompositionDataset) -> None:
    from czsl_heads import CompositionSpace

    other = CompositionSpace(["red"], ["circle"], seen=[("red", "circle")])
    with pytest.raises(ValueError, match=r"expected `folder` with weights for this space.*prompts\.primitives"):
        load_align(finished, other)


def test_checkpoints_hold_trainable_parameters_only(finished: Path) -> None:
    state = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.removeprefix("sac.") for name in state} == set(load_file(finished / WEIGHTS))
