"""The ablation: rows share data and seeds, folders are claimed by one configuration, results are complete."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch

from czsl_heads.data import DataError
from czsl_heads.report.curves import plot_curves
from czsl_heads.report.table import ablation_markdown
from czsl_heads.training.ablate import RESULTS, run_ablation
from czsl_heads.training.config import configure
from czsl_heads.training.folder import open_folder
from czsl_heads.training.summary import SUMMARY, numbers_of

FAST = {"epochs": 1, "batch_size": 48, "lora_rank": 1, "condense_epochs": 1, "condense_augment": False, "slots": 2}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> tuple[Path, dict]:
    """Two seeds of the whole ablation on a folder in the field's layout."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    config = configure(data=str(shapes_root), seeds=2, options=FAST, trainer=QUIET)
    return out, run_ablation(out, config)


def test_results_hold_every_number_of_every_run(ablation: tuple[Path, dict]) -> None:
    out, results = ablation
    assert results == json.loads((out / RESULTS).read_text())
    assert [row["number"] for row in results["rows"]] == ["1", "1+", "2", "2+", "3", "4", "5", "6"]
    assert [row["number"] for row in results["rows"] if row["transductive"]] == ["6"]
    for row in results["rows"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert row["trainable_parameters"] > 0
        for world in ("closed", "open"):
            for protocol in ("standard", "exact"):
                for name in SUMMARY:
                    values = [run["test"][world][protocol][name] for run in row["runs"]]
                    spread = row["summary"][world][protocol][name]
                    assert spread == {"mean": statistics.fmean(values), "std": statistics.stdev(values)}
    assert results["config"]["options"]["epochs"] == 1
    assert {"torch", "czsl-heads", "python"} <= results["environment"]["versions"].keys()
    assert results["data"]["images"] == {"train": 96, "val": 48, "test": 48}


def test_rows_differ_in_one_thing_each(ablation: tuple[Path, dict]) -> None:
    out, results = ablation
    runs = {
        name: json.loads((out / "seed0" / name / "run.json").read_text()) for name in ("cls", "max", "vac", "vac-kl")
    }
    assert [run["reduce"] for run in runs.values()] == ["cls", "max", "max", "max"]
    assert [run["stage"] for run in runs.values()] == ["align", "align", "condense", "condense"]
    assert runs["cls"]["options"] == runs["max"]["options"] == runs["vac-kl"]["options"]
    assert runs["vac"]["options"] == {**runs["vac-kl"]["options"], "alpha": 0.0}
    assert runs["cls"]["trainable_parameters"] == runs["max"]["trainable_parameters"]
    assert runs["vac"]["trainable_parameters"] == runs["vac-kl"]["trainable_parameters"]
    by_number = {row["number"]: row["runs"][0]["test"] for row in results["rows"]}
    for number, readout in (("4", "fused"), ("5", "bank"), ("6", "adapted")):
        assert numbers_of(by_number[number]) == numbers_of(runs["vac-kl"]["budgets"]["best"]["test"][readout])
    for number, name, budget in (("1", "cls", "best"), ("2+", "max", "longer")):
        recorded = runs[name]["budgets"][budget]["test"]["aligned"]
        assert numbers_of(by_number[number]) == numbers_of(recorded)
        curves = [torch.tensor(each["closed"]["exact"]["curve"]) for each in (by_number[number], recorded)]
        torch.testing.assert_close(*curves, atol=1e-5, rtol=0)


def test_rows_are_compared_seed_by_seed(ablation: tuple[Path, dict]) -> None:
    _, results = ablation
    aucs = {row["number"]: [run["test"]["open"]["exact"]["auc"] for run in row["runs"]] for row in results["rows"]}
    compared = {(item["row"], item["against"]): item["auc"]["open"]["exact"] for item in results["comparisons"]}
    assert {("2", "1"), ("2+", "1+"), ("3", "2+"), ("4", "3"), ("5", "4"), ("6", "5")} <= compared.keys()
    for (row, other), found in compared.items():
        differences = [a - b for a, b in zip(aucs[row], aucs[other])]
        assert found["mean"] == pytest.approx(statistics.fmean(differences))
        # t(0.975, 1) = 12.7062
        assert found["half_width"] == pytest.approx(12.7062 * statistics.stdev(differences) / 2**0.5, rel=1e-4)


def test_the_gap_of_each_row_is_reported_by_readout(ablation: tuple[Path, dict]) -> None:
    _, results = ablation
    for row in results["rows"]:
        condensed = row["number"] in "3456"
        assert row["gap"].keys() == {"cls", "pred", "true", *(["vac"] if condensed else [])}
        assert all(0 < spread["mean"] < 1 for spread in row["gap"].values())


def test_calling_again_repeats_nothing(ablation: tuple[Path, dict], shapes_root: Path) -> None:
    out, results = ablation
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    again = run_ablation(out, configure(data=str(shapes_root), seeds=2, options=FAST, trainer=QUIET))
    assert again == results
    assert {path: path.stat().st_mtime_ns for path in out.rglob("run.json")} == stamps


def test_a_folder_of_other_settings_is_refused(ablation: tuple[Path, dict], shapes_root: Path) -> None:
    out, _ = ablation
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    other = configure(data=str(shapes_root), options={**FAST, "learning_rate": 0.5}, trainer=QUIET)
    with pytest.raises(
        ValueError, match=r"of the same settings, got .*, whose options.learning_rate is 0.0001 instead"
    ):
        run_ablation(out, other)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_seeds_can_be_added_and_speed_settings_changed(
    ablation: tuple[Path, dict], shapes_root: Path, tmp_path: Path
) -> None:
    out, results = ablation
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    options = {**FAST, "workers": 0}
    fewer = run_ablation(
        copy, configure(data=str(shapes_root), seeds=1, options=options, trainer={"accelerator": "cpu"})
    )
    assert [row["runs"] for row in fewer["rows"]] == [row["runs"][:1] for row in results["rows"]]
    again = run_ablation(copy, configure(data=str(shapes_root), seeds=2, options=options, trainer=QUIET))
    assert again["rows"] == results["rows"]


@pytest.fixture
def data(shapes_root: Path, tmp_path: Path) -> Path:
    """A copy of the data set that a test may spoil."""
    return Path(shutil.copytree(shapes_root, tmp_path / "data"))


def test_changed_data_is_refused(data: Path, tmp_path: Path) -> None:
    config = configure(data=str(data), options=FAST, trainer=QUIET)
    open_folder(tmp_path / "out", config)
    pairs = data / "compositional-split-natural" / "test_pairs.txt"
    pairs.write_text("\n".join(pairs.read_text().split("\n")[1:]))
    metadata = data / "metadata_compositional-split-natural.t7"
    members = set(map(tuple, (line.split() for line in pairs.read_text().split("\n") if line)))
    rows = torch.load(metadata, weights_only=True)
    torch.save([row for row in rows if row["set"] != "test" or (row["attr"], row["obj"]) in members], metadata)
    with pytest.raises(ValueError, match="whose data_digest is"):
        open_folder(tmp_path / "out", config)


@pytest.mark.parametrize("word", ["seen", "unseen"])
def test_validation_without_one_sort_is_refused(data: Path, tmp_path: Path, word: str) -> None:
    pairs = data / "compositional-split-natural"
    train = set((pairs / "train_pairs.txt").read_text().split("\n"))
    metadata = data / "metadata_compositional-split-natural.t7"
    rows = torch.load(metadata, weights_only=True)
    dropped = [
        row for row in rows if row["set"] != "val" or (f"{row['attr']} {row['obj']}" in train) != (word == "seen")
    ]
    torch.save(dropped, metadata)
    with pytest.raises(
        DataError, match=rf"expected validation images of seen and of unseen pairs.*got none of {word} pairs"
    ):
        run_ablation(tmp_path / "out", configure(data=str(data), options=FAST, trainer=QUIET))
    assert not (tmp_path / "out").exists()


def test_a_truncated_image_is_found_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    image = sorted((data / "images").rglob("test_*.png"))[3]
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(DataError, match=rf"{image.name}: expected a whole image"):
        run_ablation(tmp_path / "out", configure(data=str(data), options=FAST, trainer=QUIET))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "ViT-Z"}, "expected `model_or_name`"),
        ({"reductions": True, "options": {"topk": 50}}, r"expected `k` to be in \[1, 37\], got 50"),
        ({"encoder": "RN50"}, "expected a vision tower of kind VisionTransformer"),
        ({"options": {"lora_layers": 40}}, "expected `layers`"),
        ({"options": {"lora_matrices": ["z"]}}, "expected `matrices`"),
        ({"options": {"condenser_dropout": 2}}, "expected `condenser_dropout`"),
        ({"trainer": {"foo": 3}}, "expected `trainer` to hold flags that lightning.Trainer takes"),
        ({"trainer": {"accelerator": "nope"}}, "expected `trainer` to hold flags that lightning.Trainer takes"),
    ],
)
def test_settings_are_tried_before_anything_is_written(shapes_root: Path, tmp_path: Path, arguments, message) -> None:
    for data in ("shapes", str(shapes_root)):
        with pytest.raises((ValueError, TypeError), match=message):
            run_ablation(tmp_path / "out", configure(data=data, preset="shapes", **arguments))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_named(shapes_root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"expected `out` to be a folder that can be written, got .*file/out"):
        run_ablation(tmp_path / "file" / "out", configure(data=str(shapes_root)))


def test_a_wrong_data_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected the folder of a data set, got nothing"):
        run_ablation(tmp_path / "out", configure(data=str(tmp_path / "absent")))
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_refused(tmp_path: Path, shapes_root: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected `out` to be a new or empty folder"):
        run_ablation(tmp_path, configure(data=str(shapes_root)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, "expected `seeds` to be at least 1, got 0"),
        ({"first_seed": -1}, r"expected `first_seed` to be in \[0, 4294967295\], got -1"),
        ({"data": "here", "imbalance": 0.5}, 'expected `imbalance` with data="shapes" only'),
        ({"imbalance": 2.0}, "expected `imbalance` to be in"),
        ({"preset": "nothing"}, "expected `preset` to be one of"),
        ({"sweep": "beta,delta"}, "expected `sweep` to be one of alpha, beta, gamma, depth, slots, got 'delta'"),
        ({"options": {"lr": 1}}, "expected `options` to be one of"),
        ({"options": {"epochs": "many"}}, "expected `epochs`"),
        ({"options": {"epochs": None}}, "expected `epochs`"),
        ({"trainer": {"max_epochs": 2}}, "expected `trainer` without max_epochs, .*got max_epochs"),
        ({"trainer": {"check_val_every_n_epoch": 2}}, "expected `trainer` without .*got check_val_every_n_epoch"),
        ({"first_seed": 2**33}, "expected `first_seed` to be in"),
        ({"pilot": True, "options": {"patch_drop": 0.3}}, r"expected `options.patch_drop` to be 0 in the study pilot"),
        ({"blend": True, "options": {"cls_weight": 0.3}}, r"expected `options.cls_weight` to be 0 in the study blend"),
        ({"options": {"lora_matrices": 5}}, "expected `lora_matrices` to be a list of names, got 5"),
        ({"trainer": {"fast_dev_run": True}}, "expected `trainer` without .*got fast_dev_run"),
    ],
)
def test_wrong_arguments_raise(arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        configure(**arguments)


def test_presets_follow_the_encoder() -> None:
    assert configure().preset == "shapes"
    assert configure(encoder="ViT-L-14:openai", data="x").preset == "mit-states"
    assert configure(quick=True).options.epochs < configure().options.epochs
    assert configure(quick=True).options.extra_epochs < configure().options.extra_epochs
    assert configure(quick=True, options={"epochs": 9}).options.epochs == 9


def test_a_test_split_without_unseen_pairs_is_reported_as_such(tmp_path: Path, data: Path) -> None:
    pairs = data / "compositional-split-natural"
    train = set((pairs / "train_pairs.txt").read_text().split("\n"))
    kept = [line for line in (pairs / "test_pairs.txt").read_text().split("\n") if line in train]
    (pairs / "test_pairs.txt").write_text("\n".join(kept))
    results = run_ablation(tmp_path / "out", configure(data=str(data), options=FAST, trainer=QUIET))
    summary = results["rows"][0]["summary"]["closed"]["standard"]
    assert summary["unseen"]["mean"] is None
    assert 0 <= summary["seen"]["mean"] <= 1
    assert "| none |" in ablation_markdown(results)
    plot_curves(results, tmp_path / "curves.png")
