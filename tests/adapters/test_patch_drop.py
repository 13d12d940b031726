"""Patch dropout hides patches in training, and nothing otherwise."""

import pytest
import torch

from czsl_heads import wrap
from czsl_heads.adapters.patch_drop import drop_patches

IMAGES = torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("rate", "patches"), [(0.0, 36), (0.25, 27), (0.5, 18), (0.99, 1)])
def test_a_share_of_the_patches_is_hidden_in_training(rate: float, patches: int) -> None:
    encoder = wrap("tiny").train()
    drop_patches(encoder, rate)
    assert encoder.encode_tokens(IMAGES).shape == (5, 1 + patches, 96)
    assert encoder.encode_images(IMAGES).shape == (5, 96)


def test_nothing_is_hidden_in_a_test_and_removal_undoes_it() -> None:
    encoder = wrap("tiny")
    before = encoder.encode_tokens(IMAGES)
    handle = drop_patches(encoder, 0.5)
    assert torch.equal(encoder.encode_tokens(IMAGES), before)
    handle.remove()
    assert encoder.train().encode_tokens(IMAGES).shape == (5, 37, 96)


def test_the_block_sees_the_prefix_and_some_patches_each_once_and_in_order() -> None:
    encoder = wrap("tiny").train()
    arrived: list[torch.Tensor] = []
    encoder.blocks("vision")[0].register_forward_pre_hook(lambda _, arguments: arrived.append(arguments[0]))
    encoder.encode_tokens(IMAGES)
    drop_patches(encoder, 0.5)
    encoder.blocks("vision")[0].register_forward_pre_hook(lambda _, arguments: arrived.append(arguments[0]))
    torch.manual_seed(3)
    encoder.encode_tokens(IMAGES)
    whole, part = arrived[0], arrived[-1]
    kept = []
    for image, tokens in zip(whole, part):
        same = (tokens[:, None] == image[None]).all(dim=2)
        assert same.sum(dim=1).tolist() == [1] * 19
        positions = same.int().argmax(dim=1).tolist()
        assert positions[0] == 0
        assert positions == sorted(set(positions))
        kept.append(tuple(positions))
    assert len(set(kept)) == 5  # drawn for each image


def test_the_seed_decides() -> None:
    encoder = wrap("tiny").train()
    drop_patches(encoder, 0.5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(encoder.encode_images(IMAGES))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(("rate", "error"), [(1, ValueError), (-0.1, ValueError), (1.5, ValueError), ("x", TypeError)])
def test_a_wrong_rate_raises(rate, error) -> None:
    with pytest.raises(error, match="expected `rate` to be "):
        drop_patches(wrap("tiny"), rate)
