"""``python -m baselines ablate``: real runs on 192 images."""

import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from baselines import BASELINES
from baselines.__main__ import main
from baselines.ablate import run_ablation
from baselines.options import configure
from baselines.report import comparison_markdown
from baselines.train import Training, build, train_row
from czsl_heads import DynamicMemoryBank
from czsl_heads.data import read_dataset
from czsl_heads.metrics import CZSLScore
from czsl_heads.report.table import interval, percent
from czsl_heads.training import trainer as lightning_trainer
from czsl_heads.training.loaders import eval_loader

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
FAST = {"epochs": 1, "batch_size": 48}
FLAGS = [
    "--options.epochs=1",
    "--options.batch_size=48",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=0",
]
NUMBERS = ("seen", "unseen", "harmonic_mean", "auc")


@pytest.fixture(scope="module")
def dataset(shapes_root):
    return read_dataset(shapes_root)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, shapes_root):
    """The folder of a finished comparison of two seeds, shared: no test may change it."""
    out = tmp_path_factory.mktemp("comparisons") / "csp"
    assert main(["ablate", "--method=csp", f"--data={shapes_root}", "--seeds=2", f"--out={out}", *FLAGS]) == 0
    return out, json.loads((out / "results.json").read_text())


def configured(method, shapes_root, trainer=QUIET, seeds=1, **options):
    return configure(method, data=str(shapes_root), seeds=seeds, options={**FAST, **options}, trainer=trainer)


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("run.json")}


def test_the_table_sums_up_its_runs(comparison):
    out, results = comparison
    assert [row["row"] for row in results["rows"]] == ["cls", "max", "topk"]
    assert results["config"]["seeds"] == [0, 1]
    assert results["config"]["options"]["batch_size"] == 48
    assert (results["sources"]["batch_size"], results["sources"]["learning_rate"]) == ("given", "guess")
    assert {"torch", "czsl-heads", "python"} <= results["environment"]["versions"].keys()
    assert results["data"]["images"] == {"train": 96, "val": 48, "test": 48}
    for row in results["rows"]:
        files = [out / f"seed{seed}" / row["row"] / "run.json" for seed in (0, 1)]
        assert row["runs"] == [json.loads(path.read_text()) for path in files]
        for protocol in ("standard", "exact"):
            for name in NUMBERS:
                values = [run["test"]["closed"][protocol][name] for run in row["runs"]]
                assert row["summary"][protocol][name] == {
                    "mean": statistics.fmean(values),
                    "std": statistics.stdev(values),
                }


def test_rows_differ_in_the_head_alone(comparison):
    _, results = comparison
    assert {row["trainable_parameters"] for row in results["rows"]} == {24 * 96}  # a vector a primitive, in every row
    curves = [row["runs"][0]["test"]["closed"]["exact"]["curve"] for row in results["rows"]]
    assert curves[0] != curves[1] != curves[2] != curves[0]


def test_differences_are_paired_by_seed(comparison):
    _, results = comparison
    runs = {row["row"]: [run["test"]["closed"] for run in row["runs"]] for row in results["rows"]}
    assert [(item["row"], item["against"]) for item in results["comparisons"]] == [("max", "cls"), ("topk", "cls")]
    for item in results["comparisons"]:
        for protocol, differences in item["differences"].items():
            for name in NUMBERS:
                pairs = zip(runs[item["row"]], runs["cls"])
                found = [one[protocol][name] - other[protocol][name] for one, other in pairs]
                assert differences[name]["mean"] == pytest.approx(statistics.fmean(found))
                # t(0.975, 1) = 12.7062
                half = 12.7062 * statistics.stdev(found) / 2**0.5
                assert differences[name]["half_width"] == pytest.approx(half, rel=1e-4)


def test_the_page_says_what_the_numbers_say(comparison):
    out, results = comparison
    page = (out / "comparison.md").read_text()
    assert page == comparison_markdown(results)
    for protocol in ("standard", "exact"):
        for row in results["rows"]:
            cells = [percent(row["summary"][protocol][name]) for name in NUMBERS]
            assert f"| {row['row']} | {row['title']} | {' | '.join(cells)} |" in page
        for item in results["comparisons"]:
            cells = [interval(item["differences"][protocol][number]) for number in NUMBERS]
            assert f"| {item['row']} - {item['against']} | difference | {' | '.join(cells)} |" in page
    assert "learning_rate 0.0001 (guess)" in page
    assert "epochs 1 (given)" in page
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_differences(comparison, shapes_root):
    _, results = comparison
    one = {**results, "config": {**results["config"], "seeds": [0]}}
    assert "| difference |" not in comparison_markdown(one)


def test_calling_again_repeats_nothing(comparison, shapes_root):
    out, results = comparison
    before = modified(out)
    assert run_ablation(out, configured("csp", shapes_root, seeds=2)) == results
    assert modified(out) == before


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("coop", {}, "whose method is 'csp' instead of 'coop'"),
        ("csp", {"learning_rate": 0.5}, "whose options.learning_rate is 0.0001 instead of 0.5"),
        ("csp", {"context": "the"}, "whose options.model.context is None instead of 'the'"),
    ],
)
def test_a_folder_of_other_settings_is_refused(comparison, shapes_root, method, options, message):
    out, _ = comparison
    with pytest.raises(ValueError, match=message):
        run_ablation(out, configured(method, shapes_root, **options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=eva"], f"expected `method` to be one of {', '.join(BASELINES)}, got 'eva'"),
        (["--method=clip", "--options.epochs=1"], "expected `options.epochs` to be 0 for clip, which learns nothing"),
        (["--method=troika", "--options.batch_size=1919"], "expected `options.batch_size` that leaves no batch of one"),
        (["--method=csp", "--data=nowhere"], "nowhere: expected the folder of a data set, got nothing"),
        (["--method=csp", "--options.epoch=3"], "expected `options` to be one of epochs"),
        (["--method=troika", "--options.layers=-1"], "expected `layers` to be"),
        (["--method=csp", "--options.topk=99"], "expected `k` to be"),
        (["--method=csp", "--encoder=ViT-Z"], "expected `model_or_name`"),
        (["--method=csp", "--trainer.accelerator=nope"], "expected `trainer` to hold flags"),
    ],
)
def test_wrong_arguments_are_told_in_one_line_and_leave_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", "--out=out", *arguments]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("baselines ablate: ")
    assert message in told
    assert not list(tmp_path.iterdir())


def test_clip_is_evaluated_and_nothing_else(tmp_path, shapes_root, dataset):
    command = [sys.executable, "-m", "baselines", "ablate", "--method=clip", f"--data={shapes_root}", "--seeds=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Nothing is trained" in done.stdout
    results = json.loads((tmp_path / "baseline-clip" / "results.json").read_text())
    assert results["config"]["seeds"] == [0]
    assert not list(tmp_path.rglob("*.ckpt"))
    config = configure("clip", data=str(shapes_root))
    for row in results["rows"]:
        clip = build(config, dataset.space, row["row"]).eval()
        score = CZSLScore(dataset.space, eval_mask=dataset.eval_mask("test"))
        loader = eval_loader(dataset.images("test", clip.encoder.transform()), config.options)
        with torch.no_grad():
            for images, columns in loader:
                score.update(clip.scores(images, dataset.space.pairs), columns)
        expected = score.compute()
        found = row["runs"][0]["test"]["closed"]["standard"]
        for name in NUMBERS:
            assert found[name] == pytest.approx(getattr(expected, name), abs=1e-6)


def test_epochs_for_a_method_that_learns_nothing_are_refused(tmp_path, shapes_root, dataset):
    with pytest.raises(ValueError, match=r"`options\.epochs` to be 0 for clip, which learns nothing"):
        train_row(tmp_path, dataset, configured("clip", shapes_root), "cls", 0)


def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, shapes_root, dataset, monkeypatch):
    config = configured("troika", shapes_root, epochs=2, adapter_dim=4, dropout=0.2)
    whole = train_row(tmp_path / "whole", dataset, config, "max", 0)
    start, calls = Training.on_train_epoch_start, []

    def interrupt_once(module):
        calls.append(module.current_epoch)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        start(module)

    monkeypatch.setattr(Training, "on_train_epoch_start", interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        train_row(tmp_path / "parts", dataset, config, "max", 0)
    assert train_row(tmp_path / "parts", dataset, config, "max", 0) == whole
    assert calls == [0, 1, 1]


@pytest.mark.parametrize("stays", [False, True])
def test_troikas_loop_stays_in_eval_mode_where_it_is_asked_to(shapes_root, dataset, stays):
    config = configured("troika", shapes_root, epochs=2, adapter_dim=4, stays_in_eval=stays)
    module, modes = Training(build(config, dataset.space, "cls"), dataset, config.baseline, seed=0), []

    def note(disentangler, inputs):
        if torch.is_grad_enabled():
            modes.append((module.current_epoch, disentangler.training))

    module.model.attribute_disentangler.register_forward_pre_hook(note)
    flags = {**QUIET, "max_epochs": 2, "limit_train_batches": 1, "num_sanity_val_steps": 0}
    with lightning_trainer.quiet():
        lightning_trainer.testing_trainer(flags).fit(module)
    assert modes == [(0, True), (1, not stays)]


def test_the_last_epoch_is_taken_where_it_is_asked_for(tmp_path, shapes_root, dataset):
    record = train_row(tmp_path, dataset, configured("coop", shapes_root, epochs=2, selection="last"), "cls", 0)
    assert (record["best_epoch"], record["selected"]) == (2, 1.0)


@pytest.mark.parametrize(("incomplete_group", "factor"), [("mean", 2.0), ("full", 1.0)])
def test_an_incomplete_group_of_batches_is_weighed_as_asked(shapes_root, dataset, incomplete_group, factor):
    # Of three batches two make a group, and one is left, whose loss Lightning divides by two.
    config = configured("csp", shapes_root, batch_size=32, accumulate=2, incomplete_group=incomplete_group)
    module, losses = Training(build(config, dataset.space, "cls"), dataset, config.baseline, seed=0), []
    step = module.training_step

    def note(batch, batch_idx):
        images, columns = batch
        with torch.no_grad():
            rows = module.get_buffer("_train_row")[columns]
            plain = module.model.eval().loss(images, module.train_pairs, rows)
            losses.append(step(batch, batch_idx) / plain)
        return step(batch, batch_idx)

    module.training_step = note
    flags = {**QUIET, "max_epochs": 1, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0}
    with lightning_trainer.quiet():
        lightning_trainer.testing_trainer(flags).fit(module)
    assert [ratio.item() for ratio in losses] == pytest.approx([1.0, 1.0, factor])


def test_what_is_compared_is_rounded_where_it_is_asked_for(tmp_path, shapes_root, dataset):
    exact, rounded = (
        train_row(tmp_path / str(digits), dataset, configured("coop", shapes_root, selection_digits=digits), "cls", 0)
        for digits in (None, 1)
    )
    assert rounded["selected"] == pytest.approx(round(exact["selected"], 1))
    assert rounded["selected"] != exact["selected"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path, shapes_root, dataset):
    config = configured("csp", shapes_root, condense_epochs=1)
    train_row(tmp_path, dataset, config, "max", 0)
    path = tmp_path / "max" / "checkpoints" / "best.ckpt"
    kept = torch.load(path, weights_only=True)
    torch.save({**kept, "state_dict": {**kept["state_dict"], "model.other": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="a checkpoint of this model, got tensors of another, such as 'other'"):
        train_row(tmp_path, dataset, config, "vac", 0)


def test_the_epoch_of_least_loss_is_kept_with_all_that_was_learned(tmp_path, shapes_root, dataset):
    config = configured("coop", shapes_root, selection="loss", accumulate=2)
    record = train_row(tmp_path, dataset, config, "cls", 0)
    coop = build(config, dataset.space, "cls").eval()
    kept = torch.load(tmp_path / "cls" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert "model.prompts.pair_context" in kept
    assert not any("token_embedding" in name for name in kept)
    coop.load_state_dict({name.removeprefix("model."): tensor for name, tensor in kept.items()}, strict=False)
    images, columns = next(iter(eval_loader(dataset.images("val", coop.encoder.transform()), config.options)))
    assert len(columns) == 48
    with torch.no_grad():
        loss = F.cross_entropy(coop(images, dataset.space.pairs), columns)
    assert record["selected"] == pytest.approx(-loss.item(), rel=1e-5)


@pytest.fixture(scope="module", params=["clip", "csp"])
def extended(request, tmp_path_factory, shapes_root):
    """A finished comparison of one seed with condenser and bank, shared: no test may change it."""
    out = tmp_path_factory.mktemp("comparisons") / request.param
    added = ["--add=vac", "--add=bank", "--options.condense_epochs=1", "--options.slots=2", "--options.gamma=0.7"]
    flags = FLAGS if request.param != "clip" else FLAGS[2:]
    command = ["ablate", f"--method={request.param}", f"--data={shapes_root}", f"--out={out}", *flags, *added]
    assert main(command) == 0
    return request.param, out, json.loads((out / "results.json").read_text())


def test_condenser_and_bank_have_rows(extended):
    method, out, results = extended
    assert [row["row"] for row in results["rows"]] == ["cls", "max", "topk", "probs", "vac", "bank", "adapted"]
    compared = [f"{item['row']}-{item['against']}" for item in results["comparisons"]]
    assert compared == ["max-cls", "topk-cls", "probs-max", "vac-probs", "vac-cls"] + [
        f"{row}-{other}" for row, other in (("bank", "vac"), ("bank", "cls"), ("adapted", "bank"), ("adapted", "cls"))
    ]
    trained = {row["row"]: row["runs"][0]["best_epoch"] is not None for row in results["rows"]}
    learning = method != "clip"
    assert trained == {"cls": learning, "max": learning, "topk": learning, "vac": True} | dict.fromkeys(
        ("probs", "bank", "adapted"), False
    )
    curves = [str(row["runs"][0]["test"]["closed"]["exact"]["curve"]) for row in results["rows"]]
    assert len(set(curves[:6])) == 6
    page = (out / "comparison.md").read_text()
    assert "row adapted is transductive" in page.replace("\n", " ").lower()
    assert "slots 2 (given)" in page
    assert "depth 1 (sac)" in page


def test_rows_with_a_bank_equal_scoring_by_hand(extended, dataset, shapes_root):
    """Batch by batch, with Eq. 12 written out."""
    method, out, results = extended
    trained = {} if method == "clip" else FAST
    config = configure(
        method, data=str(shapes_root), options={**trained, "slots": 2, "gamma": 0.7}, add=["vac", "bank"]
    )
    model = build(config, dataset.space, "vac").eval()
    for row, part in (("max", model.method), ("vac", model)):
        if (out / "seed0" / row / "checkpoints").exists():
            kept = torch.load(out / "seed0" / row / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
            part.load_state_dict({name.removeprefix("model."): tensor for name, tensor in kept.items()}, strict=False)
    space, pairs = dataset.space, dataset.space.pairs
    protocols = {
        row: CZSLScore(space, eval_mask=dataset.eval_mask("test")) for row in ("probs", "vac", "bank", "adapted")
    }
    frozen = DynamicMemoryBank(len(pairs), model.encoder.dim, slots=2)

    def batches(split):
        return eval_loader(dataset.images(split, model.encoder.transform()), config.options)

    with torch.no_grad():
        texts = model.texts(pairs)
        for images, _ in batches("train"):
            seen = model(images, pairs, texts)
            frozen.update(seen.features, seen.condensed.softmax(dim=1))
        adapting, unseen = copy.deepcopy(frozen), (~space.seen_mask).nonzero().squeeze(1)
        adapting.fill_texts(texts[unseen], unseen)
        for images, columns in batches("test"):
            seen = model(images, pairs, texts)
            aligned, condensed = seen.aligned.softmax(dim=1), seen.condensed.softmax(dim=1)
            memories = {"vac": 0.0} | {
                row: 0.7 * bank(seen.features).softmax(dim=1) for row, bank in (("bank", frozen), ("adapted", adapting))
            }
            protocols["probs"].update(aligned, columns)
            for row, memory in memories.items():
                protocols[row].update(0.5 * aligned + 0.5 * (condensed + memory), columns)
            adapting.update(seen.features, condensed)
    found = {row["row"]: row["runs"][0]["test"]["closed"]["standard"] for row in results["rows"]}
    for row, score in protocols.items():
        for name in NUMBERS:
            assert found[row][name] == pytest.approx(getattr(score.compute(), name), abs=1e-6), row


def test_a_comparison_is_extended_and_stays_so(comparison, shapes_root, tmp_path):
    out = shutil.copytree(comparison[0], tmp_path / "csp")
    before = modified(out)
    options = {**FAST, "batch_size": 48}
    config = configure("csp", data=str(shapes_root), options=options, trainer=QUIET, add=["vac"])
    rows = [row["row"] for row in run_ablation(out, config)["rows"]]
    assert rows == ["cls", "max", "topk", "probs", "vac"]
    assert before.items() <= modified(out).items()
    again = run_ablation(out, configured("csp", shapes_root))
    assert [row["row"] for row in again["rows"]] == rows
    (out / "seed0" / "vac" / "run.json").unlink()
    (out / "seed0" / "max" / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"max/checkpoints/best\.ckpt"):
        run_ablation(out, config)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (["--add=bank"], "expected `add` with vac where there is a bank"),
        (["--add=eva"], "expected `add` to be one of vac, bank, got 'eva'"),
        (["--add=vac", "--options.alpha=2"], "expected `alpha` to be"),
        (["--add=vac", "--options.depth=0"], "expected `depth` to be"),
        (["--add=vac", "--options.condense_epochs=0"], "expected `condense_epochs` to be"),
    ],
)
def test_wrong_additions_are_told(added, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", "--method=csp", "--out=out", *added]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
