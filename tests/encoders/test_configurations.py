"""What is said of open_clip's configurations is what wrapping a model of each would say."""

from collections import Counter

import open_clip
import pytest
import torch
from open_clip.model import _build_text_tower, _build_vision_tower

from czsl_heads.encoders.configurations import read_configuration, read_configurations
from czsl_heads.encoders.open_clip import _check_text, vision_tower

BY_NAME = {each.name: each for each in read_configurations()}

FAMILY_OF = {
    "ViT-L-14": "ViT, class token",
    "ViT-L-14-quickgelu": "ViT, class token",
    "ViT-L-14-CLIPA": "ViT, mean of patches",
    "EVA02-B-16": "timm, class token",
    "MobileCLIP-B": "timm, class token",
    "ViT-B-16-SigLIP": "timm, attention pooling",
    "PE-Core-T-16-384": "timm, attention pooling",
    "ViTamin-L": "timm, mean of patches",
}
REASON_OF = {
    "RN50": "its attention pooling projects one vector, and not single patches",
    "convnext_base": "its patches do not go to the image feature as single tokens",
    "MobileCLIP-S1": "its patches do not go to the image feature as single tokens",
    "coca_ViT-B-32": "a CoCa pools by queries and by a class embedding of its own",
    "roberta-ViT-B-32": "its text tower takes token ids, and prompts cannot be put in",
    "nllb-clip-base-siglip": "its text tower takes token ids, and prompts cannot be put in",
}


def test_every_configuration_is_read_once():
    assert list(BY_NAME) == open_clip.list_models()
    assert len(BY_NAME) == len(read_configurations())


@pytest.mark.parametrize("name", FAMILY_OF)
def test_what_is_supported_has_no_reason_against_it(name):
    assert BY_NAME[name].family == FAMILY_OF[name]
    assert BY_NAME[name].reason == ""


@pytest.mark.parametrize("name", REASON_OF)
def test_what_is_refused_has_the_reason(name):
    assert BY_NAME[name].reason == REASON_OF[name]


def test_a_tokenizer_of_the_hub_is_told():
    assert BY_NAME["ViT-B-16-SigLIP"].hub_tokenizer
    assert not BY_NAME["PE-Core-T-16-384"].hub_tokenizer
    assert not BY_NAME["ViT-B-16"].hub_tokenizer


@pytest.mark.parametrize(
    ("vision", "family", "reason"),
    [
        ({"layers": 2, "pool_type": "none"}, "ViT, no pooling", "it makes no image feature"),
        ({"layers": 2, "attentional_pool": True}, "ViT, attention pooling", "its queries mix all patches"),
        ({"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "max"}, "timm, max", "no patch has a way of its own"),
    ],
)
def test_configurations_that_open_clip_does_not_bring_are_read_too(vision, family, reason):
    found = read_configuration("mine", {"vision_cfg": vision, "text_cfg": {}})
    assert (found.name, found.family) == ("mine", family)
    assert found.reason.startswith(reason)


def test_a_class_embedding_in_the_texts_is_a_reason():
    found = read_configuration("mine", {"vision_cfg": {"layers": 2}, "text_cfg": {"embed_cls": True}})
    assert found.reason == REASON_OF["coca_ViT-B-32"]


@pytest.mark.slow
def test_towers_of_all_configurations_are_taken_or_refused_as_it_is_said():
    families = Counter()
    for name, said in BY_NAME.items():
        if said.family == "CoCa":
            continue
        config = open_clip.get_model_config(name)
        with torch.device("meta"):
            visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"])
        if said.reason and "hf_model_name" not in config["text_cfg"]:
            with pytest.raises((TypeError, ValueError), match=said.reason):
                vision_tower(visual)
            continue
        if not said.reason:
            with torch.device("meta"):
                _check_text(_build_text_tower(config["embed_dim"], config["text_cfg"]))
        tower = vision_tower(visual)
        assert tower.dim == config["embed_dim"]
        families[said.family, type(tower).__name__] += 1
    assert {(family.partition(",")[0], kind) for family, kind in families} == {
        ("ViT", "ViT"),
        ("timm", "TimmViT"),
        ("timm", "TimmEva"),
    }
