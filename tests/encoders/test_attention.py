"""Attention in one piece is torch's own: its numbers, its gradients, its names; with fewer products behind it."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from czsl_heads import wrap
from czsl_heads.adapters.bottleneck import add_bottlenecks
from czsl_heads.encoders.attention import FusedAttention, fuse_attention
from tests.encoders.hugging_face import small_model
from tests.encoders.openai import small_openai


def twins(*, dtype=torch.float64, **options):
    """Torch's attention, and the same one in one piece."""
    torch.manual_seed(0)
    base = nn.MultiheadAttention(12, 3, **options).to(dtype)
    for bias in (base.in_proj_bias, base.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    fused = copy.deepcopy(base)
    fuse_attention(fused)
    assert type(base) is nn.MultiheadAttention
    assert type(fused) is FusedAttention
    return base, fused


def inputs_of(length, other, batch, *, batch_first, cross, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, length, 12) if batch_first else (length, batch, 12)
    query = torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
    if not cross:
        return (query,) * 3
    shape = (batch, other, 12) if batch_first else (other, batch, 12)
    key, value = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))
    return query, key, value


def made_mask(kind, length, other):
    if kind == "none":
        return None
    hidden = torch.ones(length, other, dtype=torch.bool).triu(1)
    return hidden if kind == "bool" else torch.zeros(length, other, dtype=torch.float64).masked_fill(hidden, -torch.inf)


@given(
    length=st.integers(1, 5),
    other=st.integers(1, 5),
    batch=st.integers(1, 4),
    batch_first=st.booleans(),
    cross=st.booleans(),
    bias=st.booleans(),
    mask=st.sampled_from(["none", "bool", "float"]),
    training=st.booleans(),
)
def test_results_and_gradients_are_the_originals(length, other, batch, batch_first, cross, bias, mask, training):
    base, fused = (layer.train(training) for layer in twins(batch_first=batch_first, bias=bias))
    inputs = inputs_of(length, other, batch, batch_first=batch_first, cross=cross)
    options = {"need_weights": False, "attn_mask": made_mask(mask, length, inputs[1].shape[batch_first])}
    expected, found = (layer(*inputs, **options) for layer in (base, fused))
    assert found[1] is None
    torch.testing.assert_close(found[0], expected[0])

    weights = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = {id(part): part for part in inputs}.values()
    gradients = [
        torch.autograd.grad((out * weights).sum(), [*wanted, *layer.parameters()])
        for layer, (out, _) in ((base, expected), (fused, found))
    ]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_it_is_differentiable():
    _, fused = twins(batch_first=True)
    inputs = inputs_of(3, 3, 2, batch_first=True, cross=True)
    assert torch.autograd.gradcheck(lambda *parts: fused(*parts, need_weights=False)[0], inputs)


@pytest.mark.parametrize(
    "options",
    [
        {},  # shares wanted, their mean over heads
        {"average_attn_weights": False},
        {"need_weights": False, "key_padding_mask": torch.tensor([[False, False, True, True]] * 2)},
        {"need_weights": False, "attn_mask": torch.ones(6, 4, 4, dtype=torch.bool).triu(1)},
        {"need_weights": False, "attn_mask": torch.ones(4, 4, dtype=torch.bool).triu(1), "is_causal": True},
    ],
)
def test_what_is_seldom_asked_for_is_the_originals(options):
    base, fused = twins(batch_first=True)
    inputs = inputs_of(4, 4, 2, batch_first=True, cross=False)
    torch.testing.assert_close(fused(*inputs, **options), base(*inputs, **options))


def test_a_batch_of_none_and_tokens_without_a_batch_are_taken():
    base, fused = twins(batch_first=True)
    for tokens in (torch.zeros(0, 4, 12, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)):
        expected = base(tokens, tokens, tokens, need_weights=False)[0]
        torch.testing.assert_close(fused(tokens, tokens, tokens, need_weights=False)[0], expected)


def test_shares_are_dropped_in_training_only():
    _, fused = twins(dropout=0.5, batch_first=True)
    tokens = torch.randn(2, 4, 12, dtype=torch.float64)
    first, second = (fused.train()(tokens, tokens, tokens, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (fused.eval()(tokens, tokens, tokens, need_weights=False)[0] for _ in range(2))
    assert torch.equal(first, second)


class Products(TorchDispatchMode):
    """Counts matrices that are multiplied."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            self.count += 1
        elif name in ("bmm", "baddbmm"):
            self.count += len(args[-1])
        return func(*args, **(kwargs or {}))


def products_of(layer, batch, batch_first):
    layer.requires_grad_(False)
    tokens = inputs_of(4, 4, batch, batch_first=batch_first, cross=False)[0]
    with Products() as counter:
        layer(tokens, tokens, tokens, need_weights=False)[0].sum().backward()
    return counter.count


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_products_of_projections_do_not_grow_in_number_with_the_batch(batch_first):
    base, fused = twins(batch_first=batch_first)
    assert products_of(fused, 7, batch_first) == products_of(fused, 2, batch_first) == 4
    if batch_first:
        assert products_of(base, 7, batch_first) > 4


@pytest.mark.parametrize("kind", [{"bias": True, "add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 5, "vdim": 5}])
def test_other_layouts_stay_what_they_are(kind):
    layer = nn.MultiheadAttention(12, 3, **kind)
    fuse_attention(layer)
    assert type(layer) is nn.MultiheadAttention


def stand_in(texts):
    return torch.ones(len(texts), 8, dtype=torch.long)


def attentions(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.MultiheadAttention)]


@pytest.mark.parametrize("container", ["open_clip", "openai", "transformers"])
def test_wrapping_puts_it_all_over_a_model_and_changes_nothing_else(small_clip_factory, container):
    if container == "transformers":
        model, layers = small_model("SiglipModel"), 1  # where images are pooled; its blocks are transformers' own
    else:
        model = small_clip_factory() if container == "open_clip" else small_openai()
        layers = len(attentions(model))
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    before = {name: (weight.data_ptr(), weight.shape) for name, weight in model.named_parameters()}
    encoder = wrap(model, tokenizer=stand_in)
    found = attentions(encoder.model)
    assert [type(layer) for layer in found] == [FusedAttention] * layers
    if container != "openai":  # whose weights are read into open_clip's blocks
        assert {name: (weight.data_ptr(), weight.shape) for name, weight in model.named_parameters()} == before
    if images.shape[-2:] == encoder.vision.image_size:
        assert encoder.encode_images(images).shape == (2, encoder.dim)


def test_the_gradient_through_an_adapted_tower_is_that_of_torchs_own_attention(small_clip_factory):
    encoder = wrap(small_clip_factory(), tokenizer=str)
    torch.manual_seed(0)
    for block in add_bottlenecks(encoder, dim=8):
        nn.init.normal_(block.attn_adapter.up_proj.weight)
        nn.init.normal_(block.mlp_adapter.up_proj.weight)
    original = copy.deepcopy(encoder)
    for layer in attentions(original):
        layer.__class__ = nn.MultiheadAttention
    images = torch.randn(3, 3, *encoder.vision.image_size, generator=torch.Generator().manual_seed(0))
    results = []
    for each in (encoder, original):
        leaf = images.clone().requires_grad_()
        tokens = each.encode_tokens(leaf)
        tokens.square().sum().backward()
        adapters = [weight.grad for weight in each.parameters() if weight.requires_grad]
        results.append((tokens, leaf.grad, adapters))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
