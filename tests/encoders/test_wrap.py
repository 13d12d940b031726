import logging
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from czsl_heads import add_lora, wrap
from czsl_heads.encoders import names
from czsl_heads.encoders.digest import weights_digest
from czsl_heads.encoders.protocol import Encoder
from tests.encoders.openai import openai_state, small_openai

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


@pytest.mark.parametrize("value", [3, None, b"tiny", ["tiny"], open_clip.CLIP, nn.Linear(2, 3)])
def test_what_is_no_model_and_no_name_raises(value):
    supported = r"a name, an Encoder, a CLIP of open_clip \(CLIP, CustomTextCLIP\), transformers or OpenAI's package"
    with pytest.raises(TypeError, match=f"{supported}, or a state dict in OpenAI's layout, got {type(value).__name__}"):
        wrap(value)


def test_a_coca_model_raises_with_the_reason():
    model = open_clip.CoCa.__new__(open_clip.CoCa)  # which derives from neither of open_clip's CLIP classes
    nn.Module.__init__(model)
    with pytest.raises(TypeError, match="got CoCa: its images are pooled by queries that mix all patches"):
        wrap(model)


def test_models_and_state_dicts_of_openai_are_taken_and_not_changed():
    model = small_openai()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    for given in (model, openai_state(model)):
        encoder = wrap(given)
        torch.testing.assert_close(encoder.encode_images(images), model.encode_image(images), rtol=0, atol=1e-5)
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert type(encoder.blocks("vision")[0].mlp.gelu).__name__ == "QuickGELU"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_state_dict_that_does_not_say_its_activation_is_refused_with_both_names():
    with pytest.raises(ValueError, match=r'"ViT-L-14:PATH" \(GELU\) or "ViT-L-14-quickgelu:PATH" \(QuickGELU\)'):
        wrap(small_openai().state_dict())


def test_a_model_of_transformers_is_taken():
    model = hugging_face_clip()
    encoder = wrap(model, tokenizer=lambda texts: torch.zeros(len(texts), 12, dtype=torch.long))
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    feature = model.get_image_features(images)
    feature = getattr(feature, "pooler_output", feature)
    torch.testing.assert_close(encoder.encode_tokens(images)[:, 0], feature, rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(TypeError, match="of transformers, got CLIPVisionModel: it is one tower of two"):
        wrap(model.vision_model)


def hugging_face_clip():
    """A small random ``CLIPModel``."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 50, "max_position_embeddings": 12, "bos_token_id": 48, "eos_token_id": 49}
    vision = {**tower, "image_size": 28, "patch_size": 7}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


def test_an_encoder_is_wrapped_already_and_left_as_it_is(small_encoder):
    add_lora(small_encoder, rank=1)
    flags = [parameter.requires_grad for parameter in small_encoder.parameters()]
    assert set(flags) == {True, False}  # LoRA learns, and nothing else
    for frozen in (None, False):
        assert wrap(small_encoder, frozen=frozen) is small_encoder
        assert [parameter.requires_grad for parameter in small_encoder.parameters()] == flags
    assert wrap(small_encoder, frozen=True) is small_encoder
    assert not any(parameter.requires_grad for parameter in small_encoder.parameters())


@pytest.mark.parametrize(
    "options", [{"tokenizer": lambda texts: texts}, {"dense": "value"}, {"image_size": 28}, {"image_size": (28, 42)}]
)
def test_what_an_encoder_has_already_is_not_given_again(small_encoder, options):
    with pytest.raises(ValueError, match=f"no `{next(iter(options))}` with an Encoder"):
        wrap(small_encoder, **options)


@pytest.mark.parametrize("size", [(56, 21), 35])
def test_another_image_size_is_taken_by_name_and_by_model(small_clip_factory, size):
    sides = size if isinstance(size, tuple) else (size, size)
    images = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(0))
    encoder = wrap(small_clip_factory(), image_size=size)
    assert encoder.image_size == size
    assert encoder.grid == (sides[0] // 7, sides[1] // 7)
    assert encoder.encode_tokens(images).shape == (2, 1 + encoder.grid[0] * encoder.grid[1], 40)
    assert encoder.transform()(Image.new("RGB", (90, 70))).shape == (3, *sides)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert wrap("tiny", image_size=(48, 64)).grid == (6, 8)


def test_the_size_that_it_has_changes_nothing(small_clip_factory):
    images = torch.randn(2, 3, 42, 28, generator=torch.Generator().manual_seed(0))
    plain, same = wrap(small_clip_factory()), wrap(small_clip_factory(), image_size=(42, 28))
    assert torch.equal(plain.encode_tokens(images), same.encode_tokens(images))


@pytest.mark.parametrize(
    ("size", "error"), [(0, ValueError), ((28, 28, 28), ValueError), (2.5, TypeError), ((28, "28"), TypeError)]
)
def test_a_size_that_is_none_raises(small_clip_factory, size, error):
    with pytest.raises(error, match="expected `image_size`"):
        wrap(small_clip_factory(), image_size=size)


def test_dense_patches_leave_the_image_feature_as_it_is(small_clip_factory):
    images = torch.randn(2, 3, 42, 28, generator=torch.Generator().manual_seed(0))
    plain, dense = wrap(small_clip_factory()), wrap(small_clip_factory(), dense="value")
    before, after = plain.encode_tokens(images), dense.encode_tokens(images)
    torch.testing.assert_close(before[:, 0], after[:, 0], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 1:], after[:, 1:], atol=1e-3)
    with pytest.raises(ValueError, match="expected `dense` to be one of none, value"):
        wrap("tiny", dense="sharp")


def test_an_encoder_of_another_package_may_have_no_name_of_ours(monkeypatch):
    def entries(group):
        return [EntryPoint(name, "other:load", group) for name in ("tiny", "ViT-B-32", "hf")]

    monkeypatch.setattr(names, "entry_points", entries)
    for name in ("tiny", "ViT-B-32:openai", "hf:some/clip"):
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


@pytest.mark.parametrize("frozen", [None, True, False])
def test_an_encoder_of_another_package_is_frozen_unless_asked_otherwise(small_clip_factory, monkeypatch, frozen):
    made = {"encoder": wrap(small_clip_factory(), frozen=False), "model": small_clip_factory()}
    for kind, value in made.items():
        entry = SimpleNamespace(name="theirs", value="other:load", load=lambda value=value: lambda tag: value)
        monkeypatch.setattr(names, "entry_points", lambda group, entry=entry: [entry])
        encoder = wrap("theirs:tag", frozen=frozen)
        assert (encoder is value) == (kind == "encoder")
        assert {parameter.requires_grad for parameter in encoder.parameters()} == {frozen is False}


def test_a_compiled_encoder_is_known_by_what_it_passes_on(small_encoder, monkeypatch):
    """As from Python 3.12 on, where isinstance asks the class and the instance alone, and no ``__getattr__``."""
    compiled = torch.compile(small_encoder, backend="eager")
    monkeypatch.setattr(type(Encoder), "__instancecheck__", lambda protocol, value: False)
    assert wrap(compiled) is compiled


def test_the_encoder_of_another_package_is_asked_for_with_options(small_clip_factory, monkeypatch):
    entry = SimpleNamespace(
        name="mine", value="a:b", load=lambda: lambda tag: wrap(small_clip_factory(), tokenizer=str)
    )
    monkeypatch.setattr(names, "entry_points", lambda group: [entry])
    encoder = wrap("mine", dense="clearclip", image_size=(28, 28))
    assert (encoder.dense, encoder.image_size, encoder.grid) == ("clearclip", 28, (4, 4))


def test_a_size_that_patches_do_not_fill_raises(small_clip_factory):
    with pytest.raises(ValueError, match=r"expected `image_size` in multiples of the patches \(7, 7\), got \(28, 30\)"):
        wrap(small_clip_factory(), tokenizer=str, image_size=(28, 30))
