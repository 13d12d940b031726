"""A CLIP of half precision trains in every method: what is trained is float32, and stays finite."""

import copy

import pytest
import torch

from czsl_heads import wrap
from czsl_heads.models.recipe import CondenserOptions, LoRAOptions, Recipe, build
from czsl_heads.models.registry import method_names
from tests.models.shared import PAIRS, SEEN, make_images, make_space

HALVES = (torch.float16, torch.bfloat16)
LORA = LoRAOptions(rank=2)


@pytest.fixture
def images():
    return make_images()


def built(method, dtype, **options):
    torch.manual_seed(0)
    return build(Recipe(method, lora=LORA, **options), make_space(), encoder=wrap("tiny").to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("align", ["cls", "max", "attention"])
@pytest.mark.parametrize("method", method_names())
def test_two_steps_of_adam_change_all_that_is_trained_and_stay_finite(method, align, dtype, images):
    model = built(method, dtype, align=align).train()
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    before = copy.deepcopy(trained)
    optimizer = torch.optim.Adam(trained.values(), lr=1e-3)
    targets = torch.arange(len(images)) % len(SEEN)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model.loss(images, SEEN, targets)
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert all(parameter.isfinite().all() for parameter in trained.values())
    assert not any(torch.equal(parameter, before[name]) for name, parameter in trained.items())


@pytest.mark.parametrize("method", method_names())
def test_scores_of_bfloat16_are_near_those_of_float32(method, images):
    exact, half = (built(method, dtype).eval() for dtype in (torch.float32, torch.bfloat16))
    with torch.no_grad():
        for one, other in zip(exact(images, PAIRS), half(images, PAIRS)):
            cosines = one / exact.encoder.logit_scale, other / half.encoder.logit_scale
            torch.testing.assert_close(cosines[1].float(), cosines[0], rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_condenser_behind_a_half_precision_clip_learns(dtype, images):
    model = built("csp", dtype, condenser=CondenserOptions()).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    model.loss(images, SEEN, torch.arange(len(images)) % len(SEEN)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.condenser.parameters())
    assert any(parameter.grad.any() for parameter in model.condenser.parameters())
