"""`load` of the folder of a command: the model of a row, and a card that says what that row scored."""

import shutil
from pathlib import Path

import pytest
import torch

from czsl_heads import load
from czsl_heads._files import read_json
from czsl_heads._numbers import percent
from czsl_heads._sealed import write_sealed
from czsl_heads.models.saved import check_encoder

pytestmark = pytest.mark.engine


def test_the_model_that_the_report_shows_is_loaded(small_ablation: Path) -> None:
    model = load(small_ablation)
    assert not model.training
    assert int(model.bank.counts.sum()) > 0
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    again = load(small_ablation, row="5", seed=0)
    pairs = model.space.pairs
    assert torch.equal(model.scores(images, pairs), again.scores(images, pairs))


def test_a_row_without_a_bank_has_none_and_one_without_a_condenser_is_the_method(small_ablation: Path) -> None:
    assert load(small_ablation, row="4").bank is None
    assert type(load(small_ablation, row="1")).__name__ == "Aligned"


@pytest.mark.parametrize("row", ["1", "4", "5"])
def test_the_card_of_a_row_has_its_numbers_and_the_table_it_stands_in(
    small_ablation: Path, row: str, tmp_path: Path
) -> None:
    load(small_ablation, row=row).save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    rows = {each["key"]: each for each in read_json(small_ablation / "results.json")["rows"]}
    own = rows[row]["by_seed"][0]["test"]["open"]["exact"]
    cells = [percent({"mean": own[name], "std": None}) for name in ("seen", "unseen", "harmonic_mean", "auc")]
    assert f"| open world, exact | {' | '.join(cells)} |" in card
    assert f"row {row}, %" in card
    assert all(each["title"] in card for each in rows.values())
    assert "seeds 0." in card
    assert load(tmp_path / "model").record["row"] == row


def test_what_cannot_be_loaded_is_named(small_ablation: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected `row` whose model stays as it is, got 6, which learns from test"):
        load(small_ablation, row="6")
    with pytest.raises(ValueError, match=r"expected `row` whose model is kept, got 1\+, of which only the shorter"):
        load(small_ablation, row="1+")
    with pytest.raises(ValueError, match=r"expected `row` to be one of 1, 1\+, 2, 2\+, 3, 4, 5, 6, got '7'"):
        load(small_ablation, row="7")
    with pytest.raises(ValueError, match="expected `seed` to be one of 0, got 3"):
        load(small_ablation, seed=3)
    with pytest.raises(ValueError, match="`row` and `seed` with a folder of several models"):
        load(small_ablation / "seed0" / "vac", row="5")
    with pytest.raises(ValueError, match="expected `folder` of a trained model"):
        load(tmp_path)


def test_a_row_that_ranks_otherwise_than_its_model_is_refused(small_ablation: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_ablation, run, ignore=shutil.ignore_patterns("checkpoints", "logs", "tensorboard"))
    results = read_json(run / "results.json")
    results["rows"][0]["readout"]["probabilities"] = True
    write_sealed(run / "results.json", results)
    with pytest.raises(ValueError, match="expected `row` that ranks as its model does, got 1, which ranks by prob"):
        load(run, row="1")


def test_scores_are_of_the_pairs_of_the_bank_in_their_order(small_ablation: Path) -> None:
    model = load(small_ablation)
    images, pairs = torch.zeros(1, 3, 48, 48), model.space.pairs
    with pytest.raises(ValueError, match="expected `pairs` to be those of the bank, in their order, got others"):
        model.scores(images, pairs.flip(0))
    assert torch.equal(model.scores(images, pairs.clone()), model.scores(images, pairs))


def test_what_was_added_to_the_bank_is_told_by_the_card(small_ablation: Path, tmp_path: Path) -> None:
    model = load(small_ablation)
    model.adapt(model(torch.zeros(1, 3, 48, 48), model.space.pairs))
    model.save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "Images were added to the memory bank after that." in card


def test_a_condenser_is_not_trained_behind_a_method_of_another_clip(small_ablation: Path, tmp_path: Path) -> None:
    folder = tmp_path / "max"
    shutil.copytree(small_ablation / "seed0" / "max", folder, ignore=shutil.ignore_patterns("checkpoints", "logs"))
    content = read_json(folder / "config.json")
    write_sealed(folder / "config.json", {**content, "encoder_digest": "0" * 64})
    (folder / "training.json").unlink()  # which has the digest of the other one
    with pytest.raises(ValueError, match=r"expected the encoder 'tiny' that .*max was trained on, got one of other"):
        check_encoder(load(small_ablation), folder)
