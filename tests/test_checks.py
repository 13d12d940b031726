import numpy as np
import pytest
import torch

from czsl_heads._checks import check_choice, check_integer, check_positive, check_range, check_shapes, check_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_float_tensors_pass(dtype):
    check_tensor("tokens", torch.zeros(1, dtype=dtype))


def test_other_kinds_are_named():
    with pytest.raises(TypeError, match=r"expected `tokens` to be a torch.Tensor, got list"):
        check_tensor("tokens", [1.0])
    with pytest.raises(TypeError, match=r"expected `tokens` of dtype torch.float32, .*got torch.int64"):
        check_tensor("tokens", torch.zeros(1, dtype=torch.long))
    with pytest.raises(TypeError, match=r"expected `mask` of dtype torch.bool, got torch.float32"):
        check_tensor("mask", torch.zeros(1), dtypes=(torch.bool,))


def test_any_dtype_passes_where_none_is_asked():
    check_tensor("index", torch.zeros(1, dtype=torch.int8), dtypes=None)


def test_shapes_bind_axes_across_tensors():
    tokens, texts = torch.zeros(2, 7, 5), torch.zeros(3, 5)
    sizes = check_shapes(tokens=(tokens, "batch tokens dim"), texts=(texts, "texts dim"))
    assert sizes == {"batch": 2, "tokens": 7, "dim": 5, "texts": 3}


def test_a_size_that_differs_is_told_with_what_was_known():
    tokens, texts = torch.zeros(2, 7, 5), torch.zeros(3, 11)
    with pytest.raises(ValueError, match=r"expected `texts` of shape \(texts, dim\) with .*dim=5, got \(3, 11\)"):
        check_shapes(tokens=(tokens, "batch tokens dim"), texts=(texts, "texts dim"))


def test_a_wrong_rank_is_told_without_sizes_of_the_culprit():
    with pytest.raises(ValueError, match=r"expected `tokens` of shape \(batch, tokens, dim\), got \(2, 7\)"):
        check_shapes(tokens=(torch.zeros(2, 7), "batch tokens dim"))


def test_a_repeated_axis_must_agree_within_one_tensor():
    assert check_shapes(square=(torch.zeros(3, 3), "side side")) == {"side": 3}
    with pytest.raises(ValueError, match=r"expected `square` of shape \(side, side\), got \(3, 5\)"):
        check_shapes(square=(torch.zeros(3, 5), "side side"))


def test_numbers_among_the_axes_are_fixed_sizes():
    assert check_shapes(pairs=(torch.zeros(3, 2), "pairs 2")) == {"pairs": 3}
    with pytest.raises(ValueError, match=r"expected `pairs` of shape \(pairs, 2\), got \(3, 5\)"):
        check_shapes(pairs=(torch.zeros(3, 5), "pairs 2"))


def test_empty_axes_are_sizes_too():
    with pytest.raises(ValueError, match=r"expected `texts` of shape \(dim\) with dim=0, got \(3,\)"):
        check_shapes(tokens=(torch.zeros(0), "dim"), texts=(torch.zeros(3), "dim"))


def test_range_holds_its_ends():
    check_range("weight", 0, 0, 1)
    check_range("weight", 1, 0, 1)
    with pytest.raises(ValueError, match=r"expected `weight` to be in \[0, 1\], got 1.5"):
        check_range("weight", 1.5, 0, 1)
    with pytest.raises(ValueError, match=r"expected `k` to be at least 1, got 0"):
        check_range("k", 0, 1)


def test_nan_is_in_no_range():
    with pytest.raises(ValueError, match="got nan"):
        check_range("weight", float("nan"), 0, 1)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_positive_means_finite_too(value):
    with pytest.raises(ValueError, match=f"expected `temperature` to be positive and finite, got {value}"):
        check_positive("temperature", value)


@pytest.mark.parametrize("value", ["a", None, [1], 1j, torch.ones(())])
def test_what_is_no_number_is_named(value):
    with pytest.raises(TypeError, match="expected `weight` to be a number, got "):
        check_range("weight", value, 0, 1)
    with pytest.raises(TypeError, match="expected `temperature` to be a number, got "):
        check_positive("temperature", value)


def test_numbers_of_numpy_pass():
    check_range("weight", np.float32(0.5), 0, 1)
    check_positive("temperature", np.int64(3))


@pytest.mark.parametrize("value", [1, 7, np.int64(3), np.array(3), torch.tensor(3)])
def test_integers_of_any_library_pass(value):
    check_integer("k", value, 1, 7)
    check_integer("k", value, 1)


@pytest.mark.parametrize("value", [True, 2.0, "2", None, np.float64(2), np.bool_(True), np.ones(2, int), torch.ones(2)])
def test_what_is_no_integer_is_named(value):
    with pytest.raises(TypeError, match="expected `k` to be an integer, got "):
        check_integer("k", value, 1)


def test_integers_out_of_range_are_told():
    with pytest.raises(ValueError, match=r"expected `k` to be in \[1, 7\], got 8"):
        check_integer("k", 8, 1, 7)
    with pytest.raises(ValueError, match="expected `k` to be at least 1, got 0"):
        check_integer("k", np.int64(0), 1)


@pytest.mark.parametrize("strict", [True, False])
def test_a_size_left_open_by_an_export_is_an_integer(strict):
    class Checked(torch.nn.Module):
        def forward(self, tokens):
            check_integer("tokens.shape[0]", tokens.shape[0], 1)
            return 2 * tokens

    sizes = {"tokens": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Checked(), (torch.zeros(3),), dynamic_shapes=sizes, strict=strict)
    assert torch.equal(program.module()(torch.ones(5)), torch.full((5,), 2.0))


def test_smallest_positive_number_passes():
    check_positive("temperature", 5e-324)


def test_an_unknown_choice_lists_the_known_ones():
    check_choice("reduce", "max", ("max", "mean"))
    with pytest.raises(ValueError, match=r"expected `reduce` to be one of max, mean, got 'median'"):
        check_choice("reduce", "median", (name for name in ("max", "mean")))
