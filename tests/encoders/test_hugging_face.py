"""Models of transformers, each against what its own code gives; weights are random, for none can be had offline."""

import copy
import json
import re
import sys
from types import SimpleNamespace

import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from czsl_heads import CompositionSpace, SoftPrompts, wrap
from czsl_heads.encoders import hugging_face
from czsl_heads.encoders.hugging_face import HuggingFaceEncoder, HuggingFaceTokenizer, supports
from tests.encoders.hugging_face import (
    KINDS,
    VERSION,
    hub_tokenizer,
    own_feature,
    small_config,
    small_model,
    text_inputs,
    vision_inputs,
)

TEXTS = ["a photo of red circle", "b", "another"]
SPACE = CompositionSpace(["r", "b"], ["x", "y"], seen=[("r", "x"), ("b", "y")])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
newest = pytest.mark.skipif(VERSION < (5, 0), reason="not in the oldest version of transformers")


def encoder_of(kind, model=None, **options):
    return HuggingFaceEncoder(model or small_model(kind), tokenizer=hub_tokenizer(kind), **options)


def images_for(encoder, count, generator):
    return torch.randn(count, 3, *encoder.vision.image_size, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_token_0_and_images_are_the_models_own_feature(kind, generator):
    encoder = encoder_of(kind)
    images = images_for(encoder, 3, generator)
    expected = own_feature(encoder.model.get_image_features(**vision_inputs(encoder, images)))
    tokens = encoder.encode_tokens(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(tokens[:, 0], expected, **CLOSE)
    torch.testing.assert_close(encoder.encode_images(images), expected, **CLOSE)
    assert tokens.shape == (3, 1 + 16, encoder.dim)
    assert encoder.encode_tokens(images[:0]).shape == (0, 1 + 16, encoder.dim)


@pytest.mark.parametrize("kind", KINDS)
def test_patches_go_the_way_of_the_image_feature_each_by_itself(kind, generator):
    encoder = encoder_of(kind)
    images = images_for(encoder, 2, generator)
    model, last = encoder.model, encoder.model.vision_model(**vision_inputs(encoder, images)).last_hidden_state
    if kind in ("CLIPModel", "MetaClip2Model"):
        patches = model.visual_projection(model.vision_model.post_layernorm(last[:, 1:]))
    elif kind == "Tipsv2Model":
        patches = last[:, 1 + 2 :]
    else:
        alone = [model.vision_model.head(last[:, place : place + 1]) for place in range(16)]
        patches = torch.stack(alone, dim=1)
    torch.testing.assert_close(encoder.encode_tokens(images)[:, 1:], patches, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_the_models_own_features(kind):
    encoder = encoder_of(kind)
    expected = own_feature(encoder.model.get_text_features(**text_inputs(encoder, TEXTS)))
    assert expected.std() > 0.1
    torch.testing.assert_close(encoder.encode_texts(TEXTS), expected, **CLOSE)
    torch.testing.assert_close(encoder.encode_texts(TEXTS[1:2]), expected[1:2], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_models_own(kind, generator):
    encoder = encoder_of(kind)
    images = images_for(encoder, 2, generator)
    output = encoder.model(**vision_inputs(encoder, images), **text_inputs(encoder, TEXTS))
    of_images, of_texts = encoder.encode_images(images), encoder.encode_texts(TEXTS)
    cosines = nn.functional.normalize(of_images, dim=-1) @ nn.functional.normalize(of_texts, dim=-1).T
    logits = encoder.logit_scale * cosines + (0 if encoder.logit_bias is None else encoder.logit_bias)
    torch.testing.assert_close(logits, output.logits_per_image, atol=1e-4, rtol=1e-4)
    assert (encoder.logit_bias is not None) == kind.startswith("Siglip")


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_encoder_says_of_itself(kind):
    encoder = encoder_of(kind)
    causal = kind in ("CLIPModel", "MetaClip2Model")
    assert encoder.dim == (40 if causal else 48)
    assert (encoder.causal_text, encoder.text_start) == (causal, int(causal))
    assert encoder.num_prefix == {"Tipsv2Model": 3, "SiglipModel": 0, "Siglip2Model": 0}.get(kind, 1)
    assert (encoder.grid, encoder.image_size, encoder.context_length) == ((4, 4), 28, 24)
    assert encoder.text_dim == encoder.model.text_model.config.hidden_size
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_containers_own_and_can_be_replaced(kind, generator):
    encoder = encoder_of(kind)
    images = images_for(encoder, 2, generator)
    own = encoder.model.vision_model.encoder
    layers = own.layer if kind == "Tipsv2Model" else own.layers
    assert encoder.blocks("vision") is layers
    assert encoder.blocks("text") is encoder.model.text_model.encoder.layers
    before = encoder.encode_tokens(images)
    encoder.blocks("vision")[1] = copy.deepcopy(encoder.blocks("vision")[2])
    expected = own_feature(encoder.model.get_image_features(**vision_inputs(encoder, images)))
    torch.testing.assert_close(encoder.encode_tokens(images)[:, 0], expected, **CLOSE)
    assert not torch.allclose(before[:, 0], expected, atol=1e-3)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_models_own(kind, checkpoint, generator):
    encoder = encoder_of(kind, frozen=False)
    images = images_for(encoder, 2, generator)
    weights = [encoder.blocks("vision")[0].mlp.fc1.weight, encoder.blocks("vision")[2].mlp.fc2.bias]
    own = own_feature(encoder.model.get_image_features(**vision_inputs(encoder, images)))
    expected = torch.autograd.grad(own.square().sum(), weights)
    found = torch.autograd.grad(encoder.encode_tokens(images, checkpoint=checkpoint)[:, 0].square().sum(), weights)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        assert other.any()
    everything = encoder.encode_tokens(images, checkpoint=checkpoint)[:, 1:].sum()
    assert all(gradient.any() for gradient in torch.autograd.grad(everything, weights))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_transformers_are_heeded(kind, generator):
    encoder = encoder_of(kind, frozen=False)
    images = images_for(encoder, 2, generator)
    weights = [encoder.blocks(tower)[0].mlp.fc1.weight for tower in ("vision", "text")]

    def gradients():
        loss = encoder.encode_tokens(images).square().sum() + encoder.encode_texts(TEXTS).square().sum()
        return torch.autograd.grad(loss, weights)

    expected = gradients()
    assert not encoder.checkpoints_text
    model = encoder.model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert encoder.checkpoints_text
    calls = []
    for tower in ("vision", "text"):
        encoder.blocks(tower)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for one, other in zip(gradients(), expected):
        torch.testing.assert_close(one, other, **CLOSE)
    assert len(calls) == 4  # each is run again once


@pytest.mark.parametrize("encode", ["auto", "plain"])
@pytest.mark.parametrize("context", ["a photo of", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_begin_as_the_texts_that_they_are_made_of(kind, context, encode):
    encoder = encoder_of(kind)
    prompts = SoftPrompts(encoder, SPACE, context=context, encode=encode)
    features = prompts(SPACE.open_world())
    names = [f"{context} {attribute} {obj}" for attribute in SPACE.attributes for obj in SPACE.objects]
    assert prompts.pair_context.shape == (len(context.replace(" ", "")), encoder.text_dim)
    for found, texts in (
        (features.pairs, names),
        (features.attributes, [f"{context} {name}" for name in SPACE.attributes]),
        (features.objects, [f"{context} {name}" for name in SPACE.objects]),
    ):
        expected = nn.functional.normalize(encoder.encode_texts(texts), dim=-1)
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_prompt_is_learned(kind):
    prompts = SoftPrompts(encoder_of(kind), SPACE)
    features = prompts(SPACE)
    weights = torch.randn(features.pairs.shape, generator=torch.Generator().manual_seed(1))
    (features.pairs * weights).sum().backward()
    assert prompts.pair_context.grad.abs().sum(dim=1).all()
    assert prompts.primitives.grad.abs().sum(dim=1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(35, 21), (14, 49)])
def test_images_of_another_size_have_interpolated_positions(kind, size, generator):
    encoder = encoder_of(kind)
    native = images_for(encoder, 2, generator)
    before = encoder.encode_tokens(native)
    encoder.vision.resize(size)
    images = images_for(encoder, 2, generator)
    expected = own_feature(encoder.model.get_image_features(**vision_inputs(encoder, images)))
    tokens = encoder.encode_tokens(images)
    torch.testing.assert_close(tokens[:, 0], expected, **CLOSE)
    torch.testing.assert_close(encoder.encode_images(images), expected, **CLOSE)
    assert encoder.grid == (size[0] // 7, size[1] // 7)
    assert tokens.shape == (2, 1 + encoder.grid[0] * encoder.grid[1], encoder.dim)
    with pytest.raises(ValueError, match="expected `images` of shape"):
        encoder.encode_tokens(native)
    encoder.vision.resize((28, 28))
    assert torch.equal(encoder.encode_tokens(native), before)


def test_a_size_that_patches_do_not_fill_is_refused():
    encoder = encoder_of("CLIPModel")
    for size in ((28, 30), (0, 28)):
        with pytest.raises(ValueError, match=re.escape(f"`image_size` in multiples of the patches (7, 7), got {size}")):
            encoder.vision.resize(size)
    # The native size need not be a multiple: what is left over was not seen in pretraining, either.
    encoder = encoder_of("CLIPModel", small_model("CLIPModel", vision={"image_size": 30}))
    encoder.vision.resize((14, 14))
    encoder.vision.resize((30, 30))
    assert encoder.encode_tokens(torch.zeros(1, 3, 30, 30)).shape == (1, 17, 40)


@newest
def test_a_picture_of_a_naflex_model_is_the_same_with_padding(generator):
    encoder = encoder_of("Siglip2Model")
    images = images_for(encoder, 2, generator)
    inputs = vision_inputs(encoder, images)
    padded = {
        "pixel_values": nn.functional.pad(inputs["pixel_values"], (0, 0, 0, 5)),
        "pixel_attention_mask": nn.functional.pad(inputs["pixel_attention_mask"], (0, 5)),
        "spatial_shapes": inputs["spatial_shapes"],
    }
    expected = own_feature(encoder.model.get_image_features(**padded))
    torch.testing.assert_close(encoder.encode_tokens(images)[:, 0], expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_eager_attention_gives_the_same(kind, generator):
    first, second = encoder_of(kind), encoder_of(kind, small_model(kind, attention="eager"))
    images = images_for(first, 2, generator)
    torch.testing.assert_close(first.encode_tokens(images), second.encode_tokens(images), **CLOSE)
    torch.testing.assert_close(first.encode_texts(TEXTS), second.encode_texts(TEXTS), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_goes_through_both_towers(kind, generator):
    encoder, half = encoder_of(kind), encoder_of(kind, small_model(kind).bfloat16())
    images = images_for(encoder, 2, generator)
    for found, expected in (
        (half.encode_tokens(images.bfloat16()), encoder.encode_tokens(images)),
        (half.encode_texts(TEXTS), encoder.encode_texts(TEXTS)),
        (half.encode_embeddings(*encoder.embed_texts(TEXTS)), encoder.encode_texts(TEXTS)),
    ):
        assert found.dtype == torch.bfloat16
        assert nn.functional.cosine_similarity(found.float(), expected, dim=-1).min() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_both_towers_are_one_graph(kind, generator):
    encoder = encoder_of(kind)
    images = images_for(encoder, 2, generator)
    embedded = encoder.embed_texts(TEXTS)
    torch._dynamo.reset()
    tokens = torch.compile(encoder.encode_tokens, backend="eager", fullgraph=VERSION >= (5, 0))(images)
    torch.testing.assert_close(tokens, encoder.encode_tokens(images), **CLOSE)
    texts = torch.compile(encoder.encode_embeddings, backend="eager", fullgraph=VERSION >= (5, 0))(*embedded)
    torch.testing.assert_close(texts, encoder.encode_texts(TEXTS), **CLOSE)


def test_a_copy_of_an_encoder_encodes_alike_and_by_itself(generator):
    encoder = encoder_of("CLIPModel")
    images = images_for(encoder, 2, generator)
    twin = copy.deepcopy(encoder)
    expected = encoder.encode_tokens(images)
    encoder.model.visual_projection.weight.data.zero_()
    assert torch.equal(twin.encode_tokens(images), expected)


# Texts and tokenizers.


def test_eos_is_the_highest_id_in_configurations_of_old():
    model = small_model("CLIPModel", text={"eos_token_id": 2})
    encoder = encoder_of("CLIPModel", model)
    ids = encoder.tokenizer(TEXTS)
    assert torch.equal(encoder.embed_texts(TEXTS)[1], ids.eq(63).int().argmax(dim=1))
    torch.testing.assert_close(encoder.encode_texts(TEXTS), own_feature(model.get_text_features(ids)), **CLOSE)


def test_a_text_of_a_causal_tower_is_run_up_to_its_end_only():
    encoder = encoder_of("CLIPModel")
    embeddings, eos = encoder.embed_texts(["abc", "a"])
    assert (embeddings.shape[1], eos.tolist()) == (5, [4, 2])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("Siglip", "Tips"))])
def test_a_text_of_another_tower_has_all_positions_and_says_where_it_ends(kind):
    encoder = encoder_of(kind)
    embeddings, eos = encoder.embed_texts(["abc", "a" * (23 if kind.startswith("Siglip") else 24)])
    assert embeddings.shape[1] == 24
    assert eos.tolist() == [3, 23 if kind.startswith("Siglip") else 24]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_does_not_fit_is_refused(kind):
    encoder = encoder_of(kind)
    ends = len(encoder.tokenizer.tokenizer("")["input_ids"])
    fits = "x" * (24 - ends)
    assert encoder.encode_texts([fits]).shape == (1, encoder.dim)
    with pytest.raises(ValueError, match=rf"`texts` of at most 24 tokens, got 25 tokens in '{fits}y'"):
        encoder.encode_texts([fits + "y"])


def test_texts_are_filled_up_behind_and_cut_off():
    padded_in_front = hub_tokenizer("SiglipModel", padding_side="left")
    tokenizer = HuggingFaceTokenizer(padded_in_front, 6)
    assert tokenizer(["ab", "abcdefgh"]).tolist() == [[5, 6, 2, 2, 2, 2], [5, 6, 7, 8, 9, 2]]
    assert [tokenizer.count(text) for text in ("ab", "abcdefgh", "")] == [3, 9, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_siglip_reads_lower_case(kind):
    encoder = encoder_of(kind)
    lower, upper = encoder.tokenizer(["red", "Red"])
    assert torch.equal(lower, upper) == kind.startswith("Siglip")
    assert encoder.tokenizer.count("RED") == encoder.tokenizer.count("red")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_may_be_any_function(kind):
    encoder = encoder_of(kind)
    own = encoder.tokenizer.tokenizer

    def ids(texts):
        return own(texts, padding="max_length", max_length=24, return_tensors="pt")["input_ids"]

    other = HuggingFaceEncoder(encoder.model, tokenizer=ids)
    assert other.tokenizer is ids
    assert torch.equal(other.encode_texts(TEXTS), encoder.encode_texts(TEXTS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_a_tokenizer_asks_for_one(kind):
    with pytest.raises(ValueError, match=f"expected `tokenizer` of a {kind} with a vocabulary of 64, got None; it"):
        HuggingFaceEncoder(small_model(kind))


@pytest.fixture(scope="module")
def openai_sized():
    """A CLIPModel with a vocabulary of OpenAI's size."""
    ids = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    return small_model("CLIPModel", text=ids)


def test_openais_vocabulary_needs_no_tokenizer(openai_sized):
    encoder = HuggingFaceEncoder(openai_sized)
    ids = encoder.tokenizer(TEXTS)
    expected = own_feature(openai_sized.get_text_features(ids))
    torch.testing.assert_close(encoder.encode_texts(TEXTS), expected, **CLOSE)
    with pytest.raises(ValueError, match="at most 24 tokens, got 30 tokens"):
        encoder.encode_texts(["red " * 28])


def test_that_tokenizer_gives_the_ids_of_transformers(tmp_path):
    simple = open_clip.SimpleTokenizer(context_length=24)
    merges = [f"{first} {second}" for first, second in simple.bpe_ranks]
    vocabulary = {token.replace("<start_of_text>", "<|startoftext|>"): place for token, place in simple.encoder.items()}
    vocabulary = {token.replace("<end_of_text>", "<|endoftext|>"): place for token, place in vocabulary.items()}
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    own = transformers.CLIPTokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    hub = HuggingFaceTokenizer(own, 24)
    texts = ["a photo of a red circle", "Ancient, ripe; broken-down houses' 12 doors", "", "sliced  apple"]
    for one, other in zip(simple(texts), hub(texts)):
        end = int(one.argmax())
        assert one[: end + 1].tolist() == other[: end + 1].tolist()
        assert other[end:].eq(49407).all()  # only the padding differs, which a causal tower does not read


# How images are prepared.

SHAPES = (61, 90), (90, 61), (40, 40), (20, 33), (28, 28)
IMAGE_PROCESSOR = {
    "CLIPModel": ("CLIPImageProcessor", {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}),
    "SiglipModel": ("SiglipImageProcessor", {"size": {"height": 28, "width": 28}}),
    "Tipsv2Model": ("Tipsv2ImageProcessor", {"size": {"height": 28, "width": 28}}),
}


def processor_of(kind, **changes):
    """The image processor that comes with a kind of models; its variant without tensors, where there are two."""
    name, sizes = IMAGE_PROCESSOR[kind]
    found = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return found(**{**sizes, **changes})


def picture(shape, generator):
    pixels = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy()).resize((shape[1] * 2, shape[0] * 2), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in IMAGE_PROCESSOR])
def test_images_are_prepared_as_the_processor_does_it(kind, given, shape, generator):
    processor = processor_of(kind)
    encoder = encoder_of(kind, processor=processor if given else None)
    image = picture(shape, generator)
    expected = torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"][0])
    found = encoder.transform()(image)
    # TIPSv2's processor has tensors only, which are rounded to other grey levels than PIL's pictures here and there.
    level = 0 if type(processor).__name__ != "Tipsv2ImageProcessor" else 2
    assert (found - expected).abs().max() <= level / 255 + 1e-5


@newest
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_processors_of_tensors_differ_by_a_grey_level_or_two(kind, shape, generator):
    name, sizes = IMAGE_PROCESSOR[kind]
    processor = getattr(transformers, name)(**sizes)
    image = picture(shape, generator)
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    found = encoder_of(kind, processor=processor).transform()(image)
    assert ((found - expected).abs() * torch.tensor(processor.image_std)[:, None, None]).max() <= 2.01 / 255


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_assumed_without_a_processor(kind):
    prepared = encoder_of(kind).preprocess
    mean, std = {
        "SiglipModel": (0.5, 0.5),
        "Siglip2Model": (0.5, 0.5),
        "Tipsv2Model": (0.0, 1.0),
    }.get(kind, (0.48145466, 0.26862954))
    assert (prepared.mean[0], prepared.std[0], prepared.size) == (mean, std, (28, 28))
    assert prepared.resize_mode == ("shortest" if "Clip" in kind or "CLIP" in kind else "squash")
    assert prepared.interpolation == ("bilinear" if kind in ("Siglip2Model", "Tipsv2Model") else "bicubic")


def test_a_processor_says_what_the_configuration_does_not(generator):
    processor = processor_of("CLIPModel", resample=2, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    encoder = encoder_of("CLIPModel", processor=processor)
    assert (encoder.preprocess.mean, encoder.preprocess.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert encoder.preprocess.interpolation == "bilinear"
    squashed = processor_of("CLIPModel", do_center_crop=False, size={"height": 28, "width": 28}, do_normalize=False)
    encoder = encoder_of("CLIPModel", processor=squashed)
    assert (encoder.preprocess.resize_mode, encoder.preprocess.mean) == ("squash", (0.0, 0.0, 0.0))


def test_the_tower_takes_images_of_the_size_that_the_processor_gives(generator):
    processor = processor_of("CLIPModel", size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    encoder = encoder_of("CLIPModel", processor=processor)
    assert (encoder.image_size, encoder.grid) == (42, (6, 6))
    image = encoder.transform()(picture((50, 70), generator))
    expected = encoder.model.get_image_features(image[None], interpolate_pos_encoding=True)
    torch.testing.assert_close(encoder.encode_tokens(image[None])[:, 0], own_feature(expected), **CLOSE)


@newest
def test_a_naflex_processor_has_no_size_of_its_own():
    processor = transformers.Siglip2ImageProcessor(patch_size=7, max_num_patches=16)
    encoder = encoder_of("Siglip2Model", processor=processor)
    assert (encoder.image_size, encoder.preprocess.interpolation) == (28, "bilinear")


def test_a_processor_with_a_tokenizer_brings_both():
    parts = {"image_processor": processor_of("CLIPModel", resample=2), "tokenizer": hub_tokenizer("CLIPModel")}
    processor = SimpleNamespace(**parts)  # a CLIPProcessor takes tokenizers of certain classes only
    encoder = HuggingFaceEncoder(small_model("CLIPModel"), processor=processor)
    assert encoder.tokenizer.tokenizer is processor.tokenizer
    assert encoder.preprocess.interpolation == "bilinear"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 1}, "bilinear or bicubic interpolation, got resample="),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor=1/255, got 0.0078"),
        ({"size": {"shortest_edge": 32}}, "or the shortest edge to the size of its centre crop, got size="),
    ],
)
def test_a_processor_that_is_not_supported_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        encoder_of("CLIPModel", processor=processor_of("CLIPModel", **changes))


# What is refused.


def test_models_of_transformers_are_known_by_their_class():
    model = small_model("CLIPModel")

    class Mine(transformers.CLIPModel):
        pass

    mine = Mine(small_config("CLIPModel"))
    assert supports(model)
    assert supports(mine)
    assert not supports(nn.Linear(2, 2))
    assert type(encoder_of("CLIPModel", mine)) is HuggingFaceEncoder


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("AltCLIPModel", "its text tower is a BERT"),
        ("ChineseCLIPModel", "its text tower is a BERT"),
        ("CLIPVisionModelWithProjection", "it is one tower of two"),
        ("BertModel", "where its patch tokens and its image feature meet is not known here"),
    ],
)
def test_another_model_of_transformers_is_refused_with_the_reason(kind, why):
    made = getattr(transformers, kind)
    model = made.__new__(made)
    nn.Module.__init__(model)
    assert supports(model)
    with pytest.raises(TypeError, match=f"expected `model` to be a CLIPModel, .* of transformers, got {kind}: {why}"):
        HuggingFaceEncoder(model)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("Siglip")])
def test_a_siglip_without_its_head_is_refused(kind):
    model = small_model(kind, vision={"vision_use_head": False})
    with pytest.raises(ValueError, match="expected a SigLIP with its pooling head, got vision_use_head=False"):
        encoder_of(kind, model)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("Siglip")])
def test_an_attention_without_masks_is_refused(kind):
    model = small_model(kind)
    model.text_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention sdpa or eager, got flash_attention_2, which takes no mask"):
        encoder_of(kind, model)


# By name.


@pytest.fixture
def folder(tmp_path):
    """What save_pretrained writes of a small SigLIP, its tokenizer and its image processor."""
    small_model("SiglipModel").save_pretrained(tmp_path)
    hub_tokenizer("SiglipModel").save_pretrained(tmp_path)
    getattr(transformers, IMAGE_PROCESSOR["SiglipModel"][0])(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_gives_what_was_saved(folder, generator):
    encoder, expected = hugging_face.load(f"hf:{folder}"), encoder_of("SiglipModel")
    images = images_for(encoder, 2, generator)
    assert torch.equal(encoder.encode_tokens(images), expected.encode_tokens(images))
    assert torch.equal(encoder.encode_texts(TEXTS), expected.encode_texts(TEXTS))
    assert encoder.preprocess == expected.preprocess
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_wrap_knows_folders_and_models(folder, generator):
    model = small_model("SiglipModel")
    named, given = wrap(f"hf:{folder}"), wrap(model, tokenizer=hub_tokenizer("SiglipModel"))
    images = images_for(named, 2, generator)
    assert given.model is model
    assert torch.equal(named.encode_tokens(images), given.encode_tokens(images))


def test_weights_of_half_precision_are_loaded_in_single_precision(folder):
    small_model("SiglipModel").half().save_pretrained(folder)
    encoder = hugging_face.load(f"hf:{folder}")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_the_oldest_kind_of_weights_is_enough_for_openais_vocabulary(tmp_path, openai_sized):
    openai_sized.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(**IMAGE_PROCESSOR["CLIPModel"][1]).save_pretrained(tmp_path)
    encoder = hugging_face.load(f"hf:{tmp_path}")
    assert type(encoder.tokenizer) is open_clip.SimpleTokenizer


def refused(name, **options):
    with pytest.raises(ValueError, match=r"^expected ") as raised:
        hugging_face.load(name, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_weights_that_are_not_complete_are_refused(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["text_model.head.weight"]
    save_file(weights, path, {"format": "pt"})
    assert "with all weights of a SiglipModel, got none of 'text_model.head.weight'" in refused(f"hf:{folder}")
    path.write_bytes(path.read_bytes()[:5000])
    said = refused(f"hf:{folder}")
    assert f"expected model.safetensors in the folder {folder}, as save_pretrained writes it, got none" in said


def test_weights_of_another_size_are_told_by_their_name_and_nothing_else_is_printed(folder, capfd, caplog):
    capfd.readouterr()  # of what was made for the test
    weights = load_file(folder / "model.safetensors")
    first = next(name for name in sorted(weights) if name.endswith("layer_norm1.weight"))
    expected = tuple(weights[first].shape)
    save_file({**weights, first: torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    message = re.escape(f"sizes in its config.json, {expected} for {first!r}, got (3,)")
    with pytest.raises(ValueError, match=message):
        wrap(f"hf:{folder}")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_what_is_missing_beside_the_weights_is_asked_for_before_they_are_read(folder):
    (folder / "model.safetensors").unlink()
    (folder / "preprocessor_config.json").unlink()
    said = refused(f"hf:{folder}")
    assert f"expected preprocessor_config.json in the folder {folder}" in said
    for path in folder.glob("*token*"):
        path.unlink()
    processor = processor_of("SiglipModel")
    said = refused(f"hf:{folder}", processor=processor)
    assert f"expected a tokenizer beside the weights of 'hf:{folder}', got" in said
    assert said.endswith("or pass `tokenizer`")
    said = refused(f"hf:{folder}", processor=processor, tokenizer=hub_tokenizer("SiglipModel"))
    assert "expected model.safetensors in the folder" in said


def test_a_model_of_another_type_is_refused_before_its_weights_are_read(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    said = refused(f"hf:{tmp_path}")
    assert said.endswith("to be a model of type clip, metaclip_2, siglip, siglip2, tipsv2, got bert")


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert f"expected config.json in the folder {tmp_path}, as save_pretrained writes it" in refused(f"hf:{tmp_path}")
    missing = tmp_path / "no"
    assert f"expected config.json in a folder, got {missing}, which is none" in refused(f"hf:{missing}")


def test_a_repository_that_cannot_be_had_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused("hf:someone/no-such-clip")
    assert "config.json of someone/no-such-clip in the cache" in said
    assert "run `hf download someone/no-such-clip --local-dir DIR`, and wrap 'hf:DIR'" in said


def test_without_transformers_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=re.escape("got none: pip install 'czsl-heads[transformers]'")):
        hugging_face.load("hf:openai/clip-vit-base-patch32")
