import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads.functional.experts import gates, mix_experts, moves_tokens, route
from tests.references import reference_mix_experts

WAYS = ("sparse", "joined")


def draw(tokens=11, dim=7, experts=5, rank=3, k=2, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, dim), (experts, rank, dim), (experts, dim, rank), (tokens, experts))
    rows, down, up, logits = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return rows, down, up, *route(logits, k)


@given(
    sizes=st.tuples(st.integers(0, 13), st.integers(1, 7), st.integers(1, 6), st.integers(1, 3)),
    chosen=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_loop(sizes, chosen, seed):
    k = 1 + round(chosen * (sizes[2] - 1))  # from one expert of each token to all of them
    inputs = draw(*sizes, k, seed=seed)
    expected = reference_mix_experts(*inputs)
    for way in WAYS:
        torch.testing.assert_close(mix_experts(*inputs, dispatch=way), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("logits", ["drawn", "all to one"])
def test_gradients(way, logits):
    rows, down, up, _, _ = draw(tokens=5, dim=3, experts=3, rank=2)
    of_router = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    if logits == "all to one":
        of_router[:, 1] += 100
    inputs = [tensor.requires_grad_() for tensor in (rows, down, up, of_router)]
    mix = lambda x, a, b, r: mix_experts(x, a, b, *route(r, 2), dispatch=way)  # noqa: E731
    assert torch.autograd.gradcheck(mix, inputs)


@pytest.mark.parametrize("way", WAYS)
def test_one_expert_is_a_low_rank_product(way):
    rows, down, up, _, _ = draw(experts=1, k=1)
    weights, experts = route(torch.randn(11, 1), 1)
    mixed = mix_experts(rows, down, up, weights, experts, dispatch=way)
    torch.testing.assert_close(mixed, rows @ down[0].T @ up[0].T)


@pytest.mark.parametrize("way", WAYS)
def test_all_tokens_may_go_to_one_expert(way):
    rows, down, up, _, _ = draw()
    experts = torch.full((11, 1), 3)
    mixed = mix_experts(rows, down, up, torch.ones(11, 1, dtype=torch.float64), experts, dispatch=way)
    torch.testing.assert_close(mixed, rows @ down[3].T @ up[3].T)


@pytest.mark.parametrize("way", WAYS)
def test_each_token_is_by_itself(way):
    rows, down, up, weights, experts = draw()
    whole = mix_experts(rows, down, up, weights, experts, dispatch=way)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    shuffled = mix_experts(rows[order], down, up, weights[order], experts[order], dispatch=way)
    torch.testing.assert_close(shuffled, whole[order])
    part = mix_experts(rows[:4], down, up, weights[:4], experts[:4], dispatch=way)
    torch.testing.assert_close(part, whole[:4])


def test_experts_may_be_renamed():
    rows, down, up, weights, experts = draw()
    order = torch.tensor([3, 0, 4, 1, 2])
    renamed = order.argsort()[experts]
    for way in WAYS:
        found = mix_experts(rows, down[order], up[order], weights, renamed, dispatch=way)
        torch.testing.assert_close(found, mix_experts(rows, down, up, weights, experts, dispatch=way))


def test_the_dtype_is_that_of_the_tokens():
    rows, down, up, weights, experts = draw()
    expected = mix_experts(rows, down, up, weights, experts)
    for way in WAYS:
        found = mix_experts(rows.bfloat16(), down.float(), up.float(), weights.float(), experts, dispatch=way)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0.5)


def test_weights_are_a_softmax_over_the_chosen():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    weights, experts = route(logits, 3)
    assert experts.tolist() == [[1, 3, 2], [0, 1, 2]]  # of equals the first
    torch.testing.assert_close(weights, torch.tensor([[2.0, 2.0, 1.0], [1.0, 1.0, 1.0]]).softmax(dim=1))
    spread = gates(weights, experts, 4)
    assert spread[0, 0] == 0
    assert spread[1, 3] == 0
    torch.testing.assert_close(spread.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(gates(*route(logits, 4), 4), logits.softmax(dim=1))


def test_few_units_are_joined_and_many_moved():
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert not moves_tokens("auto", cpu, experts=8, rank=8, k=2)
    assert moves_tokens("auto", cpu, experts=64, rank=16, k=2)
    assert not moves_tokens("auto", other, experts=64, rank=16, k=2)
    assert moves_tokens("sparse", other, experts=8, rank=8, k=2)


def test_wrong_input_is_told():
    rows, down, up, weights, experts = draw()
    with pytest.raises(ValueError, match=r"expected `k` to be in \[1, 5\], got 6"):
        route(torch.zeros(2, 5), 6)
    with pytest.raises(ValueError, match="expected `dispatch` to be one of auto, sparse, joined, got 'dense'"):
        mix_experts(rows, down, up, weights, experts, dispatch="dense")
    with pytest.raises(ValueError, match=r"expected `up` of shape \(experts, dim, rank\)"):
        mix_experts(rows, down, down, weights, experts)
    with pytest.raises(TypeError, match="expected `experts` of dtype"):
        mix_experts(rows, down, up, weights, weights)
