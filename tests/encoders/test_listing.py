"""What `czsl encoders` lists is there, and by the name that it gives each can be asked for."""

import json
import sys
from importlib.metadata import version
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch

from czsl_heads import wrap
from czsl_heads.cli import main
from czsl_heads.encoders import listing
from czsl_heads.encoders.listing import list_encoders
from tests.encoders.openai import openai_state, small_openai
from tests.encoders.test_names import archive


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches: what OpenAI's package and open_clip keep, and what the hub's does."""
    monkeypatch.setenv("HOME", str(tmp_path))
    hub = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    hub.mkdir()
    return tmp_path / ".cache" / "clip", hub


def snapshot(hub, repository, *names, model_type="clip"):
    folder = hub / f"models--{repository.replace('/', '--')}" / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(json.dumps({"model_type": model_type}))
    return folder


def test_packages_and_their_versions_are_told():
    found = list_encoders()["containers"]
    assert found["open_clip_torch"] == version("open_clip_torch")
    assert found["timm"] == version("timm")
    assert found["clip"] is None  # OpenAI's package is not on PyPI


def test_architectures_are_taken_or_refused_with_a_reason():
    found = list_encoders()
    taken = {name for family in found["architectures"].values() for name in family}
    assert {"ViT-B-32", "EVA02-B-16", "ViT-B-16-SigLIP", "PE-Core-B-16", "MobileCLIP-B"} <= taken
    assert not taken & found["refused"].keys()
    assert all(found["refused"].values())
    assert "openai" in found["architectures"]["ViT, class token"]["ViT-B-32"]


def test_without_weights_the_list_is_empty(caches):
    assert list_encoders()["weights"] == []


def test_weights_of_the_caches_are_named_as_they_are_asked_for(caches):
    clip, hub = caches
    archive(openai_state(), clip / "small.pt")
    torch.save({"a": torch.zeros(3)}, clip / "other.pt")
    (clip / "notes.txt").write_text("no weights")
    of_transformers = snapshot(hub, "me/mine", "config.json", "model.safetensors")
    of_open_clip = snapshot(hub, "you/yours", "open_clip_config.json", "open_clip_model.safetensors")
    of_nobody = snapshot(hub, "them/theirs", "weights.bin")
    of_a_bert = snapshot(hub, "bert/base", "config.json", "model.safetensors", model_type="bert")
    of_a_tag = snapshot(hub, "timm/vit_base_patch32_clip_224.openai", "config.json", "open_clip_model.safetensors")
    (hub / "models--me--mine" / "snapshots" / "stray").write_text("no folder")
    (clip / "ViT-B-32.pt").write_bytes(b"OpenAI's own")
    (clip / "RN50.pt").write_bytes(b"is refused")

    found = {each["file"]: each["name"] for each in list_encoders()["weights"]}
    assert found == {
        str(clip / "small.pt"): str(clip / "small.pt"),
        str(clip / "other.pt"): None,
        str(of_transformers / "model.safetensors"): "hf:me/mine",
        str(of_open_clip / "open_clip_model.safetensors"): "hf-hub:you/yours",
        str(of_nobody / "weights.bin"): None,
        str(of_a_bert / "model.safetensors"): None,
        str(of_a_tag / "open_clip_model.safetensors"): "ViT-B-32:openai",
        str(clip / "ViT-B-32.pt"): f"ViT-B-32:openai={clip / 'ViT-B-32.pt'}",
        str(clip / "RN50.pt"): None,
    }
    assert wrap(str(clip / "small.pt")).dim == small_openai().text_projection.shape[1]


def test_a_download_that_was_cut_has_no_bytes(caches):
    folder = snapshot(caches[1], "me/mine", "config.json")
    (folder / "model.safetensors").symlink_to(folder / "blob that is not there")
    (found,) = list_encoders()["weights"]
    assert (found["name"], found["bytes"]) == ("hf:me/mine", 0)


def test_encoders_of_other_packages_are_listed(monkeypatch):
    entry = SimpleNamespace(name="mine", value="my_package:load")
    monkeypatch.setattr(listing, "entry_points", lambda group: [entry])
    assert list_encoders()["packages"] == {"mine": "my_package:load"}


def test_the_command_prints_them(caches, capsys):
    torch.save({"a": torch.zeros(3)}, caches[0] / "other.pt")
    assert main(["encoders"]) == 0
    out = capsys.readouterr().out
    assert f"open_clip_torch {version('open_clip_torch')}" in out
    assert "clip not installed" in out
    assert "tiny: the embedded one" in out
    assert f"ARCHITECTURE:PATH  0.0 MB  {caches[0] / 'other.pt'}" in out
    assert main(["encoders", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == list_encoders()


def test_the_command_says_that_there_are_no_weights(caches, capsys):
    assert main(["encoders"]) == 0
    assert "no weights in the caches of this machine" in capsys.readouterr().out


def test_listing_asks_for_no_network_and_builds_nothing(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a model was built")

    monkeypatch.setattr(sys.modules["open_clip"], "create_model", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    assert list_encoders()["architectures"]
