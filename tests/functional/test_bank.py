import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from czsl_heads.functional.bank import (
    arrival_ranks,
    first_argmax,
    first_true,
    merge_best,
    prediction_entropy,
    rank_best,
    row_counts,
)
from czsl_heads.functional.unit import unit_rows
from tests.references import (
    reference_merge_best,
    reference_prediction_entropy,
)


def draw_features(batch=2, dim=7, *, dtype=torch.float64, seed=1):
    return 3 * torch.randn(batch, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


entries_of_few_entropies = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.5, 0.6, 1.1])), max_size=40)


@given(entries=entries_of_few_entropies, slots=st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_best_are_those_that_insertions_one_at_a_time_leave(entries, slots):
    pair_index, entropy = tensors_of(entries)
    kept = merge_best(pair_index, entropy, num_pairs=4, slots=slots)  # pair 4 is the mark of what never stays
    assert kept.tolist() == reference_merge_best(pair_index, entropy, num_pairs=4, slots=slots)


def tensors_of(entries):
    pair_index = torch.tensor([pair for pair, _ in entries], dtype=torch.long)
    return pair_index, torch.tensor([entropy for _, entropy in entries])


@given(entries=entries_of_few_entropies, cut=st.integers(0, 40), slots=st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_best_of_what_stayed_and_the_rest_are_the_best_of_all(entries, cut, slots):
    pair_index, entropy = tensors_of(entries)
    first = merge_best(pair_index[:cut], entropy[:cut], num_pairs=4, slots=slots)
    candidates = torch.cat([first, torch.arange(min(cut, len(entries)), len(entries))])
    second = merge_best(pair_index[candidates], entropy[candidates], num_pairs=4, slots=slots)
    assert torch.equal(candidates[second], merge_best(pair_index, entropy, num_pairs=4, slots=slots))


@given(entries=st.lists(st.tuples(st.integers(0, 4), st.floats(0, 3)), max_size=40), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_order_of_arrival_does_not_matter_to_different_entropies(entries, seed):
    pair_index, entropy = tensors_of(entries)
    assume(len(entropy.unique()) == len(entropy))
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))
    shuffled = merge_best(pair_index[order], entropy[order], num_pairs=4, slots=3)
    assert torch.equal(order[shuffled], merge_best(pair_index, entropy, num_pairs=4, slots=3))


@given(entries=entries_of_few_entropies, slots=st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_ranking_sorts_all_and_marks_those_that_stay(entries, slots):
    pair_index = torch.tensor([pair for pair, _ in entries], dtype=torch.long)
    entropy = torch.tensor([value for _, value in entries])
    order, stays = rank_best(pair_index, entropy, num_pairs=4, slots=slots)
    assert order.tolist() == sorted(range(len(entries)), key=lambda entry: (*entries[entry], entry))
    assert order[stays].tolist() == reference_merge_best(pair_index, entropy, num_pairs=4, slots=slots)


@given(mask=st.lists(st.booleans(), max_size=20), count=st.integers(0, 23))
@settings(deadline=None, max_examples=40)
def test_the_first_true_places_are_found(mask, count):
    places = [place for place, value in enumerate(mask) if value][:count]
    expected = places + [len(mask)] * (count - len(places))
    assert first_true(torch.tensor(mask, dtype=torch.bool), count).tolist() == expected


@given(pairs=st.lists(st.integers(0, 3), max_size=30))
@settings(deadline=None, max_examples=30)
def test_ranks_and_counts_are_counted(pairs):
    pair_index = torch.tensor(pairs, dtype=torch.long)
    assert arrival_ranks(pair_index).tolist() == [pairs[:i].count(pair) for i, pair in enumerate(pairs)]
    assert row_counts(pair_index, 3).tolist() == [pairs.count(pair) for pair in range(4)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pair_index": torch.zeros(3)}, TypeError, r"expected `pair_index` of dtype torch.int64, got torch.float32"),
        ({"entropy": [0.1]}, TypeError, r"expected `entropy` to be a torch.Tensor, got list"),
        (
            {"entropy": torch.zeros(5)},
            ValueError,
            r"expected `entropy` of shape \(entries\) with entries=3, got \(5,\)",
        ),
        ({"slots": 0}, ValueError, r"expected `slots` to be at least 1, got 0"),
        ({"num_pairs": 1.5}, TypeError, r"expected `num_pairs` to be an integer, got 1.5"),
    ],
)
def test_wrong_arguments_of_the_merge_are_told(change, error, message):
    arguments = {"pair_index": torch.zeros(3, dtype=torch.long), "entropy": torch.zeros(3), "num_pairs": 5, "slots": 3}
    with pytest.raises(error, match=message):
        merge_best(**{**arguments, **change})


@given(pairs=st.integers(1, 67), seed=st.integers(0, 2**31), temperature=st.sampled_from([0.02, 1.0, 10.0]))
@settings(deadline=None, max_examples=30)
def test_entropy_is_its_formula(pairs, seed, temperature):
    logits = torch.randn(3, pairs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probs = (logits / temperature).softmax(dim=1)
    torch.testing.assert_close(prediction_entropy(probs), reference_prediction_entropy(probs))
    single = probs.float()
    torch.testing.assert_close(prediction_entropy(single), reference_prediction_entropy(single).float())


def test_entropy_of_many_columns_is_that_of_all():
    probs = draw_features(3, 2 * 2048 + 5).softmax(dim=1)
    probs[:, ::3] = 0
    torch.testing.assert_close(prediction_entropy(probs), reference_prediction_entropy(probs))


@given(
    size=st.sampled_from([1, 5, 2048, 2049, 4096, 5003]),
    values=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=40)
def test_the_first_of_the_largest_is_found(size, values, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, values, (3, size), generator=generator).to(dtype)
    rows[1] = 0
    rows[1, torch.randint(0, size, (1,), generator=generator)] = 1
    assert torch.equal(first_argmax(rows), rows.argmax(dim=1))


def test_gradients_of_entropy_and_unit_rows_are_right():
    probs = draw_features(3, 5).softmax(dim=1).requires_grad_()
    assert torch.autograd.gradcheck(prediction_entropy, probs)
    assert torch.autograd.gradcheck(lambda rows: unit_rows(rows)[0], draw_features(3, 5).requires_grad_())


def test_entropy_of_the_uniform_is_the_logarithm_and_of_certainty_zero():
    assert float(prediction_entropy(torch.full((1, 1262), 1 / 1262))) == pytest.approx(math.log(1262), rel=1e-6)
    assert prediction_entropy(torch.eye(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("function", [lambda rows: [prediction_entropy(rows.softmax(1))], unit_rows], ids=["H", "unit"])
def test_a_row_gives_the_same_bits_in_any_batch(function, dtype):
    rows = draw_features(13, 1009, dtype=dtype)
    whole = function(rows)
    for part in (slice(0, 1), slice(4, 9), slice(12, 13)):
        for alone, together in zip(function(rows[part]), whole):
            assert torch.equal(alone, together[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_unit_rows_have_length_one_and_the_old_direction(dtype):
    rows = draw_features(11, 67, dtype=dtype)
    before = rows.clone()
    unit, directed = unit_rows(rows)
    assert directed.all()
    assert unit.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(unit, F.normalize(rows.to(unit.dtype), dim=-1))
    assert torch.equal(rows, before)


def test_rows_without_direction_are_told():
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [torch.nan, 1.0], [1.0, torch.inf], [-torch.inf, 1.0]])
    assert unit_rows(rows)[1].tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(("name", "function"), [("probs", prediction_entropy), ("vectors", unit_rows)])
def test_wrong_rows_are_told(name, function):
    with pytest.raises(ValueError, match=rf"expected `{name}` of shape \(batch, \w+\), got \(3,\)"):
        function(torch.zeros(3))
    with pytest.raises(ValueError, match=rf"expected `{name}.shape\[1\]` to be at least 1, got 0"):
        function(torch.zeros(3, 0))
    with pytest.raises(TypeError, match=rf"expected `{name}` of dtype .*got torch.int64"):
        function(torch.zeros(3, 2, dtype=torch.long))
