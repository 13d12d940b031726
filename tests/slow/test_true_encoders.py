"""The contract of an encoder at the true sizes of ViT-L/14 and SigLIP B/16, random weights, in both containers."""

import logging

import pytest
import torch
import transformers

from czsl_heads import CompositionSpace, SoftPrompts, add_lora, merge_lora, wrap
from czsl_heads.adapters.patch_drop import drop_patches
from tests.encoders.families import own_image_features, own_text_features

pytestmark = pytest.mark.slow
VISION = {"vision_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}}
VISION["vision_config"] |= {"num_attention_heads": 12, "image_size": 224, "patch_size": 16}
CONTEXT_LENGTH = 64  # of SigLIP
TEXTS = ["a photo of a black swan", "old"]
SPACE = CompositionSpace(["black", "old"], ["swan", "car"], seen=[("black", "swan"), ("old", "car")])


def letters(texts, context_length=CONTEXT_LENGTH):
    """Stand-in for SigLIP's tokenizer: a letter a token, then [EOS] and its padding, which are one id."""
    rows = torch.ones(len(texts), context_length, dtype=torch.long)
    for row, text in zip(rows, texts):
        ids = [2 + ord(letter) for letter in text][: context_length - 1]
        row[: len(ids)] = torch.tensor(ids)
    return rows


def siglip_of_transformers():
    torch.manual_seed(0)
    return transformers.SiglipModel(transformers.SiglipConfig(**VISION)).eval()


ENCODERS = {
    "ViT-L/14": (lambda: wrap("ViT-L-14-quickgelu"), (16, 16), 768, True),
    "SigLIP B/16": (lambda: wrap("ViT-B-16-SigLIP", tokenizer=letters), (14, 14), 768, False),
    "SigLIP B/16 of transformers": (lambda: wrap(siglip_of_transformers(), tokenizer=letters), (14, 14), 768, False),
}


@pytest.fixture(scope="module", autouse=True)
def _no_warning_of_random_weights():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module", params=ENCODERS)
def name(request):
    return request.param


@pytest.fixture
def encoder(name):
    return ENCODERS[name][0]()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def test_tokens_and_texts_are_the_containers_own(encoder, name, images):
    _, grid, dim, causal = ENCODERS[name]
    tokens = encoder.encode_tokens(images)
    assert (encoder.grid, encoder.dim, encoder.causal_text) == (grid, dim, causal)
    assert tokens.shape == (2, 1 + grid[0] * grid[1], dim)
    torch.testing.assert_close(tokens[:, 0], own_image_features(encoder, images), rtol=1e-4, atol=1e-4)
    found = encoder.encode_texts(TEXTS)
    assert found.shape == (2, dim)
    if hasattr(encoder.model, "encode_text"):
        torch.testing.assert_close(found, own_text_features(encoder, TEXTS), rtol=1e-4, atol=1e-4)
    assert (encoder.logit_bias is None) is causal


def test_adapters_and_prompts_train_in_one_step(encoder, images):
    add_lora(encoder, matrices=("q", "v", "fc"), rank=4)
    drop_patches(encoder, 0.5)
    prompts = SoftPrompts(encoder, SPACE, context="a", checkpoint=True)
    encoder.train()
    tokens = encoder.encode_tokens(images, checkpoint=True)
    assert tokens.shape[1] == 1 + encoder.grid[0] * encoder.grid[1] // 2
    (torch.einsum("btd,pd->bp", tokens, prompts(SPACE).pairs).square().mean()).backward()
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert all(parameter.grad.isfinite().all() for parameter in [*trained, prompts.primitives, prompts.pair_context])
    assert any(parameter.grad.any() for parameter in trained)


def test_merged_updates_and_dense_patches(encoder, images):
    modules = add_lora(encoder, matrices=("q", "v"), rank=4)
    torch.manual_seed(0)
    with torch.no_grad():
        for module in modules:
            for delta in module.deltas.values():
                delta.b.normal_(std=0.02)
        found = encoder.encode_tokens(images)
        merge_lora(encoder)
        torch.testing.assert_close(encoder.encode_tokens(images), found, rtol=1e-3, atol=1e-3)
        for dense in ("value", "sclip", "clearclip", "naclip"):
            encoder.dense = dense
            tokens = encoder.encode_tokens(images)
            torch.testing.assert_close(tokens[:, 0], found[:, 0], rtol=1e-3, atol=1e-3)
            assert not torch.allclose(tokens[:, 1:], found[:, 1:], rtol=1e-2, atol=1e-2)
