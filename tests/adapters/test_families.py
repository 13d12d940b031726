"""LoRA in both towers of every family of CLIP: as weights that are changed by hand, merged, taken out, compiled."""

import pytest
import torch
from torch import nn

from czsl_heads import add_lora, merge_lora, remove_lora, unmerge_lora
from tests.encoders.families import FAMILIES, build
from tests.encoders.test_blocks import images_for, randomise

MATRICES = ("q", "k", "v", "o", "fc", "proj")
TEXTS = ["red circle", "a dog"]
TOWERS = ("vision", "text")
SCALE = 1.5


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def run(encoder, tower):
    return encoder.encode_tokens(images_for(encoder)) if tower == "vision" else encoder.encode_texts(TEXTS)


def adapted_family(name, tower, matrices=MATRICES):
    encoder = build(name)
    return encoder, randomise(add_lora(encoder, matrices=matrices, rank=2, alpha=2 * SCALE, tower=tower), scale=0.1)


def change_by_hand(layer, matrix, update):
    """Add to the rows of a weight, or of its third, as PyTorch, timm and transformers lay it out."""
    thirds = {"q": 0, "k": 1, "v": 2}
    if isinstance(layer, nn.MultiheadAttention):
        weight = layer.out_proj.weight if matrix == "o" else layer.in_proj_weight
    else:
        weight = layer.weight
    first = thirds[matrix] * len(update) if len(weight) == 3 * len(update) and matrix in thirds else 0
    weight[first : first + len(update)] += update


@pytest.mark.parametrize("tower", TOWERS)
def test_the_updates_equal_weights_changed_by_hand(name, tower):
    encoder, _ = adapted_family(name, tower)
    found = run(encoder, tower)
    plain = build(name)
    before = run(plain, tower)
    with torch.no_grad():
        for block, other in zip(encoder.blocks(tower), plain.blocks(tower)):
            for path, module in block.named_modules():
                for matrix, delta in getattr(module, "deltas", {}).items():
                    change_by_hand(other.get_submodule(path), matrix, SCALE * delta.b @ delta.a)
    torch.testing.assert_close(found, run(plain, tower), rtol=1e-4, atol=1e-4)
    assert (found - before).abs().mean() > 1e-3


@pytest.mark.parametrize("tower", TOWERS)
def test_they_are_merged_unmerged_and_removed(name, tower):
    encoder, modules = adapted_family(name, tower)
    found, state = run(encoder, tower), build(name).state_dict()
    merge_lora(encoder, tower=tower)
    torch.testing.assert_close(run(encoder, tower), found, rtol=1e-4, atol=1e-4)
    unmerge_lora(encoder, tower=tower)
    assert torch.equal(run(encoder, tower), found)
    assert not any(module.merged for module in modules)
    remove_lora(encoder, tower=tower)
    assert torch.equal(run(encoder, tower), run(build(name), tower))
    assert encoder.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("tower", TOWERS)
def test_all_updates_learn_and_nothing_else(name, tower):
    encoder, modules = adapted_family(name, tower)
    encoder.train()
    run(encoder, tower).square().sum().backward()
    deltas = [delta for module in modules for delta in module.deltas.values()]
    learned = {id(parameter) for delta in deltas for parameter in delta.parameters()}
    for parameter in encoder.parameters():
        if id(parameter) in learned:
            assert parameter.grad is not None
            assert parameter.grad.any()
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("name", ["class token", "EVA-02", "SigLIP", "CLIPModel"])  # a fused qkv, and one apart
def test_a_compiled_encoder_follows_its_updates(name):
    encoder, _ = adapted_family(name, "vision", matrices=("q", "v", "fc"))
    images = images_for(encoder)
    torch.compiler.reset()
    compiled = torch.compile(encoder.encode_tokens, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = encoder.encode_tokens(images)
        torch.testing.assert_close(compiled(images), found, rtol=0, atol=1e-5)
        merge_lora(encoder)
        torch.testing.assert_close(compiled(images), found, rtol=1e-4, atol=1e-4)
        unmerge_lora(encoder)
        torch.testing.assert_close(compiled(images), found, rtol=0, atol=1e-5)
        remove_lora(encoder)
        torch.testing.assert_close(compiled(images), build(name).encode_tokens(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_step_of_adam_in_half_precision_stays_finite(name, dtype):
    encoder = build(name).to(dtype)
    modules = add_lora(encoder, matrices=MATRICES, rank=2)
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        encoder.encode_tokens(images_for(encoder)).float().square().mean().backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in parameters)
    assert all(delta.b.any() for module in modules for delta in module.deltas.values())
