"""The ablation: rows share data and seeds, folders are claimed by one configuration, results are complete."""

import json
import statistics
from pathlib import Path

import pytest

from czsl_heads.data import DataError
from czsl_heads.report.curves import plot_curves
from czsl_heads.report.table import ablation_markdown, print_ablation
from czsl_heads.training.ablate import RESULTS, SUMMARY, run_ablation
from czsl_heads.training.config import configure

FAST = {"epochs": 1, "batch_size": 48, "lora_rank": 1}
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
    assert [row["name"] for row in results["rows"]] == ["[CLS] baseline", "+ Sparse Alignment"]
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


def test_rows_differ_in_the_reduction_only(ablation: tuple[Path, dict]) -> None:
    _, results = ablation
    first, second = (row["runs"][0] for row in results["rows"])
    assert (first["reduce"], second["reduce"]) == ("cls", "max")
    assert first["options"] == second["options"]
    assert first["trainable_parameters"] == second["trainable_parameters"]


def test_calling_again_repeats_nothing(ablation: tuple[Path, dict], shapes_root: Path) -> None:
    out, results = ablation
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    again = run_ablation(out, configure(data=str(shapes_root), seeds=2, options=FAST, trainer=QUIET))
    assert again == results
    assert {path: path.stat().st_mtime_ns for path in out.rglob("run.json")} == stamps


def test_a_folder_of_another_configuration_is_refused(ablation: tuple[Path, dict], shapes_root: Path) -> None:
    out, _ = ablation
    before = sorted(out.rglob("*"))
    with pytest.raises(
        ValueError, match=r"of the same configuration, got .*whose `seeds` is \[0, 1\] instead of \[0\]"
    ):
        run_ablation(out, configure(data=str(shapes_root), options=FAST, trainer=QUIET))
    assert sorted(out.rglob("*")) == before


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
        ({"first_seed": -1}, "expected `first_seed` to be at least 0, got -1"),
        ({"data": "here", "imbalance": 0.5}, 'expected `imbalance` with data="shapes" only'),
        ({"imbalance": 2.0}, "expected `imbalance` to be in"),
        ({"preset": "nothing"}, "expected `preset` to be one of"),
        ({"options": {"lr": 1}}, "expected `options` to be one of"),
    ],
)
def test_wrong_arguments_raise(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(**arguments)


def test_presets_follow_the_encoder() -> None:
    assert configure().preset == "shapes"
    assert configure(encoder="ViT-L-14:openai", data="x").preset == "mit-states"
    assert configure(quick=True).options.epochs < configure().options.epochs
    assert configure(quick=True, options={"epochs": 9}).options.epochs == 9


def test_the_page_says_what_the_results_say(ablation: tuple[Path, dict]) -> None:
    _, results = ablation
    page = ablation_markdown(results)
    for row in results["rows"]:
        auc = row["summary"]["closed"]["standard"]["auc"]
        cell = f"{100 * auc['mean']:.1f} ± {100 * auc['std']:.1f}"
        assert any(row["name"] in line and cell in line for line in page.splitlines())
    assert "mean ± sd of 2 seeds" in page
    assert page.count("| row |") == 2


def test_the_terminal_shows_both_worlds(ablation: tuple[Path, dict], capsys: pytest.CaptureFixture) -> None:
    print_ablation(ablation[1])
    shown = capsys.readouterr().out
    assert "closed world" in shown
    assert "open world" in shown


def test_the_curves_are_drawn(ablation: tuple[Path, dict], tmp_path: Path) -> None:
    from PIL import Image

    plot_curves(ablation[1], tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        colors = picture.convert("RGB").getcolors(maxcolors=1 << 20)
    assert len(colors) > 100  # two coloured curves with soft edges, not an empty frame
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_a_test_split_without_unseen_pairs_is_reported_as_such(tmp_path: Path, shapes_root: Path) -> None:
    import shutil

    root = tmp_path / "data"
    shutil.copytree(shapes_root, root)
    pairs = root / "compositional-split-natural"
    train = set((pairs / "train_pairs.txt").read_text().split("\n"))
    kept = [line for line in (pairs / "test_pairs.txt").read_text().split("\n") if line in train]
    (pairs / "test_pairs.txt").write_text("\n".join(kept))
    results = run_ablation(tmp_path / "out", configure(data=str(root), options=FAST, trainer=QUIET))
    summary = results["rows"][0]["summary"]["closed"]["standard"]
    assert summary["unseen"]["mean"] is None
    assert 0 <= summary["seen"]["mean"] <= 1
    assert "| none |" in ablation_markdown(results)
    plot_curves(results, tmp_path / "curves.png")
