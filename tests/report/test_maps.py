"""Maps agree with slow loops over tokens, lie as the patches do, and point where they should."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from czsl_heads import CompositionSpace, add_lora, wrap
from czsl_heads.models.method import Method
from czsl_heads.report.maps import (
    TokenMap,
    alignment_map,
    centres_inside,
    crop_transform,
    dense_recipes,
    encode_densely,
    encode_with_attention,
    points_inside,
    token_map,
)
from tests.encoders.families import FAMILIES, build
from tests.encoders.test_blocks import images_for
from tests.references import reference_alignment_map, reference_cls_attention, reference_pointing

GRID = (6, 4)  # of the small encoder
MEANS = {"CLIPA", "CLIPA, norm before the mean", "ViTamin", "mean of patches"}
WITHOUT_CLASS_TOKEN = MEANS | {"SigLIP", "SigLIP 2", "PE-Core", "SiglipModel", "Siglip2Model"}
SPACE = CompositionSpace(["red"], ["circle"], seen=[("red", "circle")])


def method_of(encoder):
    """The least that can be looked at."""
    return Method(encoder, SPACE)


@pytest.fixture
def images(generator):
    return torch.randn(3, 3, 42, 28, generator=generator)


def test_patches_lie_row_by_row_behind_the_prefix(small_encoder):
    found = token_map(torch.arange(50.0).view(2, 25), small_encoder)
    assert found.prefix.tolist() == [[0.0], [25.0]]
    assert found.patches.shape == (2, *GRID)
    assert found.patches[0, 0].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert found.patches[1, 5].tolist() == [46.0, 47.0, 48.0, 49.0]
    one = found.image(1)
    assert (one.prefix.tolist(), one.patches[0].tolist()) == ([25.0], [26.0, 27.0, 28.0, 29.0])


def test_the_winner_is_the_highest_token_and_the_first_of_equals():
    prefix = torch.tensor([[3.0], [1.0], [2.0]])
    patches = torch.tensor([[[1.0, 2.0]], [[0.0, 2.0]], [[2.0, 2.0]]])
    found = TokenMap(prefix, patches)
    assert found.winner.tolist() == [0, 2, 0]
    assert [int(found.image(index).winner) for index in range(3)] == [0, 2, 0]


def test_alignment_maps_equal_a_loop_over_tokens(small_encoder, images, generator):
    tokens = small_encoder.encode_tokens(images)
    texts = torch.randn(3, small_encoder.dim, generator=generator)
    texts[1] = tokens[1, 7]  # a token that wins for sure
    found = alignment_map(tokens, texts, small_encoder)
    cosines, winner = reference_alignment_map(tokens, texts, GRID)
    torch.testing.assert_close(found.patches, cosines, rtol=0, atol=1e-5)
    assert torch.equal(found.winner, winner)
    assert found.winner[1] == 7
    torch.testing.assert_close(alignment_map(2 * tokens, 3 * texts, small_encoder).patches, cosines, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", [(), ("v",), ("q", "k", "v", "o")], ids=["plain", "v", "qkvo"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_attention_of_cls_equals_a_loop_over_heads(small_clip_factory, small_encoder, images, lora, batch_first):
    encoder = wrap(small_clip_factory(), tokenizer=str)
    last = encoder.blocks("vision")[-1]
    if not batch_first:
        for block in encoder.blocks("vision"):
            block.attn.batch_first = False
        encoder.model.visual.transformer.batch_first = False
    if lora:
        torch.manual_seed(0)
        for module in add_lora(encoder, matrices=lora):
            for delta in module.deltas.values():
                nn.init.normal_(delta.b, std=0.3)
    heard = []
    last.register_forward_pre_hook(lambda module, arguments: heard.append(arguments[0]))
    tokens, found = encode_with_attention(method_of(encoder), images)
    torch.testing.assert_close(tokens, encoder.encode_tokens(images), rtol=0, atol=1e-6)
    if lora:
        last.attn.merge()
    hidden = last.ln_1(heard[0] if batch_first else heard[0].transpose(0, 1))
    weight, bias = last.attn.in_proj_weight.detach(), last.attn.in_proj_bias.detach()
    shares = reference_cls_attention(hidden.detach(), weight, bias, last.attn.num_heads)
    torch.testing.assert_close(found.prefix, shares[:, :1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.patches.flatten(1), shares[:, 1:], rtol=0, atol=1e-5)
    assert not found.patches.requires_grad


def test_nothing_stays_hooked_after_the_maps_even_if_they_fail(small_encoder, images):
    last = small_encoder.blocks("vision")[-1]
    method = method_of(small_encoder)
    encode_with_attention(method, images)
    with pytest.raises(ValueError, match="expected `images` of shape"):
        encode_with_attention(method, images[:, :, 1:])
    assert not last._forward_pre_hooks


def test_a_block_of_an_unknown_kind_has_no_attention_and_no_recipe(small_encoder, images):
    small_encoder.blocks("vision")[-1] = nn.Identity()
    tokens, found = encode_with_attention(method_of(small_encoder), images)
    assert torch.equal(tokens, small_encoder.encode_tokens(images))
    assert found is None
    assert dense_recipes(small_encoder) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_the_attention_of_every_family_is_that_of_its_class_token(name):
    encoder = build(name)
    images = images_for(encoder)
    tokens, found = encode_with_attention(method_of(encoder), images)
    assert torch.equal(tokens, encoder.encode_tokens(images))
    if name in WITHOUT_CLASS_TOKEN:
        assert found is None
        return
    assert found.patches.shape == (len(images), *encoder.grid)
    total = found.prefix.sum(dim=1) + found.patches.flatten(1).sum(dim=1)
    torch.testing.assert_close(total, torch.ones(len(images)), rtol=0, atol=1e-5)
    assert (found.patches > 0).all()


def test_maps_of_a_recipe_are_of_its_tokens_and_leave_the_model_as_it_was(small_encoder, images):
    method = method_of(small_encoder)
    assert dense_recipes(small_encoder) == ["value", "sclip", "clearclip", "naclip"]
    before = small_encoder.encode_tokens(images)
    found = encode_densely(method, images, "clearclip")
    dense = wrap(small_encoder.model, tokenizer=str, dense="clearclip")
    assert torch.equal(found, dense.encode_tokens(images))
    assert not torch.allclose(found[:, 1:], before[:, 1:], atol=1e-2)
    assert small_encoder.dense == "none"
    with pytest.raises(ValueError, match="expected `images` of shape"):
        encode_densely(method, images[:, :, 1:], "value")
    assert small_encoder.dense == "none"


@pytest.mark.parametrize("size", [(28, 42), (71, 53), (53, 71), (200, 90)])
def test_the_crop_is_that_of_the_transform(small_encoder, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    cropped = crop_transform(small_encoder)(picture)
    assert cropped.size == (28, 42)
    assert torch.equal(small_encoder.transform()(cropped), small_encoder.transform()(picture))


@pytest.mark.parametrize("size", [(48, 48), (96, 96), (131, 90), (90, 131)])
def test_masks_go_where_their_images_go(size):
    encoder = wrap("tiny")
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 3, size[1] // 2, size[0], size[1]))
    moved = crop_transform(encoder, nearest=True)(mask)
    assert moved.size == (48, 48)
    assert {value for _, value in moved.getcolors()} == {0, 255}
    image = crop_transform(encoder)(mask.convert("RGB")).convert("L")
    differ = (np.asarray(moved) > 127) != (np.asarray(image) > 127)
    assert differ.sum() <= 2 * 48  # a pixel along the two edges, where an image is smoothed and a mask is not
    if size == (48, 48):
        assert np.array_equal(np.asarray(moved), np.asarray(mask))


def test_centres_are_looked_up_in_the_mask():
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 1, 2] = True  # the centre of the first patch: row 6 / 4, column 8 / 4, rounded down
    masks[1, 4, :] = True
    inside = centres_inside(masks, (2, 2))
    assert inside.tolist() == [[[True, False], [False, False]], [[False, False], [True, True]]]


def test_a_map_points_inside_where_its_highest_patch_lies():
    inside = torch.tensor([[[True, False], [False, False]]]).expand(3, 2, 2)
    maps = torch.tensor([[[0.9, 0.1], [0.2, 0.3]], [[0.1, 0.9], [0.2, 0.3]], [[-1.0, -2.0], [-3.0, -1.5]]])
    assert points_inside(maps, inside).tolist() == [True, False, True]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    larger=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    share=st.floats(0, 1),
)
def test_pointing_scores_equal_a_loop_over_images(seed, grid, larger, share):
    generator = torch.Generator().manual_seed(seed)
    height, width = (count + more for count, more in zip(grid, larger))
    masks = torch.rand(7, height, width, generator=generator) < share
    maps = torch.randn(7, *grid, generator=generator)
    inside = centres_inside(masks, grid)
    assert int(points_inside(maps, inside).sum()) == reference_pointing(maps, masks)
    assert torch.equal(points_inside(maps.flip(1), inside.flip(1)), points_inside(maps, inside))


@pytest.mark.parametrize(("fill", "hits"), [(True, True), (False, False)])
def test_a_mask_of_everything_is_always_hit_and_one_of_nothing_never(generator, fill, hits):
    inside = centres_inside(torch.full((5, 42, 28), fill), GRID)
    assert points_inside(torch.randn(5, *GRID, generator=generator), inside).tolist() == [hits] * 5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e: token_map(torch.zeros(2, 24), e), ValueError, r"expected `numbers` of shape \(batch, 25\), got"),
        (lambda e: token_map(torch.zeros(2, 25).long(), e), TypeError, "expected `numbers` of dtype"),
        (
            lambda e: alignment_map(torch.zeros(2, 25, 40), torch.zeros(3, 40), e),
            ValueError,
            r"expected `texts` of shape \(batch, dim\) with batch=2",
        ),
        (lambda e: alignment_map(None, torch.zeros(3, 40), e), TypeError, "expected `tokens` to be a torch.Tensor"),
        (lambda e: centres_inside(torch.zeros(1, 4, 4), GRID), TypeError, "expected `masks` of dtype torch.bool"),
        (
            lambda e: points_inside(torch.zeros(1, 2, 3), torch.zeros(1, 3, 2, dtype=torch.bool)),
            ValueError,
            r"expected `inside` of shape \(batch, rows, columns\) with batch=1, rows=2, columns=3",
        ),
    ],
)
def test_wrong_arguments_raise(small_encoder, call, error, message):
    with pytest.raises(error, match=message):
        call(small_encoder)
