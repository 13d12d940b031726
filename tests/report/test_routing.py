"""Where words and images go, against routers asked one by one."""

import numpy as np
import pytest
import torch
from PIL import Image

from baselines.eva import EVA
from czsl_heads import wrap
from czsl_heads.adapters.experts import mixtures_of
from czsl_heads.functional.experts import gates, route
from czsl_heads.report.routing import plot_routing, routing_of
from tests.models.shared import build, disturb, make_images, make_space


@pytest.fixture
def model():
    torch.manual_seed(0)
    return disturb(EVA(wrap("tiny"), make_space(), rank=2, experts=5)).eval()


@torch.no_grad()
def test_a_word_goes_where_its_own_token_goes(model):
    routing = routing_of(model, make_images())
    assert routing.words == ["red", "striped", "Dark.Blue", "circle", "star"]
    torch.testing.assert_close(routing.by_word.sum(dim=1), torch.ones(5))
    # [SOS], context, word, [EOS], through the tower by hand; what the last MLP reads is at the word's place.
    prompts, encoder = model.prompts, model.encoder
    kinds = [prompts.attribute_context] * 3 + [prompts.object_context] * 2
    for number, context in enumerate(kinds):
        parts = [
            prompts.get_buffer("_start"),
            context,
            prompts.primitives[number][None],
            prompts.get_buffer("_end")[:1],
        ]
        embeddings = torch.cat(parts)[None]
        shares = []
        for mixture in mixtures_of(encoder, "text"):
            seen = []
            handle = mixture.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(inputs[0]))
            encoder.encode_embeddings(embeddings, torch.tensor([embeddings.shape[1] - 1]))
            handle.remove()
            logits = mixture.router(seen[0][0, -2])
            shares.append(gates(*route(logits, 2), 5))
        torch.testing.assert_close(routing.by_word[number], torch.stack(shares).mean(dim=0), rtol=1e-4, atol=1e-4)
    assert model.prompts.encode == "auto"


def test_loads_are_of_every_block_of_both_towers(model):
    routing = routing_of(model, make_images())
    assert {tower: loads.shape for tower, loads in routing.by_block.items()} == {"text": (3, 5), "vision": (4, 5)}
    for loads in routing.by_block.values():
        torch.testing.assert_close(loads.sum(dim=1), torch.ones(len(loads)))
    plain = routing.as_dict()
    assert list(plain["by_word"]) == routing.words
    assert len(plain["by_block"]["vision"][0]) == 5


def test_models_without_experts_have_no_routing():
    assert routing_of(build("csp"), make_images()) is None
    assert routing_of(build("clip"), make_images()) is None


def test_the_picture_is_drawn(model, tmp_path):
    plot_routing(routing_of(model, make_images()), tmp_path / "routing.png")
    with Image.open(tmp_path / "routing.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
