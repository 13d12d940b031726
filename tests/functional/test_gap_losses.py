import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads.functional import modality_distance, uniformity
from czsl_heads.functional.gap import gather_sums
from czsl_heads.functional.gap_losses import (
    alignment_loss,
    contrastive_loss,
    cua_loss,
    cuaxu_loss,
    gap_loss,
)
from czsl_heads.functional.uniformity import cross_uniformity_loss, uniformity_loss
from tests.functional.test_gap import IMAGES, LABELS, TEXTS, draw


def test_golden_values():
    # Computed by the released code's own functions, in float64.
    matched = TEXTS[LABELS]
    found = [loss(IMAGES, matched).item() for loss in (alignment_loss, contrastive_loss, cua_loss, cuaxu_loss)]
    expected = [0.6367953122791297, 16.014620127068387, 15.441408991246554, 14.210989120813137]
    assert found == pytest.approx(expected, abs=1e-11)


@given(
    sizes=st.tuples(st.integers(1, 13), st.integers(1, 7), st.integers(1, 11)),
    block=st.sampled_from([64 * 2**20, 200, 8]),
    temperature=st.sampled_from([0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_the_contrastive_loss_is_two_cross_entropies(sizes, block, temperature, seed):
    images, texts, labels = draw(*sizes, seed=seed)
    logits = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T / temperature
    of_texts = []
    for text in range(len(texts)):
        own = (labels == text).nonzero()[:, 0]
        if len(own):
            of_texts.append(torch.stack([F.cross_entropy(logits[:, text], image) for image in own]).mean())
    expected = (F.cross_entropy(logits, labels) + torch.stack(of_texts).mean()) / 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniformity, "BLOCK_BYTES", block)
        found = contrastive_loss(images, texts, labels=labels, temperature=temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("block", [64 * 2**20, 100, 8])
def test_gradients_are_exact(monkeypatch, block):
    monkeypatch.setattr(uniformity, "BLOCK_BYTES", block)
    images, texts, labels = draw(5, 3, 4)
    temperature = torch.tensor(0.4, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (images, texts, temperature)]
    for loss in (cua_loss, cuaxu_loss):
        assert torch.autograd.gradcheck(lambda x, y, t, loss=loss: loss(x, y, labels=labels, temperature=t), inputs)


def test_sums_are_of_their_terms():
    images, texts, labels = draw()
    terms = alignment_loss(images, texts, labels=labels) + (uniformity_loss(images) + uniformity_loss(texts)) / 2
    assert torch.isclose(gap_loss("cua", images, texts, labels), terms)
    crossed = terms + cross_uniformity_loss(images, texts, labels=labels)
    assert torch.isclose(gap_loss("cuaxu", images, texts, labels), crossed)
    contrastive = contrastive_loss(images, texts, labels=labels, temperature=0.2)
    assert torch.isclose(cuaxu_loss(images, texts, labels=labels, temperature=0.2), crossed + contrastive)


def test_alignment_is_four_times_the_matched_dissimilarity_of_the_gap():
    images, texts, labels = draw()
    matched = gather_sums(images, texts, labels).matched_sum / len(images)
    assert alignment_loss(images, texts, labels=labels).item() == pytest.approx(4 * matched.item())


def test_what_has_no_others_adds_nothing():
    images, texts, _ = draw()
    alone = cuaxu_loss(images[:1], texts[:1], temperature=None)
    assert torch.equal(alone, alignment_loss(images[:1], texts[:1]))
    one_class = torch.zeros(len(images), dtype=torch.long)
    expected = alignment_loss(images, texts[:1], labels=one_class) + uniformity_loss(images) / 2
    assert torch.isclose(gap_loss("cuaxu", images, texts[:1], one_class), expected)


def test_texts_without_images_are_wrong_for_all_and_ask_for_none():
    images, texts, labels = draw()
    more = torch.cat([texts, draw(seed=3)[1]])
    both = contrastive_loss(images, more, labels=labels), contrastive_loss(images, texts, labels=labels)
    logits = [100 * F.normalize(images, dim=1) @ F.normalize(rows, dim=1).T for rows in (more, texts)]
    raised = (F.cross_entropy(logits[0], labels) - F.cross_entropy(logits[1], labels)) / 2
    assert raised > 0
    assert torch.isclose(both[0] - both[1], raised)


def test_they_close_a_gap_that_the_contrastive_loss_leaves():
    def distance_after(loss):
        generator = torch.Generator().manual_seed(0)
        shift = 2 * torch.eye(16)[0]
        images = (torch.randn(32, 16, generator=generator) + shift).requires_grad_()
        texts = (torch.randn(32, 16, generator=generator) - shift).requires_grad_()
        optimizer = torch.optim.Adam([images, texts], lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            loss(images, texts, temperature=0.1).backward()
            optimizer.step()
        return modality_distance(images, texts).item()

    assert distance_after(contrastive_loss) > 0.2
    assert distance_after(cua_loss) < 0.02
    assert distance_after(cuaxu_loss) < 0.02


def test_mixed_kinds_and_autocast_are_computed_wide():
    images, texts, labels = draw()
    expected = cuaxu_loss(images.float(), texts.float(), labels=labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cuaxu_loss(images.float(), texts.float(), labels=labels), expected)
    assert cuaxu_loss(images.bfloat16(), texts, labels=labels).dtype == torch.float64
    assert cuaxu_loss(images.bfloat16(), texts.bfloat16(), labels=labels).dtype == torch.float32


def test_wrong_input_is_told():
    images, texts, labels = draw()
    with pytest.raises(ValueError, match="expected `temperature` to be positive and finite, got 0"):
        contrastive_loss(images, texts, labels=labels, temperature=0)
    with pytest.raises(ValueError, match="expected `images` with at least one row, got none"):
        contrastive_loss(images[:0], texts, labels=labels[:0])
    with pytest.raises(ValueError, match="expected `images` with at least one row, got none"):
        cua_loss(images[:0], texts[:0])
    with pytest.raises(TypeError, match=r"expected `labels` of dtype torch\.int64"):
        cua_loss(images, texts, labels=labels.float())
