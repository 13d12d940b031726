"""Primitives by themselves, and sentences of pairs: the encoder's own features of the words of their names."""

import pytest
import torch

from baselines.clip import CLIP
from czsl_heads import CompositionSpace
from czsl_heads.data.names import prompt_names
from czsl_heads.prompts import primitives
from czsl_heads.prompts.primitives import encode_primitives

SPACE = CompositionSpace(["Faux.Fur", "wet"], ["dog", "traffic_light", "T-Shirt"], seen=[("wet", "dog")])


def test_each_primitive_is_encoded_by_its_cleaned_name(small_encoder) -> None:
    attributes, objects = encode_primitives(small_encoder, SPACE)
    names = ["faux fur", "wet", "dog", "traffic_light", "t-shirt"]
    expected = small_encoder.encode_texts([f"a photo of {name}" for name in names])
    torch.testing.assert_close(torch.cat([attributes, objects]), expected)
    assert (len(attributes), len(objects)) == (2, 3)
    assert not objects.requires_grad


def test_another_context_or_none(small_encoder) -> None:
    attributes, _ = encode_primitives(small_encoder, SPACE, context="")
    torch.testing.assert_close(attributes, small_encoder.encode_texts(["faux fur", "wet"]))


def test_many_primitives_are_encoded_in_parts(small_encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_primitives(small_encoder, SPACE)
    monkeypatch.setattr(primitives, "_ROWS", 2)
    torch.testing.assert_close(encode_primitives(small_encoder, SPACE), whole)


def test_something_else_is_refused(small_encoder) -> None:
    with pytest.raises(TypeError, match="expected `encoder` to be an Encoder"):
        encode_primitives(torch.nn.Linear(2, 2), SPACE)
    with pytest.raises(TypeError, match="expected `space` to be a CompositionSpace, got list"):
        encode_primitives(small_encoder, ["wet"])


def test_words_stand_for_names(small_encoder) -> None:
    worded = SPACE.with_words({"Faux.Fur": "fake fur", "traffic_light": "traffic light"})
    meant = CompositionSpace(["fake fur", "wet"], ["dog", "traffic light", "t-shirt"], seen=[("wet", "dog")])
    features = torch.cat(encode_primitives(small_encoder, worded))
    assert torch.equal(features, torch.cat(encode_primitives(small_encoder, meant)))
    changed = (features != torch.cat(encode_primitives(small_encoder, SPACE))).any(dim=1)
    assert changed.tolist() == [True, False, False, True, False]


def test_sentences_of_pairs_say_the_words_of_the_space(small_encoder) -> None:
    pairs = [("Hair.Calf", "Boots.Mid-Calf"), ("Suede", "traffic_light")]
    space = CompositionSpace(["Hair.Calf", "Suede"], ["Boots.Mid-Calf", "traffic_light"], seen=pairs)
    meant = CompositionSpace(["calf hair", "suede"], ["mid-calf boots", "traffic light"], seen=space.pairs)
    worded = space.with_words(prompt_names([*space.attributes, *space.objects], "clean"))

    published, clean, expected = (CLIP(small_encoder, each) for each in (space, worded, meant))
    assert published.sentence((0, 0)) == "a photo of hair calf boots mid-calf"
    assert published.sentence((1, 1)) == "a photo of suede traffic_light"
    assert clean.sentence((0, 0)) == expected.sentence((0, 0)) == "a photo of calf hair mid-calf boots"
    assert clean.sentence((1, 1)) == expected.sentence((1, 1)) == "a photo of suede traffic light"

    features = clean.texts(space.pairs).pairs
    assert torch.equal(features, expected.texts(space.pairs).pairs)
    assert not torch.equal(features, published.texts(space.pairs).pairs)
