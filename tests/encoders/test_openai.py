"""OpenAI's own models, state dicts and archives, on a stand-in: no weights and no package can be had offline."""

import re
import warnings

import open_clip
import pytest
import torch
from torch import nn

from czsl_heads import wrap
from czsl_heads.encoders.open_clip import OpenClipEncoder
from czsl_heads.encoders.openai import clip_of_openai_model, clip_of_openai_state, is_openai_model, is_openai_state
from tests.encoders.openai import openai_state, small_openai

TEXTS = ["a photo of a red circle", "blue"]


def ids(texts, length=20):
    return open_clip.SimpleTokenizer(context_length=length)(texts)


def assert_same_outputs(encoder, model, generator):
    images = torch.randn(3, 3, 28, 28, generator=generator)
    tokens = encoder.encode_tokens(images)
    torch.testing.assert_close(tokens[:, 0], model.encode_image(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode_images(images), model.encode_image(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), model.encode_text(ids(TEXTS)), atol=1e-5, rtol=1e-5)
    assert tokens.shape == (3, 17, 40)


def test_a_state_dict_of_an_archive_gives_what_its_model_gives(generator):
    model = small_openai()
    encoder = OpenClipEncoder(clip_of_openai_state(openai_state(model)))
    assert_same_outputs(encoder, model, generator)
    torch.testing.assert_close(encoder.logit_scale, model.logit_scale.exp())


def test_a_state_dict_needs_no_numbers_once_it_is_known_to_be_openais(generator):
    model = small_openai()
    assert_same_outputs(OpenClipEncoder(clip_of_openai_state(model.state_dict())), model, generator)


def test_half_precision_is_read_into_single_precision():
    state = {name: tensor.half() for name, tensor in small_openai().state_dict().items()}
    clip = clip_of_openai_state(state)
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32}
    assert torch.equal(clip.visual.proj, state["visual.proj"].float())
    assert not clip.training


def test_only_the_numbers_of_an_archive_tell_openais_layout():
    state = openai_state()
    assert is_openai_state(state)
    for name in ("input_resolution", "context_length", "vocab_size"):
        assert not is_openai_state({key: value for key, value in state.items() if key != name})
    assert not is_openai_state(open_clip.CLIP(8, {"width": 64, "layers": 1}, {"width": 64, "layers": 1}).state_dict())
    assert not is_openai_state(None)


def test_a_model_object_is_known_by_its_class_and_its_parts():
    model = small_openai()
    assert is_openai_model(model)
    assert not is_openai_model(clip_of_openai_model(model))
    assert not is_openai_model(nn.Linear(2, 2))
    del model.ln_final
    assert not is_openai_model(model)


@pytest.mark.parametrize("heads", [(2, 1), (4, 8)])
def test_a_model_object_is_copied_heads_and_all(generator, heads):
    model = small_openai(heads=heads)
    encoder = OpenClipEncoder(clip_of_openai_model(model))
    assert_same_outputs(encoder, model, generator)
    model.visual.proj.data.zero_()
    assert encoder.model.visual.proj.any()


def test_an_activation_other_than_openais_is_kept(generator):
    model = small_openai()
    for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
        block.mlp.gelu = nn.GELU()
    assert_same_outputs(OpenClipEncoder(clip_of_openai_model(model)), model, generator)
    for block in model.transformer.resblocks:
        block.mlp.gelu = nn.ReLU()
    with pytest.raises(ValueError, match=r"QuickGELU or GELU in its blocks, got Linear, ReLU"):
        clip_of_openai_model(model)


def test_mode_and_flags_are_those_of_the_model():
    model = small_openai().train()
    model.visual.conv1.weight.requires_grad_(False)
    clip = clip_of_openai_model(model)
    assert clip.training
    assert [name for name, weight in clip.named_parameters() if not weight.requires_grad] == ["visual.conv1.weight"]


def test_wrap_takes_the_model_and_the_state_dict(generator):
    model = small_openai()
    for given in (model, openai_state(model)):
        assert_same_outputs(wrap(given), model, generator)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    model = small_openai(numbers=True)
    path = tmp_path_factory.mktemp("archives") / "clip.pt"
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but what OpenAI published stays what it is
        torch.jit.trace(model, (torch.randn(2, 3, 28, 28), ids(TEXTS)), check_trace=False).save(path)
    return path


def test_a_torchscript_archive_is_read_by_its_path(archive, generator):
    model = small_openai()
    assert_same_outputs(wrap(str(archive)), model, generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.jit.load(archive)
    assert is_openai_model(loaded)
    assert_same_outputs(OpenClipEncoder(clip_of_openai_model(loaded)), model, generator)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("visual.proj"), "with a vision transformer, got no 'visual.proj'"),
        (lambda state: state.pop("ln_final.weight"), 'got one: Missing key(s) in state_dict: "ln_final.weight"'),
        (lambda state: state.update(more=torch.ones(1)), 'got one: Unexpected key(s) in state_dict: "more"'),
        (lambda state: state.update({"visual.layer1.0.conv1.weight": torch.ones(1)}), "got one with a ResNet"),
        (lambda state: state.update(input_resolution=torch.tensor(35)), "input_resolution 28, as its positions say"),
        (
            lambda state: state.update({"visual.positional_embedding": torch.ones(16, 128)}),
            "of [CLS] and a square of patches, got 16 rows",
        ),
        (
            lambda state: state.update({"ln_final.weight": torch.ones(3)}),
            "got one: size mismatch for ln_final.weight",
        ),
    ],
)
def test_a_state_dict_that_cannot_be_right_is_refused_in_one_line(change, message):
    state = openai_state()
    change(state)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        clip_of_openai_state(state)
    assert "\n" not in str(raised.value)


def test_a_width_without_heads_is_refused():
    state = small_openai().state_dict()
    narrow = {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}
    sizes = {"conv1.weight": (40, 3, 7, 7), "positional_embedding": (17, 40), "proj": (40, 40)}
    narrow |= {f"visual.{name}": torch.ones(size) for name, size in sizes.items()}
    with pytest.raises(ValueError, match=r"`visual.proj` of a width that width // 64 heads divide, got 40"):
        clip_of_openai_state(narrow)


@pytest.mark.parametrize("state", [None, {"visual.proj": 1}])
def test_what_is_no_state_dict_is_refused(state):
    with pytest.raises(TypeError, match="expected `state"):
        clip_of_openai_state(state)
