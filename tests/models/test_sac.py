"""SAC: prompts and tokens compared, scored by Eq. 13, trained by Eq. 4."""

import pytest
import torch
import torch.nn.functional as F

from czsl_heads import SAC, CompositionSpace, SparseAlignHead, wrap
from czsl_heads.functional import combine


@pytest.fixture
def space() -> CompositionSpace:
    seen = [("red", "circle"), ("blue", "star"), ("striped", "heart")]
    return CompositionSpace(
        ["red", "blue", "striped"], ["circle", "star", "heart"], seen=seen, unseen=[("red", "star"), ("blue", "heart")]
    )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def test_logits_are_the_heads_and_scores_are_eq_13(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space)
    texts = sac.texts(space)
    out = sac(images, texts)
    tokens = sac.encoder.encode_tokens(images)
    for logits, features in zip(out.sa, texts.features):
        torch.testing.assert_close(logits, sac.head(tokens, features))
    scores = combine(out.sa.pairs.softmax(1), out.sa.attrs.softmax(1), out.sa.objs.softmax(1), space.pairs)
    torch.testing.assert_close(out.scores, scores)
    assert out.space is space


def test_the_default_head_scales_as_the_encoder_does(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space)
    cosine = SparseAlignHead(logit_scale=1.0)(sac.encoder.encode_tokens(images), sac.texts(space).features.pairs)
    torch.testing.assert_close(sac(images, sac.texts(space)).sa.pairs, cosine * sac.encoder.logit_scale)


def test_fusion_of_logits_adds_the_primitives_to_the_pair_logit(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space, fusion="logits")
    out = sac(images, sac.texts(space))
    added = out.scores - out.sa.pairs
    expected = combine(torch.zeros_like(out.sa.pairs), out.sa.attrs.softmax(1), out.sa.objs.softmax(1), space.pairs)
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=0)


def test_a_pair_has_the_same_logit_in_every_space(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space)
    world = space.open_world()
    closed = sac(images, sac.texts(space)).sa.pairs
    opened = sac(images, sac.texts(world)).sa.pairs
    torch.testing.assert_close(opened[:, world.index(space.pairs)], closed)


def test_loss_is_the_sum_of_three_cross_entropies(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space)
    train = space.subset(space.seen_mask)
    out = sac(images, sac.texts(train))
    target = torch.tensor([0, 1, 2, 1, 0])
    losses = sac.losses(out, target, stage="align")
    attrs, objs = train.pairs[target].unbind(1)
    parts = [F.cross_entropy(*both) for both in zip(out.sa, (target, attrs, objs))]
    torch.testing.assert_close(losses["loss"], parts[0] + parts[1] + parts[2])
    torch.testing.assert_close(losses["loss_attrs"], parts[1])


def test_only_prompts_train_on_a_frozen_encoder(space: CompositionSpace, images: torch.Tensor) -> None:
    sac = SAC(wrap("tiny"), space)
    out = sac(images, sac.texts(space))
    sac.losses(out, torch.arange(5))["loss"].backward()
    trained = {name for name, parameter in sac.named_parameters() if parameter.grad is not None}
    assert trained == {
        "prompts.pair_context",
        "prompts.attribute_context",
        "prompts.object_context",
        "prompts.primitives",
    }


def test_wrong_arguments_raise(space: CompositionSpace, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected `fusion` to be one of probs, logits, got 'sum'"):
        SAC(wrap("tiny"), space, fusion="sum")
    sac = SAC(wrap("tiny"), space)
    out = sac(images, sac.texts(space))
    with pytest.raises(ValueError, match="expected `stage` to be one of align"):
        sac.losses(out, torch.arange(5), stage="all")
    with pytest.raises(ValueError, match="expected `pair_target` of shape"):
        sac.losses(out, torch.arange(4))
    with pytest.raises(TypeError, match=r"expected `pair_target` of dtype torch\.int64"):
        sac.losses(out, torch.rand(5))
