import gzip
from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads import wrap
from czsl_heads.data.drawing import ATTRIBUTES, OBJECTS
from czsl_heads.encoders.tiny import CONTEXT_LENGTH, MERGES, WEIGHTS, build_tiny, load_tiny


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny()[1]


@pytest.fixture(scope="module")
def encoder():
    return wrap("tiny")


@pytest.mark.parametrize("word", [*ATTRIBUTES, *OBJECTS, "a", "an", "the", "photo", "of", "object"])
def test_every_word_of_the_shapes_world_is_one_token(tokenizer, word):
    assert len(tokenizer.encode(word)) == 1
    assert tokenizer.encode(word.upper()) == tokenizer.encode(word)


def test_words_of_the_shapes_world_have_different_tokens(tokenizer):
    tokens = [tokenizer.encode(word)[0] for word in (*ATTRIBUTES, *OBJECTS)]
    assert len(set(tokens)) == len(ATTRIBUTES) + len(OBJECTS)


@pytest.mark.parametrize("text", ["zebra", "Straße", "日本語", "🦓🧑‍🚀", "café au lait", "x" * 40, "1984", "!?", ""])
def test_any_other_text_falls_back_to_pieces_and_bytes(tokenizer, encoder, text):
    pieces = tokenizer.encode(text)
    assert all(0 <= piece < tokenizer.vocab_size - 2 for piece in pieces)
    assert tokenizer.decode(pieces).replace(" ", "") == text.lower().replace(" ", "")
    assert encoder.encode_texts([text]).isfinite().all()


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=18))
def test_no_text_is_an_error_and_texts_keep_their_letters(tokenizer, text):
    pieces = tokenizer.encode(text)
    assert all(0 <= piece < tokenizer.vocab_size for piece in pieces)
    if text.isascii() and text.isalpha():
        assert tokenizer.decode(pieces).strip() == text.lower()


def test_different_unknown_words_have_different_features(encoder):
    features = encoder.encode_texts(["zebra", "giraffe", "斑马"])
    assert torch.cdist(features, features).fill_diagonal_(1).min() > 1e-3


def test_the_architecture_has_a_million_and_a_quarter_parameters():
    model, tokenizer = build_tiny()
    count = sum(p.numel() for p in model.parameters())
    assert 1.20e6 < count < 1.30e6
    assert model.vocab_size == tokenizer.vocab_size
    assert tokenizer.context_length == CONTEXT_LENGTH == 77


def test_the_shipped_files_are_small_and_fit_the_architecture():
    assets = files("czsl_heads.encoders") / "assets"
    assert len((assets / WEIGHTS).read_bytes()) < 6_000_000
    assert len((assets / MERGES).read_bytes()) < 10_000
    model, _ = load_tiny()
    assert not model.training
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


def test_loading_twice_gives_the_same_weights():
    first, second = load_tiny()[0].state_dict(), load_tiny()[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_merge_file_of_ones_own_is_used(tmp_path):
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress(b"#version: own\nc a\nca t</w>", mtime=0))
    model, tokenizer = build_tiny(path)
    assert len(tokenizer.encode("cat")) == 1
    assert len(tokenizer.encode("red")) == 3
    assert model.vocab_size == 512 + 2 + 2


def test_the_tiny_clip_is_small_in_every_size(encoder):
    assert (encoder.grid, encoder.image_size, encoder.dim, encoder.text_dim) == ((6, 6), 48, 96, 96)
    assert encoder.causal_text
    assert encoder.num_prefix == 1
    assert encoder.encode_tokens(torch.zeros(2, 3, 48, 48)).shape == (2, 37, 96)
