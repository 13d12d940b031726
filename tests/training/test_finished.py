"""A finished command is read, refused where it does not fit, and scored again as what it is scored on."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from czsl_heads._sealed import write_sealed
from czsl_heads.data import read_dataset
from czsl_heads.data.layout import DataError
from czsl_heads.models.saved import SCHEMA
from czsl_heads.training import trainer
from czsl_heads.training.finished import dataset_of, evaluate, finished, one_device
from czsl_heads.training.tune import tune

pytestmark = pytest.mark.engine
FLAGS = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture
def run(small_ablation: Path, tmp_path: Path) -> Path:
    """A copy of the small ablation, to spoil."""
    left_out = shutil.ignore_patterns("checkpoints", "logs", "tensorboard")
    return Path(shutil.copytree(small_ablation, tmp_path / "run", ignore=left_out))


@pytest.fixture
def other(shapes_root: Path, tmp_path: Path) -> Path:
    """The data set without the pairs of one object."""
    obj, out = read_dataset(shapes_root).space.objects[0], tmp_path / "other"
    shutil.copytree(shapes_root, out)
    for path in (out / "compositional-split-natural").iterdir():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.endswith(f" {obj}")]
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    metadata = out / "metadata_compositional-split-natural.t7"
    torch.save([row for row in torch.load(metadata, weights_only=True) if row["obj"] != obj], metadata)
    return out


def change(path: Path, changed: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    changed(content)
    write_sealed(path, content)


def test_weights_are_tuned_on_no_other_data(small_ablation: Path, other: Path) -> None:
    with pytest.raises(DataError, match=r"other: expected the data set that the models were trained on, got another"):
        tune(small_ablation, read_dataset(other), "vac", [0], FLAGS)


def test_changed_labels_are_refused_unless_they_are_asked_for(run: Path, other: Path) -> None:
    change(run / "results.json", lambda results: results["config"].update(data=str(other)))
    config = finished(run)[0]["config"]
    with pytest.raises(ValueError, match=rf"expected {re.escape(str(other))} with the labels .* got other ones"):
        dataset_of(run, config)
    with pytest.raises(ValueError, match=r"with the labels .* got other ones; czsl evaluate scores other data"):
        dataset_of(run, config, other)
    change(run / "config.json", lambda settings: (settings.pop("data_digest"), settings.pop("pictures_digest")))
    assert dataset_of(run, config).root == other


def test_an_evaluation_says_what_it_was_on(run: Path, other: Path) -> None:
    def of_elsewhere(results: dict) -> None:
        results["config"]["shapes"] = {"seed": 0}
        results["config"]["trainer"] |= {"devices": 2, "strategy": "nope", "num_nodes": 2}
        results["environment"] = {}

    change(run / "results.json", of_elsewhere)
    found = evaluate(run, data=other, split="val", rows=["1"])
    assert (found["config"]["data"], found["config"]["shapes"]) == (str(other), None)
    assert found["config"]["trainer"] == FLAGS  # one device: each of several would score everything
    assert found["environment"]["versions"].keys() >= {"torch", "python"}
    dataset = read_dataset(other)
    assert found["data"] == {
        "attributes": len(dataset.space.attributes),
        "objects": len(dataset.space.objects),
        "pairs": {split: len(pairs) for split, pairs in dataset.split_pairs.items()},
        "images": {"val": len(dataset.samples["val"])},
    }
    again = evaluate(run, data=other, split="val", rows=["1"], trainer={**FLAGS, "precision": "64-true"})
    assert again["config"]["trainer"]["precision"] == "64-true"


def test_rows_are_those_of_the_training_and_others_are_told(run: Path, capsys: pytest.CaptureFixture) -> None:
    found = evaluate(run)
    before = {row["key"]: row for row in finished(run)[0]["rows"]}
    assert found["rows"] == [before[key] for key in ("1", "2", "3", "4", "5", "6")]
    assert "without rows 1+, 2+, whose models are not kept" in capsys.readouterr().err
    assert evaluate(run, rows=["2"])["rows"] == [before["2"]]
    assert "without rows" not in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"`rows` whose models are kept, got 1\+, of which"):
        evaluate(run, rows=["1+"])


def test_other_processes_say_nothing(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(trainer, "is_main_process", lambda: False)
    evaluate(run, split="val")
    assert "without rows" not in capsys.readouterr().err


def test_scoring_takes_one_device() -> None:
    assert one_device({"devices": 2, "strategy": "ddp", "num_nodes": 1, "precision": 16}) == {"precision": 16}


def test_the_folder_of_one_model_is_called_that(small_ablation: Path) -> None:
    with pytest.raises(ValueError, match=r"which holds one saved model; czsl predict takes it"):
        finished(small_ablation / "seed0" / "vac")


@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1, None])
def test_results_of_another_schema_are_refused(run: Path, schema: int | None) -> None:
    change(run / "results.json", lambda results: results.update(schema=schema))
    with pytest.raises(ValueError, match=rf"results.json of schema {SCHEMA}, got schema {schema}"):
        finished(run)


def test_the_open_world_is_that_of_the_folder(run: Path, shapes_root: Path, tmp_path: Path) -> None:
    space = read_dataset(shapes_root).space
    scores = tmp_path / "scores.pt"
    torch.save({"feasibility": (~space.seen_mask).float()[space.open_world().index(space.pairs).argsort()]}, scores)
    change(
        run / "results.json",
        lambda results: results["config"].update(world="open", feasibility=str(scores), masking="official"),
    )
    found = evaluate(run, world="open", rows=["1"])["config"]
    assert (found["world"], found["feasibility"], found["masking"]) == ("open", str(scores), "official")
    scores.unlink()
    closed = evaluate(run, rows=["1"])
    assert "feasibility" not in closed["config"]
    assert "feasible" not in closed["rows"][0]["summary"]
    given = evaluate(run, world="open", feasibility="encoder", masking="clean", rows=["1"])["config"]
    assert (given["feasibility"], given["masking"]) == ("encoder", "clean")
    with pytest.raises(ValueError, match=r"`feasibility` to be .*scores.pt, which is none"):
        evaluate(run, world="open", rows=["1"])


def test_the_open_world_of_a_folder_without_one_is_the_encoders(small_ablation: Path) -> None:
    found = evaluate(small_ablation, world="open", rows=["1"])["config"]
    assert (found["world"], found["feasibility"], found["masking"]) == ("open", "encoder", "clean")
    with pytest.raises(ValueError, match=r'`masking` with world="open" only'):
        evaluate(small_ablation, masking="official")


def test_the_words_of_prompts_are_those_that_were_written_down(run: Path) -> None:
    config = finished(run)[0]["config"]
    assert dataset_of(run, config).space.words == {}
    change(run / "config.json", lambda settings: settings.update(words={"red": "crimson"}))
    dataset = dataset_of(run, {**config, "names": "gone.csv"})
    assert dataset.space.words == {"red": "crimson"}
