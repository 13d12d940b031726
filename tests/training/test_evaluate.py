"""One pass, many readouts: equal to scoring image by image with a bank that is fed by hand."""

import dataclasses
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from czsl_heads.data import CompositionDataset
from czsl_heads.functional import relative_modality_gap
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.recipe import BankOptions
from czsl_heads.models.saved import load_model
from czsl_heads.training import trainer
from czsl_heads.training.evaluate import Evaluation
from czsl_heads.training.options import Options
from czsl_heads.training.rows import Readout
from tests.training.reference import Reference, assert_same_numbers, reference_result

pytestmark = pytest.mark.engine


def run(model, dataset: CompositionDataset, options: Options, readouts: dict[str, Readout], **choices) -> Evaluation:
    evaluation = Evaluation(model, dataset, options, readouts, **choices)
    with trainer.quiet():
        trainer.testing_trainer({"accelerator": "cpu", "enable_progress_bar": False}).test(evaluation, verbose=False)
    return evaluation


@pytest.fixture(scope="module")
def model(condensed: Path) -> Condensed:
    return load_model(condensed)


@pytest.fixture(scope="module")
def evaluation(model: Condensed, dataset: CompositionDataset, options: Options, readouts: dict) -> Evaluation:
    return run(model, dataset, options, readouts)


@pytest.fixture(scope="module")
def by_hand(model: Condensed, dataset: CompositionDataset, options: Options, readouts: dict) -> dict:
    reference = Reference(model, dataset, options.eval_batch_size)
    return {
        (name, world): reference.scores(readout, world)
        for name, readout in readouts.items()
        for world in ("closed", "open")
    }


def test_a_readout_equals_scoring_by_hand(evaluation: Evaluation, by_hand: dict, dataset: CompositionDataset) -> None:
    found = evaluation.as_dicts()
    for (name, world), scores in by_hand.items():
        for protocol in ("standard", "exact"):
            expected = reference_result(scores, dataset, world, protocol=protocol)
            assert_same_numbers(found[name][world][protocol], expected)


def test_every_readout_scores_in_its_own_way(by_hand: dict) -> None:
    scores = [rows for (name, world), rows in by_hand.items() if world == "closed" and name != "alone"]
    assert not any(torch.equal(one, other) for i, one in enumerate(scores) for other in scores[:i])


def test_every_pass_starts_from_the_same_bank(
    evaluation: Evaluation, model: Condensed, dataset: CompositionDataset, options: Options, readouts: dict
) -> None:
    before = deepcopy(model.state_dict())
    again = run(model, dataset, options, readouts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert again.as_dicts() == evaluation.as_dicts()
    with trainer.quiet():
        again.trainer.test(again, verbose=False)  # the same module, tested twice
    assert again.as_dicts() == evaluation.as_dicts()


def test_other_readouts_do_not_change_a_result(
    evaluation: Evaluation, model: Condensed, dataset: CompositionDataset, options: Options, readouts: dict
) -> None:
    alone = run(model, dataset, options, {"adapted": readouts["adapted"]}, worlds=("closed",))
    assert alone.as_dicts() == {"adapted": {"closed": evaluation.as_dicts()["adapted"]["closed"]}}


def test_labels_can_fill_the_bank(
    model: Condensed, dataset: CompositionDataset, options: Options, readouts: dict
) -> None:
    labelled = dataclasses.replace(options, bank=BankOptions(slots=3, labels=True))
    filled = run(model, dataset, labelled, {"bank": readouts["bank"]}).filled_bank("closed", 3)
    wanted = dataset.images("train").columns.bincount(minlength=len(dataset.space)).clamp(max=3)
    assert torch.equal(filled.counts, wanted)


@torch.no_grad()
def test_the_gap_is_that_of_each_readouts_vectors(
    evaluation: Evaluation, model: Condensed, dataset: CompositionDataset
) -> None:
    pairs = dataset.space.pairs
    texts = model.texts(pairs)
    columns = dataset.images("test").columns
    mask = dataset.eval_mask("test")
    vectors: dict[str, list[torch.Tensor]] = {"cls": [], "pred": [], "true": [], "vac": []}
    patches = {"pred": 0, "true": 0}
    for (image, _), label in zip(dataset.images("test", model.encoder.transform()), columns):
        encoded = model.encode(image[None])
        logits = model.compare(encoded, texts)[0]
        tokens = F.normalize(encoded[0], dim=-1)
        predicted = model.method.fuse(logits.aligned, pairs).masked_fill(~mask, -1).argmax()
        vectors["cls"].append(tokens[0])
        vectors["vac"].append(logits.features[0])
        for name, pair in (("pred", predicted), ("true", label)):
            winner = (tokens @ texts.pairs[pair]).argmax()
            vectors[name].append(tokens[winner])
            patches[name] += int(winner > 0)
    for name, rows in vectors.items():
        expected = relative_modality_gap(torch.stack(rows), texts.pairs, labels=columns)
        assert evaluation.gap["relative_modality_gap"][name] == pytest.approx(expected.item(), abs=1e-5), name
    for name, count in patches.items():
        assert evaluation.gap["winners_that_are_patches"][name] == pytest.approx(count / len(columns))
    assert 0 < evaluation.gap["patches_above_the_middle"]["pred"] < 1


def test_a_method_alone_has_one_readout_and_no_gap_of_a_condenser(
    aligned: Path, condensed: Path, dataset: CompositionDataset, options: Options, readouts: dict
) -> None:
    method = load_model(aligned)
    evaluation = run(method, dataset, options, {"alone": readouts["alone"]}, split="val")
    assert evaluation.gap["relative_modality_gap"].keys() == {"cls", "pred", "true"}
    scores = Reference(method, dataset, 1).scores(readouts["alone"], split="val")
    found = evaluation.as_dicts()["alone"]["closed"]["standard"]
    assert_same_numbers(found, reference_result(scores, dataset, split="val"))
    for name in ("fused", "bank"):
        with pytest.raises(ValueError, match="expected `readouts` of the method alone without a condenser, got one"):
            Evaluation(method, dataset, options, {"one": readouts[name]})
    with pytest.raises(ValueError, match="expected `readouts` with a bank where gamma is above 0, got one without"):
        Evaluation(load_model(condensed), dataset, options, {"one": Readout(0.5, 0.2)})


def test_vectors_that_are_not_finite_do_not_enter_a_bank_and_are_counted(
    condensed: Path, dataset: CompositionDataset, options: Options, readouts: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(condensed)
    encode, calls = model.encoder.encode_tokens, []

    def spoiled(images: torch.Tensor) -> torch.Tensor:
        tokens = encode(images)
        calls.append(len(images))
        if len(calls) == 2:
            tokens[:3] = torch.nan
        return tokens

    monkeypatch.setattr(model.encoder, "encode_tokens", spoiled)
    evaluation = run(model, dataset, options, {"bank": readouts["bank"]}, worlds=("closed",))
    assert evaluation.rejected == 3
    assert evaluation.filled_bank("closed", 3).features.isfinite().all()
