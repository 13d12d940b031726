import copy
import pickle
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from czsl_heads import add_lora, merge_lora, remove_lora, unmerge_lora, wrap
from czsl_heads.adapters.bottleneck import add_bottlenecks
from czsl_heads.adapters.lora_layers import LoRAAttention, LoRALinear
from czsl_heads.encoders.attention import FusedAttention
from czsl_heads.encoders.blocks import AdaptedAttention, AdaptedLayer

MATRICES = ("q", "k", "v", "o", "fc", "proj")
DIM = 48


@pytest.fixture
def images(generator):
    return torch.randn(5, 3, 42, 28, generator=generator)


def randomise(modules, seed=0):
    """Give the updates values, which they start without."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in modules:
            for delta in module.deltas.values():
                delta.a.copy_(0.3 * torch.randn(delta.a.shape, generator=generator))
                delta.b.copy_(0.3 * torch.randn(delta.b.shape, generator=generator))
    return modules


def reference_add_lora(encoder, adapted_encoder, tower="vision"):
    """Add scale * B @ A to the weights of an encoder that has none, by hand."""
    with torch.no_grad():
        for block, adapted in zip(encoder.blocks(tower), adapted_encoder.blocks(tower)):
            rows = {"q": slice(0, DIM), "k": slice(DIM, 2 * DIM), "v": slice(2 * DIM, 3 * DIM)}
            for matrix, delta in getattr(adapted.attn, "deltas", {}).items():
                weight = block.attn.out_proj.weight if matrix == "o" else block.attn.in_proj_weight[rows[matrix]]
                weight += delta.scale * (delta.b @ delta.a)
            for name in ("c_fc", "c_proj"):
                for delta in getattr(getattr(adapted.mlp, name), "deltas", {}).values():
                    getattr(block.mlp, name).weight += delta.scale * (delta.b @ delta.a)
    return encoder


class Births(TorchDispatchMode):
    """The shapes of all tensors that operations make in memory of their own, views of ``known`` tensors left out."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.shapes.add(tuple(tensor.shape))
        return results


def backward_shapes(block, hidden):
    loss = block(hidden).square().sum()
    with Births(block.parameters()) as births:
        loss.backward()
    return births.shapes


@pytest.mark.parametrize("matrices", [*((m,) for m in MATRICES), *combinations(MATRICES, 2), MATRICES])
def test_the_update_equals_weights_changed_by_hand(small_clip_factory, images, matrices):
    base, adapted = wrap(small_clip_factory(), tokenizer=str), wrap(small_clip_factory(), tokenizer=str)
    randomise(add_lora(adapted, matrices=matrices, rank=3, alpha=2.0))
    unchanged = base.encode_tokens(images)
    expected = reference_add_lora(base, adapted).encode_tokens(images)
    tokens = adapted.encode_tokens(images)
    assert not torch.allclose(tokens, unchanged, atol=1e-3)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("matrices", [("q", "k", "v"), MATRICES])
def test_an_untrained_update_changes_nothing(small_encoder, images, matrices):
    before = small_encoder.encode_tokens(images)
    add_lora(small_encoder, matrices=matrices, dropout=0.3)
    torch.testing.assert_close(small_encoder.encode_tokens(images), before, rtol=0, atol=1e-6)


def test_only_the_low_rank_parameters_train(small_encoder, images):
    names = set(small_encoder.state_dict())
    add_lora(small_encoder, matrices=MATRICES, rank=2)
    trainable = {name: p for name, p in small_encoder.named_parameters() if p.requires_grad}
    assert all(".deltas." in name for name in trainable)
    assert len(trainable) == 3 * 6 * 2
    assert sum(p.numel() for p in trainable.values()) == 3 * 2 * (4 * (DIM + DIM) + 2 * (DIM + 4 * DIM))
    assert names == {name for name in small_encoder.state_dict() if ".deltas." not in name}
    small_encoder.encode_tokens(images).square().sum().backward()
    assert {name for name, p in small_encoder.named_parameters() if p.grad is not None} == set(trainable)
    # B starts at zero, so the first step moves B alone; a gradient of A that is not zero would be wrong.
    assert all((p.grad.abs().sum() > 0) == name.endswith(".b") for name, p in trainable.items())


def test_weights_that_train_go_on_training(small_clip_factory, images):
    encoder = wrap(small_clip_factory(), tokenizer=str, frozen=False)
    add_lora(encoder, layers=1)
    encoder.encode_tokens(images).square().sum().backward()
    block = encoder.blocks("vision")[2]
    assert block.attn.in_proj_weight.requires_grad
    assert block.attn.in_proj_weight.grad.shape == (3 * DIM, DIM)


def test_the_gradients_are_those_of_the_changed_weights(small_clip_factory, images):
    base = wrap(small_clip_factory(), tokenizer=str, frozen=False)
    adapted = wrap(small_clip_factory(), tokenizer=str)
    (attention, linear) = randomise(add_lora(adapted, matrices=("v", "fc"), rank=3, alpha=6.0, layers=[1]))
    reference_add_lora(base, adapted).encode_tokens(images).square().sum().backward()
    adapted.encode_tokens(images).square().sum().backward()
    full = base.blocks("vision")[1]
    for delta, gradient in (
        (attention.deltas["v"], full.attn.in_proj_weight.grad[2 * DIM :]),
        (linear.deltas["w"], full.mlp.c_fc.weight.grad),
    ):
        torch.testing.assert_close(delta.b.grad, 2.0 * gradient @ delta.a.T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(delta.a.grad, 2.0 * delta.b.T @ gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("matrices", [("q", "k", "v"), ("o",), MATRICES])
def test_no_gradient_of_a_full_weight_arises(small_encoder, generator, matrices):
    randomise(add_lora(small_encoder, matrices=matrices, rank=3))
    hidden = torch.randn(
        2, 7, DIM, generator=generator, requires_grad=True
    )  # and none of the sizes is 3 or 48 by chance
    shapes = backward_shapes(small_encoder.blocks("vision")[0], hidden)
    forbidden = {(3 * DIM, DIM), (DIM, 3 * DIM), (DIM, DIM), (4 * DIM, DIM), (DIM, 4 * DIM), (3, DIM, DIM)}
    assert (3, DIM) in shapes
    assert not shapes & forbidden


def test_the_recording_would_see_a_full_gradient(small_clip_factory, generator):
    encoder = wrap(small_clip_factory(), tokenizer=str, frozen=False)
    add_lora(encoder)
    hidden = torch.randn(2, 7, DIM, generator=generator, requires_grad=True)
    assert {(3 * DIM, DIM), (DIM, DIM)} <= backward_shapes(encoder.blocks("vision")[0], hidden)


@pytest.mark.parametrize("matrices", [("q", "v"), ("o",), ("k", "o", "proj"), MATRICES])
def test_merging_keeps_the_output_and_unmerging_the_bits(small_encoder, images, matrices):
    modules = randomise(add_lora(small_encoder, matrices=matrices, rank=3))
    weights = {name: weight.clone() for name, weight in small_encoder.state_dict().items()}
    before = small_encoder.encode_tokens(images)
    for module in modules:
        module.merge()
        assert module.merged
    torch.testing.assert_close(small_encoder.encode_tokens(images), before, rtol=0, atol=1e-5)
    for module in modules:
        module.unmerge()
        assert not module.merged
    assert torch.equal(small_encoder.encode_tokens(images), before)
    assert all(torch.equal(weight, weights[name]) for name, weight in small_encoder.state_dict().items())


def test_merging_changes_the_weights_and_twice_is_once(small_encoder):
    (module,) = randomise(add_lora(small_encoder, matrices=("k", "o"), layers=1))
    fused, out = module.in_proj_weight.clone(), module.out_proj.weight.clone()
    module.merge()
    module.merge()
    change = module.in_proj_weight - fused
    assert change[:DIM].abs().max() == change[2 * DIM :].abs().max() == 0
    torch.testing.assert_close(change[DIM : 2 * DIM], module.deltas["k"].matrix(), rtol=0, atol=1e-5)
    torch.testing.assert_close(module.out_proj.weight - out, module.deltas["o"].matrix(), rtol=0, atol=1e-5)
    module.unmerge()
    module.unmerge()
    assert torch.equal(module.in_proj_weight, fused)
    assert torch.equal(module.out_proj.weight, out)


def test_a_state_dict_holds_the_weights_before_merging(small_encoder):
    modules = randomise(add_lora(small_encoder, matrices=MATRICES))
    before = {name: weight.clone() for name, weight in small_encoder.state_dict().items()}
    for module in modules:
        module.merge()
    for holder, prefix in (
        (small_encoder, ""),
        (small_encoder.blocks("vision")[1], "model.visual.transformer.resblocks.1."),
    ):
        state = holder.state_dict()
        assert all(torch.equal(weight, before[prefix + name]) for name, weight in state.items())
    assert list(small_encoder.state_dict()) == list(before)


def test_a_merged_module_loads_and_is_no_longer_merged(small_clip_factory, small_encoder, images):
    other = wrap(small_clip_factory(), tokenizer=str)
    randomise(add_lora(other, matrices=MATRICES), seed=1)
    modules = randomise(add_lora(small_encoder, matrices=MATRICES), seed=2)
    for module in modules:
        module.merge()
    small_encoder.load_state_dict(other.state_dict())
    assert not any(module.merged for module in modules)
    assert torch.equal(small_encoder.encode_tokens(images), other.encode_tokens(images))
    for module in modules:
        module.unmerge()
    assert torch.equal(small_encoder.encode_tokens(images), other.encode_tokens(images))


def test_a_copy_of_a_merged_encoder_unmerges_by_itself(small_encoder, images):
    (module,) = randomise(add_lora(small_encoder, matrices=("q", "o"), layers=1))
    fused = module.in_proj_weight.clone()
    module.merge()
    twin = copy.deepcopy(small_encoder)
    twin.blocks("vision")[2].attn.unmerge()
    assert torch.equal(twin.blocks("vision")[2].attn.in_proj_weight, fused)
    assert module.merged
    assert not torch.equal(module.in_proj_weight, fused)
    assert torch.equal(
        twin.state_dict()["model.visual.transformer.resblocks.2.attn.out_proj.weight"],
        small_encoder.state_dict()["model.visual.transformer.resblocks.2.attn.out_proj.weight"],
    )


def test_state_dicts_and_copies_carry_the_updates(small_clip_factory, small_encoder, images):
    randomise(add_lora(small_encoder, matrices=MATRICES))
    tokens = small_encoder.encode_tokens(images)
    fresh = wrap(small_clip_factory(), tokenizer=str)
    add_lora(fresh, matrices=MATRICES)
    fresh.load_state_dict(small_encoder.state_dict())
    assert torch.equal(fresh.encode_tokens(images), tokens)
    assert torch.equal(copy.deepcopy(small_encoder).encode_tokens(images), tokens)


def test_an_adapted_model_loads_the_weights_of_its_base(small_clip_factory, small_encoder):
    add_lora(small_encoder, matrices=MATRICES)
    missing, unexpected = small_encoder.model.load_state_dict(small_clip_factory().state_dict(), strict=False)
    assert not unexpected
    assert all(".deltas." in name for name in missing)


def test_dropout_acts_in_training_only(small_encoder, images):
    modules = randomise(add_lora(small_encoder, matrices=MATRICES, dropout=0.5))
    assert not any(module.training for root in modules for module in root.modules())
    assert torch.equal(small_encoder.encode_tokens(images), small_encoder.encode_tokens(images))
    small_encoder.train()
    torch.manual_seed(0)
    first, second = small_encoder.encode_tokens(images), small_encoder.encode_tokens(images)
    assert not torch.allclose(first, second, atol=1e-4)
    torch.manual_seed(0)
    assert torch.equal(small_encoder.encode_tokens(images), first)


def test_full_dropout_leaves_the_base_model_in_training(small_encoder, images):
    before = small_encoder.encode_tokens(images)
    randomise(add_lora(small_encoder, matrices=MATRICES, dropout=1.0))
    torch.testing.assert_close(small_encoder.train().encode_tokens(images), before, rtol=0, atol=1e-6)
    assert not torch.allclose(small_encoder.eval().encode_tokens(images), before, atol=1e-3)


def test_new_modules_take_the_mode_of_what_they_replace(small_clip_factory):
    for training in (True, False):
        encoder = wrap(small_clip_factory().train(training), tokenizer=str)
        for root in add_lora(encoder, matrices=MATRICES):
            assert all(module.training is training for module in root.modules())


def test_alpha_scales_the_update_and_defaults_to_the_rank(small_encoder):
    assert {
        delta.scale for module in add_lora(small_encoder, rank=5, layers=[0]) for delta in module.deltas.values()
    } == {1}
    (module,) = add_lora(small_encoder, rank=5, alpha=2.0, layers=[1], matrices=["q"])
    assert module.deltas["q"].scale == pytest.approx(0.4)
    assert module.deltas["q"].a.shape == (5, DIM)


@pytest.mark.parametrize(
    ("layers", "adapted"),
    [(None, [0, 1, 2]), (1, [2]), (2, [1, 2]), (3, [0, 1, 2]), ([0], [0]), ([-1], [2]), ((2, 0, -3), [0, 2])],
)
def test_layers_are_counted_from_the_end_or_named(small_encoder, layers, adapted):
    modules = add_lora(small_encoder, layers=layers)
    blocks = small_encoder.blocks("vision")
    assert [index for index in range(3) if isinstance(blocks[index].attn, LoRAAttention)] == adapted
    assert modules == [blocks[index].attn for index in adapted]


def test_the_modules_come_block_by_block(small_encoder):
    modules = add_lora(small_encoder, matrices=("proj", "q", "fc"), layers=2)
    assert [type(module) for module in modules] == [LoRAAttention, LoRALinear, LoRALinear] * 2
    assert modules[1] is small_encoder.blocks("vision")[1].mlp.c_fc
    assert modules[2] is small_encoder.blocks("vision")[1].mlp.c_proj


def test_the_text_tower_takes_updates_through_its_mask(small_encoder):
    texts = ["a photo of red circle", "dog"]
    before = small_encoder.encode_texts(texts)
    modules = add_lora(small_encoder, matrices=MATRICES, tower="text")
    torch.testing.assert_close(small_encoder.encode_texts(texts), before, rtol=0, atol=1e-5)
    for module in randomise(modules):
        module.merge()
    merged = small_encoder.encode_texts(texts)
    for module in modules:
        module.unmerge()
    torch.testing.assert_close(small_encoder.encode_texts(texts), merged, rtol=0, atol=1e-5)
    assert not torch.allclose(merged, before, atol=1e-2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("same", [True, False], ids=["self", "cross"])
@pytest.mark.parametrize("mask_dtype", [None, torch.float32, torch.bool])
def test_the_attention_equals_multihead_attention(generator, bias, batch_first, same, mask_dtype):
    base = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first).eval()
    adapted = LoRAAttention(base, ["q"], rank=2, scale=1.0, dropout=0.0)
    length, other = 5, 5 if same else 7
    query, key, value = (torch.randn(2, size, 12, generator=generator) for size in (length, other, other))
    if not batch_first:
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    if same:
        key = value = query
    hidden = torch.ones(length, other, dtype=torch.bool).triu(1)
    mask = {
        None: None,
        torch.float32: torch.randn(length, other, generator=generator).masked_fill(hidden, float("-inf")),
        torch.bool: hidden,
    }[mask_dtype]
    outputs, weights = adapted(query, key, value, need_weights=False, attn_mask=mask)
    expected, _ = base(query, key, value, need_weights=False, attn_mask=mask)
    assert weights is None
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_projects_its_input_once(generator, batch_first):
    adapted = LoRAAttention(nn.MultiheadAttention(12, 3, batch_first=batch_first), ["q"], rank=2, scale=1.0, dropout=0)
    hidden = torch.randn(2, 5, 12, generator=generator)
    with torch.no_grad(), Births(adapted.parameters()) as births:
        adapted(hidden, hidden, hidden)
    assert any(36 in shape for shape in births.shapes)


def test_merged_updates_refuse_to_train(small_encoder, images):
    modules = add_lora(small_encoder, matrices=("fc",), layers=1) + add_lora(small_encoder, matrices=("o",), layers=[0])
    small_encoder.model.train()
    for module in modules:
        small_encoder.encode_tokens(images)
        module.merge()
        with pytest.raises(ValueError, match="expected updates unmerged in training mode, got merged ones"):
            small_encoder.encode_tokens(images)
        small_encoder.model.eval()
        small_encoder.encode_tokens(images)
        small_encoder.model.train()
        module.unmerge()


def test_the_attention_takes_the_parameters_and_not_copies():
    base = nn.MultiheadAttention(12, 3, dropout=0.25)
    adapted = LoRAAttention(base, ["q"], rank=2, scale=1.0, dropout=0.0)
    assert adapted.in_proj_weight is base.in_proj_weight
    assert adapted.in_proj_bias is base.in_proj_bias
    assert adapted.out_proj is base.out_proj
    assert adapted.attention_dropout == 0.25


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("average", [True, False], ids=["mean", "per head"])
@pytest.mark.parametrize("mask_dtype", [None, torch.float32, torch.bool])
def test_the_weights_equal_those_of_multihead_attention(generator, batch_first, average, mask_dtype):
    base = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    adapted = LoRAAttention(base, ["q", "k"], rank=2, scale=1.0, dropout=0.0)
    hidden = torch.randn(2, 5, 12, generator=generator)
    hidden = hidden if batch_first else hidden.transpose(0, 1)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    mask = {None: None, torch.float32: torch.zeros(5, 5).masked_fill(causal, -torch.inf), torch.bool: causal}
    call = {"need_weights": True, "average_attn_weights": average, "attn_mask": mask[mask_dtype]}
    outputs, weights = adapted(hidden, hidden, hidden, **call)
    expected_outputs, expected = base(hidden, hidden, hidden, **call)
    assert weights.shape == ((2, 5, 5) if average else (2, 3, 5, 5))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs, expected_outputs, rtol=0, atol=1e-6)


def test_the_weights_are_those_of_the_changed_matrices(generator):
    adapted = LoRAAttention(nn.MultiheadAttention(12, 3, batch_first=True), ["q", "k"], rank=2, scale=1.0, dropout=0.0)
    randomise([adapted.eval()])
    base = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    hidden = torch.randn(2, 5, 12, generator=generator)
    _, weights = adapted(hidden, hidden, hidden, need_weights=True)
    adapted.merge()
    base.load_state_dict({name: adapted.get_parameter(name) for name in base.state_dict()})  # the merged matrices
    _, expected = base(hidden, hidden, hidden, need_weights=True)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(adapted(hidden, hidden, hidden, need_weights=True)[1], expected, rtol=0, atol=1e-6)
    adapted.unmerge()
    base.load_state_dict({name: adapted.get_parameter(name) for name in base.state_dict()})
    assert not torch.allclose(weights, base(hidden, hidden, hidden, need_weights=True)[1], atol=1e-2)


def test_weights_are_returned_only_when_asked_for_and_change_no_output(small_encoder, generator):
    randomise(add_lora(small_encoder))
    hidden = torch.randn(1, 2, DIM, generator=generator)
    attention = small_encoder.blocks("vision")[0].attn
    outputs, nothing = attention(hidden, hidden, hidden)
    asked, weights = attention(hidden, hidden, hidden, need_weights=True)
    assert nothing is None
    assert torch.equal(asked, outputs)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 2))


def test_blocks_that_are_not_batch_first_are_adapted_alike(small_encoder, generator):
    torch.manual_seed(0)
    first = ResidualAttentionBlock(DIM, 3, batch_first=True).eval().requires_grad_(False)
    second = ResidualAttentionBlock(DIM, 3, batch_first=False).eval().requires_grad_(False)
    second.load_state_dict(first.state_dict())
    for block in (first, second):
        small_encoder.blocks("vision")[2] = block
        randomise(add_lora(small_encoder, matrices=MATRICES, layers=[2]))
    hidden = torch.randn(2, 5, DIM, generator=generator)
    torch.testing.assert_close(second(hidden.transpose(0, 1)).transpose(0, 1), first(hidden), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_adapted_towers_run_in_bf16_and_under_autocast(small_encoder, images, tower):
    def run(encoder, images):
        return encoder.encode_tokens(images) if tower == "vision" else encoder.encode_texts(["red dog", "a wet cat"])

    modules = randomise(add_lora(small_encoder, matrices=MATRICES, tower=tower))
    for module in modules:
        for delta in module.deltas.values():
            delta.b.data.mul_(0.1)
    expected = run(small_encoder, images)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(small_encoder, images)
        outputs.float().square().sum().backward()
    assert (outputs.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert modules[0].deltas["q"].a.grad.dtype == torch.float32
    small_encoder.to(torch.bfloat16)
    assert modules[0].deltas["q"].a.dtype == torch.bfloat16
    outputs = run(small_encoder, images.bfloat16())
    assert outputs.dtype == torch.bfloat16
    assert (outputs.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("dtype", "trained"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_updates_are_float32_at_least_whatever_the_dtype_of_the_weights(small_clip_factory, images, dtype, trained):
    encoder = wrap(small_clip_factory().to(dtype), tokenizer=str)
    modules = add_lora(encoder, matrices=MATRICES)
    assert {p.dtype for module in modules for p in module.parameters() if p.requires_grad} == {trained}
    assert {p.dtype for module in modules for p in module.parameters() if not p.requires_grad} == {dtype}
    assert encoder.encode_tokens(images).dtype == dtype


def test_an_adapted_encoder_compiles_whole(small_encoder, images):
    randomise(add_lora(small_encoder, matrices=MATRICES, layers=1))
    compiled = torch.compile(small_encoder.encode_tokens, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), small_encoder.encode_tokens(images), rtol=0, atol=1e-5)


def test_a_block_passes_gradcheck(generator):
    base = nn.MultiheadAttention(6, 2, batch_first=True).double().requires_grad_(False)
    adapted = LoRAAttention(base, ["q", "k", "v", "o"], rank=2, scale=0.5, dropout=0.0)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    values = [torch.randn(adapted.get_parameter(name).shape, generator=generator).double() for name in names]
    hidden = torch.randn(1, 3, 6, generator=generator).double().requires_grad_()

    def run(hidden, *values):
        return torch.func.functional_call(adapted, dict(zip(names, values)), (hidden, hidden, hidden))[0]

    assert torch.autograd.gradcheck(run, (hidden, *(value.requires_grad_() for value in values)))


def test_a_linear_layer_without_bias_is_adapted(generator):
    base = nn.Linear(5, 7, bias=False)
    adapted = LoRALinear(base, rank=2, scale=3.0, dropout=0.0)
    randomise([adapted])
    hidden = torch.randn(2, 5, generator=generator)
    delta = adapted.deltas["w"]
    expected = F.linear(hidden, base.weight + 3.0 * delta.b @ delta.a)
    torch.testing.assert_close(adapted(hidden), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrices": ()}, "expected `matrices` to name at least one, got none"),
        ({"matrices": ("q", "w")}, "expected `matrices` to be one of q, k, v, o, fc, proj, got 'w'"),
        ({"rank": 0}, "expected `rank` to be at least 1, got 0"),
        ({"alpha": 0.0}, "expected `alpha` to be positive and finite, got 0.0"),
        ({"alpha": float("inf")}, "expected `alpha` to be positive and finite, got inf"),
        ({"dropout": 1.5}, r"expected `dropout` to be in \[0, 1\], got 1.5"),
        ({"layers": 0}, r"expected `layers` to be in \[1, 3\], got 0"),
        ({"layers": 4}, r"expected `layers` to be in \[1, 3\], got 4"),
        ({"layers": [3]}, r"expected `layers` to be in \[-3, 2\], got 3"),
        ({"layers": [-4]}, r"expected `layers` to be in \[-3, 2\], got -4"),
        ({"layers": []}, "expected `layers` to name at least one block, got none"),
        ({"tower": "audio"}, "expected `tower` to be one of vision, text, got 'audio'"),
    ],
)
def test_a_wrong_option_raises_and_leaves_the_model_alone(small_encoder, options, message):
    names = list(small_encoder.state_dict())
    with pytest.raises(ValueError, match=message):
        add_lora(small_encoder, **options)
    assert list(small_encoder.state_dict()) == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrices": "qkv"}, "expected `matrices` to be a sequence of names, got the string 'qkv'"),
        ({"rank": 1.5}, "expected `rank` to be an integer, got 1.5"),
        ({"alpha": "8"}, "expected `alpha` to be a number, got '8'"),
        ({"layers": 1.0}, "expected `layers` to be an integer, got 1.0"),
        ({"layers": True}, "expected `layers` to be an integer, got True"),
        ({"layers": "1"}, "expected `layers` to be an integer, got '1'"),
        ({"layers": [0, None]}, "expected `layers` to be an integer, got None"),
        ({"encoder": 5}, "expected `encoder` to be an Encoder, as `wrap` returns, got int without `dim`"),
        ({"encoder": nn.Linear(2, 3)}, "expected `encoder` to be an Encoder, .*got Linear without `dim`"),
    ],
)
def test_an_option_of_another_kind_raises_and_leaves_the_model_alone(small_encoder, options, message):
    names = list(small_encoder.state_dict())
    with pytest.raises(TypeError, match=message):
        add_lora(**{"encoder": small_encoder, **options})
    assert list(small_encoder.state_dict()) == names


@pytest.mark.parametrize(("first", "second"), [("q", "v"), ("q", "fc"), ("fc", "q"), ("proj", "proj")])
def test_a_block_is_adapted_only_once(small_encoder, first, second):
    add_lora(small_encoder, matrices=[first], layers=[1])
    names = list(small_encoder.state_dict())
    with pytest.raises(ValueError, match="expected a vision tower without LoRA, got one that is adapted already"):
        add_lora(small_encoder, matrices=[second])
    assert list(small_encoder.state_dict()) == names
    add_lora(small_encoder, matrices=[second], layers=[0, 2])


def test_blocks_of_another_kind_raise(small_clip_factory, small_encoder):
    custom = wrap(small_clip_factory(vision={"qk_norm": True}), tokenizer=str)
    kinds = "expected blocks of open_clip's ResidualAttentionBlock, timm's Block or EvaBlock, or a CLIP layer"
    with pytest.raises(TypeError, match=f"{kinds} of transformers, got CustomResidualAttentionBlock"):
        add_lora(custom)
    small_encoder.blocks("vision")[1] = nn.Identity()
    with pytest.raises(TypeError, match=f"{kinds} of transformers, got Identity"):
        add_lora(small_encoder)
    assert not isinstance(small_encoder.blocks("vision")[0].attn, LoRAAttention)


class OtherAttention(nn.MultiheadAttention):
    """Not torch's own: it may do anything."""


class OtherLinear(nn.Linear):
    """Likewise, as the layers of quantised weights do."""


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.MultiheadAttention, {"kdim": 5, "vdim": 5}),
        (nn.MultiheadAttention, {"add_bias_kv": True}),
        (nn.MultiheadAttention, {"add_zero_attn": True}),
        (OtherAttention, {}),
    ],
    ids=["unfused", "bias_k", "zero_attn", "subclass"],
)
def test_another_layout_of_the_attention_raises(small_encoder, kind, options):
    small_encoder.blocks("vision")[2].attn = kind(DIM, 3, batch_first=True, **options)
    with pytest.raises(TypeError, match="with one fused in_proj_weight and no bias_k, got another layout"):
        add_lora(small_encoder)
    assert not isinstance(small_encoder.blocks("vision")[0].attn, LoRAAttention)
    add_lora(small_encoder, matrices=("fc",))  # which leaves the attention alone


def test_another_linear_layer_raises(small_encoder):
    small_encoder.blocks("vision")[2].mlp.c_fc = OtherLinear(DIM, 4 * DIM)
    with pytest.raises(TypeError, match=r"expected an MLP whose c_fc is an nn\.Linear, got OtherLinear"):
        add_lora(small_encoder, matrices=("q", "fc"))
    assert not isinstance(small_encoder.blocks("vision")[0].attn, LoRAAttention)
    add_lora(small_encoder, matrices=("q", "proj"))


@pytest.mark.parametrize(("matrices", "kind"), [(("q",), "FusedAttention"), (("fc",), "Linear")])
def test_hooks_on_what_is_replaced_are_not_lost_in_silence(small_encoder, matrices, kind):
    block = small_encoder.blocks("vision")[2]
    layer = block.attn if kind == "FusedAttention" else block.mlp.c_fc
    handle = layer.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(ValueError, match=f"without hooks on what LoRA replaces, got hooks on a {kind}; add them"):
        add_lora(small_encoder, matrices=matrices)
    assert not any(isinstance(module, (LoRAAttention, LoRALinear)) for module in small_encoder.modules())
    handle.remove()
    add_lora(small_encoder, matrices=matrices)


def both_towers(encoder, **options):
    """Adapters with values of their own in both towers."""
    modules = [module for tower in ("vision", "text") for module in add_lora(encoder, tower=tower, **options)]
    return randomise(modules)


def outputs(encoder, images):
    with torch.no_grad():
        return encoder.encode_tokens(images), encoder.encode_texts(["a red dog", "cat"])


def copied_state(encoder):
    return {name: weight.clone() for name, weight in encoder.state_dict().items()}


def same_state(encoder, expected):
    state = encoder.state_dict()
    assert list(state) == list(expected)
    return all(torch.equal(weight, expected[name]) for name, weight in state.items())


def test_both_towers_are_merged_and_unmerged_at_once(small_encoder, images):
    modules = both_towers(small_encoder, matrices=MATRICES)
    before, weights = outputs(small_encoder, images), [p.clone() for p in small_encoder.parameters()]
    modules[0].merge()
    for _ in range(2):  # twice is once
        merge_lora(small_encoder)
        assert all(module.merged for module in modules)
        for one, other in zip(outputs(small_encoder, images), before):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert not all(map(torch.equal, small_encoder.parameters(), weights))
    for _ in range(2):
        unmerge_lora(small_encoder)
        assert not any(module.merged for module in modules)
        assert all(map(torch.equal, small_encoder.parameters(), weights))
    assert all(map(torch.equal, outputs(small_encoder, images), before))


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_one_tower_may_be_asked_for(small_encoder, tower):
    modules = both_towers(small_encoder)
    of_tower = [block.attn for block in small_encoder.blocks(tower)]
    merge_lora(small_encoder, tower=tower)
    assert [module for module in modules if module.merged] == of_tower
    merge_lora(small_encoder)
    unmerge_lora(small_encoder, tower=tower)
    assert [module for module in modules if not module.merged] == of_tower
    remove_lora(small_encoder, tower=tower)
    left = [module for module in small_encoder.modules() if isinstance(module, LoRAAttention)]
    assert left == [module for module in modules if module not in of_tower]
    with pytest.raises(ValueError, match=f"expected a {tower} tower with LoRA, as `add_lora` makes it, got one"):
        remove_lora(small_encoder, tower=tower)


@pytest.mark.parametrize("matrices", [("q", "v"), ("fc",), MATRICES])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_without_its_adapters_an_encoder_is_what_it_was(small_clip_factory, images, matrices, merged, training):
    encoder = wrap(small_clip_factory(), tokenizer=str, frozen=False)
    encoder.blocks("vision")[1].requires_grad_(False)
    encoder.train(training)
    text, before = str(encoder), copied_state(encoder)
    parameters = {name: (id(p), p.requires_grad) for name, p in encoder.named_parameters()}
    tokens = encoder.encode_tokens(images)
    randomise(add_lora(encoder, matrices=matrices, layers=2))
    if merged:
        merge_lora(encoder)
    random_state = torch.get_rng_state()
    remove_lora(encoder)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: (id(p), p.requires_grad) for name, p in encoder.named_parameters()} == parameters
    assert same_state(encoder, before)
    assert str(encoder) == text
    assert all(module.training is training for module in encoder.modules())
    assert torch.equal(encoder.encode_tokens(images), tokens)
    assert type(encoder.blocks("vision")[2].attn) is FusedAttention
    assert type(encoder.blocks("vision")[2].mlp.c_fc) is nn.Linear


@pytest.mark.parametrize("merged", [False, True])
def test_removed_adapters_may_leave_their_updates_in_the_weights(small_clip_factory, images, merged):
    base, encoder = wrap(small_clip_factory(), tokenizer=str), wrap(small_clip_factory(), tokenizer=str)
    randomise(add_lora(encoder, matrices=MATRICES, rank=3, alpha=2.0))
    expected = reference_add_lora(base, encoder)
    before = encoder.encode_tokens(images)
    if merged:
        merge_lora(encoder)
    remove_lora(encoder, merge=True)
    assert list(encoder.state_dict()) == list(expected.state_dict())
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.encode_tokens(images), before, rtol=0, atol=1e-5)


def test_adapters_may_come_again(small_encoder, images):
    before = outputs(small_encoder, images)
    for _ in range(2):
        both_towers(small_encoder, matrices=MATRICES)
        assert not torch.allclose(outputs(small_encoder, images)[1], before[1], atol=1e-2)
        remove_lora(small_encoder)
        assert all(map(torch.equal, outputs(small_encoder, images), before))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_attention_that_comes_back_has_all_options_of_the_first(small_encoder, bias, batch_first):
    options = {"dropout": 0.25, "bias": bias, "batch_first": batch_first}
    base = nn.MultiheadAttention(DIM, 3, **options).to(torch.float64)
    small_encoder.blocks("vision")[0].attn = base
    add_lora(small_encoder, layers=[0])
    remove_lora(small_encoder)
    again = small_encoder.blocks("vision")[0].attn
    named = {name: value for name, value in vars(base).items() if isinstance(value, (int, float, bool, type(None)))}
    assert named["dropout"] == 0.25
    assert {name: getattr(again, name) for name in named} == named
    assert [(name, id(p)) for name, p in again.named_parameters()] == [(n, id(p)) for n, p in base.named_parameters()]


@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_layer_that_comes_back_is_the_first(bias):
    base = nn.Linear(5, 7, bias=bias)
    again = LoRALinear(base, rank=2, scale=3.0, dropout=0.0).plain()
    assert str(again) == str(base)
    assert again.weight is base.weight
    assert again.bias is base.bias


def test_lora_beside_bottlenecks_is_removed_alone(small_encoder, images):
    blocks = add_bottlenecks(small_encoder, dim=3)
    before = copied_state(small_encoder)
    randomise(add_lora(small_encoder, matrices=MATRICES))
    remove_lora(small_encoder)
    assert same_state(small_encoder, before)
    assert list(small_encoder.blocks("vision")) == blocks


def test_hooks_on_adapters_are_not_lost_in_silence(small_encoder):
    modules = add_lora(small_encoder, matrices=("q", "fc"))
    handle = modules[-1].register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(ValueError, match="would be lost with it, got hooks on a LoRALinear; remove them first"):
        remove_lora(small_encoder)
    assert small_encoder.blocks("vision")[0].attn is modules[0]
    handle.remove()
    remove_lora(small_encoder)


@pytest.mark.parametrize("change", [merge_lora, unmerge_lora, remove_lora])
def test_an_encoder_without_lora_is_told(small_encoder, change):
    with pytest.raises(ValueError, match="expected an encoder with LoRA, as `add_lora` makes it, got one without"):
        change(small_encoder)
    with pytest.raises(ValueError, match="expected `tower` to be one of vision, text, got 'audio'"):
        change(small_encoder, tower="audio")
    with pytest.raises(TypeError, match="expected `encoder` to be an Encoder"):
        change(small_encoder.model)


def test_whether_to_merge_is_yes_or_no(small_encoder):
    add_lora(small_encoder)
    with pytest.raises(TypeError, match="expected `merge` to be a bool, got str"):
        remove_lora(small_encoder, merge="yes")


def test_modules_tell_what_they_are(small_encoder):
    attention, linear = add_lora(small_encoder, matrices=("v", "q", "fc"), rank=2, alpha=3, dropout=0.1, layers=1)
    assert attention.extra_repr() == (
        "embed_dim=48, num_heads=3, matrices=qv, rank=2, scale=1.5, dropout=0.1, merged=False"
    )
    assert linear.extra_repr() == (
        "in_features=48, out_features=192, bias=True, rank=2, scale=1.5, dropout=0.1, merged=False"
    )
    assert str(linear.deltas["w"]) == "_Delta(rank=2, scale=1.5, dropout=0.1)"
    merge_lora(small_encoder)
    assert attention.extra_repr().endswith("merged=True")
    assert linear.extra_repr().endswith("merged=True")


@pytest.mark.parametrize("merged", [False, True])
def test_a_pickle_carries_updates_and_what_unmerging_restores(small_encoder, generator, merged):
    modules = randomise(add_lora(small_encoder, matrices=("q", "o", "fc"), layers=1))
    hidden, fused = torch.randn(2, 5, DIM, generator=generator), modules[0].in_proj_weight.clone()
    if merged:
        merge_lora(small_encoder)
    block = small_encoder.blocks("vision")[2]
    twin = pickle.loads(pickle.dumps(block))
    assert torch.equal(twin(hidden), block(hidden))
    assert str(twin) == str(block)
    twin.attn.unmerge()
    assert torch.equal(twin.attn.in_proj_weight, fused)
    assert torch.equal(twin.attn.plain().in_proj_weight, fused)


def test_merged_updates_follow_to_another_dtype(small_encoder):
    modules = both_towers(small_encoder, matrices=MATRICES)
    expected = {name: weight.bfloat16() for name, weight in copied_state(small_encoder).items()}
    merge_lora(small_encoder)
    small_encoder.to(torch.bfloat16)
    assert all(module.merged for module in modules)
    assert {weight.dtype for weight in small_encoder.state_dict().values()} == {torch.bfloat16}
    assert same_state(small_encoder, expected)
    unmerge_lora(small_encoder)
    assert same_state(small_encoder, expected)


def test_adapted_layers_say_what_others_must_know(generator):
    base = nn.MultiheadAttention(12, 3, batch_first=True, dropout=0.25)
    attention, linear = (
        LoRAAttention(base, ["q", "k", "v", "o"], rank=2, scale=1.0, dropout=0.0),
        LoRALinear(nn.Linear(12, 4), rank=2, scale=1.0, dropout=0.0),
    )
    randomise([attention, linear])
    assert isinstance(attention, AdaptedAttention)
    assert isinstance(linear, AdaptedLayer)
    assert not isinstance(linear, AdaptedAttention)
    assert not isinstance(base, AdaptedLayer)
    tokens = torch.randn(2, 5, 12, generator=generator)
    parts = attention.project_in(tokens)
    for token in range(5):  # each token by itself, which `per_token` says
        for part, alone in zip(parts, attention.project_in(tokens[:, token])):
            torch.testing.assert_close(part[:, token], alone, rtol=0, atol=1e-6)
    expected = [
        F.linear(tokens, weight + attention.deltas[matrix].matrix(), bias)
        for matrix, weight, bias in zip("qkv", base.in_proj_weight.chunk(3), base.in_proj_bias.chunk(3))
    ]
    torch.testing.assert_close(list(parts), expected, rtol=0, atol=1e-5)
    out = F.linear(tokens, base.out_proj.weight + attention.deltas["o"].matrix(), base.out_proj.bias)
    torch.testing.assert_close(attention.project_out(tokens), out, rtol=0, atol=1e-5)
