import importlib
import logging
from importlib.metadata import EntryPoint

import open_clip
import pytest
import torch
from torch import nn

from czsl_heads import wrap
from czsl_heads.encoders.digest import weights_digest
from czsl_heads.encoders.protocol import Encoder

wrap_module = importlib.import_module("czsl_heads.encoders.wrap")
ARCHITECTURE = "small-for-tests"


@pytest.fixture
def small_architecture(monkeypatch):
    """A small model under a name that open_clip knows, built as it builds its own."""
    config = {
        "embed_dim": 40,
        "vision_cfg": {"image_size": 28, "patch_size": 7, "width": 48, "layers": 1, "head_width": 16},
        "text_cfg": {"width": 56, "heads": 4, "layers": 1, "context_length": 31},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, ARCHITECTURE, config)
    monkeypatch.setattr(logging.root, "disabled", True)
    return config


def test_an_open_clip_name_gives_random_weights_and_its_own_tokenizer(small_architecture):
    encoder = wrap(ARCHITECTURE)
    assert isinstance(encoder.model, open_clip.CLIP)
    assert (encoder.dim, encoder.grid, encoder.context_length) == (40, (4, 4), 31)
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    tokens = open_clip.get_tokenizer(ARCHITECTURE)(["a red circle"])
    assert tokens.shape == (1, 31)
    torch.testing.assert_close(
        encoder.encode_texts(["a red circle"]), encoder.model.encode_text(tokens), rtol=0, atol=1e-5
    )


def test_the_part_behind_the_colon_may_be_a_checkpoint(small_architecture, tmp_path):
    first = wrap(ARCHITECTURE)
    with torch.no_grad():
        first.model.visual.proj += 0.1
    path = tmp_path / "weights.pt"
    torch.save(first.model.state_dict(), path)
    again = wrap(f"{ARCHITECTURE}:{path}")
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.encode_tokens(images), again.encode_tokens(images))
    assert not torch.equal(first.encode_tokens(images), wrap(ARCHITECTURE).encode_tokens(images))


def test_custom_text_models_are_taken_by_name_too(small_architecture):
    small_architecture["custom_text"] = True
    encoder = wrap(ARCHITECTURE, frozen=False)
    assert isinstance(encoder.model, open_clip.CustomTextCLIP)
    assert all(p.requires_grad for p in encoder.parameters())


def test_a_given_tokenizer_comes_before_the_named_one(small_architecture):
    calls = []
    own = open_clip.SimpleTokenizer(context_length=31)

    def tokenizer(texts):
        calls.append(texts)
        return own(texts)

    wrap(ARCHITECTURE, tokenizer=tokenizer).encode_texts(["dog"])
    assert calls == [["dog"]]


def test_the_tiny_clip_is_an_encoder_in_eval_mode():
    encoder = wrap("tiny")
    assert isinstance(encoder, Encoder)
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert any(p.requires_grad for p in wrap("tiny", frozen=False).parameters())


@pytest.mark.parametrize("name", ["huge", "", "TINY", "ViT-B-33:openai", ":openai"])
def test_an_unknown_name_raises(name):
    with pytest.raises(ValueError, match=rf"one of open_clip.list_models\(\), got '{name}'"):
        wrap(name)


def test_an_unknown_tag_raises_with_the_known_ones(small_architecture):
    with pytest.raises(ValueError, match=r"tag of ViT-B-32 \(one of openai, .*of a checkpoint, got 'ViT-B-32:nope'"):
        wrap("ViT-B-32:nope")
    with pytest.raises(ValueError, match=rf"a tag of {ARCHITECTURE} \(one of none\) or the path of a checkpoint, got"):
        wrap(f"{ARCHITECTURE}:openai")


@pytest.mark.skipif(open_clip.__version__ != "3.3.0", reason="the numbers are those of open_clip 3.3.0")
def test_the_configurations_that_are_taken_are_as_many_as_the_design_says():
    configs = [open_clip.get_model_config(name) for name in open_clip.list_models()]
    pooled_by_class_token = [
        config
        for config in configs
        if not any(key in config["vision_cfg"] for key in ("timm_model_name", "attentional_pool"))
        and not isinstance(config["vision_cfg"]["layers"], list)  # the stages of a ResNet
        and config["vision_cfg"].get("pool_type", "tok") == "tok"
    ]
    other_text = [
        config
        for config in pooled_by_class_token
        if any(key in config["text_cfg"] for key in ("hf_model_name", "embed_cls"))
    ]
    assert (len(pooled_by_class_token), len(other_text)) == (48, 9)


@pytest.mark.parametrize("value", [3, None, b"tiny", ["tiny"], open_clip.CLIP])
def test_what_is_no_model_and_no_name_raises(value):
    with pytest.raises(TypeError, match=f"to be a CLIP model or a name, got {type(value).__name__}"):
        wrap(value)


def test_a_module_of_another_kind_raises():
    with pytest.raises(TypeError, match="to be an open_clip CLIP or CustomTextCLIP, got Linear"):
        wrap(nn.Linear(2, 3))


def test_a_coca_model_raises():
    class CoCa(nn.Module):
        """open_clip's CoCa derives from neither of its CLIP classes."""

    assert not issubclass(open_clip.CoCa, (open_clip.CLIP, open_clip.CustomTextCLIP))
    with pytest.raises(TypeError, match="to be an open_clip CLIP or CustomTextCLIP, got CoCa"):
        wrap(CoCa())


def test_an_encoder_is_wrapped_already(small_encoder):
    assert wrap(small_encoder, frozen=False) is small_encoder
    small_encoder.requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in wrap(small_encoder).parameters())
    with pytest.raises(ValueError, match="no `tokenizer` with an Encoder"):
        wrap(small_encoder, tokenizer=lambda texts: texts)


def test_an_encoder_of_another_package_may_have_no_name_of_ours(monkeypatch):
    def entries(group):
        return [EntryPoint(name, "other:load", group) for name in ("tiny", "ViT-B-32")]

    monkeypatch.setattr(wrap_module, "entry_points", entries)
    for name in ("tiny", "ViT-B-32:openai"):
        with pytest.raises(ValueError, match=r"that brings the encoder .*, got this package and other:load"):
            wrap(name)


def test_an_architecture_alone_has_the_same_random_weights_each_time(small_architecture):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (wrap(ARCHITECTURE) for _ in range(2))
    assert weights_digest(first) == weights_digest(second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", ["tiny", open_clip.CLIP, open_clip.CustomTextCLIP, "compiled"])
def test_wrapping_twice_is_wrapping_once(small_clip_factory, kind, frozen):
    if kind == "tiny":
        once, size = wrap("tiny", frozen=frozen), (48, 48)
    elif kind == "compiled":
        once, size = torch.compile(wrap(small_clip_factory(), frozen=frozen), backend="eager"), (42, 28)
    else:
        once, size = wrap(small_clip_factory(kind), frozen=frozen), (42, 28)
    flags = [parameter.requires_grad for parameter in once.parameters()]
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    before = once.encode_tokens(images), once.encode_texts(["a red circle"])
    twice = wrap(once, frozen=frozen)
    assert twice is once
    assert [parameter.requires_grad for parameter in twice.parameters()] == flags
    assert set(flags) == {not frozen}
    assert all(map(torch.equal, (twice.encode_tokens(images), twice.encode_texts(["a red circle"])), before))


def test_wrapping_again_freezes_what_was_not_frozen(small_clip_factory):
    once = wrap(small_clip_factory(), frozen=False)
    assert all(parameter.requires_grad for parameter in once.parameters())
    assert not any(parameter.requires_grad for parameter in wrap(once).parameters())
    assert not any(parameter.requires_grad for parameter in wrap(once, frozen=False).parameters())


def test_a_compiled_encoder_is_known_by_what_it_passes_on(small_encoder, monkeypatch):
    """As from Python 3.12 on, where isinstance asks the class and the instance alone, and no ``__getattr__``."""
    compiled = torch.compile(small_encoder, backend="eager")
    monkeypatch.setattr(type(Encoder), "__instancecheck__", lambda protocol, value: False)
    assert wrap(compiled) is compiled
