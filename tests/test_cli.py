"""The `czsl` command as a user runs it: in a clean folder, and mostly in a process of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import czsl_heads
from czsl_heads import cli
from czsl_heads._sealed import write_sealed
from czsl_heads.cli import main
from czsl_heads.data import images
from czsl_heads.models.recipe import new_bank
from czsl_heads.models.saved import RECORD, SCHEMA, load_model, save_model
from czsl_heads.training.config import configure_model

pytestmark = pytest.mark.engine
FAST = ["--options.epochs=1", "--options.condense_epochs=1", "--options.batch_size=48", "--trainer.accelerator=cpu"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: two would slow each other down


def czsl(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "czsl_heads.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=ONE_THREAD)


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., SimpleNamespace]:
    """Runs a command in a clean folder, in this process: a new one takes seconds to start."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> SimpleNamespace:
        capsys.readouterr()
        status = main(list(arguments))
        told = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=told.out, stderr=told.err)

    return run


def test_make_shapes_writes_a_data_set_that_check_accepts(tmp_path: Path) -> None:
    sizes = ["--train_per_pair=1", "--val_per_pair=1", "--test_per_pair=2"]
    made = czsl("make-shapes", "--out", "world", *sizes, "--seed=3", "--imbalance=0.2", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert json.loads((tmp_path / "world" / "shapes.json").read_text(encoding="utf-8"))["seed"] == 3
    checked = czsl("check", "world", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "test      48 pairs      96 images (48 of seen pairs)" in checked.stdout
    again = czsl("make-shapes", "--out", "world", cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.strip() == (
        "czsl make-shapes: expected `out` to be a new or empty folder, got world, which holds something"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["world"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["make-shapes", "--out", "w", "--imbalance=3"], 1, "expected `imbalance` to be in [0, 1], got 3"),
        (["check", "nowhere"], 1, "nowhere: expected the folder of a data set, got nothing"),
        (["ablate", "--out", "o", "--data", "nowhere"], 1, "expected the folder of a data set, got nothing"),
        (["ablate", "--out", "o", "--options.epoch=3"], 1, "expected `options` to be one of epochs"),
        (["ablate", "--out", "o", "--encoder=ViT-Z"], 1, "expected `model_or_name`"),
        (
            ["ablate", "--out", "o", "--encoder=RN50"],
            1,
            "got RN50: its attention pooling projects one vector, and not single patches",
        ),
        (["ablate", "--out", "o", "--trainer.accelerator=nope"], 1, "expected `trainer` to hold flags"),
        (["ablate", "--out", "file/o", "--quick"], 1, "expected `out` to be a folder that can be written, got file/o"),
        (["make-shapes", "--out", "file/w"], 1, "expected `out` to be a folder that can be written, got file/w"),
        (
            ["report", "nowhere"],
            1,
            "expected `run` of czsl train or czsl ablate, got nowhere, which has no config.json",
        ),
        (["predict", "file", "--run", "nowhere"], 1, "expected `run` of czsl train or czsl ablate, got nowhere"),
        (["import", "nowhere", "--out", "o"], 1, "nowhere: expected a file or a folder, got nothing"),
        (["import", "file", "--out", "o"], 1, "file: expected a file that ends in .csv, .tsv, .jsonl, or a folder"),
        (["split", "nowhere"], 1, "got none; czsl import makes one"),
        (["check", "nowhere", "--dataset", "zappos"], 2, "dataset"),
        (["train", "--out", "o", "--names", "clean"], 1, "expected `names` with a data set of yours only"),
        (["predict", "--run", "nowhere"], 2, "arguments are required: predict.images"),
        (["predict", "file", "--run", "nowhere", "--world", "half"], 2, "world"),
        (["ablate"], 2, "arguments are required: ablate.out"),
        (["fly"], 2, "invalid choice"),
        (["train"], 2, "arguments are required: train.out"),
        (
            ["train", "--out", "o", "--method", "duplex"],
            1,
            "expected `method` to be one of clip, coop, csp, eva, sac, troika",
        ),
        (["train", "--out", "o", "--method", "csp", "--options.layers=1"], 1, "expected `options` to be one of epochs"),
        (["train", "--out", "o", "--method", "csp", "--options.dropout=1"], 1, "expected `options` with model.dropout"),
        (["train", "--out", "o", "--options.bank.slot=1"], 1, "expected `options.bank` to be one of slots"),
        (["train", "--out", "o", "--align", "best"], 2, "align"),
        (
            ["ablate", "--out", "o", "--add", "bank", "--method", "csp"],
            1,
            "expected `add` with vac where",
        ),
        (["evaluate", "nowhere"], 1, "expected `run` of czsl train or czsl ablate, got nowhere"),
        (["tune", "nowhere"], 1, "expected `run` of czsl train or czsl ablate, got nowhere"),
        (["ablate", "--out", "o", "--seeds", "many"], 2, "seeds"),
    ],
)
def test_wrong_input_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path,
    arguments: list[str],
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    try:
        returned = main(arguments)
    except SystemExit as stopped:  # the parser's own way
        returned = stopped.code
    complaint = capsys.readouterr().err
    assert returned == status
    assert message in complaint
    assert "Traceback" not in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_ablation_is_resumed_by_the_same_command(
    here: Callable[..., SimpleNamespace], tmp_path: Path, shapes_root: Path
) -> None:
    command = ["ablate", "--data", str(shapes_root), *FAST]
    whole = here(*command, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    for name in ("results.json", "ablation.md", "curves.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 0
    assert "+ Sparse Alignment" in whole.stdout

    process = subprocess.Popen(
        [sys.executable, "-m", "czsl_heads.cli", *command, "--out", "cut"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
        # A job in the background of a shell ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("cut/**/last.ckpt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted; the same command resumes it" in errors
    assert not (tmp_path / "cut" / "results.json").exists()

    resumed = here(*command, "--out", "cut")
    assert resumed.returncode == 0, resumed.stderr
    results = [json.loads((tmp_path / out / "results.json").read_text(encoding="utf-8")) for out in ("whole", "cut")]
    assert results[0]["rows"] == results[1]["rows"]


@pytest.fixture
def photos(shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three images in the current folder, two of them of one stem, and one named as the maps of another would be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    names = ["one.png", "one-maps.png", "other/one.png"]
    for name, path in zip(names, sorted((shapes_root / "images").glob("*/test_*.png"))):
        shutil.copy(path, tmp_path / name)
    return names


@pytest.fixture
def smaller_world(small_ablation: Path, tmp_path: Path) -> Path:
    """The same ablation as if its data set had fewer pairs, so that the open world has more."""
    run = tmp_path / "run"
    shutil.copytree(small_ablation, run, ignore=shutil.ignore_patterns("checkpoints", "logs", "tensorboard"))
    path = run / "seed0" / "vac"
    model = load_model(path)
    pairs = model.space.pairs[:-1]
    model.method.space = model.space.subset(pairs)
    model.bank = new_bank(model.space, model.encoder, model.recipe.bank)
    save_model(model, path)
    (path / RECORD).unlink()  # which says what the files held before
    return run


def test_predict_names_the_pairs_and_saves_the_maps(
    photos: list[str], small_ablation: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {name: (tmp_path / name).read_bytes() for name in photos}
    assert main(["predict", *photos, "--run", str(small_ablation), "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("│") == 3 * 3 * 6  # three images, three pairs: a name and four numbers, six lines between
    assert "bank" in shown
    assert "has no part" not in shown
    for photo, maps in zip(photos, ("one-2-maps.png", "one-maps-maps.png", "one-3-maps.png")):
        assert f"wrote {maps}" in shown
        assert photo in shown
        with Image.open(tmp_path / maps) as picture:
            assert picture.width > 4 * 192
    assert {name: (tmp_path / name).read_bytes() for name in photos} == before
    assert len([*tmp_path.rglob("*.png")]) == 6


def test_the_bank_has_no_part_in_a_larger_world(
    photos: list[str], smaller_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["predict", "other/one.png", "--run", str(smaller_world), "--out", "maps"]
    assert main([*command, "--top", "999", "--world", "open"]) == 0
    shown = capsys.readouterr().out
    assert "open world: the memory bank, which is over the pairs of the data set, has no part" in shown
    assert shown.count("│") == 144 * 5
    assert "bank │" not in shown
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["one-maps.png"]


def test_report_writes_one_page(
    small_ablation: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_ablation, run, ignore=shutil.ignore_patterns("checkpoints", "logs", "tensorboard"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["report", str(run), "--images", "1"]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<article") == 3
    assert {path: path.read_bytes() for path in before} == before
    assert {path for path in run.rglob("*") if path.is_file()} == before.keys() | {run / "report.html"}

    (tmp_path / "file").write_text("in the way")
    assert main(["report", str(run), "--images", "1", "--out", str(tmp_path / "file" / "page.html")]) == 1
    assert "expected `out` to be a file that can be written, got" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> Path:
    """The folder of one model of a baseline, with condenser and bank; shared: no test may change it."""
    out = tmp_path_factory.mktemp("trained") / "csp"
    command = ["train", "--method=csp", f"--data={shapes_root}", "--align=max", "--add=vac", "--add=bank"]
    assert main([*command, *FAST, "--trainer.enable_progress_bar=false", "--out", str(out)]) == 0
    return out


def test_one_model_is_trained_tested_and_written(trained: Path, capsys: pytest.CaptureFixture) -> None:
    results = json.loads((trained / "results.json").read_text(encoding="utf-8"))
    assert [row["key"] for row in results["rows"]] == ["model"]
    assert results["rows"][0]["readout"]["bank"] is not None
    assert sorted(path.name for path in (trained / "seed0").iterdir()) == ["max", "vac"]
    assert json.loads((trained / "seed0" / "max" / "training.json").read_text())["budgets"]["best"]["test"] == {}
    page = (trained / "results.md").read_text(encoding="utf-8")
    assert page.startswith(f"# csp on `{results['config']['data']}`, encoder `tiny`")
    card = (trained / "seed0" / "vac" / "README.md").read_text(encoding="utf-8")
    assert "Test images had no part in training or in the bank." in card


def test_an_evaluation_gives_the_numbers_of_the_training(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = tmp_path / "again.json"
    assert main(["evaluate", str(trained), "--out", str(found)]) == 0
    assert "Closed world, test, % (seed 0)" in capsys.readouterr().out
    kept = json.loads((trained / "results.json").read_text(encoding="utf-8"))["rows"][0]
    again = json.loads(found.read_text(encoding="utf-8"))["rows"][0]
    assert again == kept


@pytest.mark.parametrize("command", ["evaluate", "tune"])
def test_an_evaluation_and_tuned_weights_are_told_by_one_process(
    trained: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run, found = tmp_path / "run", tmp_path / "found.json"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints", "logs", "tensorboard"))
    path = run / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["config"]["trainer"]["strategy"] = "nope"  # of the training: scoring takes one device
    write_sealed(path, results)
    for module in ("trainer", "tune"):
        monkeypatch.setattr(f"czsl_heads.training.{module}.is_main_process", lambda: False)
    more = ["--out", str(found)] if command == "evaluate" else []
    assert main([command, str(run), *more]) == 0
    assert capsys.readouterr().out == ""
    assert not found.exists()
    assert not (run / "tune.json").exists()


@pytest.mark.parametrize("command", ["evaluate", "tune", "report"])
def test_the_folder_of_one_model_is_told_from_an_unfinished_one(trained: Path, command: str, capsys) -> None:
    assert main([command, str(trained / "seed0" / "vac")]) == 1
    assert "which holds one saved model; czsl predict takes it" in capsys.readouterr().err


def test_an_evaluation_takes_another_split_other_data_and_the_open_world(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other, found = tmp_path / "other", tmp_path / "found.json"
    sizes = ["--train_per_pair=1", "--val_per_pair=1", "--test_per_pair=1"]
    assert main(["make-shapes", "--out", str(other), *sizes, "--seed=5"]) == 0
    command = ["evaluate", str(trained), "--data", str(other), "--split=val", "--world=open", "--out", str(found)]
    assert main(command) == 0
    assert "Open world, val, % (seed 0)" in capsys.readouterr().out
    row = json.loads(found.read_text(encoding="utf-8"))["rows"][0]
    assert row["summary"].keys() == {"closed", "open", "feasible"}
    # The threshold was searched on these very images, so that masking cannot be worse.
    masked, plain = (row["summary"][world]["standard"]["auc"]["mean"] for world in ("feasible", "open"))
    assert masked >= plain


def test_words_that_a_model_does_not_know_are_named(trained: Path, shapes_root: Path, tmp_path: Path, capsys) -> None:
    data = Path(shutil.copytree(shapes_root, tmp_path / "data"))
    for path in (data / "compositional-split-natural").iterdir():
        path.write_text(re.sub("^red ", "crimson ", path.read_text(), flags=re.MULTILINE))
    metadata = data / "metadata_compositional-split-natural.t7"
    rows = torch.load(metadata, weights_only=True)
    torch.save([{**row, "attr": {"red": "crimson"}.get(row["attr"], row["attr"])} for row in rows], metadata)
    assert main(["evaluate", str(trained), "--data", str(data)]) == 1
    assert "expected attributes that the model knows, got 'crimson'" in capsys.readouterr().err
    assert main(["evaluate", str(trained), "--rows=[best]"]) == 1
    assert "expected `rows` to be one of model, got 'best'" in capsys.readouterr().err


def test_the_open_world_is_masked_pictured_and_taken_up_again(shapes_root: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    command = ["ablate", "--method=clip", f"--data={shapes_root}", "--world=open", f"--out={out}"]
    flags = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main([*command, *flags]) == 0
    shown = capsys.readouterr().out
    assert "AUC exact, feasible" in shown
    assert "wrote results.json, ablation.md, feasibility.png and curves.png" in shown
    with Image.open(out / "feasibility.png") as picture:
        assert picture.size > (800, 300)
    results = (out / "results.json").read_text(encoding="utf-8")
    assert "Nothing is trained" in (out / "ablation.md").read_text(encoding="utf-8")
    assert main([*command, *flags]) == 0
    assert (out / "results.json").read_text(encoding="utf-8") == results
    assert main([*command[:-2], f"--out={out}", *flags]) == 1
    assert "whose world is 'open' instead of 'closed'" in capsys.readouterr().err


def test_weights_are_tuned_for_any_method_with_a_bank(trained: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints", "logs", "tensorboard"))
    assert main(["tune", str(run)]) == 0
    assert "for a new training: --options.beta" in capsys.readouterr().out
    assert json.loads((run / "tune.json").read_text(encoding="utf-8"))["model"] == "vac"


def test_a_page_and_predictions_come_from_any_method(trained: Path, photos: list[str], tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(trained), "--images", "1", "--out", str(page)]) == 0
    assert "csp on" in page.read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["predict", photos[0], "--run", str(trained), "--top", "2"]) == 0
    shown = capsys.readouterr().out
    # The folder of the model alone is enough, and Python says the same.
    assert main(["predict", photos[0], "--run", str(trained / "seed0" / "vac"), "--top", "2"]) == 0
    assert capsys.readouterr().out == shown
    best = czsl_heads.load(trained).predict(photos[0], topk=2)[0][0]
    assert f"{best.attribute} {best.object}" in shown
    assert f"{best.score:.3f}" in shown


def test_the_page_and_the_weights_find_data_that_was_moved(
    small_ablation: Path, shapes_root: Path, tmp_path: Path, capsys
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(small_ablation, run, ignore=shutil.ignore_patterns("checkpoints", "logs", "tensorboard"))
    shutil.copytree(shapes_root, moved)
    path = run / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["config"]["data"] = str(tmp_path / "gone")
    write_sealed(path, results)
    assert main(["report", str(run), "--images", "1"]) == 1
    assert "got nothing; pass --data if it was moved" in capsys.readouterr().err
    assert main(["report", str(run), "--images", "1", "--data", str(moved)]) == 0
    assert main(["tune", str(run), "--data", str(moved)]) == 0


def test_a_method_without_a_bank_has_no_weights_to_tune(small_ablation: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(small_ablation / "config.json", run)
    results = json.loads((small_ablation / "results.json").read_text(encoding="utf-8"))
    results["rows"] = results["rows"][:4]
    write_sealed(run / "results.json", results)
    assert main(["tune", str(run)]) == 1
    assert "expected `run` with a memory bank (--add vac --add bank)" in capsys.readouterr().err


def test_predict_reads_one_image_at_a_time_and_goes_on_behind_a_bad_one(
    small_ablation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths[:4]):
        Image.new("RGB", (60, 50), (number, 9, 9)).save(path)
    paths[1].write_text("no image", encoding="utf-8")
    alive: list[weakref.ref] = []
    most = []
    plain = images.open_image

    def watched(path):
        most.append(sum(ref() is not None for ref in alive))
        image = plain(path)
        alive.append(weakref.ref(image))
        return image

    monkeypatch.setattr(images, "open_image", watched)
    assert main(["predict", *map(str, paths), "--run", str(small_ablation), "--out", str(tmp_path / "maps")]) == 1
    told = capsys.readouterr()
    assert max(most) <= 1
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {f"{number}-maps.png" for number in (0, 2, 3)}
    lines = told.err.strip().splitlines()
    assert f"czsl predict: {paths[1]}: expected an image, got a file of another kind" in lines
    assert f"czsl predict: {paths[4]}: expected an image file, got none" in lines
    assert lines[-1] == f"czsl predict: 2 of 5 images not read: {paths[1]}, {paths[4]}"


def test_own_photographs_become_a_data_set(here: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    for attribute in ("wet", "old", "hot"):
        for obj in ("dog", "cat", "fox"):
            (tmp_path / "photos" / attribute / obj).mkdir(parents=True)
            for number in range(4):
                value = 20 * number
                Image.new("RGB", (50, 60), (value, len(attribute), len(obj))).save(
                    tmp_path / "photos" / attribute / obj / f"{number}.png"
                )
    made = here("import", "photos", "--out", "data", "--copy")
    assert made.returncode == 0, made.stderr
    assert "wrote data: 36 rows, 36 pictures, 9 pairs" in made.stdout
    early = here("train", "--data", "data", "--out", "run")
    assert early.returncode == 1
    assert early.stderr.strip().endswith(
        "data: expected a split, got none yet; czsl split " + str(tmp_path / "data") + " draws one"
    )
    drawn = here("split", "data", "--seed", "1", "--unseen", "0.3")
    assert drawn.returncode == 0, drawn.stderr
    assert "drawn by seed 1" in drawn.stdout
    checked = here("check", "data", "--json")
    assert checked.returncode == 0, checked.stderr
    report = json.loads(checked.stdout)
    assert report["ok"]
    assert sum(report["images"].values()) == 36
    strange = here("train", "--method", "clip", "--data", "data", "--out", "run", "--trainer.accelerator=cpu")
    assert strange.returncode == 0, strange.stderr
    assert "the encoder tiny knows drawn shapes only, and none of 'hot', 'old', 'wet'" in strange.stderr
    refused = here("check", "data", "--dataset", "cgqa")
    assert refused.returncode == 1
    assert "not fit to train on" in refused.stdout

    (tmp_path / "data").rename(tmp_path / "moved")
    command = ["train", "--method", "clip", "--data", "moved", "--out", "run", "--trainer.accelerator=cpu"]
    again = here(*command)
    assert again.returncode == 0, again.stderr
    gone = here("report", "run", "--images", "1")
    assert gone.returncode == 0, gone.stderr  # the folder knows where the data is now
    (tmp_path / "moved").rename(tmp_path / "data")
    lost = here("report", "run", "--images", "1")
    assert lost.returncode == 1
    assert "pass --data if it was moved" in lost.stderr
    named = here("predict", "old/dog/1.png", "--run", "run", "--data", "data")
    assert named.returncode == 0, named.stderr
    Image.new("RGB", (50, 61)).save(tmp_path / "data" / "images" / "old" / "dog" / "1.png")
    for changed in (["report", "run"], ["predict", "x.png", "--run", "run"]):
        done = here(*changed, "--data", "data")
        assert done.returncode == 1
        assert (
            "with the pictures that run was trained on, got other ones" in done.stderr or "memory bank" in done.stderr
        )


def test_baselines_are_another_door_to_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "baselines", "ablate", "--method", "csp", "--out", "out", "--data", "nowhere"]
    environment = {**ONE_THREAD, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1
    assert f"czsl ablate: {tmp_path / 'nowhere'}: expected the folder of a data set, got nothing" in done.stderr


def test_options_of_parts_are_read_from_flags_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    monkeypatch.setitem(cli._COMMANDS, "train", lambda **values: given.update(values) or 0)
    (tmp_path / "settings.yaml").write_text("method: csp\nadd: [vac]\noptions: {bank: {slots: 3}, epochs: 2}\n")
    flags = ["--options.model.dropout", "0.5", "--options.lora.matrices=[q, k]", "--options.bank.slots=7"]
    assert main(["train", "--out=o", f"--config={tmp_path / 'settings.yaml'}", *flags]) == 0
    assert (given["method"], given["add"]) == ("csp", ["vac"])
    config = configure_model(**{name: value for name, value in given.items() if name != "out"})
    assert (config.options.epochs, config.options.bank.slots) == (2, 7)
    assert config.options.model == {"dropout": 0.5}
    assert config.options.lora.matrices == ("q", "k")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda run: (run / "results.json").unlink(),
            "which has no results.json; its czsl command, given again",
        ),
        (lambda run: (run / "config.json").unlink(), "which has no config.json"),
        (
            lambda run: (run / "results.json").write_text('{"rows": []}'),
            f"results.json of schema {SCHEMA}, got schema None",
        ),
        (lambda run: shutil.rmtree(run / "seed0" / "vac"), "expected a trained model in"),
        (lambda run: (run / "seed0" / "vac" / "model.safetensors").unlink(), "model.safetensors"),
    ],
)
@pytest.mark.parametrize("command", ["report", "predict"])
def test_a_folder_without_a_finished_ablation_is_refused(
    photos: list[str], small_ablation: Path, tmp_path: Path, command: str, spoil, message: str, capsys
) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_ablation, run, ignore=shutil.ignore_patterns("checkpoints", "logs", "tensorboard"))
    spoil(run)
    before = sorted(tmp_path.rglob("*"))
    assert main([command, str(run)] if command == "report" else [command, "one.png", "--run", str(run)]) == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"czsl {command}: expected ")
    assert message in complaint
    assert sorted(tmp_path.rglob("*")) == before


def test_a_seed_that_was_not_run_is_refused(small_ablation: Path, photos: list[str], capsys) -> None:
    for command in (["report", str(small_ablation)], ["predict", "one.png", "--run", str(small_ablation)]):
        assert main([*command, "--seed", "7"]) == 1
        assert "expected `seed` to be one of 0, got 7" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["check", "x"]) == 1
    assert "czsl-heads[train]" in capsys.readouterr().err


def test_gap_measures_any_encoder_and_any_model(
    here: Callable[..., SimpleNamespace], tmp_path: Path, shapes_root: Path
) -> None:
    done = here("gap", str(shapes_root), "--out", "gaps", "--limit=20")
    assert done.returncode == 0, done.stderr
    assert "relative modality gap" in done.stdout
    content = json.loads((tmp_path / "gaps" / "gap.json").read_text(encoding="utf-8"))
    assert list(content["vectors"]) == ["cls", "pred", "true"]
    assert {path.name for path in (tmp_path / "gaps").glob("*.png")} == {
        f"gap-{name}.png" for name in content["vectors"]
    }
    assert 0 < content["vectors"]["cls"]["relative_modality_gap"] < 1

    refused = here("gap", str(shapes_root), "--out", "gaps", "--row=max")
    assert refused.returncode == 1
    assert refused.stderr.strip() == "czsl gap: expected `row` with `run` only, got 'max'"
    for given in ("--encoder=tiny", "--context=a"):
        both = here("gap", str(shapes_root), "--out", "gaps", "--run=elsewhere", given)
        assert "without `run` only, got" in both.stderr
    nothing = here("gap", "nowhere", "--out", "gaps")
    assert nothing.stderr.strip() == "czsl gap: nowhere: expected the folder of a data set, got nothing"
