import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads.functional import combine


def draw(batch=2, pairs=7, attrs=3, objs=5, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probs = [torch.rand(batch, size, generator=generator).to(dtype) for size in (pairs, attrs, objs)]
    index = [torch.randint(size, (pairs,), generator=generator) for size in (attrs, objs)]
    return *probs, torch.stack(index, dim=1)


@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 7), st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=30)
def test_combine_equals_a_loop(sizes, seed):
    pair_probs, attr_probs, obj_probs, pairs = draw(*sizes, dtype=torch.float64, seed=seed)
    expected = pair_probs.clone()
    for b in range(len(expected)):
        for p, (attr, obj) in enumerate(pairs.tolist()):
            expected[b, p] += attr_probs[b, attr] * obj_probs[b, obj]
    assert torch.equal(combine(pair_probs, attr_probs, obj_probs, pairs), expected)


def test_impossible_primitives_add_nothing():
    pair_probs, attr_probs, obj_probs, pairs = draw()
    assert torch.equal(combine(pair_probs, torch.zeros_like(attr_probs), obj_probs, pairs), pair_probs)


def test_order_of_pairs_is_that_of_the_scores():
    pair_probs, attr_probs, obj_probs, pairs = draw()
    flipped = combine(pair_probs.flip(1), attr_probs, obj_probs, pairs.flip(0))
    assert torch.equal(flipped, combine(pair_probs, attr_probs, obj_probs, pairs).flip(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_inputs_are_kept(dtype):
    inputs = draw(dtype=dtype)
    before = [tensor.clone() for tensor in inputs]
    assert combine(*inputs).dtype == dtype
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before))


def test_gradients_are_right():
    *probs, pairs = draw(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: combine(*args, pairs), [prob.requires_grad_() for prob in probs])


@pytest.mark.parametrize(
    ("position", "wrong", "error", "message"),
    [
        (0, torch.zeros(2, 6), ValueError, r"expected `pairs` of shape \(pairs, 2\) with .*pairs=6.*got \(7, 2\)"),
        (1, torch.zeros(3, 3), ValueError, r"expected `attr_probs` of shape \(batch, attrs\) with batch=2"),
        (2, torch.zeros(5), ValueError, r"expected `obj_probs` of shape \(batch, objs\) .*got \(5,\)"),
        (3, torch.zeros(7, 3, dtype=torch.long), ValueError, r"expected `pairs` of shape \(pairs, 2\) .*got \(7, 3\)"),
        (0, torch.zeros(2, 7, dtype=torch.long), TypeError, r"expected `pair_probs` of dtype .*got torch.int64"),
        (1, [0.5], TypeError, r"expected `attr_probs` to be a torch.Tensor, got list"),
        (3, torch.zeros(7, 2), TypeError, r"expected `pairs` of dtype torch.int64, got torch.float32"),
        (3, [(0, 0)], TypeError, r"expected `pairs` to be a torch.Tensor, got list"),
    ],
)
def test_wrong_arguments_are_told(position, wrong, error, message):
    arguments = list(draw())
    arguments[position] = wrong
    with pytest.raises(error, match=message):
        combine(*arguments)
