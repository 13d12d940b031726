from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads.functional.gap import (
    GapSums,
    gap_of_sums,
    gather_sums,
    instance_distance,
    modality_distance,
    relative_modality_gap,
)
from tests.references import reference_relative_modality_gap

# The released code's own functions, called in float64 on these rows, give the golden values below.
IMAGES = torch.tensor([(3, 1, 0, 2), (1, 2, 2, 0), (0, 1, 3, 1), (2, 0, 1, 2), (1, 1, 1, 3)]).double()
TEXTS = torch.tensor([(2, 2, 0, 1), (1, 0, 2, 1), (0, 3, 1, 1)]).double()
LABELS = torch.tensor([0, 1, 1, 2, 0])


def draw(images=11, texts=5, dim=7, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(images, dim, generator=generator).to(dtype),
        torch.randn(texts, dim, generator=generator).to(dtype),
        torch.randint(texts, (images,), generator=generator),
    )


def both_modes(images, texts, labels, **options):
    return torch.stack(
        [
            relative_modality_gap(images, texts, labels=labels, **options),
            relative_modality_gap(images, texts[labels], **options),
        ]
    )


def test_golden_values():
    gaps = both_modes(IMAGES, TEXTS, LABELS)
    assert gaps.dtype == torch.float64
    assert gaps.tolist() == pytest.approx([0.4141990762862806, 0.4381908911029611], abs=1e-12)
    self_included = relative_modality_gap(IMAGES, TEXTS[LABELS], include_self=True)
    assert float(self_included) == pytest.approx(0.4936593556412618, abs=1e-12)


def test_hand_sized_values():
    # Two orthogonal images, each at 45 degrees from its text, which is the same: a = 1/2, b = 0.
    images, texts = torch.eye(2), torch.ones(2, 2)
    matched = (1 - 0.5**0.5) / 2
    assert float(relative_modality_gap(images, texts)) == pytest.approx(matched / (matched + 0.25))
    # With self pairs the images are half as far apart.
    with_self = relative_modality_gap(images, texts, include_self=True)
    assert float(with_self) == pytest.approx(matched / (matched + 0.125))


@given(
    sizes=st.tuples(st.integers(2, 13), st.integers(2, 7), st.integers(2, 11)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    labelled=st.booleans(),
    include_self=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=40)
def test_linear_time_equals_all_pairs_one_by_one(sizes, dtype, labelled, include_self, seed):
    images, texts, labels = draw(*sizes, dtype=dtype, seed=seed)
    texts, labels = (texts, labels) if labelled else (texts[labels], None)
    options = {"labels": labels, "include_self": include_self}
    gap = relative_modality_gap(images, texts, **options)
    assert gap.shape == ()
    assert gap.dtype == torch.float64
    assert 0 < gap <= 1
    assert float(gap) == pytest.approx(reference_relative_modality_gap(images, texts, **options), rel=1e-10)


@given(cuts=st.sets(st.integers(0, 11)), include_self=st.booleans())
@settings(deadline=None, max_examples=25)
def test_sums_of_parts_add_up_to_the_whole(cuts, include_self):
    images, texts, labels = draw()
    edges = [0, *sorted(cuts), 11]
    parts = [
        gather_sums(images[first:last], texts, labels[first:last]) for first, last in pairwise(edges)
    ]  # some of them empty
    whole = GapSums(*(sum(field) for field in zip(*parts)))
    torch.testing.assert_close(
        gap_of_sums(whole, include_self=include_self),
        relative_modality_gap(images, texts[labels], include_self=include_self),
        rtol=1e-13,
        atol=0,
    )


@pytest.mark.parametrize("include_self", [False, True])
def test_a_common_rotation_changes_nothing(include_self):
    images, texts, labels = draw()
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    torch.testing.assert_close(
        both_modes(images @ rotation, texts @ rotation, labels, include_self=include_self),
        both_modes(images, texts, labels, include_self=include_self),
    )
    # A rotation of one modality alone is a different matter.
    assert not torch.isclose(both_modes(images @ rotation, texts, labels), both_modes(images, texts, labels)).any()


def test_norms_do_not_matter():
    images, texts, labels = draw()
    scales = torch.linspace(0.01, 100, 11, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        both_modes(scales * images, 3 * texts, labels), both_modes(images, texts, labels), rtol=1e-12, atol=0
    )


def test_orders_of_images_and_of_class_texts_do_not_matter():
    images, texts, labels = draw()
    samples, classes = torch.randperm(11, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 0, 4, 2, 1])
    expected = both_modes(images, texts, labels)
    torch.testing.assert_close(both_modes(images[samples], texts, labels[samples]), expected)
    torch.testing.assert_close(both_modes(images, texts[classes], classes.argsort()[labels]), expected)


def test_images_and_texts_may_change_places():
    images, texts, labels = draw()
    torch.testing.assert_close(
        relative_modality_gap(texts[labels], images), relative_modality_gap(images, texts[labels])
    )


def test_unused_class_texts_count_among_the_texts():
    images, texts, _ = draw()
    labels = torch.arange(11) % 3
    gap = relative_modality_gap(images, texts, labels=labels)
    assert not torch.isclose(gap, relative_modality_gap(images, texts[:3], labels=labels))
    expected = reference_relative_modality_gap(images, texts, labels=labels)
    assert float(gap) == pytest.approx(expected, rel=1e-12)


def test_several_captions_an_image_are_labelled_by_their_image():
    # As the released code does on captions: matched by caption, images unique, all captions.
    generator = torch.Generator().manual_seed(0)
    images, captions = (torch.randn(size, 7, dtype=torch.float64, generator=generator) for size in (5, 15))
    owner = torch.arange(15) // 3
    unit_images, unit_captions = F.normalize(images, dim=-1), F.normalize(captions, dim=-1)

    def within(vectors):
        distances = (1 - vectors @ vectors.T) / 2
        return (distances.sum() - distances.trace()) / (len(vectors) ** 2 - len(vectors))

    matched = ((1 - (unit_captions * unit_images[owner]).sum(-1)) / 2).mean()
    expected = matched / (matched + (within(unit_images) + within(unit_captions)) / 2)
    torch.testing.assert_close(relative_modality_gap(captions, images, labels=owner), expected)


def test_the_gap_grows_as_images_move_away_from_all_texts():
    images, texts, labels = draw(dim=64)
    away = torch.zeros(64, dtype=torch.float64)
    away[0] = 1.0
    gaps = [both_modes(images + step * away, texts - step * away, labels) for step in (0, 2, 5, 20)]
    for near, far in pairwise(gaps):
        assert (near < far).all()
    assert (gaps[-1] > 0.9).all()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_identical_modalities_get_the_floor(scale):
    images, _, _ = draw(dim=67)
    unit = F.normalize(images, dim=-1)
    within = (1 - (unit @ unit.T - torch.eye(11, dtype=torch.float64)).sum() / 110) / 2
    gap = relative_modality_gap(images, scale * images)
    torch.testing.assert_close(gap, 1e-3 / (1e-3 + within))
    every = relative_modality_gap(images, scale * images, labels=torch.arange(11))
    assert torch.equal(every, gap)


def test_nearly_identical_modalities_are_no_floor():
    images, _, _ = draw()
    near = images.clone()
    near[:, 0] += 1e-5
    gap = relative_modality_gap(images, near)
    assert float(gap) == pytest.approx(reference_relative_modality_gap(images, near), rel=1e-3)  # which cancels
    assert 0 < gap < 1e-9


@pytest.mark.parametrize("texts_scale", [1.0, -2.0])
@pytest.mark.parametrize("include_self", [False, True])
def test_two_points_have_the_largest_gap_there_is(texts_scale, include_self):
    # Nothing lies within the modalities, so whatever lies between them is all; also where both points are one.
    rows = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row in rows:  # in some of them rounding would take the gap beyond 1
        images, texts = row.expand(5, 7), (texts_scale * row).expand(5, 7)
        for labels in (None, torch.tensor([0, 4, 1, 1, 2])):
            gap = relative_modality_gap(images, texts, labels=labels, include_self=include_self)
            assert float(gap) == pytest.approx(1.0, abs=1e-9)
            assert gap <= 1


def test_self_pairs_matter_less_the_more_samples_there_are():
    def difference(size):
        images, texts, _ = draw(images=size, texts=size, dim=13)
        return relative_modality_gap(images, texts, include_self=True) - relative_modality_gap(images, texts)

    assert 0 < difference(1000) < 0.02 * difference(10)


def test_one_image_and_one_text_are_enough_with_self_pairs():
    images, texts, _ = draw(images=1, texts=1)
    assert float(relative_modality_gap(images, texts, include_self=True)) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_floats_are_computed_in_float64(dtype):
    images, texts, labels = draw(dtype=dtype, dim=67)
    assert torch.equal(both_modes(images, texts, labels), both_modes(images.double(), texts.double(), labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(both_modes(images, texts, labels), both_modes(images.double(), texts.double(), labels))


def test_gradients_are_right():
    images, texts, labels = draw()
    inputs = images.requires_grad_(), texts.requires_grad_()
    assert torch.autograd.gradcheck(lambda images, texts: both_modes(images, texts, labels), inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_propagates(value, side):
    images, texts, labels = draw()
    (images, texts)[side][labels[3] if side else 3, 2] = value
    assert both_modes(images, texts, labels).isnan().all()


def test_inputs_are_left_alone():
    images, texts, labels = draw()
    before = images.clone(), texts.clone(), labels.clone()
    both_modes(images, texts, labels)
    for tensor, kept in zip((images, texts, labels), before):
        assert torch.equal(tensor, kept)


@pytest.mark.parametrize("seed", range(3))
def test_choosing_the_token_by_the_label_lowers_the_gap_of_pure_noise(seed):
    # Why the gap is told for three vectors: nothing was learned here, and the oracle's is far lower.
    generator = torch.Generator().manual_seed(seed)
    texts = F.normalize(torch.randn(29, 64, generator=generator), dim=-1)
    tokens = F.normalize(torch.randn(1009, 50, 64, generator=generator), dim=-1)
    labels = torch.randint(29, (1009,), generator=generator)
    scores, winner = (tokens @ texts.mT).max(dim=1)
    rows = torch.arange(1009)
    vectors = {
        "cls": tokens[:, 0],
        "true": tokens[rows, winner[rows, labels]],
        "pred": tokens[rows, winner[rows, scores.argmax(dim=1)]],
    }
    gaps = {name: float(relative_modality_gap(images, texts, labels=labels)) for name, images in vectors.items()}
    assert gaps == pytest.approx({"cls": 0.499, "true": 0.422, "pred": 0.497}, abs=0.01)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": [[1.0]]}, TypeError, r"expected `images` to be a torch.Tensor, got list"),
        ({"texts": torch.ones(5, 7).long()}, TypeError, r"expected `texts` of dtype .*got torch.int64"),
        ({"labels": [0] * 11}, TypeError, r"expected `labels` to be a torch.Tensor, got list"),
        ({"labels": torch.zeros(11)}, TypeError, r"expected `labels` of dtype torch.int64, got torch.float32"),
        ({"images": torch.ones(7)}, ValueError, r"expected `images` of shape \(images, dim\), got \(7,\)"),
        ({"texts": torch.ones(5, 6)}, ValueError, r"expected `texts` of shape \(texts, dim\) .*dim=7, got \(5, 6\)"),
        ({"labels": torch.zeros(5).long()}, ValueError, r"expected `labels` of shape .*images=11.*got \(5,\)"),
        ({"labels": None}, ValueError, r"expected `texts` of shape \(images, dim\) with images=11.*got \(5, 7\)"),
        ({"labels": torch.full((11,), 5)}, ValueError, r"expected `labels` to be in \[0, 4\], got 5"),
        ({"labels": torch.full((11,), -1)}, ValueError, r"expected `labels` to be in \[0, 4\], got -1"),
        ({"texts": torch.ones(0, 7)}, ValueError, r"expected `labels` of no index at all, got"),
    ],
)
def test_wrong_arguments_are_told(change, error, message):
    images, texts, labels = draw()
    with pytest.raises(error, match=message):
        relative_modality_gap(**{"images": images, "texts": texts, "labels": labels, **change})


def test_too_few_to_compare_are_told():
    images, texts, labels = draw()
    one = torch.zeros(1).long()
    with pytest.raises(ValueError, match=r"at least 2 images and 2 texts with include_self=False, got 1 and 5"):
        relative_modality_gap(images[:1], texts, labels=one)
    with pytest.raises(ValueError, match=r"at least 2 images and 2 texts with include_self=False, got 11 and 1"):
        relative_modality_gap(images, texts[:1], labels=torch.zeros_like(labels))
    with pytest.raises(ValueError, match=r"at least 2 images and 2 texts with include_self=False, got 1 and 1"):
        relative_modality_gap(images[:1], texts[:1])
    with pytest.raises(ValueError, match=r"at least 1 images and 1 texts with include_self=True, got 0 and 0"):
        relative_modality_gap(images[:0], texts[:0], include_self=True)


def test_vectors_without_a_direction_are_told():
    images, texts, labels = draw()
    images[3] = 0
    with pytest.raises(ValueError, match=r"expected `images` without zero vectors, got one in row 3"):
        both_modes(images, texts, labels)
    images, texts, labels = draw()
    texts[4], labels[:] = 0, torch.arange(11) % 4  # a class that no image has
    with pytest.raises(ValueError, match=r"expected `texts` without zero vectors, got one in row 4"):
        relative_modality_gap(images, texts, labels=labels)


def test_golden_distances():
    # Computed by the released code's own functions, in float64.
    matched = TEXTS[LABELS]
    found = [
        modality_distance(IMAGES, TEXTS, labels=LABELS),
        modality_distance(IMAGES, matched),
        instance_distance(IMAGES, matched),
        instance_distance(IMAGES, TEXTS, labels=LABELS),
    ]
    expected = [0.26783708104793713, 0.19193876819946523, 0.7565267540911993, 0.7565267540911993]
    assert [value.item() for value in found] == pytest.approx(expected, abs=1e-12)


@given(sizes=st.tuples(st.integers(1, 13), st.integers(1, 7), st.integers(1, 11)), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_distances_equal_a_loop(sizes, seed):
    images, texts, labels = draw(*sizes, seed=seed)
    unit = [vector / vector.norm() for vector in images], [vector / vector.norm() for vector in texts]
    means = [sum(vectors) / len(vectors) for vectors in unit]
    apart = [(image - unit[1][label]).norm().item() for image, label in zip(unit[0], labels.tolist())]
    distance = modality_distance(3 * images, texts.float(), labels=labels)
    assert distance.item() == pytest.approx((means[0] - means[1]).norm().item(), abs=1e-6)
    assert instance_distance(images, texts, labels=labels).item() == pytest.approx(sum(apart) / len(apart), abs=1e-12)


def test_distances_of_nothing_are_told():
    images, texts, labels = draw()
    for distance in (modality_distance, instance_distance):
        with pytest.raises(ValueError, match="expected at least one image and one text, got 0 and 0"):
            distance(images[:0], texts[:0])
        with pytest.raises(ValueError, match=r"expected `labels` to be in \[0, 4\], got -1"):
            distance(images, texts, labels=labels.clone().fill_(-1))
