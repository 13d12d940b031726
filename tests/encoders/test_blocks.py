"""The parts of every family's blocks, run one after the other, give what the blocks give."""

import inspect

import pytest
import torch
from einops import einsum
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn

from czsl_heads import add_lora, wrap
from czsl_heads.encoders.blocks import BlockParts, cannot_run_in_parts, mixing_layer
from tests.encoders.families import FAMILIES, build


def images_for(encoder, batch=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, *encoder.vision.image_size, generator=generator)


def reference_block(block, hidden, rope=None):
    """Attention as a loop over heads, each with its softmax, and then the MLP."""
    parts = BlockParts(block)
    normed = parts.norm("attention", hidden)
    query, key, value = parts.heads(normed, rope)
    mixed = torch.empty_like(value)
    for head in range(parts.num_heads):
        logits = einsum(query[:, :, head], key[:, :, head], "batch i dim, batch j dim -> batch i j")
        shares = (logits / query.shape[-1] ** 0.5).softmax(dim=-1)
        mixed[:, :, head] = shares @ value[:, :, head]
    return parts.add_mlp(parts.add("attention", hidden, parts.project_out(mixed, normed)))


def states(output):
    return output[0] if isinstance(output, tuple) else output


def randomise(adapted, scale=0.3):
    """Give updates values, which they start without."""
    generator = torch.Generator().manual_seed(0)
    for module in adapted:
        for delta in module.deltas.values():
            for factor in (delta.a, delta.b):
                factor.data.copy_(scale * torch.randn(factor.shape, generator=generator))
    return adapted


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_vision_blocks_equal_their_parts(name, lora):
    encoder = build(name)
    if lora:
        randomise(add_lora(encoder, matrices=("q", "k", "v", "o", "fc", "proj"), rank=2))
    calls = []
    for block in encoder.blocks("vision"):
        block.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    encoder.encode_tokens(images_for(encoder))
    assert len(calls) == len(encoder.blocks("vision"))
    for block, (hidden, *_), options, output in calls:
        found = reference_block(block, hidden, options.get("rope"))
        torch.testing.assert_close(found, states(output), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_blocks_equal_their_parts(name, generator):
    encoder = build(name)
    hidden = torch.randn(2, 5, encoder.text_dim, generator=generator)
    for block in encoder.blocks("text"):
        needed = [p for p in inspect.signature(type(block).forward).parameters.values() if p.default is p.empty]
        masks = [None for parameter in needed[2:] if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        torch.testing.assert_close(reference_block(block, hidden), states(block(hidden, *masks)), rtol=1e-4, atol=1e-5)


TIMM_BLOCKS = {
    "all norms": lambda: Block(48, 4, qkv_bias=True, qk_norm=True, scale_attn_norm=True, init_values=0.3),
    "no biases": lambda: Block(48, 4, proj_bias=False),
    "fused, biases apart": lambda: EvaBlock(48, 4, init_values=0.4, scale_attn_inner=True),
    "fused, no biases": lambda: EvaBlock(48, 4, qkv_bias=False),
    "gated": lambda: EvaBlock(48, 4, gated_attn=True, attn_type="rope", qk_norm=True, swiglu_mlp=True),
    "half turns": lambda: EvaBlock(48, 4, rotate_half=True, num_prefix_tokens=2, qkv_fused=False),
}


def randomised(block):
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block.eval()


@pytest.mark.parametrize("make", TIMM_BLOCKS.values(), ids=TIMM_BLOCKS)
def test_timm_blocks_of_all_kinds_equal_their_parts(make, generator):
    torch.manual_seed(0)
    block = randomised(make())
    hidden = torch.randn(2, 7, 48, generator=generator)
    assert cannot_run_in_parts(block) is None
    torch.testing.assert_close(reference_block(block, hidden), block(hidden), rtol=1e-4, atol=1e-5)
    if isinstance(block, EvaBlock):
        rope = torch.randn(7 - block.attn.num_prefix_tokens, 2 * 12, generator=generator)
        found = reference_block(block, hidden, rope)
        assert not torch.allclose(found, block(hidden), atol=1e-2)
        torch.testing.assert_close(found, block(hidden, rope=rope), rtol=1e-4, atol=1e-5)


def test_dropout_is_that_of_the_mode():
    for block, expected in [
        (Block(48, 4, attn_drop=0.25), 0.25),
        (wrap("tiny").blocks("vision")[0], 0.0),
    ]:
        assert BlockParts(block.train()).dropout == expected
        assert BlockParts(block.eval()).dropout == 0


def test_stochastic_depth_is_that_of_the_block(generator):
    block = Block(48, 4, drop_path=0.5).train()
    hidden = torch.randn(64, 5, 48, generator=generator)
    torch.manual_seed(1)
    expected = block(hidden)
    torch.manual_seed(1)
    torch.testing.assert_close(reference_block(block, hidden), expected, rtol=1e-4, atol=1e-5)
    assert (expected == hidden).flatten(1).all(dim=1).any()  # some images went past both halves


class Derived(Block):
    """It may do anything."""


def replaced_attention():
    block = Block(48, 4)
    block.attn = nn.Identity()
    return block


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Derived(48, 4), "blocks of kind Derived"),
        (nn.Identity(), "blocks of kind Identity"),
        (replaced_attention(), r"blocks with an attention of another layout (Identity)"),
        (EvaBlock(48, 4, attn_type="rope", num_kv_heads=2, qkv_fused=False), "blocks with fewer heads of keys"),
    ],
    ids=["derived", "unknown", "attention", "grouped"],
)
def test_what_is_not_known_has_a_reason(block, reason):
    assert cannot_run_in_parts(block).startswith(reason)


def test_an_unknown_block_has_no_parts():
    with pytest.raises(TypeError, match=r"expected blocks of open_clip's ResidualAttentionBlock, .*, got Identity"):
        BlockParts(nn.Identity())
    assert BlockParts(Derived(48, 4)).num_heads == 4


class Mixer(nn.Module):
    """Reads all tokens, and knows nothing of the protocol."""

    def forward(self, tokens):
        return tokens.flip(1)


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_blocks_of_all_families_act_on_single_tokens_but_for_attention(name, tower):
    encoder = build(name)
    assert not any(map(mixing_layer, encoder.blocks(tower)))
    block = encoder.blocks(tower)[0]
    (parent, layer), *_ = BlockParts(block).linear_layers("proj")
    setattr(parent, layer, nn.Sequential(getattr(parent, layer), Mixer()))
    assert isinstance(mixing_layer(block), Mixer)
