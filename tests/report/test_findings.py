"""What is said of an image is what the model says: its scores, their parts, its maps."""

from pathlib import Path

import pytest
import torch

from czsl_heads.data import read_dataset
from czsl_heads.functional.fusion import fuse
from czsl_heads.models.saved import load
from czsl_heads.report.findings import examine
from czsl_heads.report.maps import alignment_map


@pytest.fixture(scope="module")
def dataset(shapes_root: Path):
    return read_dataset(shapes_root)


@pytest.fixture(scope="module")
def model(small_ablation: Path):
    return load(small_ablation)


@pytest.fixture(scope="module")
def batch(dataset, model):
    """Five test images and the columns of their pairs."""
    loaded = [dataset.images("test", model.encoder.transform())[index] for index in range(0, 48, 11)]
    return torch.stack([image for image, _ in loaded]), torch.tensor([column for _, column in loaded])


@pytest.fixture(scope="module")
def pairs(dataset):
    return dataset.space.pairs


@pytest.fixture(scope="module")
def texts(model, pairs):
    with torch.no_grad():
        return model.texts(pairs)


@torch.no_grad()
def test_the_predictions_are_the_best_scores_of_the_model(model, batch, pairs, texts, dataset):
    scores = model.scores(batch[0], pairs)
    for finding, row in zip(examine(model, batch[0], pairs, texts, top=4), scores):
        best, columns = row.sort(descending=True)
        assert [prediction.score for prediction in finding.predictions] == pytest.approx(best[:4].tolist(), abs=1e-6)
        names = [(prediction.attribute, prediction.object) for prediction in finding.predictions]
        assert names == [dataset.space.pair_names[column] for column in columns[:4]]


def test_the_parts_add_up_to_the_score(model, batch, pairs, texts):
    findings = examine(model, batch[0], pairs, texts)
    found = [prediction for finding in findings for prediction in finding.predictions]
    score = torch.tensor([[prediction.score for prediction in found]])
    parts = [
        torch.tensor([[prediction.parts[name] for prediction in found]]) for name in ("alignment", "condenser", "bank")
    ]
    torch.testing.assert_close(fuse(*parts, beta=model.beta, gamma=model.gamma), score, rtol=0, atol=1e-6)
    assert all(part.abs().sum() > 0 for part in parts)


def test_a_model_without_condenser_has_its_branches_and_no_map_of_it(small_ablation, batch, pairs):
    baseline = load(small_ablation, row="1")
    finding = examine(baseline, batch[0], pairs, baseline.texts(pairs))[0]
    assert finding.maps.keys() == {"alignment", "attention"}
    for prediction in finding.predictions:
        product = prediction.parts["attribute"] * prediction.parts["object"]
        assert prediction.score == pytest.approx(prediction.parts["pair"] + product, abs=1e-6)


def test_only_candidates_are_predicted(model, batch, pairs, texts, dataset):
    names = dataset.space.pair_names
    candidates = torch.zeros(len(pairs), dtype=torch.bool)
    candidates[[3, 100]] = True
    for finding in examine(model, batch[0], pairs, texts, candidates=candidates):
        found = {(prediction.attribute, prediction.object) for prediction in finding.predictions}
        assert found == {names[3], names[100]}
    everything = examine(model, batch[0], pairs, texts, candidates=torch.ones_like(candidates))
    plain = examine(model, batch[0], pairs, texts)
    assert [finding.predictions for finding in everything] == [finding.predictions for finding in plain]
    assert len(examine(model, batch[0], pairs, texts, top=999)[0].predictions) == len(pairs)


@torch.no_grad()
def test_the_maps_are_those_of_the_predicted_and_of_the_labelled_pair(model, batch, pairs, texts):
    images, target = batch
    found = examine(model, images, pairs, texts, target=target)
    tokens = model.encoder.encode_tokens(images)
    best = model.scores(images, pairs).argmax(dim=1)
    for name, columns in (("alignment", best), ("labelled", target)):
        expected = alignment_map(tokens, texts.pairs[columns], model.encoder)
        for index, finding in enumerate(found):
            torch.testing.assert_close(finding.maps[name].patches, expected.patches[index], rtol=0, atol=1e-6)
    for index, finding in enumerate(found):
        condensed = finding.maps["condenser"]
        shares = torch.cat([condensed.prefix, condensed.patches.flatten()])
        torch.testing.assert_close(shares, model.condenser.attention(tokens)[index], rtol=0, atol=1e-6)
        attention = finding.maps["attention"]
        assert float(attention.prefix.sum() + attention.patches.sum()) == pytest.approx(1, abs=1e-5)


def test_looking_changes_nothing_and_images_do_not_meet(model, batch, pairs, texts):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    together = examine(model, batch[0], pairs, texts)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    alone = examine(model, batch[0][3:4], pairs, texts)[0]
    for one, other in zip(alone.predictions, together[3].predictions):
        assert one[:2] == other[:2]
        assert one.score == pytest.approx(other.score, abs=1e-5)
        assert one.parts == pytest.approx(other.parts, abs=1e-5)


def test_wrong_arguments_raise(model, batch, pairs, texts):
    with pytest.raises(ValueError, match="expected `top` to be at least 1, got 0"):
        examine(model, batch[0], pairs, texts, top=0)
    with pytest.raises(ValueError, match="expected `images` of shape"):
        examine(model, batch[0][:, :1], pairs, texts)


def test_maps_of_dense_patches_are_shown_beside_and_decide_nothing(model, batch, pairs, texts):
    plain = examine(model, batch[0], pairs, texts)
    found = examine(model, batch[0], pairs, texts, dense=["value", "clearclip"])
    assert [each.predictions for each in found] == [each.predictions for each in plain]
    assert found[0].maps.keys() == plain[0].maps.keys() | {"value", "clearclip"}
    best = model.scores(batch[0], pairs).argmax(dim=1)
    model.encoder.dense = "clearclip"
    expected = alignment_map(model.encoder.encode_tokens(batch[0]), texts.pairs[best], model.encoder)
    model.encoder.dense = "none"
    for index, finding in enumerate(found):
        torch.testing.assert_close(finding.maps["clearclip"].patches, expected.patches[index], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"expected `dense` to be one of none, .*, naclip, got 'x'"):
        examine(model, batch[0], pairs, texts, dense=["x"])
    assert model.encoder.dense == "none"
