"""Vectors of length one: as torch's normalize, and right where it is not."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from czsl_heads.functional.unit import unit_rows, unit_vectors, wide_unit_rows

EXPONENTS = (-37, -30, -20, -13, -11, 0, 11, 18, 20, 30, 37)


def draw(batch=5, dim=67, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, dim, generator=generator, dtype=torch.float64).to(dtype)


def reference_unit(vectors):
    """Python's own floats, element by element; hypot scales as it goes."""
    rows = []
    for vector in vectors.double().tolist():
        length = math.hypot(*vector)
        rows.append([element / length for element in vector])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("unit", [unit_vectors, lambda rows: unit_rows(rows)[0]], ids=["vectors", "rows"])
def test_the_length_does_not_matter(unit, exponent):
    vectors = draw() * 10.0**exponent if exponent < 37 else draw().sign() * 1e37
    assert vectors.isfinite().all()
    torch.testing.assert_close(unit(vectors), reference_unit(vectors).float(), atol=1e-6, rtol=2e-6)


@pytest.mark.parametrize("exponent", [-250, -120, -99, 0, 149, 152, 300])
@pytest.mark.parametrize("unit", [unit_vectors, lambda rows: unit_rows(rows)[0]], ids=["vectors", "rows"])
def test_the_length_does_not_matter_in_double_precision(unit, exponent):
    vectors = draw(dtype=torch.float64) * 10.0**exponent
    torch.testing.assert_close(unit(vectors), reference_unit(vectors), atol=1e-15, rtol=1e-14)


@given(
    exponents=st.lists(st.sampled_from(EXPONENTS), min_size=1, max_size=6),
    power=st.integers(-3, 3),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=50)
def test_a_power_of_two_changes_no_bit_and_no_row_another(exponents, power, seed):
    lengths = torch.tensor([10.0**exponent for exponent in exponents])[:, None]
    vectors = draw(len(exponents), 5, seed=seed).clamp(-2, 2) * lengths / 8
    kept = vectors.abs().amin(dim=1) > 1e-35  # no element falls under the smallest normal number
    unit = unit_vectors(vectors)
    assert torch.equal(unit_vectors(vectors * 2.0**power)[kept], unit[kept])
    for row, vector in enumerate(vectors):
        assert torch.equal(unit_vectors(vector), unit[row])


def test_usual_lengths_give_the_bits_of_torch():
    vectors = draw(9, 768) * torch.logspace(-12, 17, 9)[:, None]
    assert torch.equal(unit_vectors(vectors), F.normalize(vectors, dim=-1))
    with_zero = torch.cat([vectors, torch.zeros(1, 768)])
    assert torch.equal(unit_vectors(with_zero), F.normalize(with_zero, dim=-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_widened(dtype):
    vectors = draw(dtype=dtype)
    unit = unit_vectors(vectors)
    assert unit.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(unit, F.normalize(vectors.to(unit.dtype), dim=-1))
    assert unit_vectors(vectors, torch.float64).dtype == torch.float64


def test_half_precision_has_its_whole_range():
    vectors = torch.tensor([[6e4, 6e4], [6e-8, 6e-8]], dtype=torch.float16)
    torch.testing.assert_close(unit_vectors(vectors), torch.full((2, 2), 0.5**0.5))


def test_nan_and_infinity_stay_in_their_rows():
    vectors = draw(4, 3)
    vectors[1, 0], vectors[2, 1] = torch.nan, torch.inf
    unit = unit_vectors(vectors)
    assert unit.isnan().any(dim=1).tolist() == [False, True, True, False]
    assert torch.equal(unit[[0, 3]], F.normalize(vectors[[0, 3]], dim=-1))


def test_gradients_are_right_at_every_length():
    for exponent in (-120, -20, 0, 20, 160):
        vectors = (draw(3, 5, dtype=torch.float64) * 10.0**exponent).requires_grad_()
        weights = draw(3, 5, dtype=torch.float64, seed=1)
        (gradient,) = torch.autograd.grad((unit_vectors(vectors) * weights).sum(), vectors)

        # Of a unit vector times 1 / length: what is left of the weights beside the vector.
        unit = reference_unit(vectors.detach())
        beside = weights - (weights * unit).sum(dim=1, keepdim=True) * unit
        length = torch.tensor([[math.hypot(*vector)] for vector in vectors.tolist()], dtype=torch.float64)
        torch.testing.assert_close(gradient, beside / length, rtol=1e-9, atol=0)
    assert torch.autograd.gradcheck(unit_vectors, draw(3, 5, dtype=torch.float64).requires_grad_())


def test_a_zero_vector_has_the_gradient_that_torch_gives_it():
    zeros, extreme = torch.zeros(1, 3, requires_grad=True), torch.tensor([[1e-30, 0.0, 1e-30]])
    (expected,) = torch.autograd.grad(F.normalize(zeros, dim=-1).sum(), zeros)
    for others in (torch.ones(1, 3), extreme):
        (gradient,) = torch.autograd.grad(unit_vectors(torch.cat([zeros, others])).sum(), zeros)
        torch.testing.assert_close(gradient, expected)


def test_it_works_in_graphs_and_transforms():
    vectors = torch.cat([draw(3, 7), draw(3, 7) * 1e-25, draw(3, 7) * 1e25, torch.zeros(1, 7)])
    expected = unit_vectors(vectors)
    torch.testing.assert_close(torch.vmap(unit_vectors)(vectors), expected)
    compiled = torch.compile(unit_vectors, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(vectors), expected)
    jacobian = torch.func.jacrev(unit_vectors)(vectors[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(unit_vectors, vectors[0]))
    assert unit_vectors(vectors.to("meta")).shape == vectors.shape


def test_wide_rows_name_the_zero_vector():
    vectors = draw(3, 4)
    vectors[1] = 0
    with pytest.raises(ValueError, match="expected `images` without zero vectors, got one in row 1"):
        wide_unit_rows("images", vectors)
    tiny = torch.tensor([[1e-40, 0.0], [3e38, 3e38]])
    torch.testing.assert_close(wide_unit_rows("images", tiny), torch.tensor([[1, 0], [0.5**0.5] * 2]).double())


def test_what_is_written_down_of_it_is_right_at_every_length():
    usual = draw(3, 7)
    vectors = torch.cat([usual, draw(3, 7) * 1e-25, draw(3, 7) * 1e25, torch.zeros(1, 7)])
    expected = unit_vectors(vectors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        traced = torch.jit.trace(unit_vectors, (usual,))
    torch.testing.assert_close(traced(vectors), expected)
    torch.testing.assert_close(make_fx(lambda rows: unit_vectors(rows))(usual)(vectors), expected)
    assert unit_vectors(vectors).isfinite().all()
    with FakeTensorMode():
        assert unit_vectors(torch.empty(4, 7)).shape == (4, 7)
