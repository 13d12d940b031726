"""Studies vary one thing, and read what was trained before."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from czsl_heads.report.curves import plot_study
from czsl_heads.report.table import ablation_markdown, percent
from czsl_heads.training import plans
from czsl_heads.training.ablate import run_ablation
from czsl_heads.training.config import SWEEPS, configure
from czsl_heads.training.options import SACOptions
from czsl_heads.training.studies import _STUDIES

FAST = {"epochs": 1, "batch_size": 48, "lora_rank": 1, "condense_epochs": 1, "condense_augment": False, "slots": 4}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> Path:
    """The ablation, without studies."""
    out = tmp_path_factory.mktemp("studies") / "out"
    run_ablation(out, configure(data=str(shapes_root), options=FAST, trainer=QUIET))
    return out


@pytest.fixture(scope="module")
def results(out: Path, shapes_root: Path) -> dict:
    config = configure(
        data=str(shapes_root), options=FAST, trainer=QUIET, reductions=True, pilot=True, sweep="beta,gamma,slots,alpha"
    )
    return run_ablation(out, config)


def auc(point: dict) -> float:
    return point["runs"][0]["test"]["closed"]["exact"]["auc"]


def test_asking_for_studies_repeats_no_row(results: dict, out: Path) -> None:
    assert [*results["studies"]] == ["reductions", "pilot", "beta", "gamma", "slots", "alpha"]
    assert len(list(out.glob("seed0/*/logs/*"))) == len(list(out.glob("seed0/*/run.json")))


def test_weights_at_their_settings_give_the_rows(results: dict, out: Path) -> None:
    rows = {row["number"]: auc(row) for row in results["rows"]}
    options = SACOptions(**results["config"]["options"])
    for name, value in (("beta", options.beta), ("gamma", options.gamma), ("slots", options.slots)):
        found = {point["series"]: auc(point) for point in results["studies"][name]["points"] if point["value"] == value}
        for series, number in (("row 4", "4"), ("row 5", "5"), ("row 6", "6")):
            assert found.get(series, rows[number]) == rows[number], (name, series)
    reductions = {point["value"]: auc(point) for point in results["studies"]["reductions"]["points"]}
    assert (reductions["cls"], reductions["max"]) == (rows["1"], rows["2"])
    assert len(reductions) == 7
    alphas = {point["value"]: auc(point) for point in results["studies"]["alpha"]["points"]}
    assert alphas[0.0] == rows["3"]
    assert alphas[options.alpha] == rows["4"]
    drops = {point["value"]: auc(point) for point in results["studies"]["pilot"]["points"]}
    assert drops[0.0] == rows["1"]
    weights = [load_file(out / "seed0" / name / "weights.safetensors") for name in ("cls", "drop-0.1", "drop-0.5")]
    for some, others in pairwise(weights):
        assert not any(torch.equal(tensor, others[name]) for name, tensor in some.items() if name.startswith("encoder"))


def test_the_ends_of_beta_are_single_branches(results: dict) -> None:
    rows = {row["number"]: auc(row) for row in results["rows"]}
    last = {point["series"]: auc(point) for point in results["studies"]["beta"]["points"] if point["value"] == 1}
    assert last == dict.fromkeys(("row 4", "row 5", "row 6"), rows["2"])  # the alignment branch alone


def test_a_weight_that_touches_no_training_is_swept_by_one_pass(results: dict, out: Path) -> None:
    folders = {path.parent.name for path in out.glob("seed0/*/run.json")}
    assert {"cls", "max", "vac", "vac-kl", "drop-0.5", "alpha-0.1"} <= folders
    assert not any(name.startswith(("beta", "gamma", "slots")) for name in folders)
    assert (out / "seed0" / "vac-kl" / "beta.json").exists()


def test_nothing_is_repeated(results: dict, out: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("czsl_heads.training.stage.Stage.training_step", never)
    monkeypatch.setattr("czsl_heads.training.evaluate.Evaluation.test_step", never)
    config = configure(data=str(shapes_root), options=FAST, trainer=QUIET, sweep="gamma")
    again = run_ablation(out, config)
    assert again["studies"] == results["studies"]  # those of before, and of now


def test_a_study_is_in_the_page_and_in_a_picture(results: dict, tmp_path: Path) -> None:
    page = ablation_markdown(results)
    for name, study in results["studies"].items():
        assert f"## {study['title']}" in page
        assert f"study-{name}.png" in page
        for point in study["points"]:
            cells = (
                f"| {point['value']} | {point['series']} | {percent(point['summary']['closed']['standard']['auc'])} |"
            )
            assert cells in page
        plot_study(study, tmp_path / f"study-{name}.png")
        assert (tmp_path / f"study-{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", _STUDIES)
def test_studies_name_folders_that_differ_where_training_does(name: str) -> None:
    study = _STUDIES[name](SACOptions(alpha=0.3, depth=2))
    by_folder: dict[str, plans.RunPlan] = {}
    for point in study.points:
        assert by_folder.setdefault(point.plan.folder, point.plan) == point.plan
        assert (point.readout in study.readouts) == bool(study.readouts)
    keys = [(point.value, point.series) for point in study.points]
    assert len(set(keys)) == len(keys) > 2
    assert set(SWEEPS) | {"reductions", "pilot", "blend"} == set(_STUDIES)


def test_an_interrupted_study_is_taken_up_again(out: Path, shapes_root: Path, tmp_path: Path, monkeypatch) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    for path in copy.glob("seed0/blend*"):
        shutil.rmtree(path)
    config = configure(data=str(shapes_root), options=FAST, trainer=QUIET, blend=True)
    with monkeypatch.context() as patch:
        patch.setattr(
            "czsl_heads.training.stage.Stage.training_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            run_ablation(copy, config)
    points = run_ablation(copy, config)["studies"]["blend"]["points"]
    assert [point["value"] for point in points] == [0.0, 0.25, 0.5, 0.75, 1.0]
