"""The weights of the fusion are picked by validation AUC, over the whole grid, from one pass."""

import json
from pathlib import Path

import pytest

from czsl_heads.data import CompositionDataset
from czsl_heads.training.evaluate import BankPlan, Evaluation, Readout
from czsl_heads.training.options import SACOptions
from czsl_heads.training.run import evaluate_model
from czsl_heads.training.tune import BETAS, GAMMAS, TUNED, tune


@pytest.fixture(scope="module")
def tuned(condensed: Path, dataset: CompositionDataset, flags: dict) -> dict:
    return tune(condensed.parent.parent, dataset, [0], flags)


def test_every_pair_of_weights_is_scored_and_the_best_is_taken(tuned: dict, condensed: Path) -> None:
    assert tuned == json.loads((condensed.parent.parent / TUNED).read_text())
    found = {(point["beta"], point["gamma"]): point["auc"] for point in tuned["grid"]}
    assert {(beta, gamma) for beta in BETAS for gamma in GAMMAS} <= found.keys()
    assert tuned["best"]["auc"] == max(found.values())
    assert tuned["best"]["auc"] >= tuned["used"]["auc"]


def test_an_auc_of_the_grid_is_that_of_an_evaluation(
    tuned: dict, condensed: Path, dataset: CompositionDataset, options: SACOptions, flags: dict
) -> None:
    readout = Readout(0.3, 0.4, BankPlan(options.slots))
    evaluation = evaluate_model(condensed, dataset, {"one": readout}, split="val", worlds=("closed",), trainer=flags)
    (point,) = (point for point in tuned["grid"] if (point["beta"], point["gamma"]) == (0.3, 0.4))
    assert point["auc"] == evaluation.results["one"]["closed"]["standard"].auc


def test_the_alignment_branch_alone_does_not_depend_on_gamma(tuned: dict) -> None:
    assert len({point["auc"] for point in tuned["grid"] if point["beta"] == 1}) == 1


def test_of_equals_the_least_machinery_is_taken(
    condensed: Path, dataset: CompositionDataset, flags: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Same:
        auc = 0.5

    monkeypatch.setattr(
        Evaluation,
        "on_test_epoch_end",
        lambda self: self.results.update({name: {"closed": {"standard": Same}} for name in self.readouts}),
    )
    best = tune(condensed.parent.parent, dataset, [0], flags)["best"]
    assert (best["beta"], best["gamma"]) == (1.0, 0.0)
