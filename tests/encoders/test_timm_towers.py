"""Tokens of timm's towers, each against one patch at a time; what is refused; other sizes; rotary positions."""

import copy

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from timm.models.eva import Eva
from torch import nn

from czsl_heads import CompositionSpace, SoftPrompts
from czsl_heads.adapters.patch_drop import drop_patches
from czsl_heads.encoders.open_clip import OpenClipEncoder, vision_tower
from czsl_heads.encoders.timm_towers import TimmEva, TimmViT, normalised_as_their_mean, pooled_alone
from tests.encoders.families import FAMILIES, Letters, build

POOLED_BY_TOKEN = ["EVA-01", "EVA-02", "MobileCLIP-B", "MobileCLIP2-L-14", "class token and registers"]
POOLED_BY_ATTENTION = ["SigLIP", "SigLIP 2", "PE-Core"]
ROTARY = ["EVA-02", "PE-Core"]


def images_for(encoder, batch=2):
    return torch.randn(batch, 3, *encoder.vision.image_size, generator=torch.Generator().manual_seed(0))


def small_trunk(**options):
    """timm's smallest vision transformer, in open_clip's class."""
    torch.manual_seed(0)
    return TimmModel("test_vit", 40, image_size=160, **options).eval()


def swapped(trunk):
    """A TimmModel with that trunk."""
    visual = small_trunk(pool="token", proj=None)
    visual.trunk = trunk.eval()
    return visual


@pytest.mark.parametrize("name", POOLED_BY_TOKEN)
def test_pooled_by_the_class_token_all_tokens_go_its_way(name):
    encoder = build(name)
    images, visual = images_for(encoder), encoder.model.visual
    features = visual.trunk.forward_features(images)
    prefix = visual.trunk.num_prefix_tokens
    assert prefix == encoder.num_prefix == (3 if name == "class token and registers" else 1)
    tokens = encoder.encode_tokens(images)
    for place, feature in enumerate(features.unbind(dim=1)):
        if 0 < place < prefix:
            continue  # a register
        expected = visual.head(visual.trunk.head(visual.trunk.fc_norm(feature)))
        found = tokens[:, 0 if place == 0 else 1 + place - prefix]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", POOLED_BY_ATTENTION)
def test_pooled_by_attention_each_patch_goes_through_it_alone(name):
    encoder = build(name)
    images, visual = images_for(encoder), encoder.model.visual
    features = visual.trunk.forward_features(images)
    assert encoder.num_prefix == visual.trunk.num_prefix_tokens == (1 if name == "PE-Core" else 0)
    tokens = encoder.encode_tokens(images)
    for place in range(tokens.shape[1] - 1):
        alone = features[:, [encoder.num_prefix + place]]
        expected = visual.head(visual.trunk.forward_head(alone))
        torch.testing.assert_close(tokens[:, 1 + place], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"latent_len": 3}, {"latent_len": 3, "pool_type": "avg"}, {"qk_norm": True}])
def test_one_token_alone_is_its_value_whatever_the_query(options, generator):
    torch.manual_seed(0)
    pool = timm.layers.AttentionPoolLatent(48, num_heads=4, norm_layer=nn.LayerNorm, **options)
    tokens = torch.randn(2, 5, 48, generator=generator)
    expected = torch.stack([pool(token) for token in tokens.split(1, dim=1)], dim=1)
    torch.testing.assert_close(pooled_alone(pool, tokens), expected, rtol=0, atol=1e-6)


def test_attention_pooling_without_mlp_is_a_projection_of_values(generator):
    pool = timm.layers.AttentionPoolLatent(48, out_features=0, num_heads=4)
    tokens = torch.randn(2, 5, 48, generator=generator)
    torch.testing.assert_close(pooled_alone(pool, tokens)[:, 1], pool(tokens[:, [1]]), rtol=0, atol=1e-6)


def test_pooled_by_the_mean_patches_are_normalised_as_the_mean_is():
    encoder = build("ViTamin")
    images, visual = images_for(encoder), encoder.model.visual
    norm = visual.trunk.fc_norm
    assert isinstance(norm, nn.LayerNorm)
    tokens = encoder.encode_tokens(images)
    for features, found in zip(visual.trunk.forward_features(images), tokens):
        mean = features.mean(dim=0)
        deviation = (mean.var(correction=0) + norm.eps).sqrt()
        for feature, token in zip(features, found[1:]):
            normed = (feature - mean.mean()) / deviation * norm.weight + norm.bias
            torch.testing.assert_close(token, visual.head(normed), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, 1:].mean(dim=1), tokens[:, 0], rtol=0, atol=1e-5)


def test_normed_before_the_mean_patches_are_normed_each_by_itself():
    encoder = build("mean of patches")
    images, visual = images_for(encoder), encoder.model.visual
    assert isinstance(visual.trunk.fc_norm, nn.Identity)
    tokens = encoder.encode_tokens(images)
    expected = visual.head(visual.trunk.forward_features(images))
    torch.testing.assert_close(tokens[:, 1:], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens[:, 1:].mean(dim=1), tokens[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_mean_of_tokens_normalised_as_their_mean_is_its_layer_norm(dtype, generator):
    norm = nn.LayerNorm(48, eps=1e-3).to(dtype)
    norm.weight.data += torch.randn(48, generator=generator)
    norm.bias.data += torch.randn(48, generator=generator)
    tokens = (3 + 2 * torch.randn(2, 5, 48, generator=generator)).to(dtype)
    normed = normalised_as_their_mean(tokens, norm)
    assert normed.dtype == dtype
    bound = 1e-12 if dtype is torch.float64 else 0.1
    torch.testing.assert_close(normed.mean(dim=1), norm(tokens.mean(dim=1)), rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("pool", "proj", "dim"),
    [
        *[("token", None, 40), ("token", "none", 64), ("token", "linear", 40), ("token", "mlp", 40)],
        *[("avg", None, 40), ("avg", "none", 64), ("avg", "linear", 40), ("avg", "mlp", 40)],
        *[("map", None, 40), ("map", "none", 64)],  # open_clip adds no attention pooling to a trunk made already
    ],
)
def test_every_projection_behind_the_pooling_is_applied_to_each_token(pool, proj, dim, generator):
    visual = small_trunk(pool=pool, proj=proj)
    tower = vision_tower(visual)
    images = torch.randn(2, 3, 160, 160, generator=generator)
    tokens = tower.leave(tower.run(images))
    assert type(tower) is TimmViT
    assert (tower.dim, tower.grid, tower.image_size) == (dim, (10, 10), (160, 160))
    assert tokens.shape == (2, 101, dim)
    torch.testing.assert_close(tokens[:, 0], visual(images), rtol=0, atol=1e-5)
    if pool == "token":
        normed = visual.trunk.fc_norm(visual.trunk.forward_features(images))
        torch.testing.assert_close(tokens, visual.head(visual.trunk.head(normed)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["convnext_atto", "fastvit_t8", "vit_relpos_small_patch16_224", "resnet10t"])
def test_a_trunk_that_is_no_plain_vision_transformer_raises_with_the_reason(name):
    visual = small_trunk(pool="token", proj=None)
    with torch.device("meta"):
        visual.trunk = timm.create_model(name)
    kind = type(visual.trunk).__name__
    reason = "its patches do not go to the image feature as single tokens"
    with pytest.raises(
        TypeError, match=f"expected a timm tower of kind VisionTransformer or Eva, got {kind}: {reason}"
    ):
        vision_tower(visual)


@pytest.mark.parametrize("pool", ["", "max", "avgmax", "prr"])
def test_another_pooling_raises_with_the_reason(pool):
    visual = swapped(timm.create_model("test_vit", global_pool=pool))
    with pytest.raises(ValueError, match=f"got global_pool='{pool}': no patch has a way of its own through it"):
        vision_tower(visual)


def test_a_mean_that_is_not_of_patches_alone_raises_with_the_reason():
    visual = small_trunk(pool="avg", proj=None)
    visual.trunk.pool_include_prefix = True
    with pytest.raises(ValueError, match="a mean of patches alone, got pool_include_prefix=True: it is no mean of the"):
        vision_tower(visual)


def test_a_norm_of_another_kind_behind_the_mean_raises_with_the_reason():
    visual = small_trunk(pool="avg", proj=None)
    visual.trunk.fc_norm = nn.BatchNorm1d(64)
    with pytest.raises(ValueError, match="a layer norm behind the mean of patches, got BatchNorm1d: what it does to"):
        vision_tower(visual)


def test_attention_pooling_with_positions_raises_with_the_reason():
    visual = small_trunk(pool="map", proj=None)
    visual.trunk.attn_pool = timm.layers.AttentionPoolLatent(64, pos_embed="abs", feat_size=100)
    with pytest.raises(ValueError, match="without positions of its own, got some: a patch alone would get the first"):
        vision_tower(visual)


def test_rotary_positions_of_each_block_raise_with_the_reason():
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 40, "global_pool": "token"}
    visual = swapped(Eva(use_rot_pos_emb=True, rope_type="mixed", **sizes))
    with pytest.raises(ValueError, match="rotary positions that all blocks share, got rope_mixed=True"):
        vision_tower(visual)


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224"])
def test_a_trunk_of_dynamic_size_equals_itself(name, generator):
    sizes = {"img_size": (28, 42), "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 4}
    visual = swapped(timm.create_model(name, num_classes=40, global_pool="token", dynamic_img_size=True, **sizes))
    tower = vision_tower(visual)
    images = torch.randn(2, 3, 28, 42, generator=generator)
    hidden = tower.enter(images)
    for block in tower.blocks:
        hidden = tower.step(block, hidden)
    torch.testing.assert_close(tower.leave(hidden)[:, 0], visual(images), rtol=0, atol=1e-6)
    assert tower.leave(tower.run(images)).shape == (2, 1 + 2 * 3, 40)


@pytest.mark.parametrize("name", ["EVA-02", "SigLIP"])
def test_the_container_s_own_checkpoints_are_heeded(name):
    encoder, calls = build(name), []
    encoder.blocks("vision")[0].register_forward_pre_hook(lambda *_: calls.append(1))
    images = images_for(encoder).requires_grad_()
    for own, expected in ((False, 1), (True, 2)):
        encoder.model.visual.set_grad_checkpointing(own)
        calls.clear()
        encoder.encode_tokens(images).sum().backward()
        assert len(calls) == expected


@pytest.mark.parametrize("name", ROTARY)
def test_patches_that_stay_keep_their_rotary_positions(name):
    encoder = build(name)
    assert type(encoder.vision) is TimmEva
    images, trunk = images_for(encoder), encoder.model.visual.trunk
    whole, prefix = encoder.vision.enter(images), encoder.num_prefix
    rope = trunk.rope.get_embed()

    encoder.train()
    drop_patches(encoder, 0.5)
    torch.manual_seed(5)
    tokens = encoder.encode_tokens(images)
    torch.manual_seed(5)
    kept = torch.rand(2, 6).argsort(dim=1)[:, :3].sort(dim=1).values
    for image, places, found in zip(whole, kept, tokens):
        hidden = torch.cat([image[:prefix], image[prefix:][places]])[None]
        for block in trunk.blocks:
            hidden = block(hidden, rope=rope[places])
        torch.testing.assert_close(encoder.vision.leave(hidden)[0], found, rtol=0, atol=1e-5)
    assert kept[0].tolist() != kept[1].tolist()


@pytest.mark.parametrize("name", ["EVA-02", "SigLIP"])
def test_patch_dropout_of_the_configuration_is_heeded(name):
    encoder = FAMILIES[name](patch_drop_rate=0.5).train()
    images = images_for(encoder)
    torch.manual_seed(0)
    tokens = encoder.encode_tokens(images)
    torch.manual_seed(0)
    torch.testing.assert_close(tokens[:, 0], encoder.model.encode_image(images), rtol=0, atol=1e-6)
    assert tokens.shape[1] == 1 + 3
    assert encoder.eval().encode_tokens(images).shape[1] == 1 + 6


@pytest.mark.parametrize("name", ["EVA-02", "SigLIP", "PE-Core", "class token and registers", "mean of patches"])
def test_another_size_equals_a_tower_made_for_it(name):
    encoder = build(name)
    old_grid = encoder.grid
    side = encoder.image_size[0] // old_grid[0]
    size = (4 * side, 5 * side)
    state = {key: value.clone() for key, value in encoder.model.visual.state_dict().items()}
    positions = state["trunk.pos_embed"]
    fixed = positions.shape[1] - old_grid[0] * old_grid[1]
    as_picture = positions[0, fixed:].T.reshape(1, -1, *old_grid)
    larger = F.interpolate(as_picture, size=(4, 5), mode="bicubic", antialias=True, align_corners=False)
    state["trunk.pos_embed"] = torch.cat([positions[:, :fixed], larger[0].flatten(1).T[None]], dim=1)
    made = FAMILIES[name](img_size=size)
    made.model.visual.load_state_dict(state)

    own = copy.deepcopy(encoder.model).visual
    own.set_input_size(size)
    encoder.vision.resize(size)
    images = images_for(encoder)
    assert images.shape[2:] == size
    assert encoder.model.visual.image_size == size
    torch.testing.assert_close(encoder.encode_tokens(images), made.encode_tokens(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode_images(images), own(images), rtol=0, atol=0)


@pytest.mark.parametrize("size", [224, (224,), [48, 48], (48.0, 48), ("48", 48), (True, 48)])
def test_a_size_that_is_no_pair_of_integers_raises(size):
    encoder = build("SigLIP")
    with pytest.raises(TypeError, match="expected `image_size` to be"):
        encoder.vision.resize(size)
    assert encoder.image_size == (48, 32)


@pytest.mark.parametrize("size", [(15, 32), (32, 0), (-16, 16)])
def test_a_size_without_room_for_a_patch_raises(size):
    encoder = build("SigLIP")
    with pytest.raises(ValueError, match=r"expected `image_size` to be at least 16, got"):
        encoder.vision.resize(size)
    assert encoder.encode_tokens(images_for(encoder)).shape[1] == 7


def test_the_text_tower_of_siglip_takes_64_tokens_and_reads_the_last_position():
    encoder = build("SigLIP")
    assert encoder.context_length == 64
    assert encoder.causal_text is False
    assert encoder.text_start == 0
    embeddings, position = encoder.embed_texts(["red", "a green triangle"])
    assert embeddings.shape == (2, 64, 48)
    assert position.tolist() == [3, 16]  # of [EOS]
    hidden = encoder.text.run(encoder.text.enter(embeddings))
    expected = encoder.text.leave(hidden[:, 63])
    torch.testing.assert_close(encoder.encode_embeddings(embeddings, position), expected, rtol=0, atol=1e-6)
    assert isinstance(encoder.model.text.text_projection, nn.Linear)


@pytest.mark.parametrize("name", ["class token", "CLIPA", "MobileCLIP2-L-14", "SigLIP", "PE-Core"])
def test_prompts_that_are_not_trained_yet_are_the_texts_they_spell(name):
    encoder = build(name)
    space = CompositionSpace(["r", "b"], ["c", "d"], seen=[("r", "c"), ("b", "d")])
    texts = SoftPrompts(encoder, space, context="of")(space)
    assert texts.pairs.shape == (2, encoder.dim)
    for found, spelled in ((texts.pairs, ["ofrc", "ofbd"]), (texts.attributes, ["ofr", "ofb"])):
        expected = F.normalize(encoder.encode_texts(spelled), dim=-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_text_tower_of_perception_encoder_takes_32_tokens_and_is_causal():
    encoder = build("PE-Core")
    assert encoder.context_length == 32
    assert encoder.causal_text is True
    assert encoder.embed_texts(["red"])[1].tolist() == [4]  # [SOS] and three letters stand before [EOS]


def test_the_bias_of_siglip_is_the_container_s():
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    encoder = build("SigLIP")
    assert encoder.logit_bias.item() == config["init_logit_bias"] == -10
    images, texts = images_for(encoder), ["red circle", "blue square", "dog"]
    expected, _ = encoder.model.get_logits(images, encoder.tokenizer(texts))
    cosines = F.normalize(encoder.encode_images(images), dim=-1) @ F.normalize(encoder.encode_texts(texts), dim=-1).T
    found = encoder.logit_scale * cosines + encoder.logit_bias
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_bias_of_one_dimension_is_a_scalar_too():
    vision = {"image_size": 16, "patch_size": 8, "width": 48, "layers": 1, "head_width": 16}
    text = {"width": 48, "heads": 4, "layers": 1, "vocab_size": 120, "context_length": 20}
    model = open_clip.CLIP(40, vision, text, init_logit_bias=-3.0, nonscalar_logit_scale=True)
    encoder = OpenClipEncoder(model, tokenizer=Letters(20, 120))
    assert encoder.logit_bias.shape == encoder.logit_scale.shape == ()
    assert encoder.logit_bias.item() == -3.0
