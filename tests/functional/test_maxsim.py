import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from czsl_heads.functional import maxsim, maxsim_op
from czsl_heads.functional.maxsim_op import streamed
from tests.references import reference_maxsim

HALVES = (torch.bfloat16, torch.float16)
# Products are summed in another order than the reference's, never in another precision.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
# One chunk, and chunks of one or a few images and texts.
WAYS = [
    {"backend": "dense"},
    {"backend": "stream"},
    {"backend": "stream", "chunk_bytes": 1},
    {"backend": "stream", "chunk_bytes": 700},
]


def draw(batch=2, tokens=7, texts=3, dim=5, *, per_image=False, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text_shape = (batch, texts, dim) if per_image else (texts, dim)
    return (
        torch.randn(batch, tokens, dim, generator=generator).to(dtype),
        torch.randn(text_shape, generator=generator).to(dtype),
    )


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 5), st.integers(1, 7)),
    per_image=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    way=st.sampled_from(WAYS),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_maxsim_equals_three_loops(sizes, per_image, dtype, way, seed, data):
    tokens, texts = draw(*sizes, per_image=per_image, dtype=dtype, seed=seed)
    k = data.draw(st.integers(1, sizes[1]))
    scores, index = maxsim(tokens, texts, k=k, return_index=True, **way)
    expected, _ = reference_maxsim(tokens, texts, k=k)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(scores.double(), expected, **TOLERANCE)
    torch.testing.assert_close(maxsim(tokens, texts, k=k, **way), scores, **TOLERANCE)  # which looks for no index
    # Two products closer than the rounding may change places, so the index is judged by what it picks.
    shown = texts if per_image else texts.expand(sizes[0], -1, -1)
    picked = torch.einsum("bld,bcd->bcl", tokens.double(), shown.double()).gather(2, index.reshape(*scores.shape, k))
    torch.testing.assert_close(picked.mean(dim=2), expected, **TOLERANCE)


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3)),
    way=st.sampled_from(WAYS),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_ties_go_to_the_lowest_index_best_first(sizes, way, seed, data):
    # Small integers: products are exact and many are equal.
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-1, 2, (*sizes[:2], sizes[3]), generator=generator).float()
    texts = torch.randint(-1, 2, sizes[2:], generator=generator).float()
    k = data.draw(st.integers(1, sizes[1]))
    _, index = maxsim(tokens, texts, k=k, return_index=True, **way)
    _, expected = reference_maxsim(tokens, texts, k=k)
    assert index.dtype == torch.int64
    assert torch.equal(index, expected[..., 0] if k == 1 else expected)


def test_ties_go_to_the_lowest_index_in_long_rows():
    tokens = torch.ones(2, 577, 3)
    assert not maxsim(tokens, torch.ones(67, 3), return_index=True)[1].any()
    index = maxsim(tokens, torch.ones(67, 3), k=5, return_index=True)[1]
    assert torch.equal(index, torch.arange(5).expand(2, 67, 5))


def test_hand_sized_values():
    tokens = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 0.5]]])
    scores, index = maxsim(tokens, torch.eye(2), k=2, return_index=True)
    torch.testing.assert_close(scores, torch.tensor([[0.8, 0.65]]))
    assert index.tolist() == [[[0, 1], [1, 2]]]


def test_one_token_is_a_plain_product():
    tokens, texts = draw(tokens=1)
    torch.testing.assert_close(maxsim(tokens, texts), tokens[:, 0] @ texts.mT)


def test_all_tokens_are_the_mean():
    tokens, texts = draw()
    torch.testing.assert_close(maxsim(tokens, texts, k=7), tokens.mean(dim=1) @ texts.mT)


def test_one_text_is_a_column():
    tokens, texts = draw()
    torch.testing.assert_close(maxsim(tokens, texts[1:2]), maxsim(tokens, texts)[:, 1:2])


@pytest.mark.parametrize(("batch", "texts"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("per_image", [False, True])
def test_nothing_in_nothing_out(batch, texts, k, per_image):
    inputs = [value.requires_grad_() for value in draw(batch=batch, texts=texts, per_image=per_image)]
    scores, index = maxsim(*inputs, k=k, return_index=True)
    assert scores.shape == (batch, texts)
    assert index.shape == ((batch, texts) if k == 1 else (batch, texts, k))
    scores.sum().backward()
    assert all(torch.equal(value.grad, torch.zeros_like(value)) for value in inputs)


@pytest.mark.parametrize("k", [1, 3])
def test_own_texts_of_each_image_equal_images_one_by_one(k):
    tokens, texts = draw(per_image=True)
    rows = [maxsim(tokens[b : b + 1], texts[b], k=k) for b in range(2)]
    torch.testing.assert_close(maxsim(tokens, texts, k=k), torch.cat(rows))


@pytest.mark.parametrize("k", [1, 4])
def test_order_of_tokens_does_not_matter(k):
    tokens, texts = draw(dtype=torch.float64)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    scores, index = maxsim(tokens, texts, k=k, return_index=True)
    permuted, moved = maxsim(tokens[:, order], texts, k=k, return_index=True)
    torch.testing.assert_close(permuted, scores)
    assert torch.equal(order[moved], index)


@pytest.mark.parametrize("k", [1, 2])
def test_gradient_reaches_the_first_of_equal_tokens_only(k):
    tokens = torch.ones(1, 5, 3, requires_grad=True)
    maxsim(tokens, torch.tensor([[1.0, 2.0, 3.0]]), k=k).sum().backward()
    expected = torch.zeros(1, 5, 3)
    expected[0, :k] = torch.tensor([1.0, 2.0, 3.0]) / k
    assert torch.equal(tokens.grad, expected)


@pytest.mark.parametrize("way", [*WAYS, {"select": "bf16"}])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("per_image", [False, True])
def test_gradients_are_right(k, per_image, way):
    tokens, texts = draw(per_image=per_image, dtype=torch.float64)
    inputs = tokens.requires_grad_(), texts.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: maxsim(*args, k=k, **way), inputs)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_are_those_of_the_dense_way(k, per_image, dtypes, wanted):
    def gradients(way):
        inputs = draw(3, 11, 13, 5, per_image=per_image)
        inputs = [value.to(dtype).requires_grad_(need) for value, dtype, need in zip(inputs, dtypes, wanted)]
        scores = maxsim(*inputs, k=k, **way)
        scores.backward(torch.linspace(-1, 2, scores.numel()).view_as(scores))
        return [value.grad for value in inputs]

    expected = gradients({"backend": "dense"})
    for way in WAYS[1:]:
        for grad, dense, dtype in zip(gradients(way), expected, dtypes):
            assert (grad is None) == (dense is None)
            if grad is not None:
                assert grad.dtype == dtype
                torch.testing.assert_close(grad, dense)


def test_only_the_chosen_tokens_get_a_gradient():
    tokens, texts = draw(tokens=41)
    tokens.requires_grad_()
    scores, index = maxsim(tokens, texts, return_index=True)
    scores.sum().backward()
    touched = tokens.grad.ne(0).any(dim=2)
    assert touched.sum() == sum(len(set(row.tolist())) for row in index)
    assert touched.gather(1, index).all()


def test_gradients_repeat_to_the_bit():
    tokens, texts = draw(5, 31, 301, 17)
    torch.use_deterministic_algorithms(True)
    try:
        grads = []
        for _ in range(3):
            inputs = tokens.clone().requires_grad_(), texts.clone().requires_grad_()
            maxsim(*inputs).square().sum().backward()
            grads.append([value.grad for value in inputs])
    finally:
        torch.use_deterministic_algorithms(False)
    for again in grads[1:]:
        assert all(torch.equal(one, other) for one, other in zip(again, grads[0]))


def test_no_second_derivative_but_the_dense_one():
    tokens, texts = draw()
    tokens.requires_grad_()
    for backend in ("stream", "dense"):
        scores = maxsim(tokens, texts.square(), backend=backend)
        (grad,) = torch.autograd.grad(scores.square().sum(), tokens, create_graph=True)
        if backend == "dense":
            grad.sum().backward()
            assert tokens.grad.any()
        else:
            with pytest.raises(
                NotImplementedError, match=r"expected one derivative of maxsim.*backend=\"dense\" has it"
            ):
                grad.sum().backward()


def test_no_vmap_but_the_dense_one():
    tokens, texts = draw(batch=4)
    split = tokens.view(2, 2, *tokens.shape[1:])
    dense = torch.vmap(lambda part: maxsim(part, texts, backend="dense"))(split)
    torch.testing.assert_close(dense.flatten(0, 1), maxsim(tokens, texts))
    with pytest.raises(NotImplementedError, match=r"expected maxsim outside torch.vmap.*backend=\"dense\" has vmap"):
        torch.vmap(lambda part: maxsim(part, texts))(split)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own doing, on first forward mode
def test_no_forward_mode_but_the_dense_one():
    tokens, texts = draw()

    def forward(backend):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(
                maxsim(forward_ad.make_dual(tokens, tokens.clone()), texts, backend=backend)
            ).tangent

    transforms = {
        "jvp": lambda way: torch.func.jvp(way, (tokens,), (tokens,))[1],
        "grad": lambda way: torch.func.grad(lambda value: way(value).sum())(tokens),
        "vjp": lambda way: torch.func.vjp(way, tokens)[0],
    }
    torch.testing.assert_close(forward("dense"), maxsim(tokens, texts))  # it is linear in the tokens that win
    with pytest.raises(NotImplementedError, match=r"outside torch.func and forward-mode .*backend=\"dense\" has both"):
        forward("stream")
    for transform in transforms.values():
        assert transform(lambda value: maxsim(value, texts, backend="dense")).any()
        with pytest.raises(NotImplementedError, match=r"outside torch.func and forward-mode .*backend=\"dense\""):
            transform(lambda value: maxsim(value, texts))


def test_vectors_without_dimensions_score_nothing():
    for select in ("exact", "bf16"):
        tokens, texts = (value.requires_grad_() for value in draw(dim=0))
        scores = maxsim(tokens, texts, select=select)
        assert torch.equal(scores, torch.zeros(2, 3))
        scores.sum().backward()
        assert tokens.grad.shape == tokens.shape


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("select", ["exact", "bf16"])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
def test_the_operator_keeps_the_rules_of_operators(k, select, per_image, dtype):
    tokens, texts = draw(per_image=per_image, dtype=dtype)
    inputs = (tokens.requires_grad_(), texts.requires_grad_(), k, select, "stream", True, 300)
    torch.library.opcheck(torch.ops.czsl_heads.maxsim.default, inputs)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that was made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.numel() * value.itemsize)
        return result


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("select", ["exact", "bf16"])
@pytest.mark.parametrize("per_image", [False, True])
def test_no_tensor_is_larger_than_the_chunk(k, select, per_image):
    tokens, texts = draw(7, 31, 301, 13, per_image=per_image)
    results = 7 * 301 * k * 8
    for chunk_bytes in (20_000, 100_000):
        with Largest() as largest:
            streamed(tokens, texts, k=k, select=select, with_index=True, chunk_bytes=chunk_bytes)
        assert largest.bytes <= max(chunk_bytes, results)
    assert 4 * 7 * 31 * 301 > 2 * 100_000  # all products would not have passed


# Winners picked by a bfloat16 product


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(1, 40)),
    per_image=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_picked_tokens_are_within_twice_the_error_of_a_bfloat16_product(sizes, per_image, seed, data):
    tokens, texts = draw(*sizes, per_image=per_image, seed=seed)
    tokens = tokens / 50 + torch.randn(
        sizes[0], 1, sizes[3], generator=torch.Generator().manual_seed(seed)
    )  # near-ties
    k = data.draw(st.integers(1, sizes[1]))
    exact = tokens.double() @ texts.double().mT
    error = ((tokens.bfloat16() @ texts.bfloat16().mT).double() - exact).abs().amax()
    scores, index = maxsim(tokens, texts, k=k, select="bf16", return_index=True)
    picked = exact.mT.gather(2, index.view(*scores.shape, k))
    best = exact.topk(k, dim=1).values.mT
    assert (picked >= best - 2 * error - 1e-5).all()
    torch.testing.assert_close(scores.double(), picked.mean(dim=2), **TOLERANCE)  # exact for the tokens returned


def test_bfloat16_ties_with_cls_are_settled_in_full_precision():
    tokens = torch.full((1, 50, 2), 0.5)
    tokens[0, :3, 0] = torch.tensor([1.0, 1.0 + 2**-12, 1.0 + 2**-11])  # all three are 1 in bfloat16
    index = maxsim(tokens, torch.tensor([[1.0, 0.0]]), select="bf16", return_index=True)[1]
    assert index.item() == 2


@pytest.mark.parametrize("k", [1, 3])
def test_nan_is_not_lost_by_bfloat16(k):
    tokens, texts = draw(tokens=30)
    tokens[1, 17, 2] = torch.nan
    scores = maxsim(tokens, texts, k=k, select="bf16")
    assert scores[1].isnan().all()
    assert scores[0].isfinite().all()


def test_a_bfloat16_product_is_rarely_wrong_about_the_winner():
    tokens, texts = draw(8, 257, 50, 96)
    index = maxsim(tokens, texts, return_index=True)[1]
    picked = maxsim(tokens, texts, select="bf16", return_index=True)[1]
    by_bfloat16 = (tokens.bfloat16() @ texts.bfloat16().mT).max(dim=1).indices
    assert (by_bfloat16 != index).any()  # it does err on these
    assert torch.equal(picked, index)  # but not by more than the tokens that are scored again


@pytest.mark.parametrize("k", [1, 3])
def test_nan_propagates_to_its_own_image_only(k):
    tokens, texts = draw()
    tokens[1, 4, 2] = torch.nan
    scores = maxsim(tokens, texts, k=k)
    assert scores[1].isnan().all()
    assert scores[0].isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("k", [1, 3])
def test_halves_are_computed_in_float32(dtype, k):
    tokens, texts = draw(dim=67, dtype=dtype)
    expected = maxsim(tokens.float(), texts.float(), k=k)
    assert torch.equal(maxsim(tokens, texts, k=k), expected)
    assert torch.equal(maxsim(tokens, texts.float(), k=k), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_changes_nothing(dtype):
    tokens, texts = draw(dim=67)
    with torch.autocast("cpu", dtype=dtype):
        scores = maxsim(tokens, texts)
        assert (tokens @ texts.mT).dtype == dtype  # autocast goes on after the call
    assert scores.dtype == torch.float32
    assert torch.equal(scores, maxsim(tokens, texts))


def test_one_float64_input_makes_it_float64():
    tokens, texts = draw()
    assert torch.equal(maxsim(tokens.double(), texts), maxsim(tokens.double(), texts.double()))
    assert maxsim(tokens, texts.double()).dtype == torch.float64


def test_inputs_are_left_alone():
    tokens, texts = draw()
    before = tokens.clone(), texts.clone()
    maxsim(tokens, texts, k=3)
    assert torch.equal(tokens, before[0])
    assert torch.equal(texts, before[1])


class Both(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, tokens, texts):
        return maxsim(tokens, texts, k=self.k, return_index=True)


@pytest.mark.parametrize("k", [1, 3])
def test_maxsim_compiles_whole(k):
    torch.compiler.reset()
    tokens, texts = draw()
    compiled = torch.compile(Both(k), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, index = compiled(tokens, texts)
    expected_scores, expected_index = maxsim(tokens, texts, k=k, return_index=True)
    torch.testing.assert_close(scores, expected_scores)
    assert torch.equal(index, expected_index)


def test_a_training_step_compiles_whole():
    torch.compiler.reset()
    tokens, texts = draw()

    def gradients(function):
        inputs = tokens.clone().requires_grad_(), texts.clone().requires_grad_()
        function(*inputs).square().sum().backward()
        return [value.grad for value in inputs]

    compiled = gradients(torch.compile(maxsim, fullgraph=True, backend="aot_eager"))
    for grad, expected in zip(compiled, gradients(maxsim)):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("k", [1, 3])
def test_maxsim_exports_with_any_batch_and_texts(k):
    sizes = {"tokens": {0: torch.export.Dim("batch")}, "texts": {0: torch.export.Dim("texts")}}
    program = torch.export.export(Both(k), draw(), dynamic_shapes=sizes)
    assert "czsl_heads" not in program.graph_module.code  # it runs where this package is not
    tokens, texts = draw(batch=5, texts=11)
    scores, index = program.module()(tokens, texts)
    expected_scores, expected_index = maxsim(tokens, texts, k=k, return_index=True)
    torch.testing.assert_close(scores, expected_scores)
    assert torch.equal(index, expected_index)


@pytest.mark.parametrize("k", [1, 3])
def test_meta_tensors_give_shapes(k):
    tokens, texts = draw()
    scores, index = maxsim(tokens.to("meta"), texts.to("meta"), k=k, return_index=True)
    assert (scores.device.type, scores.shape, scores.dtype) == ("meta", (2, 3), torch.float32)
    assert index.shape == ((2, 3) if k == 1 else (2, 3, k))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": [[1.0]]}, TypeError, r"expected `tokens` to be a torch.Tensor, got list"),
        ({"texts": None}, TypeError, r"expected `texts` to be a torch.Tensor, got NoneType"),
        (
            {"tokens": torch.zeros(2, 7, 5, dtype=torch.long)},
            TypeError,
            r"expected `tokens` of dtype .* got torch.int64",
        ),
        ({"texts": torch.zeros(3, 5, dtype=torch.complex64)}, TypeError, r"expected `texts` of dtype .*complex64"),
        ({"tokens": torch.zeros(7, 5)}, ValueError, r"expected `tokens` of shape \(batch, tokens, dim\), got \(7, 5\)"),
        ({"texts": torch.zeros(5)}, ValueError, r"expected `texts` of shape \(texts, dim\) .*got \(5,\)"),
        ({"texts": torch.zeros(3, 6)}, ValueError, r"expected `texts` of shape .*dim=5, got \(3, 6\)"),
        (
            {"texts": torch.zeros(4, 3, 5)},
            ValueError,
            r"`texts` of shape \(batch, texts, dim\) with batch=2.*\(4, 3, 5\)",
        ),
        ({"tokens": torch.zeros(2, 0, 5)}, ValueError, r"expected `k` to be in \[1, 0\], got 1"),
        ({"k": 0}, ValueError, r"expected `k` to be in \[1, 7\], got 0"),
        ({"k": 2.0}, TypeError, r"expected `k` to be an integer, got 2.0"),
        ({"k": True}, TypeError, r"expected `k` to be an integer, got True"),
        ({"k": 8}, ValueError, r"expected `k` to be in \[1, 7\], got 8"),
        ({"select": "bf17"}, ValueError, r"expected `select` to be one of exact, bf16, got 'bf17'"),
        ({"backend": "flash"}, ValueError, r"`backend` to be one of auto, dense, stream, triton, got 'flash'"),
        ({"chunk_bytes": 0}, ValueError, r"expected `chunk_bytes` to be at least 1, got 0"),
        ({"chunk_bytes": 1.5}, TypeError, r"expected `chunk_bytes` to be an integer, got 1.5"),
        (
            {"select": "bf16", "backend": "dense"},
            ValueError,
            r'expected `select="exact"` with backend="dense", got "bf16"',
        ),
        ({"k": 2, "backend": "triton"}, ValueError, r'expected `k` to be 1 with backend="triton", got 2'),
        ({"texts": torch.zeros(3, 5).double(), "backend": "triton"}, ValueError, r"at most 32 bits .*float64"),
    ],
)
def test_wrong_arguments_are_told(change, error, message):
    tokens, texts = draw()
    with pytest.raises(error, match=message):
        maxsim(**{"tokens": tokens, "texts": texts, **change})


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(2, 40), st.integers(1, 9), st.integers(1, 7)),
    per_image=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_few_winners_get_to_the_bit_the_gradient_of_many(sizes, per_image, seed, data):
    batch, length, count, dim = sizes
    tokens, texts = draw(batch, length, count, dim, per_image=per_image, seed=seed)
    k = data.draw(st.integers(1, min(3, length)))
    _, index = streamed(tokens, texts, k=k, select="exact", with_index=True, chunk_bytes=2**20)
    grad = torch.randn(batch, count, generator=torch.Generator().manual_seed(seed))
    wanted = {"for_tokens": True, "for_texts": True}
    of_ways = []
    for few in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(maxsim_op, "_are_few", lambda index, tokens, few=few: few)
            of_ways.append(maxsim_op.winner_gradients(grad, tokens, texts, index, **wanted))
    for one, other in zip(*of_ways):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("length", "few"), [(5, False), (6, True)])
def test_winners_are_few_if_they_are_at_most_half_of_the_tokens(length, few):
    index = torch.zeros(2, 3, 1, dtype=torch.long)
    assert maxsim_op._are_few(index, 2 * length) == few
    assert not maxsim_op._are_few(index.to("meta"), 2 * length)  # would wait for a device
    assert not maxsim_op._are_few(index[:0], 2 * length)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("per_image", [False, True])
def test_what_is_cut_to_fit_caches_is_put_together_again(monkeypatch, k, per_image):
    tokens, texts = draw(5, 7, 9, 4, per_image=per_image)
    options = {"k": k, "select": "exact", "with_index": True, "chunk_bytes": 2**20}
    expected = streamed(tokens, texts, **options)
    monkeypatch.setattr(maxsim_op, "_NEAR", 4)
    assert maxsim_op._chunk_sizes(tokens, texts, k, "exact", 2**20) == (1, 4)
    for one, other in zip(streamed(tokens, texts, **options), expected):
        torch.testing.assert_close(one, other)
