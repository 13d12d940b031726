"""Soft prompts on the text tower of every family of CLIP: with a shared prefix where it is causal, else each whole."""

import pytest
import torch

from czsl_heads import CompositionSpace, SoftPrompts
from tests.encoders.families import FAMILIES, build

SPACE = CompositionSpace(
    ["red", "old"], ["dog", "car", "cup"], seen=[("red", "dog"), ("old", "car")], unseen=[("red", "cup")]
)
CONTEXT = "see"  # short: stand-in tokenizers spell


@pytest.fixture(params=FAMILIES)
def encoder(request):
    return build(request.param)


def prompts_of(encoder, encode, **options):
    return SoftPrompts(encoder, SPACE, context=CONTEXT, encode=encode, **options)


def features_and_gradients(prompts):
    features = torch.cat([*prompts(SPACE)])
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    return features, torch.autograd.grad((features * weights).sum(), [*prompts.parameters()])


def test_a_shared_prefix_changes_nothing_where_it_can_be_shared(encoder):
    plain = prompts_of(encoder, "plain")
    if not encoder.causal_text:
        with pytest.raises(ValueError, match="got a text tower that is not causal"):
            prompts_of(encoder, "prefix")
        assert torch.equal(torch.cat([*prompts_of(encoder, "auto")(SPACE)]), torch.cat([*plain(SPACE)]))
        return
    found, gradients = features_and_gradients(prompts_of(encoder, "prefix"))
    expected, of_plain = features_and_gradients(plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for one, other in zip(gradients, of_plain):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("encode", ["auto", "plain"])
def test_all_that_is_learned_gets_a_gradient(encoder, encode):
    _, gradients = features_and_gradients(prompts_of(encoder, encode))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("encode", ["auto", "plain"])
def test_checkpoints_change_no_gradient(encoder, encode):
    found = features_and_gradients(prompts_of(encoder, encode, checkpoint=True))[1]
    for one, other in zip(found, features_and_gradients(prompts_of(encoder, encode))[1]):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_prompts_of_a_half_precision_tower_train_in_single_precision(encoder, dtype):
    expected = torch.cat([*prompts_of(encoder, "auto")(SPACE)])
    prompts = prompts_of(encoder.to(dtype), "auto")
    assert {parameter.dtype for parameter in prompts.parameters()} == {torch.float32}
    features, gradients = features_and_gradients(prompts)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    torch.testing.assert_close(features.float(), expected, rtol=0, atol=0.05)
