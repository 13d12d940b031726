import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from czsl_heads.functional import combine, fuse


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


def branches(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, 7, generator=generator, dtype=dtype) for _ in range(3)]


@given(beta=st.floats(0, 1), gamma=st.floats(0, 3), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_fuse_equals_a_loop(beta, gamma, seed):
    sa, vac, bank = branches(seed=seed)
    fused = fuse(sa, vac, bank, beta=beta, gamma=gamma)
    for b in range(3):
        for p in range(7):
            expected = beta * sa[b, p] + (1 - beta) * (vac[b, p] + gamma * bank[b, p])
            assert fused[b, p].item() == pytest.approx(expected.item(), abs=1e-12)


def test_weights_at_their_ends_leave_one_branch():
    sa, vac, bank = branches()
    assert torch.equal(fuse(sa, vac, bank, beta=1, gamma=0.7), sa)
    assert torch.equal(fuse(sa, vac, None, beta=0, gamma=0), vac)


def test_a_bank_without_weight_has_no_say_whatever_it_holds():
    sa, vac, bank = branches()
    bank[0, 0] = -torch.inf
    assert torch.equal(fuse(sa, vac, bank, beta=0.3, gamma=0), fuse(sa, vac, None, beta=0.3, gamma=0))


def test_fuse_has_right_gradients_and_leaves_its_inputs():
    parts = [part.requires_grad_() for part in branches()]
    before = [part.clone() for part in parts]
    assert torch.autograd.gradcheck(lambda *args: fuse(*args, beta=0.3, gamma=0.5), parts)
    assert all(torch.equal(part, copy) for part, copy in zip(parts, before))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sa": torch.zeros(3, 6)}, ValueError, r"expected `vac` of shape \(batch, pairs\) with batch=3, pairs=6"),
        ({"bank": torch.zeros(2, 7)}, ValueError, r"expected `bank` of shape \(batch, pairs\) .*got \(2, 7\)"),
        ({"vac": [1.0]}, TypeError, "expected `vac` to be a torch.Tensor, got list"),
        ({"bank": 0.5}, TypeError, "expected `bank` to be a torch.Tensor, got float"),
        ({"bank": None}, ValueError, "expected `bank` with gamma above 0, got None with gamma=0.5"),
        ({"beta": 1.5}, ValueError, r"expected `beta` to be in \[0, 1\], got 1.5"),
        ({"gamma": -1.0}, ValueError, "expected `gamma` to be at least 0, got -1.0"),
        ({"beta": "half"}, TypeError, "expected `beta` to be a number"),
    ],
)
def test_wrong_arguments_of_fuse_are_told(changes, error, message):
    names = dict(zip(("sa", "vac", "bank"), branches()))
    with pytest.raises(error, match=message):
        fuse(**{**names, "beta": 0.3, "gamma": 0.5, **changes})


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("wrong", [-1, 99])
def test_indices_out_of_range_are_told(column, wrong):
    pair_probs, attr_probs, obj_probs, pairs = draw()
    pairs[4, column] = wrong  # -1 would be the last attribute or object, in silence
    most = (attr_probs, obj_probs)[column].shape[1] - 1
    with pytest.raises(ValueError, match=rf"expected `pairs\[:, {column}\]` to be in \[0, {most}\], got {wrong}"):
        combine(pair_probs, attr_probs, obj_probs, pairs)
    with pytest.raises(RuntimeError, match=rf"expected `pairs\[:, {column}\]` to be in \[0, {most}\]"):
        torch.compile(combine, backend="aot_eager", fullgraph=True)(pair_probs, attr_probs, obj_probs, pairs)


def test_indices_without_values_are_not_looked_at():
    *probs, pairs = draw()
    expected = combine(*probs, pairs)
    batched = torch.vmap(combine, in_dims=(None, None, None, 0))(*probs, torch.stack([pairs, pairs]))
    assert torch.equal(batched, torch.stack([expected, expected]))
    assert torch.equal(make_fx(combine)(*probs, pairs)(*probs, pairs), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        empty = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (*probs, pairs)]
        assert combine(*empty).shape == expected.shape


def test_no_primitives_are_told():
    pair_probs, attr_probs, obj_probs, pairs = draw()
    with pytest.raises(ValueError, match=r"expected `pairs\[:, 0\]` of no index at all, got"):
        combine(pair_probs, attr_probs[:, :0], obj_probs, pairs)
