"""Every method on a CLIP of a real size (ViT-B/32, random weights) and the label space of MIT-States."""

import logging

import pytest
import torch

import czsl_heads
from czsl_heads import CompositionSpace
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.recipe import build, new_bank
from czsl_heads.models.registry import method_names
from czsl_heads.training.options import change, load_options

pytestmark = pytest.mark.slow
SIZES = 115, 245, 1262, 700  # attributes, objects, seen and unseen pairs of MIT-States
ENCODER = "ViT-B-32"


@pytest.fixture(scope="module")
def space():
    attrs, objs, seen, unseen = SIZES
    drawn = torch.randperm(attrs * objs, generator=torch.Generator().manual_seed(0))[: seen + unseen].tolist()
    pairs = [(column // objs, column % objs) for column in drawn]
    names = [f"attribute {index}" for index in range(attrs)], [f"object {index}" for index in range(objs)]
    return CompositionSpace(*names, seen=pairs[:seen], unseen=pairs[seen:])


@pytest.fixture(autouse=True)
def no_warning_of_random_weights():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def built(method, space, *, condenser=False, align="max"):
    options = load_options(method, "mit-states")[0]
    torch.manual_seed(0)
    return build(change(options, {"workers": 0}).recipe(method, ENCODER, align, condenser=condenser), space)


@pytest.mark.parametrize("method", method_names())
def test_a_training_step_has_a_finite_loss_and_gradients(method, space, images):
    model = built(method, space).train()
    training = space.pairs[space.seen_mask]
    loss = model.loss(images, training, torch.tensor([0, 1261]))
    assert loss.isfinite()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not learned:
        assert method == "clip"
        return
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in learned)


@pytest.mark.parametrize("method", method_names())
def test_a_condenser_and_a_bank_stand_behind_it_and_it_is_saved(method, space, images, tmp_path):
    model = built(method, space, condenser=True)
    assert isinstance(model, Condensed)
    training = space.pairs[space.seen_mask]
    model.loss(images, training, torch.tensor([0, 1261])).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.condenser.parameters())

    model.eval()
    model.bank = new_bank(space, model.encoder, model.recipe.bank)
    with torch.no_grad():
        texts = model.texts(space.pairs)
        model.adapt(model(images, space.pairs, texts))
        scores = model.scores(images, space.pairs, texts)
    assert scores.shape == (2, 1962)
    assert scores.isfinite().all()
    best = model.predict(images, topk=3, texts=texts)
    assert [prediction.score for prediction in best[0]] == sorted(scores[0].tolist(), reverse=True)[:3]

    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 250_000_000
    loaded = czsl_heads.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.scores(images, space.pairs), scores)
