"""A whole table: rows share data and seeds, models are trained once, results are complete."""

import json
import shutil
import statistics
from pathlib import Path

import pytest

from czsl_heads.models.saved import RESULTS
from czsl_heads.training.ablate import run_ablation
from czsl_heads.training.evaluate import Evaluation
from czsl_heads.training.stage import Stage
from czsl_heads.training.summary import SUMMARY, differences_of
from czsl_heads.training.train import RECORD

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory, small_ablation: Path, configured) -> tuple[Path, dict]:
    """The small ablation and a second seed."""
    out = Path(shutil.copytree(small_ablation, tmp_path_factory.mktemp("ablation") / "out"))
    return out, run_ablation(out, configured(seeds=2))


def test_a_second_seed_leaves_the_first_as_it_was(ablation: tuple[Path, dict], small_ablation: Path) -> None:
    before = json.loads((small_ablation / RESULTS).read_text())
    for row, known in zip(ablation[1]["rows"], before["rows"]):
        assert row["by_seed"][:1] == known["by_seed"]
        assert known["summary"]["open"]["exact"]["auc"]["std"] is None
    records = [path.relative_to(small_ablation) for path in small_ablation.rglob(RECORD)]
    assert len(records) == 4
    assert all((ablation[0] / path).read_bytes() == (small_ablation / path).read_bytes() for path in records)


def test_results_that_were_lost_are_made_again_from_the_records(
    ablation: tuple[Path, dict], configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out = Path(shutil.copytree(ablation[0], tmp_path / "out"))
    (out / RESULTS).write_bytes((out / RESULTS).read_bytes()[:-9])
    monkeypatch.setattr(Stage, "training_step", None)
    monkeypatch.setattr(Evaluation, "test_step", None)
    assert run_ablation(out, configured()) == ablation[1]  # of both seeds, though only one is asked for now
    assert "writes it anew: from the records of its models" in capsys.readouterr().err
    assert (out / RESULTS).read_bytes() == (ablation[0] / RESULTS).read_bytes()


def test_results_hold_every_number_of_every_model(ablation: tuple[Path, dict]) -> None:
    out, results = ablation
    assert results == json.loads((out / RESULTS).read_text())
    assert [row["key"] for row in results["rows"]] == ["1", "1+", "2", "2+", "3", "4", "5", "6"]
    assert [row["key"] for row in results["rows"] if row["transductive"]] == ["6"]
    for row in results["rows"]:
        assert [run["seed"] for run in row["by_seed"]] == [0, 1]
        assert row["trainable_parameters"] > 0
        for world in ("closed", "open"):
            for protocol in ("standard", "exact"):
                for name in SUMMARY:
                    values = [run["test"][world][protocol][name] for run in row["by_seed"]]
                    spread = row["summary"][world][protocol][name]
                    assert spread == {"mean": statistics.fmean(values), "std": statistics.stdev(values)}
    assert (results["schema"], results["shown"], results["baseline"]) == (2, "5", "1")
    assert results["config"]["options"]["lora"]["rank"] == 1
    assert (results["sources"]["epochs"], results["sources"]["learning_rate"]) == ("given", "guess")
    assert {"torch", "czsl-heads", "python"} <= results["environment"]["versions"].keys()
    assert results["data"]["images"] == {"train": 96, "val": 48, "test": 48}


def test_rows_differ_in_one_thing_each(ablation: tuple[Path, dict]) -> None:
    out, results = ablation
    records = {path.parent.name: json.loads(path.read_text()) for path in out.glob(f"seed0/*/{RECORD}")}
    assert records.keys() == {"cls", "max", "vac-labels", "vac"}
    options, recipes = ({name: record[kind] for name, record in records.items()} for kind in ("options", "recipe"))
    assert options["cls"] == options["max"] == options["vac"]
    assert options["vac-labels"] == {**options["vac"], "alpha": 0.0}
    assert recipes["cls"] == {**recipes["max"], "align": "cls"}
    assert recipes["max"] == {**recipes["vac"], "condenser": None}
    sizes = {name: record["trainable_parameters"] for name, record in records.items()}
    assert sizes["cls"] == sizes["max"]
    assert sizes["vac"] == sizes["vac-labels"]
    for row in results["rows"]:
        budget = records[row["model"]]["budgets"]["longer" if "+" in row["key"] else "best"]
        assert row["by_seed"][0]["test"] == budget["test"][row["readout"]["name"]]
        assert row["by_seed"][0]["best_epoch"] == budget["best_epoch"]


def test_rows_are_compared_seed_by_seed(ablation: tuple[Path, dict]) -> None:
    _, results = ablation
    tests = {row["key"]: [run["test"] for run in row["by_seed"]] for row in results["rows"]}
    compared = {(item["row"], item["against"]): item["differences"] for item in results["comparisons"]}
    assert {("2", "1"), ("2+", "1+"), ("3", "2+"), ("4", "3"), ("5", "4"), ("6", "5")} <= compared.keys()
    for (row, other), found in compared.items():
        assert found == differences_of(tests[row], tests[other])
        pairs = zip(tests[row], tests[other])
        differences = [one["open"]["exact"]["auc"] - another["open"]["exact"]["auc"] for one, another in pairs]
        auc = found["open"]["exact"]["auc"]
        assert auc["mean"] == pytest.approx(statistics.fmean(differences))
        # t(0.975, 1) = 12.7062
        assert auc["half_width"] == pytest.approx(12.7062 * statistics.stdev(differences) / 2**0.5, rel=1e-4)


def test_the_gap_of_each_row_is_reported_by_vector(ablation: tuple[Path, dict]) -> None:
    for row in ablation[1]["rows"]:
        condensed = row["key"] in "3456"
        assert row["gap"].keys() == {"cls", "pred", "true", *(["vac"] if condensed else [])}
        assert all(0 < spread["mean"] < 1 for spread in row["gap"].values())


def test_calling_again_repeats_nothing_whatever_the_speed(
    ablation: tuple[Path, dict], tmp_path: Path, configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = ablation
    monkeypatch.setattr(Stage, "training_step", None)
    monkeypatch.setattr(Evaluation, "test_step", None)
    assert run_ablation(out, configured(seeds=2)) == results
    copy = shutil.copytree(out, tmp_path / "copy")
    other = {"options": {"workers": 1, "checkpoint": True}, "trainer": {"accelerator": "cpu"}}
    fewer = run_ablation(copy, configured(**other))  # what was done with other seeds stays in the table
    assert fewer["rows"] == results["rows"]
    assert fewer["config"]["seeds"] == [0, 1]
