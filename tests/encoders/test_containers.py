"""The same weights in three containers: open_clip's CLIP, transformers' CLIPModel, and OpenAI's own package."""

import re

import pytest
import torch
import transformers

from czsl_heads import CompositionSpace, SoftPrompts, wrap
from czsl_heads.encoders.hugging_face import HuggingFaceEncoder
from czsl_heads.encoders.openai import clip_of_openai_state
from tests.encoders.openai import small_openai

TEXTS = ["a photo of a red circle", "blue", "a very long text of quite some words"]
PAIRS = ("open_clip", "transformers"), ("open_clip", "openai"), ("transformers", "openai")
SPACE = CompositionSpace(["red", "blue"], ["circle", "square"], seen=[("red", "circle"), ("blue", "square")])

# OpenAI's names, and open_clip's with them, to those of transformers.
RENAMED = {
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
    r"\.attn\.out_proj\.": ".self_attn.out_proj.",
    r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}


def renamed(state):
    """A state dict in OpenAI's layout in that of transformers: other names, projections the other way round."""
    out = {}
    for name, tensor in state.items():
        if name in ("visual.proj", "text_projection"):
            tensor = tensor.T.contiguous()
        for old, new in RENAMED.items():
            name = re.sub(old, new, name)
        if ".attn.in_proj_" not in name:
            out[name] = tensor
            continue
        layer, kind = name.split(".attn.in_proj_")
        for part, rows in zip("qkv", tensor.chunk(3)):
            out[f"{layer}.self_attn.{part}_proj.{kind}"] = rows.clone()
    return out


def in_transformers(model):
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision |= {"image_size": 28, "patch_size": 7, "hidden_act": "quick_gelu"}
    text |= {"max_position_embeddings": model.context_length, "vocab_size": 49408, "hidden_act": "quick_gelu"}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=40)
    with torch.random.fork_rng(devices=[]):
        inside = transformers.CLIPModel(config)
    inside.load_state_dict(renamed(model.state_dict()))
    return inside.eval()


@pytest.fixture(scope="module")
def encoders():
    model = small_openai()
    return {
        "open_clip": wrap(clip_of_openai_state(model.state_dict())),
        "transformers": HuggingFaceEncoder(in_transformers(model)),
        "openai": wrap(model),
    }


@pytest.mark.parametrize("pair", PAIRS)
def test_containers_give_the_same_tokens_images_and_texts(encoders, pair, generator):
    first, second = (encoders[name] for name in pair)
    images = torch.randn(3, 3, 28, 28, generator=generator)
    for one, other in (
        (first.encode_tokens(images), second.encode_tokens(images)),
        (first.encode_images(images), second.encode_images(images)),
        (first.encode_texts(TEXTS), second.encode_texts(TEXTS)),
        (first.logit_scale, second.logit_scale),
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_containers_give_the_same_prompts(encoders, pair):
    first, second = (SoftPrompts(encoders[name], SPACE, encode="plain")(SPACE) for name in pair)
    for one, other in zip(first, second):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_containers_prepare_images_alike(encoders, pair):
    first, second = (encoders[name].preprocess for name in pair)
    assert first == second
