"""The image feature of a region: the whole image's if the region is all, a loop's if it is not, untouched elsewhere."""

import pytest
import torch

from czsl_heads import wrap
from czsl_heads.encoders.blocks import BlockParts
from czsl_heads.encoders.restricted import cannot_restrict, patches_touched, restricted_features
from tests.encoders.families import FAMILIES, build
from tests.encoders.test_blocks import images_for


def regions(encoder, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, *encoder.grid, generator=generator) < 0.4


def able(name):
    return cannot_restrict(build(name)) is None


ABLE = [name for name in FAMILIES if able(name)]
TOLD = [name for name in ABLE if build(name).vision.pools_class_token]


@pytest.mark.parametrize("name", ABLE)
def test_a_region_of_everything_is_the_image(name):
    encoder = build(name)
    images = images_for(encoder)
    expected = encoder.encode_images(images)
    everywhere = torch.ones(len(images), *encoder.grid, dtype=torch.bool)
    for inside in (everywhere, ~everywhere):  # an image without a region keeps its own feature
        found = restricted_features(encoder, images, inside, blocks=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def reference_told(block, hidden, allowed, rope):
    """One image and one token at a time: the first token reads what it may, all others read everything."""
    parts = BlockParts(block)
    normed = parts.norm("attention", hidden)
    query, key, value = parts.heads(normed, rope)
    mixed = torch.empty_like(value)
    for image in range(len(hidden)):
        for head in range(parts.num_heads):
            for token in range(hidden.shape[1]):
                logits = key[image, :, head] @ query[image, token, head] * query.shape[-1] ** -0.5
                if token == 0:
                    logits = logits.masked_fill(~allowed[image], -torch.inf)
                mixed[image, token, head] = logits.softmax(dim=0) @ value[image, :, head]
    attended = parts.project_out(mixed, normed)
    return parts.add_mlp(parts.add("attention", hidden, attended))


@pytest.mark.parametrize("name", TOLD)
def test_the_class_token_reads_itself_and_the_region(name):
    encoder = build(name)
    images = images_for(encoder)
    inside = regions(encoder, len(images))
    tower, prefix = encoder.vision, encoder.num_prefix
    own = torch.ones(len(images), prefix, dtype=torch.bool)
    allowed = torch.cat([own, inside.flatten(1)], dim=1)

    def told(hidden, *arguments, **options):
        return reference_told(tower.blocks[-1], hidden, allowed, options.get("rope"))

    with torch.no_grad():
        hidden = tower.enter(images)
        for block in tower.blocks[:-1]:
            hidden = tower.step(block, hidden)
        expected = tower.leave(tower.step(told, hidden))[:, 0]
        found = restricted_features(encoder, images, inside, blocks=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def reference_mean(visual, patches):
    """The feature of patches ``[patches, width]`` by the container's own layers, norms before or behind the mean."""
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        return visual.head(trunk.head(trunk.fc_norm(trunk.norm(patches).mean(dim=0))))
    if visual.final_ln_after_pool:
        return visual.ln_post(patches.mean(dim=0)) @ visual.proj
    return visual.ln_post(patches).mean(dim=0) @ visual.proj


@pytest.mark.parametrize("name", [name for name in ABLE if name not in TOLD])
def test_a_mean_is_that_of_the_region(name):
    encoder = build(name)
    images = images_for(encoder)
    inside = regions(encoder, len(images))
    tower, prefix = encoder.vision, encoder.num_prefix
    with torch.no_grad():
        hidden = tower.enter(images)
        for block in tower.blocks:
            hidden = tower.step(block, hidden)
        rows = []
        for image, of_image in zip(hidden, inside.flatten(1)):
            own = [patch for patch, here in zip(image[prefix:], of_image) if here]
            rows.append(reference_mean(tower.visual, torch.stack(own)))
        found = restricted_features(encoder, images, inside)
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_what_lies_outside_the_region_does_not_matter_to_the_last_block():
    encoder = wrap("tiny")
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    inside = regions(encoder, 2)
    before = restricted_features(encoder, images, inside, blocks=len(encoder.vision.blocks))
    # In every block [CLS] reads the region alone; others read all, so that only through them the rest comes in.
    assert not torch.allclose(before, restricted_features(encoder, images, inside, blocks=1))
    alone = restricted_features(encoder, images[:1], inside[:1], blocks=2)
    both = restricted_features(encoder, images, inside, blocks=2)
    torch.testing.assert_close(alone[0], both[0], rtol=1e-4, atol=1e-5)


def test_attention_pools_have_no_such_feature():
    pooled = [name for name in FAMILIES if not able(name)]
    assert pooled
    for name in pooled:
        encoder = build(name)
        images = images_for(encoder)
        with pytest.raises(TypeError, match="expected `encoder` to pool a class token or the mean of patches, got "):
            restricted_features(encoder, images, regions(encoder, len(images)))


def test_wrong_arguments_are_named():
    encoder, images = wrap("tiny"), torch.zeros(2, 3, 48, 48)
    inside = torch.ones(2, 6, 6, dtype=torch.bool)
    with pytest.raises(TypeError, match="`inside`"):
        restricted_features(encoder, images, inside.float())
    with pytest.raises(ValueError, match="inside"):
        restricted_features(encoder, images, inside[:, :5])
    with pytest.raises(ValueError, match="expected `blocks` to be in"):
        restricted_features(encoder, images, inside, blocks=0)
    with pytest.raises(ValueError, match="expected `blocks` to be in"):
        restricted_features(encoder, images, inside, blocks=5)
    with pytest.raises(TypeError, match="expected `encoder` to be"):
        restricted_features(torch.nn.Identity(), images, inside)


def test_a_patch_is_touched_by_a_single_pixel():
    masks = torch.zeros(1, 48, 48, dtype=torch.bool)
    masks[0, 8, 47] = True  # the first row of the second row of patches, the last column
    touched = patches_touched(masks, (6, 6))
    assert touched.nonzero().tolist() == [[0, 1, 5]]
