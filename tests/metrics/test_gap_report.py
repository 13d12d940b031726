import numpy as np
import pytest
import torch
from PIL import Image

from czsl_heads.functional import (
    cua_loss,
    cuaxu_loss,
    effective_rank,
    explained_variance,
    modality_distance,
    relative_modality_gap,
)
from czsl_heads.metrics import ModalityGap, gap_report, linear_separability
from tests.functional.test_gap import IMAGES, LABELS, TEXTS, draw


def test_golden_values():
    numbers = gap_report(IMAGES, TEXTS[LABELS]).numbers
    golden = {
        "relative_modality_gap": 0.4381908911029611,
        "centroid_distance": 0.19193876819946523,
        "l2m": 0.19193876819946523,
        "l2i": 0.7565267540911993,
        "uniformity_images": -1.26370026436577,
        "uniformity_texts": -1.1563126318361543,
        "uniformity": -1.210006448100962,
        "cross_uniformity": -1.2304198704334175,
        "alignment": 0.6367953122791297,
        "contrastive": 16.014620127068387,
        "cua": 15.441408991246554,
        "cuaxu": 14.210989120813137,
    }
    assert {name: numbers[name] for name in golden} == pytest.approx(golden, abs=1e-11)
    by_class = gap_report(IMAGES, TEXTS, LABELS).numbers
    assert by_class["relative_modality_gap"] == pytest.approx(0.4141990762862806, abs=1e-12)
    assert by_class["l2m"] == pytest.approx(0.26783708104793713, abs=1e-12)
    assert by_class["centroid_distance"] == pytest.approx(0.19193876819946523, abs=1e-12)


def test_every_number_is_that_of_its_function():
    images, texts, labels = draw(images=23, texts=5)
    report = gap_report(images, texts, labels)
    numbers = report.numbers
    expected = {
        "relative_modality_gap": relative_modality_gap(images, texts, labels=labels),
        "l2m": modality_distance(images, texts, labels=labels),
        "cua": cua_loss(images, texts, labels=labels),
        "cuaxu": cuaxu_loss(images, texts, labels=labels),
        "effective_rank_images": effective_rank(images),
        "effective_rank_texts": effective_rank(texts),
        "linear_separability": linear_separability(images, texts, labels=labels),
    }
    assert {name: numbers[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()})
    assert report.explained_variance["images"] == pytest.approx(explained_variance(images).tolist())
    assert numbers["alignment"] == pytest.approx(2 - 2 * numbers["matched_cosine"])
    assert len(numbers) == 17
    assert report.as_dict().keys() == numbers.keys() | {"explained_variance", "plane_share"}


def test_the_plane_is_that_of_the_two_shared_components():
    images, texts, labels = draw(images=23, texts=5)
    unit = [vectors / vectors.norm(dim=1, keepdim=True) for vectors in (images, texts)]
    middle = (unit[0].mean(dim=0) + unit[1].mean(dim=0)) / 2
    # Both weigh the same: as if each text stood there 23 times and each image five times.
    together = torch.cat([unit[0].repeat(5, 1), unit[1].repeat(23, 1)]) - middle
    values = torch.linalg.svdvals(together).square()
    report = gap_report(images, texts, labels)
    assert report.plane_share == pytest.approx(tuple((values[:2] / values.sum()).tolist()))
    places = torch.cat([report.plane["images"].repeat(5, 1), report.plane["texts"].repeat(23, 1)])
    assert torch.allclose(places.square().sum(dim=0), values[:2])
    assert report.plane["texts"][:, 0].mean() > report.plane["images"][:, 0].mean()


def test_the_picture_is_drawn(tmp_path):
    images, texts, labels = draw(images=23, texts=5)
    gap_report(images, texts, labels).plot(tmp_path / "plane.png", title="a gap")
    with Image.open(tmp_path / "plane.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_separability_splits_pairs_and_not_vectors():
    images = draw(images=40, dim=5)[0]
    # The same vectors in both modalities: nothing to tell them by, and chance on the other pairs.
    assert linear_separability(images, images) == pytest.approx(0.5)
    assert linear_separability(images.abs(), -images.abs()) == 1.0
    # Labels name the same pairs.
    texts, labels = draw(texts=7)[1], torch.arange(40) % 7
    images = draw(images=40)[0]
    by_class = linear_separability(images, texts, labels=labels, seed=3)
    assert by_class == linear_separability(images, texts[labels], seed=3)


def test_separability_equals_scikit_learn_by_hand():
    from sklearn.linear_model import LogisticRegression

    images, texts = draw(images=30, dim=4)[0], draw(images=30, dim=4, seed=1)[0] + 0.8
    unit = [(vectors / vectors.norm(dim=1, keepdim=True)).numpy() for vectors in (images, texts)]
    order = np.random.default_rng(5).permutation(30)
    train, test = order[:24], order[24:]
    features = np.concatenate([unit[0][train], unit[1][train]])
    fitted = LogisticRegression(random_state=5).fit(features, [0] * 24 + [1] * 24)
    right = [fitted.predict(unit[0][test]) == 0, fitted.predict(unit[1][test]) == 1]
    assert linear_separability(images, texts, seed=5) == pytest.approx(np.concatenate(right).mean())


def test_the_metric_is_the_report_batch_by_batch():
    images, texts, labels = draw(images=23, texts=5)
    by_class, by_pairs = ModalityGap(texts), ModalityGap()
    for part in torch.arange(23).split(7):
        by_class.update(images[part], labels[part])
        by_pairs.update(images[part], texts[labels[part]])
    found = {name: value.item() for name, value in by_class.compute().items()}
    assert found == gap_report(images, texts, labels).numbers
    found = {name: value.item() for name, value in by_pairs.compute().items()}
    assert found == gap_report(images, texts[labels]).numbers
    merged = ModalityGap(texts)
    merged.update(images[:10], labels[:10])
    other = ModalityGap(texts)
    other.update(images[10:], labels[10:])
    other.merge_state(merged)
    # states come first, as in torchmetrics; only the split of the separability depends on the order
    found = {name: value.item() for name, value in other.compute().items() if name != "linear_separability"}
    expected = {name: gap_report(images, texts, labels).numbers[name] for name in found}
    assert found == pytest.approx(expected, rel=1e-9)


def test_what_cannot_be_measured_is_told():
    images, texts, labels = draw()
    with pytest.raises(ValueError, match="expected at least two images and texts, got none"):
        ModalityGap(texts).compute()
    with pytest.raises(ValueError, match=r"expected `images.shape\[0\]` to be at least 2, got 1"):
        gap_report(images[:1], texts, labels[:1])
    with pytest.raises(ValueError, match="expected `texts` without zero vectors, got one in row 1"):
        gap_report(images, texts.index_fill(0, torch.tensor([1]), 0), labels)
    with pytest.raises(ValueError, match="expected `images` to be finite, got NaN or an infinity"):
        gap_report(images.index_fill(0, torch.tensor([1]), torch.inf), texts, labels)
    with pytest.raises(ValueError, match=r"expected `labels` to be in \[0, 4\], got 9"):
        ModalityGap(texts).update(images, labels.clone().fill_(9))
