import copy
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.hf_model import HFTextEncoder
from torch import nn

from czsl_heads import wrap
from czsl_heads.adapters.lora import add_lora
from czsl_heads.adapters.patch_drop import drop_patches
from czsl_heads.encoders.open_clip import OpenClipEncoder
from czsl_heads.encoders.protocol import Encoder

TEXTS = ["a photo of red circle", "dog", "an old, rather worn-out pair of leather boots on a shelf"]


TOKENIZER = open_clip.SimpleTokenizer()  # shared where the default one, made anew each time, is not the point


def images_for(encoder, batch, generator):
    size = encoder.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=generator)


@pytest.fixture(scope="session")
def real_size_custom_text_clip(real_size_clip):
    """The same weights in open_clip's other class, shared with the CLIP and not copied."""
    config = open_clip.get_model_config("ViT-B-32")
    with torch.device("meta"):
        model = open_clip.CustomTextCLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    weights = open_clip.model.convert_to_custom_text_state_dict(dict(real_size_clip.state_dict()))
    model.load_state_dict(weights, assign=True)
    model.text.attn_mask = real_size_clip.attn_mask
    return model.eval()


@pytest.fixture(params=["clip", "custom_text"])
def real_size_encoder(request, real_size_clip, real_size_custom_text_clip):
    return wrap(real_size_clip if request.param == "clip" else real_size_custom_text_clip, frozen=False)


@pytest.fixture(params=[open_clip.CLIP, open_clip.CustomTextCLIP])
def either_encoder(request, small_clip_factory):
    return wrap(small_clip_factory(request.param))


def test_token_zero_is_the_image_feature_of_open_clip(real_size_encoder, generator):
    images = images_for(real_size_encoder, 2, generator)
    with torch.no_grad():
        tokens = real_size_encoder.encode_tokens(images)
        expected = real_size_encoder.model.encode_image(images, normalize=True)
    assert tokens.shape == (2, 1 + 7 * 7, 512)
    torch.testing.assert_close(F.normalize(tokens, dim=-1)[:, 0], expected, rtol=0, atol=1e-6)


def test_texts_run_on_few_positions_equal_open_clip_on_all_77(real_size_encoder):
    tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    assert tokens.shape[1] == 77
    with torch.no_grad():
        assert real_size_encoder.embed_texts(TEXTS)[0].shape[1] < 77
        features = real_size_encoder.encode_texts(TEXTS)
        expected = real_size_encoder.model.encode_text(tokens)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_the_properties_of_a_real_model_are_its_own(real_size_encoder):
    assert real_size_encoder.grid == (7, 7)
    assert real_size_encoder.dim == real_size_encoder.text_dim == 512
    assert real_size_encoder.image_size == 224
    assert real_size_encoder.num_prefix == 1
    assert real_size_encoder.context_length == 77
    assert real_size_encoder.causal_text is True
    assert len(real_size_encoder.blocks("vision")) == len(real_size_encoder.blocks("text")) == 12


def test_the_properties_tell_distinct_sizes_apart(either_encoder):
    assert either_encoder.grid == (6, 4)
    assert either_encoder.image_size == (42, 28)
    assert (either_encoder.dim, either_encoder.text_dim) == (40, 56)
    assert (len(either_encoder.blocks("vision")), len(either_encoder.blocks("text"))) == (3, 2)
    assert "grid=(6, 4)" in either_encoder.extra_repr()


def test_both_classes_satisfy_the_protocol(either_encoder):
    assert isinstance(either_encoder, Encoder)
    assert not isinstance(either_encoder.model, Encoder)


def test_tokens_of_either_class_agree_with_open_clip(either_encoder, generator):
    images = images_for(either_encoder, 5, generator)
    tokens = either_encoder.encode_tokens(images)
    assert tokens.shape == (5, 1 + 6 * 4, 40)
    torch.testing.assert_close(tokens[:, 0], either_encoder.model.encode_image(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens[:, 0], either_encoder.encode_images(images), rtol=0, atol=1e-6)


def test_patch_tokens_are_the_tokens_of_open_clip_projected(either_encoder, generator):
    images = images_for(either_encoder, 3, generator)
    visual = copy.deepcopy(either_encoder.model.visual)
    visual.output_tokens = True
    _, patches = visual(images)
    expected = patches @ visual.proj
    torch.testing.assert_close(either_encoder.encode_tokens(images)[:, 1:], expected, rtol=0, atol=1e-6)


def test_patches_are_listed_row_by_row(small_encoder, generator):
    images = images_for(small_encoder, 1, generator)
    changed = images.clone()
    changed[..., 2 * 7 : 3 * 7, 1 * 7 : 2 * 7] += 3.0  # the patch in row 2 and column 1 of a grid of 4 columns
    embeds = small_encoder.model.visual._embeds
    moved = (embeds(images) - embeds(changed)).abs().amax(dim=(0, 2)).nonzero().flatten()
    assert moved.tolist() == [1 + 2 * 4 + 1]
    assert small_encoder.encode_tokens(images).shape[1] == 1 + 6 * 4


def test_every_image_is_encoded_by_itself(small_encoder, generator):
    images = images_for(small_encoder, 3, generator)
    alone = torch.cat([small_encoder.encode_tokens(image[None]) for image in images])
    torch.testing.assert_close(small_encoder.encode_tokens(images), alone, rtol=0, atol=1e-5)


def test_a_layer_norm_after_the_pooling_changes_nothing(small_clip_factory, generator):
    plain, after = (
        wrap(small_clip_factory(vision={"final_ln_after_pool": late}), tokenizer=TOKENIZER) for late in (False, True)
    )
    images = images_for(plain, 2, generator)
    torch.testing.assert_close(after.encode_tokens(images), plain.encode_tokens(images), rtol=0, atol=0)
    torch.testing.assert_close(after.encode_tokens(images)[:, 0], after.encode_images(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"proj_bias": True},
        {"proj_type": "none", "width": 40},
        {"pool_type": "eos", "eos_id": 49407},
        {"pool_type": "first"},
        {"pool_type": "last"},
        {"no_causal_mask": True},
        {"ls_init_value": 0.3},
        {"context_length": 19},
    ],
    ids=lambda text: "-".join(map(str, text)) or "plain",
)
@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_texts_of_every_text_tower_equal_open_clip(small_clip_factory, kind, text):
    tokenizer = None if "context_length" in text else TOKENIZER
    encoder = wrap(small_clip_factory(kind, text=text), tokenizer=tokenizer)
    expected = encoder.model.encode_text(encoder.tokenizer(TEXTS))
    torch.testing.assert_close(encoder.encode_texts(TEXTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "causal"),
    [
        ({}, True),
        ({"pool_type": "eos", "eos_id": 49407}, True),
        ({"no_causal_mask": True}, False),
        ({"pool_type": "last"}, False),
        ({"pool_type": "first"}, False),
    ],
)
def test_only_a_masked_tower_pooled_at_its_end_is_causal(small_clip_factory, text, causal):
    encoder = wrap(small_clip_factory(text=text), tokenizer=TOKENIZER)
    embeddings, eos = encoder.embed_texts(TEXTS)
    assert encoder.causal_text is causal
    assert embeddings.shape[1] == (int(eos.max()) + 1 if causal else 77)


def test_what_stands_behind_the_end_does_not_matter_to_a_causal_tower(small_encoder, generator):
    embeddings, eos = small_encoder.embed_texts(TEXTS)
    behind = torch.randn(len(TEXTS), 11, small_encoder.text_dim, generator=generator)
    longer = small_encoder.encode_embeddings(torch.cat([embeddings, behind], dim=1), eos)
    torch.testing.assert_close(small_encoder.encode_embeddings(embeddings, eos), longer, rtol=0, atol=1e-5)


def test_embeddings_and_their_encoding_make_up_the_encoding_of_texts(either_encoder):
    embeddings, eos = either_encoder.embed_texts(TEXTS)
    tokens = either_encoder.tokenizer(TEXTS)
    assert eos.tolist() == tokens.argmax(dim=1).tolist()
    table = getattr(either_encoder.model, "text", either_encoder.model).token_embedding.weight
    torch.testing.assert_close(embeddings, table[tokens[:, : embeddings.shape[1]]], rtol=0, atol=0)
    both = either_encoder.encode_embeddings(embeddings, eos)
    torch.testing.assert_close(both, either_encoder.encode_texts(TEXTS), rtol=0, atol=0)


def test_any_texts_in_any_order_are_encoded_each_by_itself(small_encoder):
    @settings(max_examples=25, deadline=None)
    @given(texts=st.lists(st.text(max_size=12), min_size=1, max_size=5))
    def check(texts):
        alone = torch.cat([small_encoder.encode_texts([text]) for text in texts])
        torch.testing.assert_close(small_encoder.encode_texts(texts), alone, rtol=0, atol=1e-5)

    check()


def test_a_tuple_of_strings_is_as_good_as_a_list(small_encoder):
    assert torch.equal(small_encoder.encode_texts(tuple(TEXTS)), small_encoder.encode_texts(TEXTS))


def test_the_logit_scale_is_the_multiplier(small_clip_factory):
    for nonscalar in (False, True):
        encoder = wrap(
            small_clip_factory(init_logit_scale=math.log(37.0), nonscalar_logit_scale=nonscalar), tokenizer=TOKENIZER
        )
        assert encoder.logit_scale.shape == ()
        assert encoder.logit_scale.item() == pytest.approx(37.0, rel=1e-6)


def test_wrapping_freezes_unless_told_otherwise(small_clip_factory):
    assert not any(p.requires_grad for p in wrap(small_clip_factory(), tokenizer=TOKENIZER).parameters())
    model = small_clip_factory()
    model.visual.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {
        name: p.requires_grad for name, p in wrap(model, frozen=False, tokenizer=TOKENIZER).model.named_parameters()
    } == flags
    assert set(flags.values()) == {True, False}


def test_the_model_is_shared_and_its_mode_kept(small_clip_factory):
    for training in (True, False):
        model = small_clip_factory().train(training)
        encoder = wrap(model, tokenizer=TOKENIZER)
        assert encoder.model is model
        assert encoder.training is model.training is training


def test_a_frozen_tower_passes_gradients_to_its_inputs(small_encoder, generator):
    embeddings, eos = small_encoder.embed_texts(TEXTS)
    embeddings = embeddings.detach().requires_grad_()
    small_encoder.encode_embeddings(embeddings, eos).square().sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum() > 0
    images = images_for(small_encoder, 2, generator).requires_grad_()
    small_encoder.encode_tokens(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_blocks_can_be_replaced_in_place(small_encoder, generator):
    class Bypass(nn.Module):
        def forward(self, hidden, attn_mask=None):
            return hidden

    images = images_for(small_encoder, 1, generator)
    for index in range(3):
        small_encoder.blocks("vision")[index] = Bypass()
    visual = small_encoder.model.visual
    expected = visual.ln_post(visual._embeds(images)) @ visual.proj
    torch.testing.assert_close(small_encoder.encode_tokens(images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_encoder_computes_in_the_dtype_of_its_weights(small_clip_factory, dtype, generator):
    full = wrap(small_clip_factory(), tokenizer=TOKENIZER)
    images = images_for(full, 2, generator)
    cast = wrap(small_clip_factory().to(dtype), tokenizer=TOKENIZER)
    tokens, texts = cast.encode_tokens(images.to(dtype)), cast.encode_texts(TEXTS)
    assert tokens.dtype == texts.dtype == dtype
    bound = 0.1 if dtype is torch.bfloat16 else 1e-5  # bf16 has 8 bits, and features are of order one
    torch.testing.assert_close(tokens.float(), full.encode_tokens(images), rtol=0, atol=bound)
    torch.testing.assert_close(texts.float(), full.encode_texts(TEXTS), rtol=0, atol=bound)


def test_a_text_that_does_not_fit_raises_instead_of_being_cut(small_encoder):
    fits, too_long = " ".join(["dog"] * 75), " ".join(["dog"] * 76)
    assert small_encoder.embed_texts([fits])[0].shape[1] == 77
    with pytest.raises(ValueError, match=r"`texts` of at most 77 tokens, got 78 tokens in 'dog dog"):
        small_encoder.encode_texts(["dog", too_long])


@pytest.mark.parametrize("texts", ["dog", ["dog", 3], [None]])
def test_texts_that_are_no_list_of_strings_raise(small_encoder, texts):
    with pytest.raises(TypeError, match="expected `texts` to be a list of strings, got"):
        small_encoder.encode_texts(texts)


def test_no_texts_raise(small_encoder):
    with pytest.raises(ValueError, match="expected `texts` to hold at least one string, got none"):
        small_encoder.encode_texts([])


@pytest.mark.parametrize("method", ["encode_tokens", "encode_images"])
@pytest.mark.parametrize("shape", [(3, 42, 28), (2, 3, 28, 42), (2, 1, 42, 28), (2, 3, 42, 29)])
def test_images_of_a_wrong_shape_raise(small_encoder, method, shape):
    with pytest.raises(ValueError, match=r"expected `images` of shape \(batch, 3, 42, 28\).* got \("):
        getattr(small_encoder, method)(torch.zeros(shape))


@pytest.mark.parametrize("method", ["encode_tokens", "encode_images"])
def test_images_that_are_no_float_tensor_raise(small_encoder, method):
    with pytest.raises(TypeError, match=r"expected `images` of dtype .*, got torch.uint8"):
        getattr(small_encoder, method)(torch.zeros(2, 3, 42, 28, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"expected `images` to be a torch.Tensor, got list"):
        getattr(small_encoder, method)([[0.0]])


def test_embeddings_that_do_not_fit_raise(small_encoder, small_clip_factory):
    eos = torch.tensor([2, 3])
    with pytest.raises(ValueError, match=r"expected `embeddings` of shape \(texts, length, 56\), got \(2, 5, 55\)"):
        small_encoder.encode_embeddings(torch.zeros(2, 5, 55), eos)
    with pytest.raises(ValueError, match=r"expected `eos` of shape \(texts\) with texts=3"):
        small_encoder.encode_embeddings(torch.zeros(3, 5, 56), eos)
    with pytest.raises(TypeError, match=r"expected `eos` of dtype torch.int64, got torch.float32"):
        small_encoder.encode_embeddings(torch.zeros(2, 5, 56), eos.float())
    with pytest.raises(ValueError, match="expected `embeddings` of at most 77 positions, got 78"):
        small_encoder.encode_embeddings(torch.zeros(2, 78, 56), eos)
    two_way = wrap(small_clip_factory(text={"no_causal_mask": True}))
    with pytest.raises(ValueError, match="expected `embeddings` of exactly 77 positions, got 5"):
        two_way.encode_embeddings(torch.zeros(2, 5, 56), eos)


def test_an_unknown_tower_raises(small_encoder):
    with pytest.raises(ValueError, match="expected `tower` to be one of vision, text, got 'audio'"):
        small_encoder.blocks("audio")


def test_a_foreign_vocabulary_needs_its_tokenizer(small_clip_factory):
    model = small_clip_factory(text={"vocab_size": 97})
    with pytest.raises(ValueError, match=r"`tokenizer` for a vocabulary of 97 \(OpenAI's has 49408\), got None"):
        wrap(model)

    def letters(texts):
        rows = [[95, *(ord(letter) % 89 for letter in text), 96] for text in texts]
        return torch.tensor([row + [0] * (77 - len(row)) for row in rows])

    encoder = wrap(model, tokenizer=letters)
    torch.testing.assert_close(
        encoder.encode_texts(["dog", "horse"]), model.encode_text(letters(["dog", "horse"])), rtol=0, atol=1e-5
    )


def test_the_mean_of_normed_patches_is_the_image_feature(small_clip_factory, generator):
    encoder = wrap(small_clip_factory(vision={"pool_type": "avg", "no_ln_pre": True}), tokenizer=TOKENIZER)
    images, visual = images_for(encoder, 2, generator), encoder.model.visual
    tokens = encoder.encode_tokens(images)
    states = visual.transformer(visual._embeds(images))
    expected = visual.ln_post(states)[:, 1:] @ visual.proj
    torch.testing.assert_close(tokens[:, 1:], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens[:, 1:].mean(dim=1), encoder.model.encode_image(images), rtol=0, atol=1e-6)


def test_patches_are_normed_as_their_mean_is_where_the_norm_comes_last(small_clip_factory, generator):
    after = {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True, "norm_kwargs": {"eps": 1e-3}}
    encoder = wrap(small_clip_factory(vision=after), tokenizer=TOKENIZER)
    images, visual = images_for(encoder, 2, generator), encoder.model.visual
    norm = visual.ln_post
    norm.weight.data += torch.randn(48, generator=generator)
    norm.bias.data += torch.randn(48, generator=generator)
    tokens = encoder.encode_tokens(images)
    for states, found in zip(visual.transformer(visual._embeds(images)), tokens):
        mean = states[1:].mean(dim=0)
        deviation = (mean.var(correction=0) + 1e-3).sqrt()
        for state, token in zip(states[1:], found[1:]):
            normed = (state - mean.mean()) / deviation * norm.weight + norm.bias
            torch.testing.assert_close(token, normed @ visual.proj, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, 1:].mean(dim=1), encoder.model.encode_image(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, 0], encoder.model.encode_image(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        ({"pool_type": "none"}, "pooled by class token or mean, got pool_type='none': it makes no image feature"),
        ({"attentional_pool": True, "attn_pooler_heads": 4}, "by class token or mean, got attention pooling: its quer"),
        ({"attentional_pool": "parallel", "attn_pooler_heads": 4}, "got attention pooling: its queries mix all patch"),
    ],
)
def test_a_vision_tower_pooled_otherwise_raises_with_the_reason(small_clip_factory, vision, reason):
    with pytest.raises(ValueError, match=reason):
        wrap(small_clip_factory(vision=vision))


def test_a_vision_tower_without_projection_raises(small_clip_factory):
    model = small_clip_factory()
    model.visual.proj = None
    with pytest.raises(ValueError, match="with a projection, got none: its tokens are not in the joint space"):
        wrap(model)


def test_a_resnet_raises_with_the_reason(small_clip_factory):
    model = small_clip_factory(vision={"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 8})
    with pytest.raises(TypeError, match="or TimmModel, got ModifiedResNet: its attention pooling projects one vector"):
        wrap(model)


def test_any_other_vision_tower_raises(small_clip_factory):
    model = small_clip_factory()
    model.visual = nn.Flatten()
    with pytest.raises(TypeError, match="or TimmModel, got Flatten: it has no patch tokens in the space of the image"):
        wrap(model)


@pytest.mark.parametrize("pool_type", ["tok", "avg"])
@pytest.mark.parametrize("size", [(42, 42), (28, 63), (28, 49)])
def test_another_size_equals_open_clip_loading_the_same_weights(
    small_clip_factory, tmp_path, size, pool_type, generator
):
    square = {"image_size": 28, "pool_type": pool_type}
    encoder = wrap(small_clip_factory(vision=square), tokenizer=TOKENIZER)
    torch.save(encoder.model.state_dict(), tmp_path / "weights.pt")
    made = wrap(small_clip_factory(vision={**square, "image_size": size}), tokenizer=TOKENIZER)
    open_clip.load_checkpoint(made.model, str(tmp_path / "weights.pt"))

    encoder.vision.resize(size)
    assert encoder.grid == made.grid == (size[0] // 7, size[1] // 7)
    assert encoder.vision.image_size == made.vision.image_size == size
    images = images_for(encoder, 2, generator)
    assert images.shape[2:] == size
    torch.testing.assert_close(encoder.encode_tokens(images), made.encode_tokens(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode_images(images), made.model.encode_image(images), rtol=0, atol=1e-5)


def test_positions_of_a_grid_that_is_no_square_are_interpolated_as_they_lie(small_encoder):
    visual = small_encoder.model.visual
    positions, patches = visual.positional_embedding, 6 * 4
    ramp = torch.arange(6.0)[:, None].expand(6, 4).reshape(patches, 1)  # the row of each patch
    positions.data[1:] = ramp.expand(patches, 48)
    first = positions.data[0].clone()
    small_encoder.vision.resize((6 * 7, 8 * 7))
    larger = visual.positional_embedding
    assert larger.shape == (1 + 6 * 8, 48)
    assert not larger.requires_grad
    assert torch.equal(larger[0], first)
    expected = torch.arange(6.0)[:, None].expand(6, 8).reshape(48, 1).expand(48, 48)
    torch.testing.assert_close(larger[1:], expected, rtol=0, atol=1e-5)


def test_the_same_number_of_patches_in_another_grid_is_another_size(small_encoder, generator):
    before = small_encoder.model.visual.positional_embedding.clone()
    small_encoder.vision.resize((28, 42))
    assert small_encoder.grid == (4, 6)
    assert small_encoder.model.visual.positional_embedding.shape == before.shape
    assert not torch.allclose(small_encoder.model.visual.positional_embedding, before)
    assert small_encoder.encode_tokens(torch.randn(1, 3, 28, 42, generator=generator)).shape == (1, 25, 40)


def test_the_same_size_changes_nothing(small_encoder, generator):
    images = images_for(small_encoder, 2, generator)
    before = small_encoder.encode_tokens(images)
    small_encoder.vision.resize((42, 28))
    assert torch.equal(small_encoder.encode_tokens(images), before)


def test_positions_that_are_trained_still_are_after_a_resize(small_clip_factory):
    encoder = wrap(small_clip_factory(), tokenizer=TOKENIZER, frozen=False)
    encoder.vision.resize((28, 28))
    assert encoder.model.visual.positional_embedding.requires_grad


@pytest.mark.parametrize(("size", "error"), [((6, 28), ValueError), (28, TypeError), ((28.0, 28), TypeError)])
def test_a_size_that_does_not_fit_raises(small_encoder, size, error):
    with pytest.raises(error, match="expected `image_size` to be"):
        small_encoder.vision.resize(size)


class Words:
    """Stand-in for a tokenizer of the hub: words are tokens, padded to the right or to the left."""

    def __init__(self, end, pad, left=False):
        self.end, self.pad, self.left = end, pad, left

    def __call__(self, texts, context_length=77):
        rows = torch.full((len(texts), context_length), self.pad)
        for row, text in zip(rows, texts):
            ids = [*range(5, 5 + len(text.split()))][: context_length - 1]
            length = len(ids) + 1
            place = slice(context_length - length, None) if self.left else slice(0, length)
            row[place] = torch.tensor([*ids, self.end])
        return rows


@pytest.mark.parametrize(("pool", "place"), [("first", 0), ("last", 76)])
@pytest.mark.parametrize(("end", "pad"), [(200, 0), (1, 1)])
def test_a_text_pooled_at_a_fixed_place_ends_where_it_ends(small_clip_factory, pool, place, end, pad):
    model = small_clip_factory(text={"pool_type": pool, "no_causal_mask": True, "vocab_size": 201})
    encoder = wrap(model, tokenizer=Words(end, pad))
    embeddings, position = encoder.embed_texts(["dog", "a b c", ""])
    assert position.tolist() == [1, 3, 0]
    assert encoder.text_start == 0
    hidden = encoder.text.run(encoder.text.enter(embeddings))
    expected = encoder.text.leave(hidden[:, place])
    torch.testing.assert_close(encoder.encode_embeddings(embeddings, position), expected, rtol=0, atol=1e-6)


def test_a_tokenizer_that_pads_in_front_says_nothing_of_starts(small_clip_factory):
    model = small_clip_factory(text={"pool_type": "last", "no_causal_mask": True, "vocab_size": 201})
    encoder = wrap(model, tokenizer=Words(200, 0, left=True))
    assert encoder.text_start == 0
    assert encoder.embed_texts(["dog", "a b c"])[1].tolist() == [0, 0]


@pytest.mark.parametrize("text", [{}, {"pool_type": "eos", "eos_id": 49407}, {"pool_type": "last"}])
def test_an_sos_stands_before_the_first_word(small_clip_factory, text):
    encoder = wrap(small_clip_factory(text=text), tokenizer=TOKENIZER)
    assert encoder.text_start == 1
    assert encoder.embed_texts(["dog", "a big dog", ""])[1].tolist() == [2, 4, 1]


@pytest.mark.parametrize("tokenizer", [Words(200, 0), Words(200, 1), Words(1, 1), Words(200, 0, left=True)])
def test_a_tokenizer_of_another_kind_is_asked_what_it_would_cut(small_clip_factory, tokenizer):
    model = small_clip_factory(text={"pool_type": "last", "no_causal_mask": True, "vocab_size": 201})
    encoder = wrap(model, tokenizer=tokenizer)
    fits, too_long = " ".join(["dog"] * 76), " ".join(["dog"] * 77)
    expected = model.encode_text(tokenizer(["dog", fits]))
    torch.testing.assert_close(encoder.encode_texts(["dog", fits]), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="`texts` of at most 77 tokens, got more in 'dog dog dog"):
        encoder.encode_texts(["dog", too_long])


@pytest.mark.parametrize("strip", [False, True])
def test_open_clip_s_tokenizer_of_the_hub_is_asked_what_it_would_cut(small_clip_factory, tmp_path, strip):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "dog": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    model.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    fast.save_pretrained(tmp_path)
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=77, strip_sep_token=strip)

    text = {"pool_type": "last", "no_causal_mask": True, "vocab_size": 5}
    encoder = wrap(small_clip_factory(text=text), tokenizer=tokenizer)
    fits, too_long = " ".join(["dog"] * 75), " ".join(["dog"] * 76)
    expected = encoder.model.encode_text(tokenizer(["dog", fits]))
    torch.testing.assert_close(encoder.encode_texts(["dog", fits]), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="`texts` of at most 77 tokens, got more in 'dog dog dog"):
        encoder.encode_texts(["dog", too_long])


def test_a_tokenizer_whose_encode_adds_the_ends_itself_refuses_nothing_that_fits(small_clip_factory):
    class Whole(Words):
        def encode(self, text):
            return [1, *range(5, 5 + len(text.split())), 200]

    encoder = wrap(small_clip_factory(text={"pool_type": "last", "vocab_size": 201}), tokenizer=Whole(200, 0))
    assert encoder.encode_texts([" ".join(["dog"] * 76)]).shape == (1, 40)


def test_a_hugging_face_text_tower_raises_with_the_reason(small_clip_factory):
    model = small_clip_factory(open_clip.CustomTextCLIP)
    text = HFTextEncoder.__new__(HFTextEncoder)  # the class alone: making a real one would download a configuration
    nn.Module.__init__(text)
    model.text = text
    with pytest.raises(TypeError, match=r"text tower with token embeddings, got HFTextEncoder without token_embedding"):
        wrap(model)


def test_a_text_tower_with_a_class_embedding_raises_with_the_reason(small_clip_factory):
    model = small_clip_factory(open_clip.CustomTextCLIP, text={"embed_cls": True})
    with pytest.raises(ValueError, match=r"pooled at a token, got one that appends a class embedding \(CoCa\)"):
        wrap(model)


def test_a_text_tower_with_a_padding_mask_raises_with_the_reason(small_clip_factory):
    model = small_clip_factory(open_clip.CustomTextCLIP, text={"no_causal_mask": True})
    model.text.use_pad_mask = True
    with pytest.raises(ValueError, match="without a padding mask, got use_pad_mask=True: it needs token ids"):
        wrap(model)


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_a_text_tower_that_does_not_pool_raises(small_clip_factory, kind):
    with pytest.raises(ValueError, match="that pools to one vector, got pool_type='none'"):
        wrap(small_clip_factory(kind, text={"pool_type": "none"}))


def test_a_copy_of_the_encoder_encodes_alike(small_encoder, generator):
    images = images_for(small_encoder, 2, generator)
    twin = copy.deepcopy(small_encoder)
    assert torch.equal(twin.encode_tokens(images), small_encoder.encode_tokens(images))
    assert torch.equal(twin.encode_texts(TEXTS), small_encoder.encode_texts(TEXTS))


def test_the_encoder_is_the_class_that_wrap_returns(small_clip_factory):
    assert type(wrap(small_clip_factory())) is OpenClipEncoder


@pytest.mark.parametrize("dropped", [0.0, 0.5])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoints_change_no_gradient_and_not_the_model(small_encoder, generator, dropout, dropped):
    add_lora(small_encoder, dropout=dropout)
    handle = drop_patches(small_encoder.train(), dropped)
    images = images_for(small_encoder, 5, generator)
    trained = [parameter for parameter in small_encoder.parameters() if parameter.requires_grad]
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(3)
        tokens = small_encoder.encode_tokens(images, checkpoint=checkpoint)
        found.append([tokens, *torch.autograd.grad(tokens.square().sum(), trained)])
    for plain, again in zip(*found):
        assert torch.equal(plain, again)
    assert any(gradient.any() for gradient in found[0][1:])
    assert not small_encoder.model.visual.transformer.grad_checkpointing
    handle.remove()


def test_checkpoints_keep_what_enters_each_block(small_encoder, generator):
    add_lora(small_encoder.train())
    images = images_for(small_encoder, 5, generator)
    kept = {}
    for checkpoint in (False, True):
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {parameter.untyped_storage().data_ptr() for parameter in small_encoder.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tokens = small_encoder.encode_tokens(images, checkpoint=checkpoint)
        kept[checkpoint] = sum(size for pointer, size in sizes.items() if pointer not in weights)
        del tokens
    rows = 5 * (1 + 6 * 4) * 4
    assert kept[False] > 3 * 8 * 48 * rows
    assert kept[True] == (3 + 1) * 48 * rows + 2 * rows  # and of the last norm its input, means and deviations


def test_nothing_is_run_again_where_nothing_is_trained(small_encoder, generator):
    calls = []
    small_encoder.blocks("vision")[0].register_forward_hook(lambda *_: calls.append(1))
    images = images_for(small_encoder, 2, generator)
    with torch.no_grad():
        expected = small_encoder.encode_tokens(images)
        assert torch.equal(small_encoder.encode_tokens(images, checkpoint=True), expected)
    assert len(calls) == 2
