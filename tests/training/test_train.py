"""A model in a folder: it trains, keeps the best epochs, resumes to the bit in every stage, and loads back."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from czsl_heads._sealed import SEAL, DamagedError
from czsl_heads.data import CompositionDataset
from czsl_heads.models.recipe import Recipe, build, from_plain
from czsl_heads.models.saved import CARD, CONFIG, WEIGHTS, load_model
from czsl_heads.training.checkpoints import content_digest, read_checkpoint, read_trained
from czsl_heads.training.evaluate import Evaluation
from czsl_heads.training.options import Options
from czsl_heads.training.rows import BankPlan, Readout
from czsl_heads.training.stage import Stage
from czsl_heads.training.summary import numbers_of
from czsl_heads.training.train import RECORD, evaluate_model, train_model
from czsl_heads.training.trainer import check_trainer
from tests.training.reference import NUMBERS, assert_same_numbers, reference_result

pytestmark = pytest.mark.engine

ALONE = {"alone": Readout()}
KEPT = (RECORD, WEIGHTS, CONFIG, CARD)


def read(folder: Path, name: str = RECORD) -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture
def train(dataset: CompositionDataset, options: Options, flags: dict):
    """Trains SAC's stage I in a folder, as the fixture `aligned` was, unless told otherwise."""

    def run(folder: Path, *, method="sac", options=options, readouts=ALONE, condenser=False, **arguments) -> dict:
        recipe = options.recipe(method, "tiny", "max", condenser=condenser)
        return train_model(folder, dataset, recipe, options, readouts, **{"trainer": flags, **arguments})

    return run


def test_a_training_leaves_its_record_weights_card_and_logs(aligned: Path, options: Options) -> None:
    record, weights = read(aligned), load_file(aligned / WEIGHTS)
    assert sum(tensor.numel() for tensor in weights.values()) == record["trainable_parameters"]
    assert all("deltas" in name or name.startswith("prompts.") for name in weights)
    assert [*record["budgets"]] == ["best", "longer"]
    best, longer = record["budgets"].values()
    assert 1 <= best["best_epoch"] <= options.epochs
    assert longer["best_epoch"] <= options.epochs + 1
    assert best["selected"] <= longer["selected"]
    assert from_plain(Options, record["options"], "options") == options
    assert from_plain(Recipe, record["recipe"], "recipe") == options.recipe("sac", "tiny", "max")
    assert list(aligned.glob("logs/*/metrics.csv"))
    assert list(aligned.glob("tensorboard/*/events*"))
    assert "# sac on data of your own" in (aligned / CARD).read_text()


def test_the_second_stage_trains_the_condenser_alone_and_keeps_all_weights(
    aligned: Path, condensed: Path, readouts: dict
) -> None:
    record, before, after = read(condensed), load_file(aligned / WEIGHTS), load_file(condensed / WEIGHTS)
    assert all(torch.equal(after.pop(f"method.{name}"), tensor) for name, tensor in before.items())
    of_bank = [after.pop(name) for name in [*after] if name.startswith("bank.")]
    assert of_bank
    assert all(name.startswith("condenser.") for name in after)
    assert sum(tensor.numel() for tensor in after.values()) == record["trainable_parameters"]
    assert [*record["budgets"]["best"]["test"]] == [*readouts]
    assert record["budgets"]["best"]["gap"]["relative_modality_gap"].keys() == {"cls", "pred", "true", "vac"}


@pytest.mark.parametrize(("stage", "readout"), [("aligned", "alone"), ("condensed", "bank")])
@torch.no_grad()
def test_a_loaded_model_gives_the_recorded_numbers(
    stage: str, readout: str, dataset: CompositionDataset, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(stage)
    model = load_model(folder)
    images = [image for image, _ in dataset.images("test", model.encoder.transform())]
    scores = model.scores(torch.stack(images), dataset.space.pairs)
    recorded = read(folder)["budgets"]["best"]["test"][readout]
    assert_same_numbers(recorded["closed"]["standard"], reference_result(scores, dataset))
    of_card = read(folder, CONFIG)["record"]["test"]  # of all ways to score it, the one that is its own
    assert of_card == numbers_of(recorded)


def test_training_changes_what_trains_and_nothing_else(aligned: Path, dataset: CompositionDataset) -> None:
    trained = load_model(aligned)
    torch.manual_seed(1)
    fresh = build(trained.recipe, dataset.space)
    for (name, before), after in zip(fresh.named_parameters(), trained.parameters()):
        assert torch.equal(before, after) != before.requires_grad, name


def test_the_same_seed_gives_the_same_bits(aligned: Path, tmp_path: Path, train) -> None:
    torch.rand(7)
    train(tmp_path / "again", extra_epochs=1)
    for name in KEPT:
        assert (tmp_path / "again" / name).read_bytes() == (aligned / name).read_bytes()
    assert train(tmp_path / "other", seed=1)["seed"] == 1
    first, other = (load_file(folder / WEIGHTS) for folder in (aligned, tmp_path / "other"))
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_longer_budget_does_not_change_the_shorter_one(
    aligned: Path, tmp_path: Path, train, options: Options
) -> None:
    budgets = read(aligned)["budgets"]
    assert train(tmp_path / "alone")["budgets"] == {"best": budgets["best"]}
    longer = dataclasses.replace(options, epochs=options.epochs + 1)
    assert train(tmp_path / "whole", options=longer)["budgets"]["best"] == budgets["longer"]


def cut_short(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Interrupt training at a step; the list counts steps."""
    step, calls = Stage.training_step, [0]

    def interrupted(self: Stage, *batch):
        calls[0] += 1
        if calls[0] == after:
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(Stage, "training_step", interrupted)
    return calls


def test_the_first_stage_resumes_to_the_same_numbers_also_elsewhere(
    aligned: Path, tmp_path: Path, train, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = cut_short(monkeypatch, 6)  # the second of two batches of the third epoch
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "here", extra_epochs=1)
    folder = (tmp_path / "here").rename(tmp_path / "there")
    assert not any((folder / name).exists() for name in KEPT)
    train(folder, extra_epochs=1)
    assert calls == [8]  # one epoch of three was run again
    for name in KEPT:
        assert (folder / name).read_bytes() == (aligned / name).read_bytes()
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (folder, aligned)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert len(list(folder.glob("logs/*"))) == 2  # what the first attempt logged is kept


def test_the_second_stage_and_the_tests_resume_to_the_same_numbers(
    aligned: Path, condensed: Path, tmp_path: Path, train, readouts: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = cut_short(monkeypatch, 3)
    arguments = {"readouts": readouts, "condenser": True, "base": aligned}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "_look", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, **arguments)
    assert not (tmp_path / RECORD).exists()
    assert calls == [5]
    train(tmp_path, **arguments)
    assert calls == [5]
    for name in KEPT:
        assert (tmp_path / name).read_bytes() == (condensed / name).read_bytes()


def test_batch_norm_and_dropout_resume_to_the_same_numbers(
    tmp_path: Path, train, monkeypatch: pytest.MonkeyPatch
) -> None:
    troika = Options(epochs=2, batch_size=48, model={"adapter_dim": 4, "dropout": 0.2, "layers": 1})
    whole = train(tmp_path / "whole", method="troika", options=troika)
    calls = cut_short(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", method="troika", options=troika)
    assert train(tmp_path / "parts", method="troika", options=troika) == whole
    assert calls == [6]
    weights = [load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts")]
    assert any("running_mean" in name for name in weights[0])
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_finished_training_is_not_repeated_and_stays_one_of_its_settings(
    aligned: Path, train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "training_step", None)
    assert train(aligned) == read(aligned)
    with pytest.raises(ValueError, match=r"of the same settings, got .*, whose seed is 0 instead of 1"):
        train(aligned, seed=1)


def without(record: dict, *names: str) -> dict:
    return {name: value for name, value in record.items() if name not in names}


def test_ways_to_score_that_a_finished_model_lacks_are_added(
    aligned: Path, tmp_path: Path, train, readouts: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the bank, whose numbers are then those of the model."""
    fused = {"fused": readouts["fused"]}
    before = train(tmp_path, readouts=fused, condenser=True, base=aligned)
    assert load_model(tmp_path).bank is None
    monkeypatch.setattr(Stage, "training_step", None)
    more = {**fused, "bank": readouts["bank"], "two slots": Readout(0.5, 0.5, BankPlan(2))}
    after = train(tmp_path, readouts=more, condenser=True, base=aligned)
    assert after == read(tmp_path)
    tests = after["budgets"]["best"].pop("test")
    assert tests.pop("fused") == before["budgets"]["best"].pop("test")["fused"]
    assert tests.keys() == {"bank", "two slots"}
    digests = ("sha256", "files")  # of a model with a bank now
    assert without(after, *digests) == without(before, *digests)
    assert load_model(tmp_path).bank.slots == 3
    assert read(tmp_path, CONFIG)["record"]["test"] == numbers_of(tests["bank"])


def test_the_best_epoch_of_each_budget_is_kept(
    tmp_path: Path, train, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([0.2, 0.7, 0.4, 0.6, 0.9, 0.8])
    monkeypatch.setattr(Stage, "_selected", lambda self, auc: next(found))
    record = train(tmp_path, options=dataclasses.replace(options, epochs=3), readouts={}, extra_epochs=3)
    chosen = {name: (part["best_epoch"], part["selected"]) for name, part in record["budgets"].items()}
    assert chosen == {"best": (2, pytest.approx(0.7)), "longer": (5, pytest.approx(0.9))}
    assert [budget["test"] for budget in record["budgets"].values()] == [{}, {}]  # no way to score it, no test


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("joint", [False, True])
def test_bf16_runs_by_lightnings_flag(
    aligned: Path, tmp_path: Path, train, options: Options, readouts: dict, flags: dict, joint: bool, precision: str
) -> None:
    short = dataclasses.replace(options, epochs=1, condense_epochs=1, batch_size=8, joint=joint)
    arguments = {"condenser": True, "base": None if joint else aligned}
    few = {"limit_train_batches": 1, "limit_test_batches": 2}  # a CPU is slow at it
    record = train(
        tmp_path, options=short, readouts=readouts, trainer={**flags, **few, "precision": precision}, **arguments
    )
    for result in record["budgets"]["best"]["test"].values():
        assert all(0 <= result["open"]["exact"][name] <= 1 for name in NUMBERS)


def test_joint_training_trains_everything(tmp_path: Path, train, options: Options, dataset: CompositionDataset) -> None:
    joint = dataclasses.replace(options, epochs=1, condense_epochs=1, joint=True)
    record = train(tmp_path, options=joint, readouts={"fused": Readout(0.5)}, condenser=True)
    weights = load_file(tmp_path / WEIGHTS)
    assert record["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())
    torch.manual_seed(0)
    fresh = build(from_plain(Recipe, record["recipe"], "recipe"), dataset.space)
    changed = {name for name in weights if not torch.equal(weights[name], fresh.get_parameter(name))}
    assert {"method.prompts.primitives", "condenser.query"} <= changed


def test_scoring_anew_writes_nothing_and_gives_the_recorded_numbers(
    condensed: Path, dataset: CompositionDataset, readouts: dict, flags: dict
) -> None:
    before = {path: path.stat().st_mtime_ns for path in condensed.rglob("*")}
    evaluation = evaluate_model(condensed, dataset, readouts, trainer=flags)
    assert {path: path.stat().st_mtime_ns for path in condensed.rglob("*")} == before
    recorded = read(condensed)["budgets"]["best"]["test"]
    for name, by_world in evaluation.results.items():
        for world, result in by_world.items():
            assert result["exact"].auc == recorded[name][world]["exact"]["auc"]


def test_a_base_of_another_model_is_refused(aligned: Path, tmp_path: Path, train) -> None:
    base = Path(shutil.copytree(aligned, tmp_path / "base"))
    save_file({**load_file(base / WEIGHTS), "other": torch.zeros(1)}, base / WEIGHTS)
    with pytest.raises(ValueError, match=r"model\.safetensors as it was written, got other bytes.*; the czsl command"):
        train(tmp_path / "next", condenser=True, base=base)
    (base / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"expected the file .*model\.safetensors, got none"):
        train(tmp_path / "next", condenser=True, base=base)
    assert not (tmp_path / "next").exists()


def test_checkpoints_hold_trainable_parameters_only(aligned: Path, condensed: Path) -> None:
    for folder, first in ((aligned, ""), (condensed, "condenser.")):
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        trained = {name for name in load_file(folder / WEIGHTS) if name.startswith(first)}
        assert {name.removeprefix("model.") for name in state} == trained


def test_float16_weights_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(ValueError, match=r"expected `trainer.precision` that keeps trained weights out of float16, .*"):
        check_trainer({"precision": "16-true", "accelerator": "cpu"})
    assert check_trainer({"precision": "bf16-true", "accelerator": "cpu"}) == 1


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("last",), "goes on from longer.ckpt, the last good one"),
        (("best",), "no other one will do: the training starts anew"),
        (("longer",), "no other one will do: the training starts anew"),
        (("last", "longer"), "no other one will do: the training starts anew"),
    ],
)
def test_with_two_budgets_a_damaged_checkpoint_changes_no_number(
    aligned: Path, tmp_path: Path, train, names: tuple[str, ...], told: str, capsys: pytest.CaptureFixture
) -> None:
    """Of the chosen epochs only the one that is written last knows what the other one chose."""
    folder = Path(shutil.copytree(aligned, tmp_path / "max"))
    (folder / RECORD).unlink()
    for name in names:
        path = folder / "checkpoints" / f"{name}.ckpt"
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
    train(folder, extra_epochs=1)
    assert told in capsys.readouterr().err
    for name in KEPT:
        assert (folder / name).read_bytes() == (aligned / name).read_bytes()


def test_a_checkpoint_of_other_tensors_or_without_its_digest_is_told_or_taken(aligned: Path, tmp_path: Path) -> None:
    path = aligned / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert content_digest({name: value for name, value in content.items() if name != SEAL}) == content[SEAL]
    del content[SEAL]  # of an earlier version
    torch.save(content, tmp_path / "old.ckpt")
    assert read_checkpoint(tmp_path / "old.ckpt").keys() == content.keys()
    torch.save({**content, SEAL: "0"}, tmp_path / "other.ckpt")
    with pytest.raises(DamagedError, match=r"expected the checkpoint .*other\.ckpt as it was .*, got other content"):
        read_checkpoint(tmp_path / "other.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(DamagedError, match=r"expected a checkpoint in .*list\.ckpt, got another file"):
        read_checkpoint(tmp_path / "list.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(DamagedError, match=r"expected the checkpoint .*text\.ckpt as it was written, got damage \("):
        read_checkpoint(tmp_path / "text.ckpt")
    with pytest.raises(DamagedError, match=r"old\.ckpt, got one of other tensors: "):
        read_trained(tmp_path / "old.ckpt", torch.nn.Linear(2, 2))


def test_digests_of_contents_differ_where_contents_do() -> None:
    plain = {"a": torch.arange(4), "b": [1, 2.0, None, "x", {"c": True}]}
    same = {"a": torch.arange(4).clone(), "b": (1, 2.0, None, "x", {"c": True})}
    assert content_digest(plain) == content_digest(same)
    others = [
        {**plain, "a": torch.arange(4).view(2, 2)},
        {**plain, "a": torch.arange(4).int()},
        {**plain, "a": torch.tensor([0, 1, 2, 4])},
        {**plain, "b": [1, 2, None, "x", {"c": True}]},
        {**plain, "b": [1, 2.0, None, "x", {"c": 1}]},
        {"b": plain["b"], "a": plain["a"]},
        {**plain, "d": {}},
        {**plain, "b": [1, [2.0, None, "x", {"c": True}]]},
    ]
    digests = {content_digest(other) for other in [plain, *others]}
    assert len(digests) == len(others) + 1
