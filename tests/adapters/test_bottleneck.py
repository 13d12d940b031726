"""Bottleneck adapters: what they add, where they stand, and that they leave the rest alone."""

import copy

import pytest
import torch

from czsl_heads import add_lora, wrap
from czsl_heads.adapters.bottleneck import AdaptedBlock, Bottleneck, add_bottlenecks
from czsl_heads.adapters.patch_drop import drop_patches


@pytest.fixture
def images(generator):
    return torch.randn(5, 3, 42, 28, generator=generator)


def randomise(blocks, seed=0):
    """Give the adapters values, which their upper halves start without."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in blocks:
            for adapter in (block.attn_adapter, block.mlp_adapter):
                for parameter in adapter.parameters():
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return blocks


def test_an_adapter_is_down_relu_up_and_a_scale(generator):
    adapter = Bottleneck(7, 3, scale=0.3).double()
    stream = torch.randn(5, 2, 7, generator=generator).double()
    assert not adapter(stream).any()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    down, up = adapter.down_proj, adapter.up_proj
    expected = torch.stack([0.3 * (up.weight @ (down.weight @ row + down.bias).relu() + up.bias) for row in stream[1]])
    torch.testing.assert_close(adapter(stream)[1], expected)
    assert torch.autograd.gradcheck(adapter, stream.requires_grad_())


def test_dropout_falls_inside_the_bottleneck_in_training_only(generator):
    adapter = Bottleneck(7, 3, scale=1.0, dropout=1.0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    stream = torch.randn(5, 7, generator=generator)
    torch.testing.assert_close(adapter.train()(stream), adapter.up_proj.bias.expand(5, -1))
    assert not torch.allclose(adapter.eval()(stream), adapter.up_proj.bias.expand(5, -1))


def test_an_adapter_is_made_where_and_as_it_is_wanted():
    torch.manual_seed(0)
    double = Bottleneck(7, 3, device="cpu", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in double.parameters()} == {("cpu", torch.float64)}
    assert {p.device.type for p in Bottleneck(7, 3, device="meta").parameters()} == {"meta"}
    torch.manual_seed(0)
    first, second = Bottleneck(7, 3), Bottleneck(7, 3, device="cpu", dtype=torch.float32)
    torch.manual_seed(0)
    assert torch.equal(Bottleneck(7, 3).down_proj.weight, first.down_proj.weight)
    assert torch.equal(Bottleneck(7, 3).down_proj.weight, second.down_proj.weight)


def test_reset_starts_from_zero_again(generator):
    adapter = Bottleneck(7, 3)
    with torch.no_grad():
        adapter.up_proj.weight.fill_(1)
        adapter.down_proj.bias.fill_(1)
    adapter.reset_parameters()
    assert not adapter(torch.randn(5, 7, generator=generator)).any()
    assert not adapter.down_proj.bias.any()
    assert adapter.down_proj.weight.any()


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_adapters_that_are_not_trained_change_nothing(small_encoder, images, tower):
    with torch.no_grad():
        before = small_encoder.encode_tokens(images), small_encoder.encode_texts(["a photo of a dog"])
        add_bottlenecks(small_encoder, dim=3, tower=tower)
        after = small_encoder.encode_tokens(images), small_encoder.encode_texts(["a photo of a dog"])
    assert all(map(torch.equal, before, after))


def test_each_half_of_a_block_sees_the_stream_before_its_norm(small_encoder, generator):
    plain = copy.deepcopy(small_encoder.blocks("vision")[1])
    block = randomise(add_bottlenecks(small_encoder, dim=3))[1]
    stream = torch.randn(5, 4, 48, generator=generator)
    with torch.no_grad():
        middle = stream + plain.attention(plain.ln_1(stream)) + block.attn_adapter(stream)
        expected = middle + plain.mlp(plain.ln_2(middle)) + block.mlp_adapter(middle)
        torch.testing.assert_close(block(stream), expected)
    assert not torch.allclose(block(stream), plain(stream))


def test_the_text_tower_keeps_its_mask(small_encoder, generator):
    randomise(add_bottlenecks(small_encoder, dim=3, tower="text"))
    embeddings = torch.randn(2, 6, 56, generator=generator)
    changed = embeddings.clone()
    changed[:, 4:] += 1
    eos = torch.tensor([3, 2])
    first, second = (small_encoder.encode_embeddings(rows, eos) for rows in (embeddings, changed))
    torch.testing.assert_close(first, second)


def test_the_base_keeps_names_and_flags_and_only_adapters_train(small_encoder, images):
    before = {name: tensor.clone() for name, tensor in small_encoder.state_dict().items()}
    blocks = randomise(add_bottlenecks(small_encoder, dim=3))
    after = small_encoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained = {name for name, parameter in small_encoder.named_parameters() if parameter.requires_grad}
    assert trained == after.keys() - before.keys()
    assert len(trained) == len(blocks) * 2 * 4
    small_encoder.encode_tokens(images).sum().backward()
    grown = {name for name, parameter in small_encoder.named_parameters() if parameter.grad is not None}
    assert grown == trained


def test_open_clip_checkpoints_adapted_blocks(small_encoder, images):
    randomise(add_bottlenecks(small_encoder, dim=3))
    plain = small_encoder.encode_tokens(images)
    plain.sum().backward()
    gradients = {name: p.grad for name, p in small_encoder.named_parameters() if p.requires_grad}
    small_encoder.zero_grad()
    small_encoder.model.set_grad_checkpointing(True)
    small_encoder.train().encode_tokens(images).sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(small_encoder.get_parameter(name).grad, gradient)


def test_lora_may_be_inside(small_encoder, images):
    add_lora(small_encoder, rank=2)
    with torch.no_grad():
        before = small_encoder.encode_tokens(images)
        add_bottlenecks(small_encoder, dim=3)
        torch.testing.assert_close(small_encoder.encode_tokens(images), before)


def test_modes_and_types_are_those_of_the_block():
    encoder = wrap("tiny").to(torch.bfloat16)
    blocks = add_bottlenecks(encoder, dim=3)
    assert not any(module.training for block in blocks for module in block.modules())
    assert blocks[0].attn_adapter.up_proj.weight.dtype == torch.float32  # what is trained is not of half precision
    assert encoder.encode_tokens(torch.zeros(2, 3, 48, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert all(block.mlp_adapter.training for block in add_bottlenecks(wrap("tiny").train(), dim=3))


def test_adapters_come_once(small_encoder):
    assert all(isinstance(block, AdaptedBlock) for block in add_bottlenecks(small_encoder, dim=3))
    with pytest.raises(ValueError, match="vision tower without bottleneck adapters, got one that has them"):
        add_bottlenecks(small_encoder, dim=3)


def test_hooks_are_not_lost_in_silence(small_encoder):
    drop_patches(small_encoder, 0.5)
    with pytest.raises(ValueError, match="without hooks on its blocks"):
        add_bottlenecks(small_encoder)
    assert not any(isinstance(block, AdaptedBlock) for block in small_encoder.blocks("vision"))


def test_bad_arguments_are_named(small_encoder):
    with pytest.raises(ValueError, match="`dim` to be at least 1, got 0"):
        add_bottlenecks(small_encoder, dim=0)
    with pytest.raises(TypeError, match="`dim` to be an integer"):
        add_bottlenecks(small_encoder, dim=2.5)
    with pytest.raises(ValueError, match="`scale` to be positive and finite"):
        add_bottlenecks(small_encoder, scale=0)
    with pytest.raises(ValueError, match=r"`dropout` to be in \[0, 1\]"):
        add_bottlenecks(small_encoder, dropout=2)
    with pytest.raises(ValueError, match="`tower` to be one of vision, text"):
        add_bottlenecks(small_encoder, tower="image")
    with pytest.raises(TypeError, match="`encoder` to be an Encoder"):
        add_bottlenecks(small_encoder.model)
    assert not any(isinstance(block, AdaptedBlock) for block in small_encoder.blocks("vision"))


def test_blocks_of_another_kind_are_refused(small_clip_factory):
    encoder = wrap(small_clip_factory())
    encoder.blocks("vision")[1] = torch.nn.Identity()
    with pytest.raises(TypeError, match="open_clip's ResidualAttentionBlock, got Identity"):
        add_bottlenecks(encoder)
    assert not isinstance(encoder.blocks("vision")[0], AdaptedBlock)
