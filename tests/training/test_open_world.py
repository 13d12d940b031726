"""The open world masked by feasibility: thresholds from validation images, final scores masked, all of it on record."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from czsl_heads import wrap
from czsl_heads._numbers import percent
from czsl_heads.data import CompositionDataset
from czsl_heads.data.layout import DataError
from czsl_heads.functional import feasibility, mask_infeasible
from czsl_heads.models.saved import CONFIG, RESULTS, load, load_model
from czsl_heads.prompts.primitives import encode_primitives
from czsl_heads.report.page import results_page
from czsl_heads.report.table import FEASIBLE_COLUMNS, results_markdown, tables
from czsl_heads.training.ablate import run_ablation
from czsl_heads.training.config import configure, configure_model
from czsl_heads.training.evaluate import Evaluation
from czsl_heads.training.folder import open_folder
from czsl_heads.training.open_world import FEASIBILITY, OpenWorld, Thresholds, feasibility_table, kept_open_world
from czsl_heads.training.options import Options
from czsl_heads.training.train import RECORD
from tests.training.reference import Reference, assert_same_numbers, reference_result
from tests.training.test_evaluate import run

pytestmark = pytest.mark.engine

CHOSEN = ("alone", "bank", "adapted")


@pytest.fixture(scope="module")
def table(dataset: CompositionDataset) -> torch.Tensor:
    """Drawn at random, higher for the pairs of validation so that masking helps there; 0 where seen, some below."""
    space = dataset.space
    rows = torch.rand(len(space.attributes), len(space.objects), generator=torch.Generator().manual_seed(3)) - 0.4
    shown = space.pairs[space.index(dataset.split_pairs["val"])]
    rows[shown[:, 0], shown[:, 1]] += 0.4
    seen = space.pairs[space.seen_mask]
    rows[seen[:, 0], seen[:, 1]] = 0
    return rows


@pytest.fixture(scope="module")
def score(condensed: Path, dataset: CompositionDataset, options: Options, readouts: dict):
    """Scores the model of stage II by some of its readouts."""
    model, chosen = load_model(condensed), {name: readouts[name] for name in CHOSEN}

    def scored(names=CHOSEN, **arguments) -> Evaluation:
        return run(model, dataset, options, {name: chosen[name] for name in names}, **arguments)

    return scored


@pytest.fixture(scope="module")
def reference(condensed: Path, dataset: CompositionDataset, options: Options) -> Reference:
    return Reference(load_model(condensed), dataset, options.eval_batch_size)


@pytest.fixture(scope="module", params=["clean", "official"])
def masked(score, table: torch.Tensor, request) -> Evaluation:
    return score(open_world=OpenWorld(table, request.param))


@pytest.mark.parametrize("name", CHOSEN)
def test_masked_numbers_equal_masking_by_hand(
    masked: Evaluation, reference: Reference, readouts: dict, table: torch.Tensor, name: str
) -> None:
    dataset, readout = masked.dataset, readouts[name]
    seen, masking = dataset.space.open_world().seen_mask, masked.open_world.masking
    curve = masked.thresholds.curves[name]
    validation = reference.scores(readout, "open", "val")
    plain = reference_result(validation, dataset, "open", "val")
    assert curve.auc_unmasked == pytest.approx(plain.auc, abs=1e-6)
    for threshold, auc in list(zip(curve.thresholds.tolist(), curve.auc.tolist()))[::7]:
        hidden = mask_infeasible(validation, table.flatten(), seen, threshold, masking=masking)
        assert auc == pytest.approx(reference_result(hidden, dataset, "open", "val").auc, abs=1e-6)
    assert curve.threshold == curve.thresholds[curve.auc.argmax()]
    scores = reference.scores(readout, "open")
    hidden = mask_infeasible(scores, table.flatten(), seen, curve.threshold, masking=masking)
    assert_results(masked, name, {"open": scores, "feasible": hidden})


def assert_results(evaluation: Evaluation, name: str, scores: dict[str, torch.Tensor]) -> None:
    for world, rows in scores.items():
        for protocol, found in evaluation.as_dicts()[name][world].items():
            assert_same_numbers(found, reference_result(rows, evaluation.dataset, "open", protocol=protocol))


def test_the_bank_that_adapts_is_masked_behind_the_fusion_only(
    score, reference: Reference, readouts: dict, table: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a threshold by hand that leaves out pairs of test images: the search would not take it."""
    monkeypatch.setattr(Thresholds, "curves", {"adapted": SimpleNamespace(threshold=0.3, as_dict=dict)})
    evaluation = score(["adapted"], open_world=OpenWorld(table))
    scores = reference.scores(readouts["adapted"], "open")
    hidden = mask_infeasible(scores, table.flatten(), reference.space("open").seen_mask, 0.3)
    assert_results(evaluation, "adapted", {"open": scores, "feasible": hidden})
    aucs = [evaluation.results["adapted"][world]["exact"].auc for world in ("open", "feasible")]
    assert aucs[0] > aucs[1] + 0.01


def test_a_search_leaves_the_other_numbers_as_they_are(masked: Evaluation, score) -> None:
    plain = score()
    assert plain.thresholds is None
    for name, worlds in masked.as_dicts().items():
        assert worlds.keys() == {"closed", "open", "feasible"}
        worlds.pop("feasible")
        assert worlds == plain.as_dicts()[name]
    assert (masked.gap, masked.rejected) == (plain.gap, plain.rejected)


def test_masking_needs_the_open_world(score, table: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected `worlds` with open where it is to be masked, got closed"):
        score(worlds=("closed",), open_world=OpenWorld(table))


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory, configured) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("ablation") / "open"
    return out, run_ablation(out, configured(world="open"))


def test_every_row_has_the_masked_numbers_and_the_search(ablation: tuple[Path, dict]) -> None:
    out, results = ablation
    assert results == json.loads((out / RESULTS).read_text())
    settings = {name: results["config"][name] for name in ("world", "feasibility", "masking")}
    assert settings == {"world": "open", "feasibility": "encoder", "masking": "clean"}
    table = kept_open_world(out, configure(world="open")).feasibility
    for row in results["rows"]:
        (single,) = row["by_seed"]
        found = single["feasibility"]
        assert len(found["thresholds"]) == len(found["auc"]) == len(found["kept"]) == 50
        best = found["thresholds"].index(found["threshold"])
        assert found["auc"][best] == max(found["auc"])
        assert found["kept_pairs"] == found["kept"][best]
        assert found["kept_pairs"] == int(((table >= found["threshold"]) & (table != 0)).sum())
        assert found["unseen_pairs"] == 144 - 96
        assert single["test"].keys() == {"closed", "open", "feasible"}
        assert row["summary"]["feasible"]["exact"]["auc"]["mean"] == single["test"]["feasible"]["exact"]["auc"]
        assert row["feasibility"]["threshold"] == {"mean": found["threshold"], "std": None}
        assert row["feasibility"]["auc"]["mean"] == max(found["auc"])
    budgets = json.loads((out / "seed0" / "max" / RECORD).read_text())["budgets"]
    assert [budget["feasibility"].keys() for budget in budgets.values()] == [{"method"}, {"method"}]
    assert results["comparisons"][0]["differences"].keys() == {"closed", "open", "feasible"}


def test_the_rest_is_that_of_an_ablation_without(ablation: tuple[Path, dict], small_ablation: Path) -> None:
    plain = json.loads((small_ablation / RESULTS).read_text())
    for row, other in zip(plain["rows"], ablation[1]["rows"]):
        for world in ("closed", "open"):
            assert other["by_seed"][0]["test"][world] == row["by_seed"][0]["test"][world]
            assert other["summary"][world] == row["summary"][world]
        assert other["gap"] == row["gap"]
        assert row["by_seed"][0]["test"].keys() == {"closed", "open"}
        assert "feasibility" not in row
    for config in (plain["config"], json.loads((small_ablation / CONFIG).read_text())):
        assert config.keys().isdisjoint({"world", "feasibility", "masking"})


def test_tables_show_the_masked_numbers_beside_the_others(ablation: tuple[Path, dict], small_ablation: Path) -> None:
    results = ablation[1]
    by_title = {title.partition(",")[0]: (headings, rows) for title, headings, rows in tables(results)}
    (headings, cells), (_, searched) = by_title["Open world"], by_title["Feasibility"]
    assert headings[-3:] == [heading for heading, _, _ in FEASIBLE_COLUMNS]
    for row, shown, search in zip(results["rows"], cells, searched):
        masked, found = row["summary"]["feasible"], row["by_seed"][0]["feasibility"]
        assert len(shown) == len(headings)
        assert shown[-3] == percent(masked["standard"]["harmonic_mean"])
        assert shown[-2:] == [percent(masked[protocol]["auc"]) for protocol in ("standard", "exact")]
        assert search[2:5] == [f"{found['threshold']:.3f}", str(found["kept_pairs"]), "48"]
    plain = json.loads((small_ablation / RESULTS).read_text())
    assert "an unseen pair whose feasibility (by the text features of the encoder)" in results_markdown(results)
    assert "feasib" not in results_markdown(plain)


def test_the_page_shows_the_search(ablation: tuple[Path, dict], small_ablation: Path, dataset) -> None:
    models = [load(ablation[0], row=row) for row in ("5", "1")]
    page = results_page(ablation[1], dataset, *models, images=1)
    assert '<h2 id="feasibility">' in page
    assert '<a href="#feasibility">' in page
    plain = json.loads((small_ablation / RESULTS).read_text())
    assert "feasib" not in results_page(plain, dataset, *models, images=1)


def test_calling_again_searches_nothing_but_for_what_is_new(
    ablation: tuple[Path, dict], tmp_path: Path, configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = ablation
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "test_step", None)
        assert run_ablation(copy, configured(world="open")) == results
    gamma = run_ablation(copy, configured(world="open", sweep="gamma"))
    assert gamma["rows"] == results["rows"]
    record = json.loads((copy / "seed0" / "vac" / RECORD).read_text())["budgets"]["best"]
    assert record["feasibility"].keys() == record["test"].keys() > {"beta 0.5"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world": "open", "masking": "official"}, "whose masking is 'clean' instead of 'official'"),
        ({}, "whose world is 'open' instead of 'closed'"),
    ],
)
def test_a_folder_of_another_open_world_is_refused(
    ablation: tuple[Path, dict], small_ablation: Path, configured, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_folder(ablation[0], configured(**changes))
    with pytest.raises(ValueError, match="whose world is 'closed' instead of 'open'"):
        open_folder(small_ablation, configured(world="open"))


def word_vectors(path: Path, dataset: CompositionDataset) -> Path:
    generator = torch.Generator().manual_seed(0)
    words = [*dataset.space.attributes, *dataset.space.objects]
    numbers = [" ".join(map(str, torch.randn(3, generator=generator).tolist())) for _ in words]
    path.write_text("".join(f"{word} {vector}\n" for word, vector in zip(words, numbers)))
    return path


def test_the_table_comes_from_what_the_argument_names(
    tmp_path: Path, dataset: CompositionDataset, table: torch.Tensor
) -> None:
    space = dataset.space
    torch.save({"feasibility": table.flatten()}, tmp_path / "official.pt")
    official = configure(world="open", feasibility=str(tmp_path / "official.pt"))
    assert torch.equal(feasibility_table(official, space), table)
    words = word_vectors(tmp_path / "glove.txt", dataset)
    vectors = [[float(number) for number in line.split()[1:]] for line in words.read_text().splitlines()]
    seen = torch.zeros_like(table, dtype=torch.bool)
    seen[tuple(space.pairs[space.seen_mask].T)] = True
    by_words = feasibility_table(configure(world="open", feasibility=str(words)), space)
    assert torch.equal(by_words, feasibility(torch.tensor(vectors[:12]), torch.tensor(vectors[12:]), seen))
    by_encoder = feasibility_table(configure(world="open"), space)
    torch.testing.assert_close(by_encoder, feasibility(*encode_primitives(wrap("tiny"), space), seen))
    assert (by_words[seen] == 0).all()
    assert not torch.equal(by_words, by_encoder)


def test_the_folder_keeps_the_table(tmp_path: Path, configured, dataset: CompositionDataset) -> None:
    words = word_vectors(tmp_path / "glove.txt", dataset)
    arguments = {"world": "open", "feasibility": str(words), "masking": "official"}
    config, out = configured("clip", by=configure_model, **arguments), tmp_path / "out"
    open_folder(out, config)
    kept, whole = kept_open_world(out, config), (out / FEASIBILITY).read_bytes()
    assert kept.masking == "official"
    assert torch.equal(kept.feasibility, feasibility_table(config, dataset.space))

    (out / FEASIBILITY).unlink()  # as an interruption may have left it
    open_folder(out, config)
    assert (out / FEASIBILITY).read_bytes() == whole
    words.write_text("")
    open_folder(out, config)
    assert torch.equal(kept_open_world(out, config).feasibility, kept.feasibility)
    (out / FEASIBILITY).write_bytes(whole[:20])
    with pytest.raises(DataError, match=r"glove.txt"):  # it would be computed again, from what is not there any more
        open_folder(out, config)
    word_vectors(words, dataset)
    open_folder(out, config)
    assert (out / FEASIBILITY).read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("glove.txt", b"red 0.1 0.2\n", "expected words of all primitives, got none for"),
        ("glove.txt", b"red 0.1 0.2\nstar 0.1\n", "glove.txt, line 2: expected a word and its 2 numbers"),
        ("picture.png", b"\x89PNG\r\n", "picture.png, line 1: expected a word and its numbers"),
        ("official.pt", b"", "official.pt: expected a torch-saved dict of tensors"),
    ],
)
@pytest.mark.parametrize("drawn", [False, True])
def test_a_wrong_file_leaves_nothing_behind(
    tmp_path: Path, configured, name: str, content: bytes, message: str, drawn: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    arguments = {"world": "open", "feasibility": str(tmp_path / name), **({"data": "shapes"} if drawn else {})}
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path / "out", configured("clip", by=configure_model, **arguments))
    assert [path.name for path in tmp_path.iterdir()] == [name]
