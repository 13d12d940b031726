"""What is said of an image is what the model says: its scores, their parts, its maps."""

from pathlib import Path

import pytest
import torch

from czsl_heads.data import read_dataset
from czsl_heads.functional.fusion import fuse
from czsl_heads.report.findings import examine
from czsl_heads.report.maps import alignment_map
from czsl_heads.training.run import load_run


@pytest.fixture(scope="module")
def dataset(shapes_root: Path):
    return read_dataset(shapes_root)


@pytest.fixture(scope="module")
def sac(small_ablation: Path):
    return load_run(small_ablation / "seed0" / "vac-kl")


@pytest.fixture(scope="module")
def batch(dataset, sac):
    """Five test images and the columns of their pairs."""
    loaded = [dataset.images("test", sac.encoder.transform())[index] for index in range(0, 48, 11)]
    return torch.stack([image for image, _ in loaded]), torch.tensor([column for _, column in loaded])


@pytest.fixture(scope="module")
def texts(sac, dataset):
    with torch.no_grad():
        return sac.texts(dataset.space)


@torch.no_grad()
def test_the_predictions_are_the_best_scores_of_the_model(sac, batch, texts):
    scores = sac(batch[0], texts).scores
    for finding, row in zip(examine(sac, batch[0], texts, top=4), scores):
        best, columns = row.sort(descending=True)
        assert [prediction.score for prediction in finding.predictions] == pytest.approx(best[:4].tolist(), abs=1e-6)
        names = [(prediction.attribute, prediction.object) for prediction in finding.predictions]
        assert names == [texts.space.pair_names[column] for column in columns[:4]]


def test_the_parts_add_up_to_the_score(sac, batch, texts):
    found = [prediction for finding in examine(sac, batch[0], texts) for prediction in finding.predictions]
    score, *parts = (torch.tensor([column]) for column in list(zip(*found))[2:])
    torch.testing.assert_close(fuse(*parts, beta=sac.beta, gamma=sac.gamma), score, rtol=0, atol=1e-6)
    assert all(part.abs().sum() > 0 for part in parts)


def test_a_model_without_condenser_has_one_part_and_no_map_of_it(small_ablation, batch, texts):
    baseline = load_run(small_ablation / "seed0" / "cls")
    own = baseline.texts(texts.space)
    finding = examine(baseline, batch[0], own)[0]
    assert finding.maps.keys() == {"alignment", "attention"}
    for prediction in finding.predictions:
        assert prediction.score == prediction.sa
        assert (prediction.vac, prediction.bank) == (None, None)


def test_only_candidates_are_predicted(sac, batch, texts, dataset):
    candidates = torch.zeros(len(texts.space), dtype=torch.bool)
    candidates[[3, 100]] = True
    for finding in examine(sac, batch[0], texts, candidates=candidates):
        names = {(prediction.attribute, prediction.object) for prediction in finding.predictions}
        assert names == {texts.space.pair_names[3], texts.space.pair_names[100]}
    everything = examine(sac, batch[0], texts, candidates=torch.ones_like(candidates))
    assert [f.predictions for f in everything] == [f.predictions for f in examine(sac, batch[0], texts)]
    assert len(examine(sac, batch[0], texts, top=999)[0].predictions) == len(texts.space)


@torch.no_grad()
def test_the_maps_are_those_of_the_predicted_and_of_the_labelled_pair(sac, batch, texts):
    images, target = batch
    found = examine(sac, images, texts, target=target)
    tokens = sac.encoder.encode_tokens(images)
    best = sac(images, texts).scores.argmax(dim=1)
    for name, columns in (("alignment", best), ("labelled", target)):
        expected = alignment_map(tokens, texts.features.pairs[columns], sac.encoder)
        for index, finding in enumerate(found):
            torch.testing.assert_close(finding.maps[name].patches, expected.patches[index], rtol=0, atol=1e-6)
    for index, finding in enumerate(found):
        condensed = finding.maps["condenser"]
        shares = torch.cat([condensed.prefix, condensed.patches.flatten()])
        torch.testing.assert_close(shares, sac.condenser.attention(tokens)[index], rtol=0, atol=1e-6)
        attention = finding.maps["attention"]
        assert float(attention.prefix.sum() + attention.patches.sum()) == pytest.approx(1, abs=1e-5)


def test_looking_changes_nothing_and_rows_do_not_meet(sac, batch, texts):
    before = {name: value.clone() for name, value in sac.state_dict().items()}
    together = examine(sac, batch[0], texts)
    assert all(torch.equal(value, before[name]) for name, value in sac.state_dict().items())
    alone = examine(sac, batch[0][3:4], texts)[0]
    for one, other in zip(alone.predictions, together[3].predictions):
        assert one[:2] == other[:2]
        assert one[2:] == pytest.approx(other[2:], abs=1e-5)


def test_a_space_of_other_pairs_has_no_part_of_the_bank(sac, batch, texts):
    fewer = texts.space.subset(texts.space.seen_mask)
    for prediction in examine(sac, batch[0], sac.texts(fewer))[0].predictions:
        assert prediction.bank is None
        assert prediction.score == pytest.approx(sac.beta * prediction.sa + (1 - sac.beta) * prediction.vac, abs=1e-6)


def test_wrong_arguments_raise(sac, batch, texts):
    with pytest.raises(ValueError, match="expected `top` to be at least 1, got 0"):
        examine(sac, batch[0], texts, top=0)
    with pytest.raises(ValueError, match="expected `images` of shape"):
        examine(sac, batch[0][:, :1], texts)
