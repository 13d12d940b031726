"""What tells one CLIP from another: where its code is from, its activation, its weights."""

import copy
from dataclasses import replace

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import nn

from czsl_heads import wrap
from czsl_heads.encoders.digest import activations, container, differs, identity, weights_digest
from tests.encoders.families import build


def quick(encoder):
    """The same weights with OpenAI's activation."""
    for block in (*encoder.blocks("vision"), *encoder.blocks("text")):
        block.mlp.gelu = QuickGELU()
    return encoder


@pytest.mark.parametrize(
    ("name", "package", "activation"),
    [
        ("class token", "open_clip", "GELU"),
        ("class token, QuickGELU", "open_clip", "QuickGELU"),
        ("SigLIP", "open_clip", "GELU"),
        ("CLIPModel", "transformers", "QuickGELU"),
        ("SiglipModel", "transformers", "GELU by tanh"),
    ],
)
def test_the_package_and_the_activation_are_those_of_the_model(name, package, activation):
    encoder = build(name)
    assert container(encoder) == package
    assert activation in activations(encoder).split(", ")


def test_an_identity_holds_all_three():
    encoder = wrap("tiny")
    digest = weights_digest(encoder)
    assert identity(encoder, digest) == {
        "encoder_container": "open_clip",
        "encoder_activation": "GELU",
        "encoder_preprocess": str(encoder.preprocess),
        "encoder_digest": digest,
    }


def test_one_bit_of_a_weight_is_another_clip():
    encoder = wrap("tiny")
    before = identity(encoder, weights_digest(encoder))
    assert differs(before, identity(copy.deepcopy(encoder), weights_digest(copy.deepcopy(encoder)))) == ""
    with torch.no_grad():
        first = next(encoder.parameters()).view(-1)
        first[0] = torch.nextafter(first[0], torch.tensor(torch.inf))
    now = identity(encoder, weights_digest(encoder))
    there, here = before["encoder_digest"][:12], now["encoder_digest"][:12]
    assert differs(before, now) == f"open_clip, GELU, weights {there} there, open_clip, GELU, weights {here} here"


def test_equal_weights_with_another_activation_are_another_clip():
    encoder = wrap("tiny")
    before = identity(encoder, weights_digest(encoder))
    now = identity(quick(encoder), weights_digest(encoder))
    assert before["encoder_digest"] == now["encoder_digest"]
    assert "GELU, weights" in differs(before, now)
    assert "QuickGELU, weights" in differs(before, now)


def test_a_record_of_an_earlier_version_is_known_by_its_digest():
    encoder = wrap("tiny")
    digest = weights_digest(encoder)
    found = identity(encoder, digest)
    assert differs({"encoder_digest": digest}, found) == ""
    other = "0" * 64
    expected = f"weights {other[:12]} there, open_clip, GELU, weights {digest[:12]} here"
    assert differs({"encoder_digest": other}, found) == expected


def test_a_module_of_no_container_is_of_its_own_package():
    assert container(nn.Linear(2, 2)) == "torch"
    assert activations(nn.Linear(2, 2)) == ""


@pytest.mark.parametrize("name", ["PytorchGELUTanh", "GELUTanh", "NewGELUActivation"])
def test_an_activation_is_named_by_what_it_computes_whatever_a_version_calls_it(name):
    assert activations(type(name, (nn.Module,), {})()) == "GELU by tanh"
    assert activations(nn.GELU(approximate="tanh")) == "GELU by tanh"


def test_pictures_that_are_prepared_otherwise_are_another_clip():
    encoder = wrap("tiny")
    digest = weights_digest(encoder)
    before = identity(encoder, digest)
    encoder.preprocess = replace(encoder.preprocess, mean=(0.5, 0.5, 0.5))
    told = differs(before, identity(encoder, digest))
    assert told.startswith("images by Preprocess(size=(48, 48), mean=(0.48145466")
    assert "mean=(0.5, 0.5, 0.5)" in told
