"""Losses of a batch in parts: the numbers of the whole, in the memory of a part."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from czsl_heads import CompositionSpace, wrap
from czsl_heads.adapters.lora import add_lora
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.sac import Aligned
from czsl_heads.prompts.soft import TextFeatures
from czsl_heads.training.micro_batch import losses_in_parts

IMAGES = 11


@pytest.fixture
def model() -> Condensed:
    """SAC, all of it trained at once."""
    torch.manual_seed(0)
    names = [f"attribute {i}" for i in range(5)], [f"object {i}" for i in range(7)]
    space = CompositionSpace(*names, seen=[(i % 5, i) for i in range(7)])
    encoder = wrap("tiny")
    for module in add_lora(encoder, rank=2):
        for delta in module.deltas.values():
            nn.init.normal_(delta.b, std=0.1)  # or nothing would reach what stands before it
    return Condensed(Aligned(encoder, space), joint=True).train()


@pytest.fixture
def batch(generator: torch.Generator) -> list[Tensor]:
    columns = torch.randint(7, (IMAGES,), generator=generator)
    return [torch.randn(IMAGES, 3, 48, 48, generator=generator), columns]


def trained(model: Condensed) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole(model: Condensed, batch, texts: TextFeatures | None = None) -> dict[str, Tensor]:
    pairs = model.space.pairs
    texts = model.texts(pairs) if texts is None else texts
    return model.losses(model.compare(model.encode(batch[0]), texts)[0], pairs, batch[-1])


def in_parts(model: Condensed, batch, size: int, **options) -> dict[str, Tensor]:
    def losses(part, texts: TextFeatures) -> dict[str, Tensor]:
        return whole(model, part, texts)

    texts = model.texts(model.space.pairs)
    return losses_in_parts(losses, batch, texts, [*trained(model).values()], size=size, **options)


def gradients(model: Condensed, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trained(model).items()}


@pytest.mark.parametrize("size", [1, 4, 10, 11, 1000])
def test_losses_and_gradients_are_those_of_the_whole(model: Condensed, batch, size: int) -> None:
    model, batch = model.double(), [batch[0].double(), batch[1]]
    expected = whole(model, batch)
    wanted = gradients(model, expected["loss"])
    found = in_parts(model, batch, size)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=0)
    for name, gradient in gradients(model, found["loss"]).items():
        assert gradient.any()
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-9 * float(wanted[name].abs().max()))


def test_only_the_loss_has_gradients(model: Condensed, batch) -> None:
    found = in_parts(model, batch, 4)
    assert {name for name, value in found.items() if value.requires_grad} == {"loss"}


def test_an_incoming_gradient_is_a_factor(model: Condensed, batch) -> None:
    once = gradients(model, in_parts(model, batch, 4)["loss"])
    halved = gradients(model, in_parts(model, batch, 4)["loss"] / 2)
    for name, gradient in once.items():
        torch.testing.assert_close(halved[name], gradient / 2)


def test_a_part_alone_under_autocast_is_the_whole_under_autocast(model: Condensed, batch) -> None:
    found = []
    for run in (lambda: whole(model, batch), lambda: in_parts(model, batch, IMAGES)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = run()["loss"]
        found.append(gradients(model, loss))
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_texts_and_parameters_that_stand_still_get_no_gradient(generator: torch.Generator) -> None:
    texts = TextFeatures(*(torch.rand(3, 2, generator=generator) for _ in range(3)))
    texts.objects.requires_grad_()
    used, unused = (torch.rand(2, generator=generator, requires_grad=True) for _ in range(2))

    def losses(part, texts: TextFeatures) -> dict[str, Tensor]:
        return {"loss": (part[0] @ (texts.pairs * used * texts.objects).T).mean()}

    batch = [torch.rand(5, 2, generator=generator), torch.arange(5)]
    losses_in_parts(losses, batch, texts, [used, unused], size=2)["loss"].backward()
    assert texts.pairs.grad is None
    assert unused.grad is None
    expected = torch.autograd.grad(losses(batch, texts)["loss"], [used, texts.objects])
    for leaf, gradient in zip((used, texts.objects), expected):
        torch.testing.assert_close(leaf.grad, gradient)


def test_gradients_that_share_memory_are_summed_apart() -> None:
    one, other = (torch.zeros(1, requires_grad=True) for _ in range(2))
    texts = TextFeatures(*(torch.ones(1, 1) for _ in range(3)))
    found = losses_in_parts(
        lambda part, _: {"loss": (part[0] * (one + other)).mean()},
        [torch.arange(1.0, 7.0)],
        texts,
        [one, other],
        size=2,
    )
    found["loss"].backward()
    assert one.grad == other.grad == 3.5


def test_a_scale_saves_gradients_from_half_precision() -> None:
    texts = TextFeatures(*(torch.ones(1, 1) for _ in range(3)))
    weight = torch.ones(1, requires_grad=True)

    def losses(part, _) -> dict[str, Tensor]:
        return {"loss": 1e-9 * (weight.half() * part[0].half()).float().mean()}

    found = {}
    for scale in (1.0, 2.0**16):
        weight.grad = None
        # As a gradient scaler does: multiplied before the backward pass, divided after it.
        (
            scale * losses_in_parts(losses, [torch.arange(1.0, 7.0)], texts, [weight], size=2, scale=scale)["loss"]
        ).backward()
        found[scale] = float(weight.grad) / scale
    assert found[1.0] == 0
    assert found[2.0**16] == pytest.approx(3.5e-9, rel=1e-2)


def test_hooks_of_data_parallel_training_see_the_gradients_once(model: Condensed, batch) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return in_parts(model, batch, 4)["loss"]

    wanted = gradients(model, in_parts(model, batch, 4)["loss"])
    reduced = []

    def hook(_, bucket) -> torch.futures.Future[Tensor]:
        reduced.extend(bucket.parameters())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(2 * bucket.buffer())
        return done

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(Step())
        parallel.register_comm_hook(None, hook)
        found = gradients(model, parallel())
    finally:
        dist.destroy_process_group()
    assert {*map(id, reduced)} == {*map(id, trained(model).values())}
    assert len(reduced) == len(trained(model))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], 2 * gradient)


def most_kept(run: Callable[[], object], ignored: list[Tensor]) -> int:
    """Bytes kept for backward passes at their peak, each piece of memory counted once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in ignored}
    users: dict[int, int] = {}
    held = peak = 0

    def release(pointer: int, size: int) -> None:
        nonlocal held
        users[pointer] -= 1
        held -= 0 if users[pointer] else size

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Tensor | Kept:
        nonlocal held, peak
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in known:
            return tensor
        users[pointer] = users.get(pointer, 0) + 1
        held += size if users[pointer] == 1 else 0
        peak = max(peak, held)
        kept = Kept(tensor)
        weakref.finalize(kept, release, pointer, size)
        return kept

    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor if isinstance(kept, Kept) else kept):
        result = run()
    del result
    return peak


def test_memory_is_that_of_the_texts_and_one_part(model: Condensed, batch) -> None:
    ignored = [*model.parameters(), *model.buffers(), *batch]
    texts = most_kept(lambda: model.texts(model.space.pairs), ignored)
    all_at_once = most_kept(lambda: whole(model, batch), ignored)
    few_at_once = most_kept(lambda: in_parts(model, batch, 3), ignored)
    one_part = most_kept(lambda: whole(model, [rows[:3] for rows in batch]), ignored)
    learned = sum(parameter.nbytes for parameter in trained(model).values())  # the gradients, which are kept
    assert all_at_once - texts > 3 * (one_part - texts)
    assert few_at_once <= one_part + learned


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 0}, ValueError, "expected `size` to be at least 1, got 0"),
        ({"size": 2.0}, TypeError, "expected `size` to be an integer, got 2.0"),
        ({"size": 2, "scale": 0.0}, ValueError, "expected `scale` to be positive and finite, got 0.0"),
    ],
)
def test_wrong_arguments_raise(model: Condensed, batch, options: dict, error, message: str) -> None:
    with pytest.raises(error, match=message):
        in_parts(model, batch, **options)
