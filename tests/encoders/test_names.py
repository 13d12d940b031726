"""Names of CLIPs: each form gives the CLIP it says, as it was pretrained; a wrong one is told in one line."""

import io
import json
import logging
import pickle
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from czsl_heads import wrap
from czsl_heads.encoders import names
from czsl_heads.encoders.names import absolute
from czsl_heads.encoders.weights import read_weights
from tests.encoders.openai import openai_state, small_openai

ARCHITECTURE, TWIN = "small-for-tests", "small-for-tests-quickgelu"
CONFIG = {
    "embed_dim": 40,
    "vision_cfg": {"image_size": 28, "patch_size": 7, "width": 128, "layers": 3},
    "text_cfg": {"width": 64, "heads": 1, "layers": 2, "context_length": 20},
}  # the sizes of small_openai
GELU, QUICK = "GELU", "QuickGELU"


@pytest.fixture(autouse=True)
def without_network(monkeypatch):
    """The hub's client looks into its cache only, and does not wait for a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def architectures(monkeypatch):
    """Two small architectures that differ in their activation, one of them with two tags."""
    tags = {
        "quick": {"hf_hub": "owner/quick/", "quick_gelu": True, "resize_mode": "squash", "mean": (0.5, 0.4, 0.3)},
        "plain": {"hf_hub": "owner/plain/", "resize_mode": "squash", "mean": (0.5, 0.4, 0.3)},
    }
    monkeypatch.setitem(factory._MODEL_CONFIGS, ARCHITECTURE, CONFIG)
    monkeypatch.setitem(factory._MODEL_CONFIGS, TWIN, {**CONFIG, "quick_gelu": True})
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, ARCHITECTURE, tags)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TWIN, {"quick": tags["quick"]})


@pytest.fixture
def downloaded(monkeypatch):
    """As if every download gave weights that fit."""
    monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: "pretend.bin")
    monkeypatch.setattr(factory, "load_checkpoint", lambda *_, **__: {})


def activation(encoder):
    (kind,) = {type(block.mlp.gelu).__name__ for tower in ("vision", "text") for block in encoder.blocks(tower)}
    return kind


def small(quick_gelu=False):
    """A random model of the small architecture; always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return open_clip.CLIP(**CONFIG, quick_gelu=quick_gelu).eval()


def images():
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def archive(state, path):
    """A TorchScript archive whose state dict is the one given, as OpenAI publishes its CLIPs."""

    class Holder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    whole = Holder()
    for name, tensor in state.items():
        home = whole
        *parts, last = name.split(".")
        for part in parts:
            if not hasattr(home, part):
                home.add_module(part, torch.nn.Module())
            home = getattr(home, part)
        home.register_buffer(last, tensor.detach())
    with warnings.catch_warnings():  # newer versions of torch warn of it
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(whole), path)


@pytest.mark.parametrize("architecture", [ARCHITECTURE, TWIN])
@pytest.mark.parametrize(("tag", "expected"), [("quick", QUICK), ("plain", GELU), ("QUICK", QUICK)])
def test_the_activation_is_that_of_the_tag(architectures, downloaded, architecture, tag, expected):
    assert activation(wrap(f"{architecture}:{tag}")) == expected  # and nothing warns


@pytest.mark.parametrize("architecture", ["ViT-B-32", "ViT-L-14", "ViT-L-14-336", "ViT-H-14-378", "ViT-bigG-14"])
def test_every_tag_of_open_clip_gets_the_activation_that_it_says(monkeypatch, downloaded, architecture):
    """By the real names; what is asked of open_clip is looked at, and nothing of that size built."""
    asked = []

    def create(name, *, pretrained, force_quick_gelu):
        asked.append(force_quick_gelu or open_clip.get_model_config(name).get("quick_gelu", False))
        return small()

    monkeypatch.setattr(open_clip, "create_model", create)
    for name in (architecture, f"{architecture}-quickgelu"):
        asked.clear()
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        for tag in tags:
            wrap(f"{name}:{tag}")
        said = [bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu")) for tag in tags]
        assert asked == said
        assert any(said)


def test_images_are_prepared_as_the_tag_says(architectures, downloaded):
    wide = Image.effect_noise((90, 40), 80).convert("RGB")
    squashed = PreprocessCfg(size=28, mean=(0.5, 0.4, 0.3), resize_mode="squash")
    expected = image_transform_v2(squashed, is_train=False)(wide)
    assert torch.equal(wrap(f"{TWIN}:quick").transform()(wide), expected)
    default = image_transform_v2(PreprocessCfg(size=28), is_train=False)(wide)
    assert torch.equal(wrap(ARCHITECTURE).transform()(wide), default)


@pytest.mark.parametrize(("architecture", "expected"), [(ARCHITECTURE, GELU), (TWIN, QUICK)])
@pytest.mark.parametrize("ending", ["pt", "safetensors", "ckpt"])
def test_of_a_file_the_architecture_says_the_activation(architectures, tmp_path, architecture, expected, ending):
    model, path = small(quick_gelu=expected == QUICK), tmp_path / f"weights.{ending}"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if ending == "safetensors":
        save_file(state, path)
    elif ending == "ckpt":  # of a training on several devices
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        torch.save(state, path)
    encoder = wrap(f"{architecture}:{path}")
    assert activation(encoder) == expected
    torch.testing.assert_close(encoder.encode_images(images()), model.encode_image(images()), rtol=0, atol=1e-5)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_of_a_file_images_are_prepared_as_all_tags_of_its_activation_agree(architectures, monkeypatch, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(small().state_dict(), path)
    tags = open_clip.pretrained._PRETRAINED[ARCHITECTURE]
    assert wrap(f"{ARCHITECTURE}:{path}").preprocess.mean == (0.5, 0.4, 0.3)

    other = {**tags["plain"], "mean": (0.1, 0.1, 0.1)}
    monkeypatch.setitem(tags, "plain", other)  # the only one with GELU
    assert wrap(f"{ARCHITECTURE}:{path}").preprocess.mean == (0.1, 0.1, 0.1)
    assert wrap(f"{TWIN}:{path}").preprocess.mean == (0.5, 0.4, 0.3)

    monkeypatch.setitem(tags, "another", {**tags["plain"], "mean": (0.2, 0.2, 0.2)})
    with pytest.raises(ValueError, match=f'prepared in 2 ways: "{ARCHITECTURE}:another={path}" or .*:plain={path}"'):
        wrap(f"{ARCHITECTURE}:{path}")


@pytest.mark.parametrize("architecture", [ARCHITECTURE, TWIN])
def test_a_file_of_a_tag_is_prepared_and_activated_as_the_tag_says(architectures, monkeypatch, tmp_path, architecture):
    path = tmp_path / "weights.pt"
    torch.save(small().state_dict(), path)
    tags = open_clip.pretrained._PRETRAINED[ARCHITECTURE]
    monkeypatch.setitem(tags, "plain", {**tags["plain"], "mean": (0.1, 0.1, 0.1)})
    for tag, expected, mean in (("plain", GELU, (0.1, 0.1, 0.1)), ("quick", QUICK, (0.5, 0.4, 0.3))):
        encoder = wrap(f"{architecture}:{tag}={path}")
        assert (activation(encoder), encoder.preprocess.mean) == (expected, mean)
    monkeypatch.chdir(tmp_path)
    assert names.absolute(f"{architecture}:plain=weights.pt") == f"{architecture}:plain={path}"
    with pytest.raises(ValueError, match=f"expected weights of {architecture}:plain in the file nowhere.pt, where"):
        wrap(f"{architecture}:plain=nowhere.pt")


def test_a_repository_of_the_hub_is_no_path(monkeypatch, tmp_path):
    (tmp_path / "timm" / "foo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert names.absolute("hf-hub:timm/foo") == "hf-hub:timm/foo"


@pytest.mark.parametrize(("content", "reason"), [(b"", "it is empty"), (b"<html>", "it starts with b'<htm'")])
def test_a_file_that_is_no_checkpoint_is_told_by_what_it_is(tmp_path, content, reason):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(reason)):
        wrap(str(tmp_path / "weights.pt"))


def test_a_configuration_that_lacks_its_parts_is_told_in_one_line(tmp_path):
    config = {"model_cfg": {"embed_dim": 3, "vision_cfg": {}, "text_cfg": {}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="with the configuration of an open_clip model, got one that cannot be read"):
        wrap(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("script", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_file_in_openais_layout_is_quick_whatever_it_is_called(architectures, tmp_path, script, half):
    model, path = small_openai(), tmp_path / "ViT-S.pt"
    state = openai_state(model)
    if half:
        state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        model = model.half().float()
    archive(state, path) if script else torch.save(state, path)
    for name in (str(path), f"{ARCHITECTURE}:{path}", f"{TWIN}:{path}"):
        encoder = wrap(name)
        assert activation(encoder) == QUICK
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
        torch.testing.assert_close(encoder.encode_images(images()), model.encode_image(images()), rtol=0, atol=2e-5)
        assert encoder.encode_texts(["a red circle"]).shape == (1, 40)


def test_a_path_alone_that_does_not_say_its_activation_is_refused_with_both_names(architectures, tmp_path):
    path = tmp_path / "finetuned.pt"
    torch.save(small().state_dict(), path)
    both = f'"{ARCHITECTURE}:{path}" (GELU) or "{TWIN}:{path}" (QuickGELU), got the path alone'
    with pytest.raises(ValueError, match="does not say its activation") as told:
        wrap(str(path))
    assert both in str(told.value)
    custom = open_clip.CustomTextCLIP(**CONFIG).state_dict()
    torch.save(custom, path)
    with pytest.raises(ValueError, match="does not say its activation") as told:
        wrap(str(path))
    assert both in str(told.value)
    torch.save({"something": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r'such as "ViT-L-14:.*" or "ViT-L-14-quickgelu:'):
        wrap(str(path))


@pytest.fixture
def folder(tmp_path):
    """A folder as open_clip saves its models, whose weights and preparation of images are of another kind."""
    model = small(quick_gelu=True)
    about = {
        "model_cfg": {**CONFIG, "quick_gelu": True},
        "preprocess_cfg": {"mean": 0.5, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "longest"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    return tmp_path


def test_a_folder_of_open_clip_brings_all_it_needs(folder):
    encoder, theirs = wrap(f"local-dir:{folder}"), open_clip.create_model(f"local-dir:{folder}").eval()
    assert activation(encoder) == QUICK
    torch.testing.assert_close(encoder.encode_images(images()), theirs.encode_image(images()), rtol=0, atol=1e-5)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red circle"])
    assert torch.equal(encoder.tokenizer(["a red circle"]), tokens)
    tall = Image.effect_noise((30, 80), 80).convert("RGB")
    own = image_transform_v2(PreprocessCfg(**theirs.visual.preprocess_cfg), is_train=False)
    assert torch.equal(encoder.transform()(tall), own(tall))


def test_a_repository_of_open_clip_is_loaded_as_its_folder(folder, monkeypatch):
    def cached(model_id, filename=None, **_):
        assert model_id == "owner/clip"
        return str(folder / (filename or "open_clip_model.safetensors"))

    monkeypatch.setattr(factory, "download_pretrained_from_hf", cached)
    here, there = wrap(f"local-dir:{folder}"), wrap("hf-hub:owner/clip")
    assert torch.equal(here.encode_images(images()), there.encode_images(images()))
    assert here.preprocess == there.preprocess


@pytest.mark.parametrize("scheme", ["local-dir", "hf-hub"])
def test_a_configuration_without_weights_is_no_random_clip(folder, monkeypatch, scheme):
    (folder / "open_clip_model.safetensors").unlink()

    def cached(model_id, filename=None, **_):
        if filename is None:
            raise FileNotFoundError("no weights")
        return str(folder / filename)

    monkeypatch.setattr(factory, "download_pretrained_from_hf", cached)
    with pytest.raises(ValueError, match="expected weights of an open_clip model in"):
        wrap(f"local-dir:{folder}" if scheme == "local-dir" else "hf-hub:owner/clip")


def test_a_model_of_transformers_is_asked_for_by_its_name():
    with mock.patch("czsl_heads.encoders.hugging_face.load", return_value="encoder") as load:
        assert wrap("hf:owner/clip", dense="value", frozen=False) == "encoder"
    load.assert_called_once_with("hf:owner/clip", tokenizer=None, frozen=False, dense="value")


def test_a_given_tokenizer_spares_looking_for_one(architectures, monkeypatch):
    monkeypatch.setattr(open_clip, "get_tokenizer", mock.Mock(side_effect=AssertionError))
    own = open_clip.SimpleTokenizer(context_length=20)
    assert wrap(ARCHITECTURE, tokenizer=own).tokenizer is own


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ViT-B-33:openai", "; did you mean ViT-B-32:openai or "),
        ("vit-b-32", "; did you mean ViT-B-32?"),
        ("ViT-L/14@336px", "; did you mean ViT-L-14-336?"),
        ("ViT-B/32", "; did you mean ViT-B-32?"),
        ("TINY", "; did you mean tiny?"),
        ("openai/clip-vit-large-patch14", "; did you mean hf:openai/clip-vit-large-patch14 or hf-hub:openai/clip-"),
        ("huge-and-unlike-all", " (`czsl encoders` lists what there is)"),
        ("", " (`czsl encoders` lists what there is)"),
        (":openai", " (`czsl encoders` lists what there is)"),
        ("nowhere.pt", ", which is no file"),
        ("some/where/ViT-L-14.pt", ", which is no file"),
    ],
)
def test_a_name_that_is_nearly_right_gets_a_suggestion(name, hint):
    with pytest.raises(ValueError, match="expected `model_or_name` to be the name of a CLIP or the path") as told:
        wrap(name)
    assert f"got {name!r}{hint}" in str(told.value)


def test_the_name_of_another_package_is_suggested_too(monkeypatch):
    monkeypatch.setattr(names, "entry_points", lambda group: [SimpleNamespace(name="remote-clip", value="remote:load")])
    with pytest.raises(ValueError, match=r"got 'remoteclip'; did you mean remote-clip\?"):
        wrap("remoteclip")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-32:openia", r"\(one of openai, .* and \d+ more\) .*got 'ViT-B-32:openia'; did you mean ViT-B-32:open"),
        ("ViT-B-32-quickgelu:zzz", r"a tag of ViT-B-32-quickgelu \(one of openai, .*got 'ViT-B-32-quickgelu:zzz'$"),
        ("ViT-B-32:nowhere.pt", "the path of a checkpoint, got 'ViT-B-32:nowhere.pt', where there is no file$"),
        ("ViT-S-16:openai", r"\(one of none\) or the path of a checkpoint"),
        ("ViT-B-32:", "something behind the colon, got 'ViT-B-32:'"),
        ("hf:", "something behind the colon"),
        ("local-dir:nowhere", "expected a folder with open_clip_config.json .*got 'local-dir:nowhere', where there is"),
        ("tiny:nowhere", "expected `folder` with tiny_clip.json"),
        ("RN50:openai", "expected an architecture whose patches .*got RN50: its attention pooling projects one vector"),
        ("coca_ViT-B-32", "got coca_ViT-B-32: a CoCa pools by queries"),
        ("roberta-ViT-B-32", "got roberta-ViT-B-32: its text tower takes token ids"),
        ("convnext_base", "got convnext_base: its patches do not go to the image feature as single tokens"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(name, message, monkeypatch):
    for asked in ("create_model", "get_tokenizer"):  # nothing is built, and no tokenizer asked for
        monkeypatch.setattr(open_clip, asked, mock.Mock(side_effect=AssertionError))
    with pytest.raises(ValueError, match=message) as told:
        wrap(name)
    assert "\n" not in str(told.value)


def test_a_folder_is_told_by_which_name_it_is_asked_for(folder, tmp_path):
    for name in (str(folder), f"ViT-B-32:{folder}"):
        with pytest.raises(ValueError, match=rf'; that folder is "local-dir:{folder}"'):
            wrap(name)
    (tmp_path / "t").mkdir()
    with pytest.raises(ValueError, match=r"got '.*/t', a folder that holds no model"):
        wrap(str(tmp_path / "t"))
    (tmp_path / "t" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf'that folder is "hf:{tmp_path}/t"'):
        wrap(f"local-dir:{tmp_path / 't'}")


@pytest.mark.parametrize(
    ("name", "looked_for", "how"),
    [
        (
            "ViT-B-32:openai",
            "weights of ViT-B-32:openai from .*/hub or huggingface.co/timm/vit_base_patch32_clip_224.",
            1,
        ),
        ("ViT-B-32:metaclip_400m", "weights of ViT-B-32:metaclip_400m from .* or huggingface.co/", 1),
        ("hf-hub:owner/clip", "the configuration of an open_clip model in .*/hub or huggingface.co/owner/clip", 2),
        ("ViT-B-16-SigLIP:webli", "the tokenizer of ViT-B-16-SigLIP from .*/hub or huggingface.co/timm/ViT-B-16-", 3),
    ],
)
def test_without_network_it_is_said_what_was_looked_for_where_and_how_to_get_it(
    monkeypatch, tmp_path, name, looked_for, how
):
    monkeypatch.setenv("HOME", str(tmp_path))
    told = _told(name)
    remedy = {1: f'a copy of them is named "{name}=PATH"', 2: '"local-dir:DIR"', 3: "wrap(..., tokenizer=)"}
    assert "not there, and no network" in told or how == 3
    assert remedy[how] in told
    with pytest.raises(ValueError, match=f"expected {looked_for}"):
        raise ValueError(told)


def test_openais_own_file_is_named_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".cache" / "clip" / "ViT-B-32.pt"
    path.parent.mkdir(parents=True)
    path.touch()
    assert f'"ViT-B-32:openai={path}" is here' in _told("ViT-B-32:openai")


def _told(name):
    with pytest.raises(ValueError, match="expected") as raised:
        wrap(name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("ViT-B-16-SigLIP", "ViT-B-16-SigLIP:webli", "hf:owner/clip"):
        with pytest.raises(ModuleNotFoundError, match=r"transformers for .*pip install 'czsl-heads\[transformers\]'"):
            wrap(name)
    with pytest.raises(ValueError, match="its text tower takes token ids"):  # no package would help
        wrap("nllb-clip-base-siglip")


class Unknown:
    """What no checkpoint should hold."""


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", ["half", "text", "numbers", "objects", "list", "empty"])
def test_a_file_without_weights_is_told_in_one_line(architectures, tmp_path, kind, alone):
    path, whole = tmp_path / "weights.pt", io.BytesIO()
    torch.save(small().state_dict(), whole)
    if kind == "half":
        path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    elif kind == "text":
        path.write_text("not found")
    elif kind == "objects":
        path.write_bytes(pickle.dumps(Unknown()))
    else:
        content = {"numbers": {"epoch": np.float64(3), "state_dict": small().state_dict()}, "list": [1], "empty": {}}
        torch.save(content[kind], path)
    told = _told(str(path) if alone else f"{ARCHITECTURE}:{path}")
    assert f"weights of a CLIP in {path}" in told
    assert len(told) < 500 + len(str(path))


def test_weights_of_another_architecture_are_told_with_the_one_that_fits(architectures, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(small().state_dict(), path)
    told = _told(f"ViT-S-32:{path}")
    assert f"expected weights of ViT-S-32 in {path}, got none that can be read (" in told
    assert told.endswith(f"its sizes are those of {ARCHITECTURE}, {TWIN}")
    torch.save({"logit_scale": torch.tensor(1.0)}, path)
    assert _told(f"ViT-S-32:{path}").endswith("its sizes are those of no architecture of open_clip")


def test_nothing_is_run_that_a_file_of_tensors_holds(tmp_path):
    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"state_dict": Runs()}))
    with pytest.raises(ValueError, match="holds objects other than tensors"):
        read_weights(tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


def test_what_open_clip_logs_beside_an_error_is_not_shown(architectures, caplog):
    with caplog.at_level(logging.INFO):
        _told(f"{ARCHITECTURE}:quick")
        wrap(ARCHITECTURE)
        logging.warning("of somebody else")
    assert [record.getMessage() for record in caplog.records if record.name == "root"] == ["of somebody else"]


def test_paths_in_names_are_made_absolute_and_nothing_else(architectures, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("weights.pt", "folder", "openai", "quick", "tiny", "ViT-B-32"):
        (tmp_path / name).touch()
    known = ["tiny", "ViT-B-32", "ViT-B-32:openai", f"{ARCHITECTURE}:quick", f"{TWIN}:quick", "hf:owner/clip", "x.pt"]
    assert [absolute(name) for name in known] == known
    for head in ("tiny", "hf", "local-dir", "ViT-B-32", "theirs"):
        assert absolute(f"{head}:folder") == f"{head}:{tmp_path / 'folder'}"
    assert absolute("weights.pt") == str(tmp_path / "weights.pt")
    assert absolute("../" + tmp_path.name + "/weights.pt") == str(tmp_path / "weights.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("ViT-B-32:~/weights.pt") == f"ViT-B-32:{tmp_path / 'weights.pt'}"
