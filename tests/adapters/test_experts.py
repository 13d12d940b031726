"""Experts in both towers of every family of CLIP: at the start, as a formula, in shared prefixes, as variants."""

import copy

import pytest
import torch

from czsl_heads import CompositionSpace, SoftPrompts, add_lora, wrap
from czsl_heads.adapters.experts import (
    ExpertMixture,
    ExpertMLP,
    add_experts,
    encode_variants,
    load_balance,
    mixtures_of,
    watch_routing,
)
from czsl_heads.encoders.blocks import BlockParts
from tests.encoders.families import FAMILIES, build
from tests.encoders.test_blocks import images_for

TOWERS = ("vision", "text")
TEXTS = ["red circle", "a dog"]
SPACE = CompositionSpace(["red", "old"], ["dog", "car"], seen=[("red", "dog"), ("old", "car")])


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def run(encoder, tower):
    return encoder.encode_tokens(images_for(encoder)) if tower == "vision" else encoder.encode_texts(TEXTS)


def with_experts(encoder, tower, **options):
    mixtures = add_experts(encoder, tower=tower, **{"rank": 2, "experts": 3, **options})
    generator = torch.Generator().manual_seed(0)
    for mixture in mixtures:
        mixture.up.data.copy_(0.3 * torch.randn(mixture.up.shape, generator=generator))
    return mixtures


@pytest.mark.parametrize("tower", TOWERS)
def test_untrained_experts_change_nothing(name, tower):
    encoder = build(name)
    before = run(encoder, tower)
    mixtures = add_experts(encoder, tower=tower)
    torch.testing.assert_close(run(encoder, tower), before, rtol=0, atol=1e-5)  # attention may take another kernel
    trained = {id(parameter) for parameter in encoder.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for mixture in mixtures for parameter in mixture.parameters()}
    assert mixtures_of(encoder, tower) == mixtures
    assert not mixtures_of(encoder, "text" if tower == "vision" else "vision")


@pytest.mark.parametrize("tower", TOWERS)
def test_they_are_added_to_what_the_mlp_gives(name, tower):
    encoder, plain = build(name), build(name)
    mixtures = with_experts(encoder, tower)
    found = run(encoder, tower)
    for block, mixture in zip(plain.blocks(tower), mixtures):
        # By a hook, which knows nothing of our layers.
        block.mlp.register_forward_hook(lambda _, inputs, out, mixture=mixture: out + mixture(inputs[0]))
    torch.testing.assert_close(found, run(plain, tower), rtol=1e-5, atol=1e-5)
    assert (found - run(build(name), tower)).abs().mean() > 1e-4


@pytest.mark.parametrize("tower", TOWERS)
def test_router_and_experts_get_gradients(name, tower):
    encoder = build(name)
    mixtures = with_experts(encoder, tower, topk=2)
    run(encoder, tower).square().sum().backward()
    for mixture in mixtures:
        assert all(parameter.grad.any() for parameter in mixture.parameters())


def test_they_work_inside_a_shared_prefix(name):
    encoder = build(name)
    with_experts(encoder, "text")
    auto, plain = (SoftPrompts(encoder, SPACE, context="see", encode=encode) for encode in ("auto", "plain"))
    assert auto._shares_prefix() == encoder.causal_text
    found, expected = torch.cat([*auto(SPACE)]), torch.cat([*plain(SPACE)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for one, other in zip(gradients(encoder, found), gradients(encoder, expected)):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def gradients(encoder, features):
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    learned = [parameter for mixture in mixtures_of(encoder, "text") for parameter in mixture.parameters()]
    return torch.autograd.grad((features * weights).sum(), learned)


def test_variants_are_what_the_image_feature_would_be(name):
    encoder = build(name)
    mixtures = with_experts(encoder, "vision", shared=2)
    images = images_for(encoder)
    tokens, variants = encode_variants(encoder, images)
    torch.testing.assert_close(tokens, encoder.encode_tokens(images))
    assert variants.shape == (len(images), 5, encoder.dim)
    last = mixtures[-1]
    for number in range(5):
        alone = copy.deepcopy(encoder)
        block = alone.blocks("vision")[-1]
        # the same block, in which the last mixture is one expert for all tokens
        block.mlp.mixture.forward = lambda rows, number=number: last.each(rows)[..., number, :]
        torch.testing.assert_close(variants[:, number], alone.encode_tokens(images)[:, 0], rtol=1e-4, atol=1e-4)


def test_variants_start_as_the_image_feature_and_reach_the_experts(name):
    encoder = build(name)
    mixtures = add_experts(encoder, rank=2, experts=3)
    tokens, variants = encode_variants(encoder, images_for(encoder))
    torch.testing.assert_close(variants, tokens[:, :1].expand_as(variants), rtol=1e-4, atol=1e-4)
    variants[:, 2].sum().backward()
    of_experts = mixtures[-1].up.grad.flatten(1).any(dim=1)
    assert of_experts[2]
    assert not of_experts[[0, 1, 3]].any()


def test_an_expert_by_itself_is_its_low_rank_product():
    torch.manual_seed(0)
    mixture = ExpertMixture(6, rank=2, experts=3, shared=1, topk=3)
    torch.nn.init.normal_(mixture.up)
    tokens = torch.randn(4, 5, 6)
    each = mixture.each(tokens)
    for number in range(4):
        torch.testing.assert_close(each[:, :, number], tokens @ mixture.down[number].T @ mixture.up[number].T)
    weights = mixture.router(tokens).softmax(dim=-1)  # all three are chosen
    expected = each[:, :, 0] + (weights[..., None] * each[:, :, 1:]).sum(dim=2)
    torch.testing.assert_close(mixture(tokens), expected)


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_both_ways_to_compute_agree(shared):
    torch.manual_seed(0)
    mixture = ExpertMixture(6, rank=2, experts=5, shared=shared, dispatch="sparse")
    torch.nn.init.normal_(mixture.up)
    tokens = torch.randn(4, 5, 6)
    sparse = mixture(tokens)
    mixture.dispatch = "joined"
    torch.testing.assert_close(mixture(tokens), sparse)


def test_routers_are_watched_by_block_and_call():
    encoder = wrap("tiny")
    mixtures = with_experts(encoder, "text", experts=4, topk=2)
    embeddings, eos = encoder.embed_texts(TEXTS)
    with watch_routing(encoder, "text") as calls:
        encoder.encode_embeddings(embeddings, eos)
    assert [len(own) for own in calls] == [1, 1, 1]
    assert {own[0].shape for own in calls} == {(embeddings.shape[0] * embeddings.shape[1], 4)}
    (gradient,) = torch.autograd.grad(calls[0][0][:, 0].sum(), mixtures[0].router.weight)
    assert gradient.any()
    assert not any(mixture.router._forward_hooks for mixture in mixtures)


def test_the_load_is_balanced_where_all_experts_have_as_much():
    encoder = wrap("tiny")
    with_experts(encoder, "vision", experts=4, topk=2)
    generator = torch.Generator().manual_seed(0)
    uneven = torch.randn(6, 4, generator=generator)  # two images of three tokens
    one = torch.tensor([100.0, 50.0, 0.0, 0.0]).expand(6, 4)
    found = load_balance(encoder, "vision", [[uneven], [one], [one], [one]], 2)
    expected = []
    for rows in uneven.split(3):
        chosen = rows.topk(2).indices.flatten().bincount(minlength=4) / 6
        expected.append((4 * (chosen * rows.softmax(dim=1).mean(dim=0)).sum() + 3 * 2.0) / 4)
    torch.testing.assert_close(found, torch.stack(expected))
    even = 1e-6 * torch.eye(4)
    torch.testing.assert_close(load_balance(encoder, "vision", [[even]] * 4, 1), torch.ones(1))


def test_lora_reaches_the_mlp_behind_the_experts():
    encoder = wrap("tiny")
    add_experts(encoder)
    adapted = add_lora(encoder, matrices=("fc",), rank=2)
    mlp = encoder.blocks("vision")[0].mlp
    assert isinstance(mlp, ExpertMLP)
    assert mlp.base.c_fc is adapted[0]
    assert mlp.per_token
    assert BlockParts(encoder.blocks("vision")[0]).linear_layers("proj") == [(mlp.base, "c_proj")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_experts_of_a_half_precision_tower_are_single(dtype):
    encoder = wrap("tiny").to(dtype)
    mixtures = with_experts(encoder, "vision")
    assert {parameter.dtype for mixture in mixtures for parameter in mixture.parameters()} == {torch.float32}
    tokens = encoder.encode_tokens(torch.zeros(2, 3, 48, 48))
    assert tokens.dtype == dtype
    tokens.float().square().sum().backward()
    assert all(mixture.up.grad.isfinite().all() for mixture in mixtures)


def test_a_copy_and_a_state_dict_hold_the_experts():
    encoder = wrap("tiny")
    with_experts(encoder, "vision")
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    expected = encoder.encode_tokens(images)
    other = wrap("tiny")
    add_experts(other, rank=2, experts=3)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other.encode_tokens(images), expected)
    assert torch.equal(copy.deepcopy(encoder).encode_tokens(images), expected)


def test_what_cannot_be_adapted_is_told():
    encoder = wrap("tiny")
    add_experts(encoder)
    with pytest.raises(ValueError, match="expected a vision tower without experts, got one that has them already"):
        add_experts(encoder)
    with pytest.raises(ValueError, match="expected a text tower with experts"), watch_routing(encoder, "text"):
        pass
    with pytest.raises(ValueError, match="expected a vision tower with experts"):
        encode_variants(wrap("tiny"), torch.zeros(1, 3, 48, 48))
    with pytest.raises(ValueError, match=r"expected `topk` to be in \[1, 4\], got 5"):
        add_experts(wrap("tiny"), experts=4, topk=5)
    hooked = wrap("tiny")
    hooked.blocks("vision")[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="expected a vision tower without hooks on its MLPs"):
        add_experts(hooked)
    assert not mixtures_of(hooked, "vision")
