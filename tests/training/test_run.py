"""A run in a folder: it trains, keeps the best epochs, resumes to the bit in every stage, and loads back."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from czsl_heads import SAC
from czsl_heads.data import CompositionDataset
from czsl_heads.functional import czsl_scores
from czsl_heads.training.evaluate import Evaluation, Readout
from czsl_heads.training.loaders import eval_loader
from czsl_heads.training.options import SACOptions
from czsl_heads.training.plans import readouts_of
from czsl_heads.training.run import BANK, RECORD, WEIGHTS, build_sac, evaluate_model, load_run, train_model
from czsl_heads.training.stage import Stage

ALIGNED = {"aligned": Readout()}


def test_a_run_leaves_its_record_weights_and_logs(aligned: Path, options: SACOptions) -> None:
    record = json.loads((aligned / RECORD).read_text())
    weights = load_file(aligned / WEIGHTS)
    assert sum(tensor.numel() for tensor in weights.values()) == record["trainable_parameters"]
    assert all("deltas" in name or name.startswith("prompts.") for name in weights)
    assert [*record["budgets"]] == ["best", "longer"]
    assert 1 <= record["budgets"]["best"]["best_epoch"] <= options.epochs
    assert record["budgets"]["longer"]["best_epoch"] <= options.epochs + 1
    assert record["budgets"]["best"]["validation_auc"] <= record["budgets"]["longer"]["validation_auc"]
    assert record["options"]["learning_rate"] == options.learning_rate
    assert list(aligned.glob("logs/*/metrics.csv"))
    assert list(aligned.glob("tensorboard/*/events*"))
    assert not (aligned / BANK).exists()


def test_the_second_stage_trains_the_condenser_alone_and_keeps_all_weights(aligned: Path, condensed: Path) -> None:
    record = json.loads((condensed / RECORD).read_text())
    before, after = load_file(aligned / WEIGHTS), load_file(condensed / WEIGHTS)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    own = {name: tensor for name, tensor in after.items() if name not in before}
    assert all(name.startswith("condenser.") for name in own)
    assert sum(tensor.numel() for tensor in own.values()) == record["trainable_parameters"]
    assert [*record["budgets"]["best"]["test"]] == ["fused", "bank", "adapted"]
    assert record["budgets"]["best"]["gap"]["relative_modality_gap"].keys() == {"cls", "pred", "true", "vac"}


def scores_of(sac: SAC, dataset: CompositionDataset, world: str) -> tuple:
    space = dataset.space if world == "closed" else dataset.space.open_world()
    texts = sac.texts(space)
    loader = eval_loader(dataset.images("test", sac.encoder.transform()), SACOptions())
    scores = torch.cat([sac(images, texts).scores for images, _ in loader])
    target = space.index(dataset.space.pairs[dataset.images("test").columns])
    mask = dataset.eval_mask("test") if world == "closed" else None
    return scores, target, *space.pairs.unbind(1), space.seen_mask, mask


@torch.no_grad()
def test_loaded_models_give_the_recorded_numbers(aligned: Path, condensed: Path, dataset: CompositionDataset) -> None:
    for folder, world, readout in (
        (aligned, "closed", "aligned"),
        (aligned, "open", "aligned"),
        (condensed, "closed", "bank"),
        (condensed, "open", "bank"),  # the pairs of this data set are all there are
    ):
        result = czsl_scores(*scores_of(load_run(folder), dataset, world))
        recorded = json.loads((folder / RECORD).read_text())["budgets"]["best"]["test"][readout][world]["standard"]
        for name in ("auc", "seen", "unseen", "attr_accuracy", "obj_accuracy"):
            assert getattr(result, name) == pytest.approx(recorded[name], abs=1e-6), (world, readout, name)


def test_training_changes_what_trains_and_nothing_else(aligned: Path, dataset: CompositionDataset) -> None:
    record = json.loads((aligned / RECORD).read_text())
    trained = load_run(aligned)
    fresh = build_sac("tiny", dataset.space, SACOptions(**record["options"]))
    for (name, before), after in zip(fresh.named_parameters(), trained.parameters()):
        assert torch.equal(before, after) != before.requires_grad, name


def test_the_same_seed_gives_the_same_bits(
    aligned: Path, tmp_path: Path, dataset: CompositionDataset, options: SACOptions, flags: dict
) -> None:
    torch.rand(7)
    train_model(tmp_path / "again", dataset, options, ALIGNED, extra_epochs=1, trainer=flags)
    assert (tmp_path / "again" / RECORD).read_bytes() == (aligned / RECORD).read_bytes()
    other = train_model(tmp_path / "other", dataset, options, ALIGNED, seed=1, trainer=flags)
    first, second = load_file(aligned / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    third = load_file(tmp_path / "other" / WEIGHTS)
    assert other["seed"] == 1
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first)


def test_a_longer_budget_does_not_change_the_shorter_one(
    aligned: Path, tmp_path: Path, dataset: CompositionDataset, options: SACOptions, flags: dict
) -> None:
    alone = train_model(tmp_path / "alone", dataset, options, ALIGNED, trainer=flags)
    assert [*alone["budgets"]] == ["best"]
    assert alone["budgets"]["best"] == json.loads((aligned / RECORD).read_text())["budgets"]["best"]
    longer = dataclasses.replace(options, epochs=options.epochs + 1)
    whole = train_model(tmp_path / "whole", dataset, longer, ALIGNED, trainer=flags)
    assert whole["budgets"]["best"] == json.loads((aligned / RECORD).read_text())["budgets"]["longer"]


def cut_short(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Interrupt training at a step; the list counts steps."""
    step, calls = Stage.training_step, [0]

    def interrupted(self: Stage, batch):
        calls[0] += 1
        if calls[0] == after:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Stage, "training_step", interrupted)
    return calls


def test_the_first_stage_resumes_to_the_same_numbers(
    aligned: Path,
    tmp_path: Path,
    dataset: CompositionDataset,
    options: SACOptions,
    flags: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = cut_short(monkeypatch, 4)  # the second of two batches of the second epoch
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train_model(folder, dataset, options, ALIGNED, extra_epochs=1, trainer=flags)
    assert not (folder / RECORD).exists()
    assert not (folder / WEIGHTS).exists()
    train_model(folder, dataset, options, ALIGNED, extra_epochs=1, trainer=flags)
    assert calls == [8]  # one epoch of three was run again, not two
    assert (folder / RECORD).read_bytes() == (aligned / RECORD).read_bytes()
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (folder, aligned)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert len(list(folder.glob("logs/*"))) == 2  # what the first attempt logged is kept


def test_the_second_stage_and_the_tests_resume_to_the_same_numbers(
    aligned: Path,
    condensed: Path,
    tmp_path: Path,
    dataset: CompositionDataset,
    options: SACOptions,
    flags: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run() -> None:
        readouts = readouts_of(options, "condense")
        train_model(tmp_path / "cut", dataset, options, readouts, stage="condense", base=aligned, trainer=flags)

    calls = cut_short(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run()
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "_predict", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not (tmp_path / "cut" / RECORD).exists()
    assert calls == [5]
    run()
    assert calls == [5]
    assert (tmp_path / "cut" / RECORD).read_bytes() == (condensed / RECORD).read_bytes()
    assert (tmp_path / "cut" / BANK).read_bytes() == (condensed / BANK).read_bytes()


def test_a_finished_run_is_not_repeated(
    aligned: Path, dataset: CompositionDataset, options: SACOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "training_step", None)
    assert train_model(aligned, dataset, options, ALIGNED) == json.loads((aligned / RECORD).read_text())


def test_the_best_epoch_of_each_budget_is_kept(
    tmp_path: Path, dataset: CompositionDataset, options: SACOptions, flags: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    aucs = iter([0.2, 0.7, 0.4, 0.6, 0.9, 0.8])
    log = Stage.log
    monkeypatch.setattr(
        Stage,
        "log",
        lambda self, name, value, **kwargs: log(self, name, next(aucs) if name == "val/auc" else value, **kwargs),
    )
    longer = dataclasses.replace(options, epochs=3)
    record = train_model(tmp_path / "best", dataset, longer, ALIGNED, extra_epochs=3, trainer=flags)
    found = {name: (part["best_epoch"], part["validation_auc"]) for name, part in record["budgets"].items()}
    assert found == {"best": (2, pytest.approx(0.7)), "longer": (5, pytest.approx(0.9))}


def test_an_unfinished_folder_can_be_moved(
    aligned: Path,
    tmp_path: Path,
    dataset: CompositionDataset,
    options: SACOptions,
    flags: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_short(monkeypatch, 5)  # the first step of the third epoch
    with pytest.raises(KeyboardInterrupt):
        train_model(tmp_path / "here", dataset, options, ALIGNED, extra_epochs=1, trainer=flags)
    (tmp_path / "here").rename(tmp_path / "there")
    train_model(tmp_path / "there", dataset, options, ALIGNED, extra_epochs=1, trainer=flags)
    assert (tmp_path / "there" / RECORD).read_bytes() == (aligned / RECORD).read_bytes()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("stage", ["condense", "joint"])
def test_bf16_runs_by_lightnings_flag(
    aligned: Path,
    tmp_path: Path,
    dataset: CompositionDataset,
    options: SACOptions,
    flags: dict,
    stage: str,
    precision: str,
) -> None:
    short = dataclasses.replace(options, epochs=1, condense_epochs=1)
    record = train_model(
        tmp_path / "half",
        dataset,
        short,
        readouts_of(short, stage),
        stage=stage,
        base=aligned if stage == "condense" else None,
        trainer={**flags, "precision": precision},
    )
    for readout in ("fused", "bank", "adapted"):
        assert 0 <= record["budgets"]["best"]["test"][readout]["open"]["exact"]["auc"] <= 1


def test_joint_training_trains_everything(
    tmp_path: Path, dataset: CompositionDataset, options: SACOptions, flags: dict
) -> None:
    short = dataclasses.replace(options, epochs=1, condense_epochs=1)
    folder = tmp_path / "joint"
    record = train_model(folder, dataset, short, {"fused": Readout(0.5)}, stage="joint", trainer=flags)
    weights = load_file(folder / WEIGHTS)
    assert record["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())
    torch.manual_seed(0)
    fresh = build_sac("tiny", dataset.space, short, condenser=True)
    changed = {name for name in weights if not torch.equal(weights[name], fresh.get_parameter(name))}
    assert {"prompts.primitives", "condenser.query"} <= changed


def test_scoring_anew_writes_nothing_and_gives_the_recorded_numbers(
    condensed: Path, dataset: CompositionDataset, options: SACOptions, flags: dict
) -> None:
    before = {path: path.stat().st_mtime_ns for path in condensed.rglob("*")}
    evaluation = evaluate_model(condensed, dataset, readouts_of(options, "condense"), trainer=flags)
    assert {path: path.stat().st_mtime_ns for path in condensed.rglob("*")} == before
    recorded = json.loads((condensed / RECORD).read_text())["budgets"]["best"]["test"]
    for name, by_world in evaluation.results.items():
        for world, result in by_world.items():
            assert result["exact"].auc == recorded[name][world]["exact"]["auc"]


def test_weights_of_another_model_are_refused(aligned: Path, tmp_path: Path) -> None:
    weights = load_file(aligned / WEIGHTS)
    for name in (RECORD, WEIGHTS):
        (tmp_path / name).write_bytes((aligned / name).read_bytes())
    save_file({**weights, "prompts.primitives": weights["prompts.primitives"][1:]}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"expected weights of this model in .*other names.*: prompts\.primitives$"):
        load_run(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((aligned / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"expected tensors of a run in .*, got a damaged file"):
        load_run(tmp_path)
    save_file({name: tensor for name, tensor in weights.items() if "context" not in name}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"prompts\.attribute_context, prompts\.object_context, prompts\.pair_context"):
        load_run(tmp_path)


def test_checkpoints_hold_trainable_parameters_only(aligned: Path, condensed: Path) -> None:
    for folder in (aligned, condensed):
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        trained = {name for name in load_file(folder / WEIGHTS) if folder == aligned or name.startswith("condenser")}
        assert {name.removeprefix("sac.") for name in state} == trained
