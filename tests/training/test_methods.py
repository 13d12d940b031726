"""Any method through the same tables: as published, with Sparse Alignment, with condenser and bank behind it."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import czsl_heads
from czsl_heads.data import CompositionDataset
from czsl_heads.encoders.open_clip import OpenClipEncoder
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.recipe import build
from czsl_heads.models.saved import CONFIG, RESULTS, WEIGHTS
from czsl_heads.training.ablate import run_ablation
from czsl_heads.training.config import configure_model
from czsl_heads.training.evaluate import Evaluation
from czsl_heads.training.own_table import own_table
from czsl_heads.training.rows import Readout
from czsl_heads.training.stage import Stage
from czsl_heads.training.summary import numbers_of
from czsl_heads.training.train import RECORD
from tests.training.reference import Reference, assert_same_numbers, reference_result

pytestmark = pytest.mark.engine

WEIGHED = {"gamma": 0.7, "bank.slots": 2, "eval_batch_size": 20}
SMALL = {"troika": {"model.adapter_dim": 4}}


def count_images(patch: pytest.MonkeyPatch) -> list[int]:
    """How many images pass the encoder in each test that follows."""
    passes: list[int] = []
    start, step, encode = Evaluation.on_test_epoch_start, Evaluation.test_step, OpenClipEncoder.encode_tokens

    def started(evaluation: Evaluation) -> None:
        passes.append(0)
        start(evaluation)

    def counted(encoder: OpenClipEncoder, images, **options):
        passes[-1] += len(images)
        return encode(encoder, images, **options)

    def stepped(evaluation: Evaluation, *batch) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(OpenClipEncoder, "encode_tokens", counted)
            step(evaluation, *batch)

    patch.setattr(Evaluation, "on_test_epoch_start", started)
    patch.setattr(Evaluation, "test_step", stepped)
    return passes


@pytest.fixture(scope="module", params=["clip", "csp", "troika"])
def comparison(request, tmp_path_factory: pytest.TempPathFactory, configured) -> tuple[str, Path, dict, list[int]]:
    """Method, folder, results, and how many images each test looked at; shared: no test may change it."""
    method = request.param
    out = tmp_path_factory.mktemp("comparisons") / method
    options = {**WEIGHED, **SMALL.get(method, {})}
    with pytest.MonkeyPatch.context() as patch:
        passes = count_images(patch)
        results = run_ablation(out, configured(method, add=["vac", "bank"], options=options))
    return method, out, results, passes


def by_key(results: dict) -> dict[str, dict]:
    return {row["key"]: row["by_seed"][0] for row in results["rows"]}


def test_rows_are_those_of_the_method_and_of_what_was_added(comparison) -> None:
    method, out, results, _ = comparison
    assert results == json.loads((out / RESULTS).read_text())
    assert [row["key"] for row in results["rows"]] == ["cls", "max", "topk", "probs", "vac", "bank", "adapted"]
    assert [row["key"] for row in results["rows"] if row["transductive"]] == ["adapted"]
    assert results["rows"][2]["title"] == "+ Sparse Alignment, mean of the 4 best"
    assert (results["shown"], results["baseline"]) == ("bank", "cls")
    assert {(item["row"], item["against"]) for item in results["comparisons"]} >= {("max", "cls"), ("bank", "vac")}
    assert (results["sources"]["bank.slots"], results["sources"]["condense_learning_rate"]) == ("given", "sac")
    parameters = {row["key"]: row["trainable_parameters"] for row in results["rows"]}
    assert len({parameters[key] for key in ("cls", "max", "topk", "probs")}) == 1
    # A vector for each of 24 primitives; and nothing.
    assert method == "troika" or parameters["cls"] == {"csp": 24 * 96, "clip": 0}[method]
    curves = [run["test"]["closed"]["exact"]["curve"] for run in by_key(results).values()]
    assert len({*map(str, curves)}) >= 6  # method and probabilities rank alike where there is one branch


def test_rows_that_share_a_model_are_scored_in_one_pass(comparison) -> None:
    # cls, max, topk: the test images; vac: the training images before them, for the bank.
    assert comparison[-1] == [48, 48, 48, 96 + 48]


def test_every_row_equals_scoring_by_hand(comparison, dataset: CompositionDataset, configured) -> None:
    method, out, results, _ = comparison
    found = by_key(results)
    config = configured(method, add=["vac", "bank"], options={**WEIGHED, **SMALL.get(method, {})})
    references = {}
    for row in config.rows:
        folder = row.model.folder
        if folder not in references:
            model = czsl_heads.load(out, row=row.key)
            references[folder] = Reference(model, dataset, config.options.eval_batch_size)
        scores = references[folder].scores(config.readout(row))
        for protocol in ("standard", "exact"):
            expected = reference_result(scores, dataset, protocol=protocol)
            assert_same_numbers(found[row.key]["test"]["closed"][protocol], expected)


def test_clip_is_evaluated_as_it_is_and_nothing_is_written_beside(tmp_path: Path, dataset, configured) -> None:
    config = configured("clip", by=configure_model, align="max")
    run = by_key(run_ablation(tmp_path / "out", config))["model"]
    assert not [*tmp_path.rglob("*.ckpt"), *tmp_path.rglob("logs")]
    assert (run["best_epoch"], run["selected"]) == (None, None)
    clip = build(config.options.recipe("clip", "tiny", "max"), dataset.space).eval()
    scores = Reference(clip, dataset, 1).scores(Readout())
    assert_same_numbers(run["test"]["closed"]["standard"], reference_result(scores, dataset))


def test_an_addition_and_a_study_asked_for_later_train_no_method_again(
    tmp_path: Path, configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "csp", Counter()
    before = run_ablation(out, configured("csp"))
    step = Stage.training_step

    def noted(stage: Stage, *batch):
        seen[type(stage.model).__name__] += 1
        return step(stage, *batch)

    monkeypatch.setattr(Stage, "training_step", noted)
    with_vac = run_ablation(out, configured("csp", add=["vac"]))
    assert seen == {"Condensed": 2}
    assert [row["key"] for row in with_vac["rows"]] == ["cls", "max", "topk", "probs", "vac"]
    assert with_vac["rows"][:3] == before["rows"]
    assert czsl_heads.load(out).bank is None

    passes = count_images(monkeypatch)
    whole = run_ablation(out, configured("csp", add=["vac", "bank"], sweep="beta,gamma,slots"))
    assert seen == {"Condensed": 2}
    assert passes == [96 + 48]
    assert whole["rows"][:5] == with_vac["rows"]
    record = json.loads((out / "seed0" / "vac" / RECORD).read_text())["budgets"]["best"]["test"]
    assert {row["readout"]["name"] for row in whole["rows"][4:]} < record.keys()
    assert czsl_heads.load(out).bank.slots == 16
    of_card = json.loads((out / "seed0" / "vac" / CONFIG).read_text())["record"]["test"]
    assert of_card == numbers_of(by_key(whole)["bank"]["test"])

    again = run_ablation(out, configured("csp"))  # what was asked for before stays
    assert (again["rows"], again["studies"]) == (whole["rows"], whole["studies"])
    assert passes == [96 + 48]


def test_a_base_that_only_others_build_on_is_trained_but_not_tested(tmp_path: Path, configured) -> None:
    out = tmp_path / "one"
    config = configured("csp", by=configure_model, align="max", add=["vac", "bank"], seed=3)
    with pytest.MonkeyPatch.context() as patch:
        passes = count_images(patch)
        results = run_ablation(out, config)
    assert passes == [96 + 48]
    (row,) = results["rows"]
    assert (row["key"], row["model"], row["by_seed"][0]["seed"]) == ("model", "vac", 3)
    assert (results["shown"], results["baseline"], results["comparisons"]) == ("model", "model", [])
    base = json.loads((out / "seed3" / "max" / RECORD).read_text())
    assert base["budgets"]["best"]["test"] == {}
    assert base["budgets"]["best"]["best_epoch"] == 1
    own, behind = (load_file(out / "seed3" / name / WEIGHTS) for name in ("max", "vac"))
    assert all(torch.equal(tensor, behind[f"method.{name}"]) for name, tensor in own.items())
    assert type(czsl_heads.load(out)) is Condensed


def test_lora_and_patch_drop_work_for_any_method_through_the_table_of_sac(tmp_path: Path, configured) -> None:
    config = configured("csp", table="steps", options={"lora.rank": 1, "patch_drop": 0.25})
    results = run_ablation(tmp_path, config)
    assert [row["key"] for row in results["rows"]] == ["1", "1+", "2", "2+", "3", "4", "5", "6"]
    weights = load_file(tmp_path / "seed0" / "max" / WEIGHTS)
    learned = {name: tensor for name, tensor in weights.items() if name.endswith(".b")}
    assert len(learned) == 3 * 4  # q, k and v of four blocks
    assert all(tensor.any() for tensor in learned.values())  # which start from zero
    assert czsl_heads.load(tmp_path, row="2").recipe.patch_drop == 0.25


def test_a_split_without_unseen_pairs_is_reported_as_such(shapes_root: Path, tmp_path: Path, configured) -> None:
    data = Path(shutil.copytree(shapes_root, tmp_path / "data"))
    pairs = data / "compositional-split-natural"
    train = set((pairs / "train_pairs.txt").read_text().split("\n"))
    kept = [line for line in (pairs / "test_pairs.txt").read_text().split("\n") if line in train]
    (pairs / "test_pairs.txt").write_text("\n".join(kept))
    config = configured("clip", by=configure_model, data=str(data))
    summary = run_ablation(tmp_path / "out", config)["rows"][0]["summary"]["closed"]["standard"]
    assert summary["unseen"] == {"mean": None, "std": None}
    assert 0 <= summary["seen"]["mean"] <= 1


def test_a_method_may_bring_a_table_of_its_own(tmp_path: Path, configured, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = own_table("eva")
    kept = [row for row in whole.rows if row.key in ("base", "eva", "bank")]
    pairs = [pair for pair in whole.comparisons if set(pair) <= {"base", "eva", "bank"}]
    few = dataclasses.replace(whole, rows=tuple(kept), comparisons=tuple(pairs))
    monkeypatch.setattr("czsl_heads.training.config.own_table", lambda method: few)
    config = configured("eva")
    assert config.table == "own"
    results = run_ablation(tmp_path / "out", config)
    assert [row["key"] for row in results["rows"]] == ["base", "eva", "bank"]
    assert (results["shown"], results["baseline"]) == ("eva", "base")
    rows = {row["key"]: row for row in results["rows"]}
    assert rows["base"]["trainable_parameters"] == 24 * 96 + 9 * 96  # words and contexts
    assert rows["eva"]["trainable_parameters"] > 60_000
    assert sorted(path.name for path in (tmp_path / "out" / "seed0").iterdir()) == ["base", "eva", "max", "vac"]
    assert run_ablation(tmp_path / "out", config)["rows"] == results["rows"]
    with pytest.raises(ValueError, match='expected `add` with table="alignment" only, got it with "own"'):
        configured("eva", add=["vac"])
