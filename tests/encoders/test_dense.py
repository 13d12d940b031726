"""Every recipe equals a loop over heads and tokens, leaves token 0 alone, and works with what else is in the tower."""

import copy
import math

import open_clip
import pytest
import torch
from torch import nn

from czsl_heads import add_lora, wrap
from czsl_heads.adapters.bottleneck import add_bottlenecks
from czsl_heads.adapters.patch_drop import drop_patches
from czsl_heads.encoders.blocks import BlockParts
from czsl_heads.encoders.dense import neighbourhood
from tests.encoders.families import FAMILIES, build
from tests.encoders.test_blocks import images_for, randomise

RECIPES = ("value", "sclip", "clearclip", "naclip")


def with_recipe(encoder, dense):
    """Another encoder of the same model, as ``wrap(..., dense=dense)`` makes it."""
    other = copy.copy(encoder)
    other.dense = dense
    return other


def reference_shares(dense, query, key, grid, num_prefix):
    """Of one head of one image, ``[tokens, head_dim]``: by which shares token i reads token j, one logit at a time."""
    tokens, scale = len(query), query.shape[1] ** -0.5
    if dense == "value":
        return torch.eye(tokens)
    shares = torch.zeros(tokens, tokens)
    compared = {"sclip": (query, key), "clearclip": (query,), "naclip": (key,)}[dense]
    for one in compared:
        logits = torch.zeros(tokens, tokens)
        for i in range(tokens):
            for j in range(tokens):
                logits[i, j] = scale * float(one[i] @ one[j])
                if dense == "naclip" and min(i, j) >= num_prefix:
                    here, there = (divmod(place - num_prefix, grid[1]) for place in (i, j))
                    logits[i, j] += math.exp(-(math.dist(here, there) ** 2) / (2 * 5**2))
        shares += logits.softmax(dim=1)
    return shares


def reference_last_block(dense, block, hidden, rope, grid, num_prefix):
    parts = BlockParts(block)
    normed = parts.norm("attention", hidden)
    query, key, value = parts.heads(normed, rope)
    mixed = torch.empty_like(value)
    for image in range(len(hidden)):
        for head in range(parts.num_heads):
            shares = reference_shares(dense, query[image, :, head], key[image, :, head], grid, num_prefix)
            mixed[image, :, head] = shares @ value[image, :, head]
    attended = parts.project_out(mixed, normed)
    if dense != "sclip":
        return parts.scale("attention", attended)
    stream = hidden + parts.scale("attention", attended)
    return stream + parts.scale("mlp", parts.mlp(parts.norm("mlp", stream)))


@pytest.mark.parametrize("dense", RECIPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_patches_equal_a_loop_and_token_zero_is_left_alone(name, dense):
    plain = build(name)
    images, calls = images_for(plain, batch=2), []
    hook = plain.blocks("vision")[-1].register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    expected = plain.encode_tokens(images)
    hook.remove()
    ((block, (hidden, *_), options, _),) = calls
    last = reference_last_block(dense, block, hidden, options.get("rope"), plain.grid, plain.num_prefix)
    tokens = with_recipe(plain, dense).encode_tokens(images)
    assert torch.equal(tokens[:, 0], expected[:, 0]) or torch.allclose(tokens[:, 0], expected[:, 0], atol=1e-6)
    assert not torch.allclose(tokens[:, 1:], expected[:, 1:], atol=1e-2)
    torch.testing.assert_close(tokens[:, 1:], plain.vision.leave(last)[:, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dense", RECIPES)
def test_images_and_texts_are_those_of_the_model(small_encoder, dense):
    images = images_for(small_encoder)
    encoder = with_recipe(small_encoder, dense)
    assert torch.equal(encoder.encode_images(images), small_encoder.encode_images(images))
    assert torch.equal(encoder.encode_texts(["a dog"]), small_encoder.encode_texts(["a dog"]))
    assert encoder.encode_tokens(images[:0]).shape == (0, 25, 40)


def test_the_neighbourhood_is_a_gaussian_of_distances():
    found = neighbourhood((2, 3), sigma=2.0)
    for i in range(6):
        for j in range(6):
            distance = math.dist(divmod(i, 3), divmod(j, 3))
            assert found[i, j].item() == pytest.approx(math.exp(-(distance**2) / 8), abs=1e-7)


# Which matrices of the last block the patches depend on, by each formula.
READ = {"value": "vo", "sclip": ("q", "k", "v", "o", "fc", "proj"), "clearclip": "qvo", "naclip": "kvo"}


@pytest.mark.parametrize("dense", RECIPES)
@pytest.mark.parametrize("name", ["class token", "EVA-02", "SigLIP", "CLIPModel"])
def test_gradients_reach_the_updates_that_the_recipe_reads(name, dense):
    encoder = with_recipe(build(name), dense)
    for matrix in ("q", "k", "v", "o", "fc", "proj"):
        reached = build(name)
        adapted = randomise(add_lora(reached, matrices=(matrix,), rank=2, layers=1))
        tokens = with_recipe(reached, dense).encode_tokens(images_for(reached))
        tokens[:, 1:].square().sum().backward()
        grown = all(
            delta.a.grad is not None and delta.a.grad.any() and delta.b.grad.any()
            for module in adapted
            for delta in module.deltas.values()
        )
        assert grown == (matrix in READ[dense])
        same = torch.allclose(tokens[:, 1:], encoder.encode_tokens(images_for(encoder))[:, 1:], atol=1e-5)
        assert same == (matrix not in READ[dense])


@pytest.mark.parametrize("dense", RECIPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_gives_the_same_tokens_and_gradients(name, dense):
    found = []
    for checkpoint in (False, True):
        encoder = with_recipe(build(name), dense)
        adapted = randomise(add_lora(encoder, matrices=("v", "o"), rank=2))
        tokens = encoder.encode_tokens(images_for(encoder), checkpoint=checkpoint)
        tokens.square().sum().backward()
        found.append((tokens.detach(), [delta.a.grad for each in adapted for delta in each.deltas.values()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dense", RECIPES)
@pytest.mark.parametrize("name", ["class token", "EVA-02", "SigLIP", "CLIPModel", "class token and registers"])
def test_dropped_patches_are_left_out_or_refused(name, dense):
    encoder = with_recipe(build(name), dense).train()
    rows, columns = encoder.grid
    drop_patches(encoder, 0.5)
    if dense == "naclip":
        with pytest.raises(ValueError, match=rf'expected all {rows * columns} patches with dense="naclip", .* got \d'):
            encoder.encode_tokens(images_for(encoder))
        return
    tokens = encoder.encode_tokens(images_for(encoder))
    assert tokens.shape == (3, 1 + rows * columns // 2, encoder.dim)
    encoder.eval()
    assert encoder.encode_tokens(images_for(encoder)).shape == (3, 1 + rows * columns, encoder.dim)


def test_attention_of_length_first_blocks_is_read_so(small_clip_factory):
    encoder = wrap(small_clip_factory(), tokenizer=open_clip.tokenize, dense="clearclip")
    images = images_for(encoder)
    expected = encoder.encode_tokens(images)
    for block in encoder.blocks("vision"):
        block.attn.batch_first = False
    encoder.model.visual.transformer.batch_first = False
    torch.testing.assert_close(encoder.encode_tokens(images), expected, rtol=0, atol=1e-5)


def test_bottleneck_adapters_count_where_the_stream_does(small_encoder):
    images = images_for(small_encoder)
    before = {dense: with_recipe(small_encoder, dense).encode_tokens(images) for dense in RECIPES}
    (*_, last) = add_bottlenecks(small_encoder, dim=3)
    torch.manual_seed(0)
    nn.init.normal_(last.mlp_adapter.up_proj.weight)
    for dense in RECIPES:
        after = with_recipe(small_encoder, dense).encode_tokens(images)
        assert torch.allclose(after[:, 1:], before[dense][:, 1:], atol=1e-6) == (dense != "sclip")


@pytest.mark.parametrize("dense", RECIPES)
def test_an_encoder_with_a_recipe_compiles_whole(small_clip_factory, dense):
    encoder = wrap(small_clip_factory(), tokenizer=open_clip.tokenize, dense=dense)
    images = images_for(encoder)
    compiled = torch.compile(encoder.encode_tokens, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), encoder.encode_tokens(images), rtol=0, atol=1e-5)


def test_a_half_precision_tower_stays_so(small_clip_factory):
    for dense in RECIPES:
        encoder = wrap(small_clip_factory().bfloat16(), tokenizer=open_clip.tokenize, dense=dense)
        assert encoder.encode_tokens(images_for(encoder).bfloat16()).dtype == torch.bfloat16


def test_blocks_of_an_unknown_kind_are_refused(small_clip_factory):
    model = small_clip_factory(vision={"qk_norm": True})
    with pytest.raises(TypeError, match=r'with dense="value", got blocks of kind CustomResidualAttentionBlock'):
        wrap(model, tokenizer=open_clip.tokenize, dense="value")
    encoder = wrap(small_clip_factory(), tokenizer=open_clip.tokenize, dense="sclip")
    encoder.blocks("vision")[-1] = nn.Identity()
    with pytest.raises(TypeError, match=r'with dense="sclip", got blocks of kind Identity'):
        encoder.encode_tokens(images_for(encoder))
    with pytest.raises(
        ValueError, match="expected `dense` to be one of none, value, sclip, clearclip, naclip, got 'csa'"
    ):
        wrap(small_clip_factory(), tokenizer=open_clip.tokenize, dense="csa")


@pytest.mark.parametrize("dense", RECIPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_token_zero_is_equal_to_the_bit(name, dense):
    encoder = build(name)
    images = images_for(encoder)
    assert torch.equal(with_recipe(encoder, dense).encode_tokens(images)[:, 0], encoder.encode_tokens(images)[:, 0])


@pytest.mark.parametrize("dense", RECIPES)
def test_a_hook_on_the_last_block_changes_what_both_ways_read(small_encoder, dense):
    images = images_for(small_encoder)
    last = with_recipe(small_encoder, dense)
    before = last.encode_tokens(images)
    handle = small_encoder.blocks("vision")[-1].register_forward_pre_hook(
        lambda _, given: (given[0].flip(0), *given[1:])
    )
    torch.testing.assert_close(last.encode_tokens(images), before.flip(0), rtol=0, atol=1e-5)
    handle.remove()
    assert torch.equal(last.encode_tokens(images), before)
