import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads.functional import uniformity
from czsl_heads.functional.uniformity import cross_uniformity_loss, uniformity_loss
from tests.functional.test_gap import IMAGES, LABELS, TEXTS, draw
from tests.references import reference_cross_uniformity, reference_uniformity


@pytest.fixture(params=[64 * 2**20, 150, 8], ids=["whole", "blocks", "rows"])
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(uniformity, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("block_bytes")
def test_golden_values():
    # Computed by the released code's own functions, in float64.
    matched = TEXTS[LABELS]
    assert uniformity_loss(IMAGES).item() == pytest.approx(-1.26370026436577, abs=1e-12)
    assert uniformity_loss(matched).item() == pytest.approx(-1.1563126318361543, abs=1e-12)
    assert cross_uniformity_loss(IMAGES, matched).item() == pytest.approx(-1.2304198704334175, abs=1e-12)


def test_hand_sized_values():
    # Three orthogonal vectors are all at squared distance two, opposite ones at four.
    assert uniformity_loss(torch.eye(3)).item() == pytest.approx(-4)
    assert uniformity_loss(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])).item() == pytest.approx(-8)
    assert uniformity_loss(torch.ones(5, 4)).item() == pytest.approx(0, abs=1e-6)
    # Image 0 against the text of image 1 (equal to image 0), image 1 against that of image 0 (opposite to image 1).
    images, texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    assert cross_uniformity_loss(images, texts).item() == pytest.approx(math.log((1 + math.exp(-8)) / 2), abs=1e-6)


@given(
    sizes=st.tuples(st.integers(2, 13), st.integers(2, 7), st.integers(1, 11)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    block=st.sampled_from([64 * 2**20, 200, 8]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_loop(sizes, dtype, block, seed):
    images, texts, labels = draw(*sizes, dtype=dtype, seed=seed)
    tolerance = {"rel": 1e-9, "abs": 1e-9} if dtype == torch.float64 else {"rel": 1e-4, "abs": 1e-4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniformity, "BLOCK_BYTES", block)
        found = uniformity_loss(images), cross_uniformity_loss(images, texts, labels=labels)
    expected = reference_uniformity(images), reference_cross_uniformity(images, texts, labels)
    for value, wanted in zip(found, expected):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.item() == pytest.approx(wanted, **tolerance)
        assert -8 - 1e-4 <= value.item() <= 1e-4


@pytest.mark.usefixtures("block_bytes")
def test_gradients_are_exact():
    images, texts, labels = draw(5, 3, 4)
    images.requires_grad_()
    texts.requires_grad_()
    assert torch.autograd.gradcheck(uniformity_loss, images)
    assert torch.autograd.gradcheck(lambda *both: cross_uniformity_loss(*both, labels=labels), (images, texts))
    assert torch.autograd.gradgradcheck(uniformity_loss, images)


def test_blocks_keep_no_similarities(monkeypatch):
    vectors = draw(images=400, dim=3)[0].float().requires_grad_()

    def largest_kept(block):
        monkeypatch.setattr(uniformity, "BLOCK_BYTES", block)
        sizes = []

        def keep(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            uniformity_loss(vectors)
        return max(sizes)

    assert largest_kept(64 * 2**20) == 400 * 400
    assert largest_kept(400 * 4 * 20) == 400 * 3


def test_order_and_length_change_nothing():
    images, texts, labels = draw()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    lengths = torch.rand(len(images), 1, generator=torch.Generator().manual_seed(2)).double() + 0.1
    assert uniformity_loss((lengths * images)[order]).item() == pytest.approx(uniformity_loss(images).item())
    crossed = cross_uniformity_loss((lengths * images)[order], 3 * texts, labels=labels[order])
    assert crossed.item() == pytest.approx(cross_uniformity_loss(images, texts, labels=labels).item())


def test_pairs_are_classes_of_one_image():
    images = draw()[0]
    texts = draw(images=len(images), seed=1)[0]
    crossed = cross_uniformity_loss(images, texts, labels=torch.arange(len(images)))
    assert torch.equal(crossed, cross_uniformity_loss(images, texts))


def test_what_cannot_be_compared_is_told():
    images, texts, labels = draw()
    with pytest.raises(ValueError, match=r"expected `vectors.shape\[0\]` to be at least 2, got 1"):
        uniformity_loss(images[:1])
    with pytest.raises(ValueError, match="expected `texts` of other images too, got 1 text of 11 images"):
        cross_uniformity_loss(images, texts[:1], labels=torch.zeros(11, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected `texts` of shape \(images, dim\)"):
        cross_uniformity_loss(images, texts)
    with pytest.raises(ValueError, match=r"expected `labels` to be in \[0, 4\], got 5"):
        cross_uniformity_loss(images, texts, labels=labels.clone().fill_(5))
    with pytest.raises(TypeError, match="expected `vectors` of dtype"):
        uniformity_loss(images.long())


def test_nan_is_not_hidden():
    images = draw()[0]
    images[3, 2] = torch.nan
    assert uniformity_loss(images).isnan()
