"""Studies vary one thing, and read what was trained before; here one that was interrupted."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from czsl_heads._numbers import percent
from czsl_heads.models.recipe import from_plain
from czsl_heads.models.saved import WEIGHTS
from czsl_heads.report.curves import plot_study
from czsl_heads.report.table import results_markdown
from czsl_heads.training.ablate import run_ablation
from czsl_heads.training.evaluate import Evaluation
from czsl_heads.training.options import Options
from czsl_heads.training.stage import Stage
from czsl_heads.training.train import RECORD

pytestmark = pytest.mark.engine

ASKED = {"reductions": True, "pilot": True, "sweep": "beta,gamma,slots,alpha"}


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory, small_ablation: Path, configured) -> tuple[Path, dict]:
    """The small ablation, with studies asked for later, and interrupted once."""
    out = Path(shutil.copytree(small_ablation, tmp_path_factory.mktemp("studies") / "out"))
    step, calls = Stage.training_step, []

    def interrupted(stage: Stage, *batch):
        calls.append(stage)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(stage, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_ablation(out, configured(**ASKED))
        return out, run_ablation(out, configured(**ASKED))


def auc(result: dict) -> float:
    return result["by_seed"][0]["test"]["closed"]["exact"]["auc"]


def rows(results: dict) -> dict[str, float]:
    return {row["key"]: auc(row) for row in results["rows"]}


def points(results: dict, name: str) -> dict[tuple, float]:
    return {(point["series"], point["value"]): auc(point) for point in results["studies"][name]["points"]}


def test_asking_for_studies_repeats_no_row_and_trains_what_is_new_once(studies, small_ablation: Path) -> None:
    out, results = studies
    assert [*results["studies"]] == ["reductions", "pilot", "beta", "gamma", "slots", "alpha"]
    before = json.loads((small_ablation / "results.json").read_text())
    assert results["rows"] == before["rows"]
    trained = {path.parent.name for path in out.glob(f"seed0/*/{RECORD}")}
    assert trained == {
        *("cls", "max", "topk", "vac", "vac-labels", "mean", "attention", "linear", "logsumexp"),
        *("drop-0.1", "drop-0.3", "drop-0.5", "drop-0.7", "alpha-0.1", "alpha-0.3", "alpha-0.7", "alpha-0.9"),
    }
    assert len(list(out.glob("seed0/*/logs/*"))) == len(trained) + 1  # the one that was interrupted


def test_studies_of_lost_results_are_found_in_the_records(
    studies, configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = studies
    copy = Path(shutil.copytree(out, tmp_path / "out"))
    (copy / "results.json").write_text("{}")
    monkeypatch.setattr(Stage, "training_step", None)
    found = run_ablation(copy, configured())
    assert found["rows"] == results["rows"]
    assert found["studies"] == results["studies"]


def test_weights_at_their_settings_give_the_rows(studies) -> None:
    _, results = studies
    known, options = rows(results), from_plain(Options, results["config"]["options"], "options")
    for name, value in (("beta", options.beta), ("gamma", options.gamma), ("slots", options.bank.slots)):
        found = points(results, name)
        assert found["+ memory bank", value] == known["5"]
        assert found["+ updates *", value] == known["6"]
    assert points(results, "beta")["condenser", options.beta] == known["4"]
    reductions, pilot, alpha = (points(results, name) for name in ("reductions", "pilot", "alpha"))
    assert (reductions["alignment", "cls"], reductions["alignment", "max"]) == (known["1"], known["2"])
    assert len(reductions) == 7
    assert pilot["[CLS]", 0.0] == known["1"]
    assert (alpha["condenser", 0.0], alpha["condenser", options.alpha]) == (known["3"], known["4"])


def test_the_ends_of_beta_are_single_branches(studies) -> None:
    """With one, the method alone: both rankings of SAC are by probabilities."""
    last = {series: value for (series, beta), value in points(studies[1], "beta").items() if beta == 1}
    assert last == dict.fromkeys(("condenser", "+ memory bank", "+ updates *"), rows(studies[1])["2"])


def test_models_of_a_study_are_trained_apart(studies) -> None:
    weights = [load_file(studies[0] / "seed0" / name / WEIGHTS) for name in ("cls", "drop-0.1", "drop-0.5")]
    for some, others in pairwise(weights):
        assert not any(torch.equal(tensor, others[name]) for name, tensor in some.items() if name.startswith("encoder"))


def test_nothing_is_repeated(studies, configured, monkeypatch: pytest.MonkeyPatch) -> None:
    out, results = studies
    monkeypatch.setattr(Stage, "training_step", None)
    monkeypatch.setattr(Evaluation, "test_step", None)
    again = run_ablation(out, configured(sweep="gamma"))
    assert again["studies"] == results["studies"]  # those of before, and of now


def test_a_study_is_in_the_page_and_in_a_picture(studies, tmp_path: Path) -> None:
    _, results = studies
    page = results_markdown(results)
    for name, study in results["studies"].items():
        assert f"## {study['title']}" in page
        assert f"study-{name}.png" in page
        for point in study["points"]:
            value = percent(point["summary"]["closed"]["standard"]["auc"])
            assert f"| {point['value']} | {point['series']} | {value} |" in page
        plot_study(study, tmp_path / f"study-{name}.png")
        assert (tmp_path / f"study-{name}.png").stat().st_size > 10_000
