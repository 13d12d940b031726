"""The weights of the fusion are picked by validation AUC, over the whole grid, from one pass."""

import json
from pathlib import Path

import pytest

from czsl_heads.data import CompositionDataset
from czsl_heads.training.evaluate import Evaluation
from czsl_heads.training.options import Options
from czsl_heads.training.rows import BankPlan, Readout
from czsl_heads.training.train import evaluate_model
from czsl_heads.training.tune import BETAS, GAMMAS, TUNED, tune

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def tuned(condensed: Path, dataset: CompositionDataset, flags: dict) -> dict:
    return tune(condensed.parent.parent, dataset, "vac", [0], flags)


def test_every_pair_of_weights_is_scored_and_the_best_is_taken(tuned: dict, condensed: Path) -> None:
    assert tuned == json.loads((condensed.parent.parent / TUNED).read_text())
    assert (tuned["seeds"], tuned["model"], tuned["slots"]) == ([0], "vac", 3)
    found = {(point["beta"], point["gamma"]): point["auc"] for point in tuned["grid"]}
    assert {(beta, gamma) for beta in BETAS for gamma in GAMMAS} <= found.keys()
    assert tuned["best"]["auc"] == max(found.values())
    assert tuned["used"] == {"beta": 0.5, "gamma": 0.5, "auc": found[0.5, 0.5]}
    assert len({auc for (beta, _), auc in found.items() if beta == 1}) == 1  # the method alone


def test_an_auc_of_the_grid_is_that_of_an_evaluation(
    tuned: dict, condensed: Path, dataset: CompositionDataset, options: Options, flags: dict
) -> None:
    readout = Readout(0.3, 0.4, BankPlan(options.bank.slots))
    evaluation = evaluate_model(condensed, dataset, {"one": readout}, split="val", worlds=("closed",), trainer=flags)
    (point,) = (point for point in tuned["grid"] if (point["beta"], point["gamma"]) == (0.3, 0.4))
    assert point["auc"] == evaluation.results["one"]["closed"]["standard"].auc


def test_of_equals_the_least_machinery_is_taken(
    condensed: Path, dataset: CompositionDataset, flags: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Same:
        auc = 0.5

    def same(evaluation: Evaluation) -> None:
        evaluation.results = {name: {"closed": {"standard": Same}} for name in evaluation.readouts}

    monkeypatch.setattr(Evaluation, "on_test_epoch_end", same)
    best = tune(condensed.parent.parent, dataset, "vac", [0], flags)["best"]
    assert (best["beta"], best["gamma"]) == (1.0, 0.0)
