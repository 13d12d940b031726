"""What every family of CLIP has to do, whatever the container: small random models of the real classes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from czsl_heads.adapters.patch_drop import drop_patches
from czsl_heads.encoders.protocol import Encoder, OpenTextTower
from czsl_heads.encoders.towers import TextTower
from tests.encoders.families import (
    FAMILIES,
    FIXED_SIZE,
    OVERLAPPING,
    WITH_BIAS,
    build,
    own_image_features,
    own_scale,
    own_text_features,
)

TEXTS = ["red circle", "a dog", "old boots, worn out"]


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def encoder(name):
    return build(name)


def side_lengths(encoder):
    size = encoder.image_size
    return (size, size) if isinstance(size, int) else size


def images_for(encoder, batch=3, seed=0):
    return torch.randn(batch, 3, *side_lengths(encoder), generator=torch.Generator().manual_seed(seed))


class Bypass(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, hidden, *arguments, **options):
        self.calls += 1
        return hidden


def test_it_has_the_members_of_the_protocol_and_none_is_learned(encoder):
    assert isinstance(encoder, Encoder)
    assert isinstance(encoder, OpenTextTower)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert {id(parameter) for parameter in encoder.parameters()} == {id(p) for p in encoder.model.parameters()}


def test_token_zero_is_the_image_feature_of_the_container(encoder):
    images = images_for(encoder)
    tokens = encoder.encode_tokens(images)
    rows, columns = encoder.grid
    assert tokens.shape == (3, 1 + rows * columns, encoder.dim)
    assert rows != columns
    expected = own_image_features(encoder, images)
    assert expected.std() > 0.1  # or 1e-5 would be no bound
    torch.testing.assert_close(tokens[:, 0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode_images(images), expected, rtol=0, atol=0)


def test_texts_equal_those_of_the_container(encoder):
    expected = own_text_features(encoder, TEXTS)
    assert expected.shape == (3, encoder.dim)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), expected, rtol=0, atol=1e-5)
    embeddings, position = encoder.embed_texts(TEXTS)
    assert embeddings.shape[2] == encoder.text_dim
    assert (embeddings.shape[1] < encoder.context_length) is encoder.causal_text
    torch.testing.assert_close(encoder.encode_embeddings(embeddings, position), expected, rtol=0, atol=1e-5)


def test_text_blocks_run_from_outside_as_they_do_inside(encoder):
    if type(encoder.text).encode is not TextTower.encode:
        pytest.skip("a tower that pools otherwise than where the text ends is run as a whole")
    embeddings, position = encoder.embed_texts(TEXTS)
    hidden = encoder.text.run(encoder.enter_text_blocks(embeddings))
    features = encoder.leave_text_blocks(hidden[torch.arange(3), position])
    torch.testing.assert_close(features, encoder.encode_texts(TEXTS), rtol=0, atol=1e-6)


def test_a_text_that_is_cut_raises(encoder):
    letters = "a" * (encoder.context_length + 1)
    message = rf"`texts` of at most {encoder.context_length} tokens, got (more|\d+ tokens) in 'aaa"
    with pytest.raises(ValueError, match=message):
        encoder.encode_texts(["red", letters])


def test_the_parts_of_the_vision_tower_make_up_the_whole(encoder):
    images, vision = images_for(encoder), encoder.vision
    hidden = vision.enter(images)
    assert hidden.shape[1] == encoder.num_prefix + encoder.grid[0] * encoder.grid[1]
    for block in encoder.blocks("vision"):
        hidden = vision.step(block, hidden)
    torch.testing.assert_close(vision.leave(hidden), encoder.encode_tokens(images), rtol=0, atol=1e-6)


def test_each_image_is_encoded_by_itself(encoder):
    images = images_for(encoder)
    alone = torch.cat([encoder.encode_tokens(image[None]) for image in images])
    torch.testing.assert_close(encoder.encode_tokens(images), alone, rtol=0, atol=1e-5)


def test_patches_come_row_by_row(encoder, name):
    height, width = (size // count for size, count in zip(side_lengths(encoder), encoder.grid))
    slack = 1 if name in OVERLAPPING else 0
    if slack:
        encoder.vision.resize((6 * height, 4 * width))
    for index in range(len(encoder.blocks("vision"))):
        encoder.blocks("vision")[index] = Bypass()  # nothing goes from patch to patch
    rows, columns = encoder.grid
    grey, square = torch.zeros_like(images_for(encoder, 1)), images_for(encoder, 1)[..., :height, :width]
    before = encoder.encode_tokens(grey)[0, 1:]
    for row in range(rows):
        for column in range(columns):
            images = grey.clone()
            images[..., row * height : (row + 1) * height, column * width : (column + 1) * width] = square
            moved = (encoder.encode_tokens(images)[0, 1:] - before).norm(dim=-1)
            found = divmod(moved.argmax().item(), columns)
            assert max(abs(found[0] - row), abs(found[1] - column)) <= slack


def test_blocks_are_replaced_in_place(encoder):
    images = images_for(encoder)
    before = encoder.encode_tokens(images)
    blocks = encoder.blocks("vision")
    assert len(blocks) == len(list(blocks)) == 3
    blocks[1] = Bypass()
    after = encoder.encode_tokens(images)
    assert blocks[1].calls == 1
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after[:, 0], own_image_features(encoder, images), rtol=0, atol=1e-5)
    text_blocks = encoder.blocks("text")
    assert len(text_blocks) == len(list(text_blocks)) == 2


def test_it_can_be_trained_and_frozen_again(encoder):
    encoder.requires_grad_(True)
    encoder.encode_tokens(images_for(encoder)).square().sum().backward()
    encoder.encode_texts(TEXTS).square().sum().backward()
    blocks = [*encoder.blocks("vision").parameters(), *encoder.blocks("text").parameters()]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in blocks)
    encoder.requires_grad_(False)
    assert not encoder.encode_tokens(images_for(encoder)).requires_grad


def test_gradients_go_through_a_frozen_model_to_its_inputs(encoder):
    images = images_for(encoder).requires_grad_()
    embeddings, position = encoder.embed_texts(TEXTS)
    embeddings.requires_grad_()
    (of_images,) = torch.autograd.grad(encoder.encode_tokens(images).square().sum(), images)
    (of_texts,) = torch.autograd.grad(encoder.encode_embeddings(embeddings, position).square().sum(), embeddings)
    assert all(gradient.any() for gradient in (*of_images, *of_texts))


def test_checkpoints_change_no_gradient(encoder):
    images = images_for(encoder).requires_grad_()
    found = []
    for checkpoint in (False, True):
        tokens = encoder.encode_tokens(images, checkpoint=checkpoint)
        found.append((tokens, *torch.autograd.grad(tokens.square().sum(), images)))
    for plain, again in zip(*found):
        assert torch.equal(plain, again)


def test_checkpoints_run_the_blocks_again(encoder):
    images, calls = images_for(encoder).requires_grad_(), []
    encoder.blocks("vision")[1].register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = encoder.encode_tokens(images, checkpoint=True)
    assert len(calls) == 1
    tokens.sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        encoder.encode_tokens(images, checkpoint=True)
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_it_computes_in_the_dtype_of_its_weights(encoder, dtype):
    images = images_for(encoder)
    tokens, texts = encoder.encode_tokens(images), encoder.encode_texts(TEXTS)
    encoder.to(dtype)
    cast_tokens, cast_texts = encoder.encode_tokens(images.to(dtype)), encoder.encode_texts(TEXTS)
    assert cast_tokens.dtype == cast_texts.dtype == dtype
    bound = {torch.float16: 0.02, torch.bfloat16: 0.2, torch.float64: 1e-5}[dtype]  # 11, 8 and 53 bits
    torch.testing.assert_close(cast_tokens.float(), tokens, rtol=0, atol=bound)
    torch.testing.assert_close(cast_texts.float(), texts, rtol=0, atol=bound)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_a_copy_is_another_encoder_of_the_same_tokens(encoder, again):
    images = images_for(encoder)
    twin = again(encoder)
    assert torch.equal(twin.encode_tokens(images), encoder.encode_tokens(images))
    assert torch.equal(twin.encode_texts(TEXTS), encoder.encode_texts(TEXTS))
    twin.blocks("vision")[0] = Bypass()
    assert not torch.allclose(twin.encode_tokens(images), encoder.encode_tokens(images))


def test_it_compiles_without_a_break(encoder):
    images = images_for(encoder)
    torch.compiler.reset()
    compiled = torch.compile(encoder.encode_tokens, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), encoder.encode_tokens(images), rtol=0, atol=1e-5)


def test_no_images_give_no_tokens(encoder):
    none = images_for(encoder, batch=0)
    rows, columns = encoder.grid
    assert encoder.encode_tokens(none).shape == (0, 1 + rows * columns, encoder.dim)
    assert encoder.encode_images(none).shape == (0, encoder.dim)


def test_images_of_another_shape_raise(encoder):
    height, width = side_lengths(encoder)
    for shape in ((3, height, width), (2, 3, width, height), (2, 1, height, width), (2, 3, height + 1, width)):
        with pytest.raises(ValueError, match=rf"expected `images` of shape \(batch, 3, {height}, {width}\)"):
            encoder.encode_tokens(torch.zeros(shape))


def test_scale_and_bias_are_those_of_the_logits(encoder, name):
    assert encoder.logit_scale.shape == ()
    torch.testing.assert_close(encoder.logit_scale, own_scale(encoder), rtol=0, atol=0)
    assert (encoder.logit_bias is not None) is (name in WITH_BIAS)
    if encoder.logit_bias is not None:
        assert encoder.logit_bias.shape == ()
        assert encoder.logit_bias.item() == encoder.model.logit_bias.item() != 0


def test_it_takes_images_of_another_size(encoder, name):
    rows, columns = encoder.grid
    height, width = (size // count for size, count in zip(side_lengths(encoder), encoder.grid))
    other = ((rows + 1) * height, (columns + 2) * width)
    if name in FIXED_SIZE:
        with pytest.raises(ValueError, match="expected"):
            encoder.vision.resize(other)
        return
    encoder.vision.resize(other)
    assert encoder.image_size == (other[0] if other[0] == other[1] else other)
    assert encoder.grid == (rows + 1, columns + 2)
    images = images_for(encoder)
    tokens = encoder.encode_tokens(images)
    assert tokens.shape == (3, 1 + (rows + 1) * (columns + 2), encoder.dim)
    torch.testing.assert_close(tokens[:, 0], own_image_features(encoder, images), rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    with pytest.raises(ValueError, match="expected `image_size`"):
        encoder.vision.resize((height - 1, width))


def test_dropped_patches_leave_the_feature_token(encoder):
    images = images_for(encoder)
    whole = encoder.encode_tokens(images)
    handle = drop_patches(encoder, 0.5)
    assert torch.equal(encoder.encode_tokens(images), whole)
    encoder.train()
    for checkpoint in (False, True):
        torch.manual_seed(1)
        part = encoder.encode_tokens(images.clone().requires_grad_(), checkpoint=checkpoint)
        assert part.shape == (3, 1 + 3, encoder.dim)
    torch.manual_seed(1)
    feature = own_image_features(encoder, images)
    torch.testing.assert_close(part[:, 0], feature, rtol=0, atol=1e-5)
    assert not torch.allclose(feature, whole[:, 0])
    handle.remove()
    assert encoder.encode_tokens(images).shape == whole.shape
