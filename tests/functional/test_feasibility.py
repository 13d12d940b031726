import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads.functional import (
    czsl_scores,
    feasibility,
    feasibility_thresholds,
    mask_infeasible,
    search_threshold,
)
from tests.references import reference_feasibility, reference_masked_scores, reference_threshold_search

MASKINGS = ("clean", "official")
KINDS = ("logits", "halves", "cosines", "negative", "integers", "masked")


def vectors(*, attrs=5, objs=7, dim=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    attr_vectors, obj_vectors = (torch.randn(size, dim, generator=generator) for size in (attrs, objs))
    return attr_vectors, obj_vectors, torch.rand(attrs, objs, generator=generator) < 0.4


def draw(kind="logits", *, samples=31, pairs=53, low=-0.2, seed=0):
    """Arguments of ``search_threshold``: as many seen as unseen pairs, samples of both; ``low`` moves feasibility."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.arange(pairs)[torch.randperm(pairs, generator=generator)] % 2 == 0
    candidates = torch.rand(pairs, generator=generator) < 0.9
    candidates[[int(seen.nonzero()[0]), int((~seen).nonzero()[0])]] = True
    columns = candidates.nonzero()[:, 0]
    target = columns[torch.randint(len(columns), (samples,), generator=generator)]
    cosines = 0.2 + 0.03 * torch.randn(samples, pairs, generator=generator)
    cosines[:, seen] += 0.02
    cosines[torch.arange(samples), target] += 0.06
    scores = {
        "logits": 100 * cosines,
        "halves": (100 * cosines).half().float(),
        "cosines": cosines,
        "negative": 100 * cosines - 25,
        "integers": (30 * cosines).round() - 6,
        "masked": cosines.where(torch.rand(samples, pairs, generator=generator) < 0.7, -torch.inf),
    }[kind]
    # Some of them equal, and of unseen pairs only: seen ones have 0.
    ratings = (low + torch.rand(pairs, generator=generator)).mul(20).round().div(20).masked_fill(seen, 0.0)
    pair = torch.randperm(pairs, generator=generator)
    return (scores, target, pair // 8, pair % 8, seen, candidates), ratings


# The rule


@pytest.mark.parametrize("seed", range(5))
def test_feasibility_equals_the_loop(seed):
    attr_vectors, obj_vectors, seen = vectors(seed=seed)
    table = feasibility(attr_vectors, obj_vectors, seen)
    torch.testing.assert_close(table, reference_feasibility(attr_vectors, obj_vectors, seen).float())
    assert ((table >= -1) & (table <= 1)).all()


def test_feasibility_by_hand():
    # Cosine of the attributes 0.6; of object 0 with 1 and 2: 0.8 and -1.
    attr_vectors = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    obj_vectors = torch.tensor([[1.0, 0.0], [4.0, 3.0], [-5.0, 0.0]])
    seen = torch.tensor([[True, True, False], [True, False, False]])
    expected = torch.tensor([[0.0, 0.0, (-0.8 - 1) / 2], [0.0, (0.8 + 0.6) / 2, (-1 - 1) / 2]])
    torch.testing.assert_close(feasibility(attr_vectors, obj_vectors, seen), expected)


def test_a_primitive_seen_with_nothing_has_minus_one_on_that_side():
    attr_vectors, obj_vectors, seen = vectors()
    seen[2] = False
    seen[:, 3] = False
    table = feasibility(attr_vectors, obj_vectors, seen)
    assert table[2, 3] == -1
    cosines = torch.nn.functional.normalize(attr_vectors) @ torch.nn.functional.normalize(attr_vectors)[2]
    for obj in (column for column in range(7) if seen[:, column].any()):
        assert table[2, obj] == pytest.approx((cosines[seen[:, obj]].max().item() - 1) / 2, abs=1e-6)


def test_lengths_do_not_matter_and_order_moves_along():
    attr_vectors, obj_vectors, seen = vectors()
    table = feasibility(attr_vectors, obj_vectors, seen)
    lengths = torch.rand(5, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    torch.testing.assert_close(feasibility(attr_vectors * lengths, 3 * obj_vectors, seen), table)
    rows, columns = torch.tensor([4, 0, 2, 1, 3]), torch.tensor([6, 0, 5, 1, 4, 2, 3])
    moved = feasibility(attr_vectors[rows], obj_vectors[columns], seen[rows][:, columns])
    torch.testing.assert_close(moved, table[rows][:, columns])
    torch.testing.assert_close(feasibility(obj_vectors, attr_vectors, seen.T), table.T)


def test_a_pair_that_gets_seen_makes_no_other_less_feasible():
    attr_vectors, obj_vectors, seen = vectors()
    table = feasibility(attr_vectors, obj_vectors, seen)
    attr, obj = (~seen).nonzero()[3]
    more = seen.clone()
    more[attr, obj] = True
    assert (feasibility(attr_vectors, obj_vectors, more)[~more] >= table[~more]).all()


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_precision_is_float32_or_that_of_float64(given_dtype, expected):
    attr_vectors, obj_vectors, seen = vectors()
    attr_vectors, obj_vectors = attr_vectors.to(given_dtype), obj_vectors.to(given_dtype)
    with torch.autocast("cpu"):
        table = feasibility(attr_vectors, obj_vectors, seen)
    assert table.dtype == expected
    torch.testing.assert_close(table, feasibility(attr_vectors.to(expected), obj_vectors.to(expected), seen))


# Thresholds and masks


def test_thresholds_are_even_from_the_least_to_the_most_feasible_unseen_pair():
    ratings = torch.tensor([9.0, -0.5, 0.25, 1.0, -9.0])
    seen = torch.tensor([True, False, False, False, True])
    thresholds = feasibility_thresholds(ratings, seen, steps=7)
    torch.testing.assert_close(thresholds, torch.tensor([-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0]))
    assert (thresholds[0], thresholds[-1]) == (-0.5, 1.0)
    assert feasibility_thresholds(ratings, seen, steps=1).tolist() == [-0.5]
    assert len(feasibility_thresholds(ratings, seen)) == 50
    assert feasibility_thresholds(ratings.double(), seen).dtype == torch.float64


def test_published_thresholds_are_points_of_the_50():
    # Least and most feasible unseen pair of the shipped tensors, the point, and the threshold that CSP's README gives.
    for least, most, point, threshold in (
        (0.329571, 0.874926, 18, 0.5299109123),
        (-0.04473, 0.71840, 29, 0.4069159426),
        (-0.134626, 0.779076, 34, 0.49937106273612186),
    ):
        thresholds = feasibility_thresholds(torch.tensor([least, most]), torch.zeros(2, dtype=torch.bool))
        assert thresholds[point].item() == pytest.approx(threshold, abs=1e-5)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [-10.0, -0.1, 0.0, 0.05, 0.5, 2.0])
def test_masked_scores_equal_the_loop(kind, masking, threshold):
    (scores, _, _, _, seen, _), ratings = draw(kind)
    before = scores.clone()
    masked = mask_infeasible(scores, ratings, seen, threshold, masking=masking)
    assert torch.equal(masked, reference_masked_scores(scores, ratings, seen, threshold, masking))
    assert torch.equal(scores, before)


def test_official_masking_doubles_seen_pairs_up_to_zero():
    scores, seen = torch.tensor([[3.0, -1.0, 2.0]]), torch.tensor([True, False, False])
    ratings = torch.tensor([0.0, 0.5, -0.5])
    for threshold, expected in ((-0.25, [6.0, -1.0, 0.0]), (0.0, [6.0, -1.0, 0.0]), (0.25, [3.0, -1.0, 0.0])):
        assert mask_infeasible(scores, ratings, seen, threshold, masking="official").tolist() == [expected]


@pytest.mark.parametrize("masking", MASKINGS)
def test_what_is_said_of_seen_pairs_is_not_looked_at(masking):
    arguments, ratings = draw()
    seen = arguments[4]
    changed = ratings.where(~seen, torch.linspace(-3, 3, len(seen)))
    masked, other = (mask_infeasible(arguments[0], part, seen, 0.1, masking=masking) for part in (ratings, changed))
    assert torch.equal(masked, other)
    curve, moved = (search_threshold(*arguments, feasibility=part, masking=masking) for part in (ratings, changed))
    assert moved.as_dict() == curve.as_dict()


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masked_scores_keep_their_dtype(dtype, masking):
    (scores, _, _, _, seen, _), ratings = draw()
    masked = mask_infeasible(scores.to(dtype), ratings, seen, 0.2, masking=masking)
    assert masked.dtype == dtype
    expected = mask_infeasible(scores.to(dtype).double(), ratings, seen, 0.2, masking=masking)
    assert torch.equal(masked.double(), expected)


# The search


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31), topk=st.sampled_from([1, 2, 5]), low=st.sampled_from([-0.9, -0.2, 0.1]))
@settings(deadline=None, max_examples=5)
def test_search_equals_the_literal_one(kind, masking, seed, topk, low):
    arguments, ratings = draw(kind, seed=seed, low=low)
    options = {"feasibility": ratings, "masking": masking, "steps": 7, "topk": topk}
    curve = search_threshold(*arguments, **options)
    thresholds, areas, threshold = reference_threshold_search(*arguments, **options)
    assert curve.thresholds.tolist() == pytest.approx(thresholds, abs=1e-7)
    assert curve.auc.tolist() == pytest.approx(areas, abs=1e-12)
    assert curve.threshold == pytest.approx(threshold, abs=1e-7)


@pytest.mark.parametrize("protocol", ["standard", "exact"])
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_area_is_that_of_masked_scores_to_the_bit(kind, masking, protocol):
    for seed in range(3):
        arguments, ratings = draw(kind, seed=seed)
        scores, *rest = arguments
        curve = search_threshold(*arguments, feasibility=ratings, masking=masking, protocol=protocol)
        for threshold, area in zip(curve.thresholds.tolist(), curve.auc.tolist()):
            masked = mask_infeasible(scores, ratings, rest[3], threshold, masking=masking)
            assert area == czsl_scores(masked, *rest, protocol=protocol).auc
        assert curve.auc_unmasked == czsl_scores(*arguments, protocol=protocol).auc


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("kind", KINDS)
@given(edges=st.sets(st.integers(1, 52), max_size=20), shuffle=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=5)
def test_blocks_of_any_width_in_any_order_change_nothing(kind, masking, edges, shuffle):
    (scores, *rest), ratings = draw(kind)
    blocks = [(a, scores[:, a:b]) for a, b in zip([0, *sorted(edges)], [*sorted(edges), 53])]
    shuffle.shuffle(blocks)
    whole, streamed = (
        search_threshold(given_scores, *rest, feasibility=ratings, masking=masking, steps=11)
        for given_scores in (scores, iter(blocks))
    )
    assert streamed.as_dict() == whole.as_dict()


def test_the_search_doubles_seen_pairs_up_to_zero_and_no_further():
    (scores, *rest), _ = draw()
    scores = scores + torch.linspace(0, 30, 31)[:, None]  # what cancels between seen and unseen unless one counts twice
    seen = rest[3]
    ratings = torch.linspace(-1, 1, 53).masked_fill(seen, 0.0)
    ratings[(~seen).nonzero()[[0, -1], 0]] = torch.tensor([-1.0, 1.0])
    curve = search_threshold(scores, *rest, feasibility=ratings, masking="official", steps=5)
    assert curve.thresholds.tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    for threshold, area in zip(curve.thresholds.tolist(), curve.auc.tolist()):
        feasible = (ratings >= threshold) & ~seen
        once, twice = (czsl_scores(scores * (feasible + factor * seen), *rest).auc for factor in (1, 2))
        assert once != twice or threshold > 0
        assert area == (twice if threshold <= 0 else once)


def test_search_by_hand():
    # Pair 3 scores highest for both samples and is the least feasible; without it both can be right.
    scores = torch.tensor([[0.9, 0.5, 0.1, 2.0], [0.3, 0.2, 0.1, 2.0]])
    seen, pair = torch.tensor([True, False, False, False]), torch.arange(4)
    ratings = torch.tensor([0.0, 1.0, 0.5, -1.0])
    target = torch.tensor([0, 1])
    curve = search_threshold(scores, target, pair, pair, seen, feasibility=ratings, steps=5, protocol="exact")
    assert curve.thresholds.tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert curve.kept.tolist() == [3, 2, 2, 2, 1]
    assert curve.auc.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert (curve.threshold, curve.auc_unmasked) == (-0.5, 0.0)  # the first of equals


def test_a_true_pair_that_is_masked_still_counts():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.3, 0.7, 0.1], [0.3, 0.1, 0.7]])
    seen, pair = torch.tensor([True, False, False]), torch.arange(3)
    ratings = torch.tensor([0.0, 0.5, 1.0])
    curve = search_threshold(scores, torch.arange(3), pair, pair, seen, feasibility=ratings, steps=2, protocol="exact")
    assert curve.auc.tolist() == [1.0, 0.5]  # the second sample of two is lost


@pytest.mark.parametrize("masking", MASKINGS)
def test_one_step_masks_no_pair(masking):
    arguments, ratings = draw(low=0.1)
    curve = search_threshold(*arguments, feasibility=ratings, masking=masking, steps=1)
    assert curve.auc.tolist() == [curve.auc_unmasked]
    assert curve.kept.tolist() == [int((~arguments[4]).sum())]


@pytest.mark.parametrize("masking", MASKINGS)
def test_no_area_leaves_the_threshold_that_masks_nothing(masking):
    (scores, target, attr, obj, seen, candidates), ratings = draw()
    scores[torch.arange(len(target)), target] = -torch.inf
    curve = search_threshold(scores, target, attr, obj, seen, candidates, feasibility=ratings, masking=masking)
    assert (curve.threshold, curve.auc.sum().item()) == (-10.0, 0.0)
    assert torch.equal(mask_infeasible(scores, ratings, seen, curve.threshold), scores)


def test_without_unseen_samples_areas_are_nan_and_json_has_none():
    (scores, target, *rest), ratings = draw()
    kept = rest[2][target]
    curve = search_threshold(scores[kept], target[kept], *rest, feasibility=ratings, steps=3)
    assert curve.auc.isnan().all()
    assert math.isnan(curve.auc_unmasked)
    assert curve.threshold == -10.0
    values = json.loads(json.dumps(curve.as_dict(), allow_nan=False))
    assert (values["auc"], values["auc_unmasked"]) == ([None] * 3, None)
    np.testing.assert_equal(curve.scalars(), {"threshold": -10.0, "auc": math.nan, "auc_unmasked": math.nan})


def test_a_curve_goes_into_json_as_it_is():
    arguments, ratings = draw()
    curve = search_threshold(*arguments, feasibility=ratings)
    values = json.loads(json.dumps(curve.as_dict(), allow_nan=False))
    assert values.keys() == {"thresholds", "auc", "kept", "threshold", "auc_unmasked"}
    assert values["threshold"] in values["thresholds"]
    np.testing.assert_array_equal(values["auc"], curve.auc)
    assert values["kept"] == curve.kept.tolist() == sorted(values["kept"], reverse=True)
    assert max(values["auc"]) == values["auc"][values["thresholds"].index(values["threshold"])]
    assert curve.scalars() == {
        **{name: values[name] for name in ("threshold", "auc_unmasked")},
        "auc": max(values["auc"]),
    }


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attr_vectors": [1.0]}, TypeError, "expected `attr_vectors` to be a torch.Tensor, got list"),
        ({"obj_vectors": torch.ones(7, 3).long()}, TypeError, "expected `obj_vectors` of dtype .*, got torch.int64"),
        ({"seen": torch.ones(5, 7)}, TypeError, "expected `seen` of dtype torch.bool, got torch.float32"),
        ({"seen": torch.ones(7, 5).bool()}, ValueError, r"expected `seen` of shape \(5, 7\), got \(7, 5\)"),
        ({"obj_vectors": torch.ones(7, 4)}, ValueError, r"`obj_vectors` of shape \(objs, dim\) with .*dim=3, got"),
        ({"attr_vectors": torch.full((5, 3), math.nan)}, ValueError, "`attr_vectors` of finite numbers, got 15 that"),
        ({"obj_vectors": torch.full((7, 3), math.inf)}, ValueError, "`obj_vectors` of finite numbers, got 21 that"),
    ],
)
def test_wrong_vectors_are_told(change, error, message):
    with pytest.raises(error, match=message):
        feasibility(**{**dict(zip(("attr_vectors", "obj_vectors", "seen"), vectors())), **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.ones(53)}, ValueError, r"expected `scores` of shape \(samples, 53\), got \(53,\)"),
        ({"scores": torch.ones(3, 54)}, ValueError, r"expected `scores` of shape \(samples, 53\), got \(3, 54\)"),
        ({"scores": torch.ones(3, 53).long()}, TypeError, "expected `scores` of dtype .*, got torch.int64"),
        ({"feasibility": torch.ones(54)}, ValueError, r"`seen_mask` of shape \(pairs\) with pairs=54, got \(53,\)"),
        ({"feasibility": [0.5] * 53}, TypeError, "expected `feasibility` to be a torch.Tensor, got list"),
        ({"feasibility": torch.full((53,), math.nan)}, ValueError, "expected `feasibility` of finite numbers, got"),
        ({"seen_mask": torch.ones(53)}, TypeError, "expected `seen_mask` of dtype torch.bool, got torch.float32"),
        ({"threshold": "low"}, TypeError, "expected `threshold` to be a number, got 'low'"),
        ({"threshold": math.nan}, ValueError, "expected `threshold` to be at least -inf, got nan"),
        ({"masking": "soft"}, ValueError, "expected `masking` to be one of clean, official, got 'soft'"),
    ],
)
def test_wrong_masks_are_told(change, error, message):
    (scores, _, _, _, seen, _), ratings = draw()
    arguments = {"scores": scores, "feasibility": ratings, "seen_mask": seen, "threshold": 0.1}
    with pytest.raises(error, match=message):
        mask_infeasible(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"feasibility": torch.ones(54)}, ValueError, r"`seen_mask` of shape \(pairs\) with pairs=54, got \(53,\)"),
        ({"feasibility": torch.full((53,), math.inf)}, ValueError, "expected `feasibility` of finite numbers, got"),
        ({"masking": "soft"}, ValueError, "expected `masking` to be one of clean, official, got 'soft'"),
        ({"protocol": "loose"}, ValueError, "expected `protocol` to be one of standard, exact, got 'loose'"),
        ({"steps": 0}, ValueError, "expected `steps` to be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "expected `steps` to be an integer, got 2.5"),
        ({"topk": 0}, ValueError, r"expected `topk` to be in \[1, 53\], got 0"),
        ({"seen_mask": torch.ones(53).bool()}, ValueError, "expected `seen_mask` to leave a pair unseen, got none"),
        ({"scores": torch.ones(31, 52)}, ValueError, "expected `scores` to cover all 53 columns"),
        (
            {"scores": torch.full((31, 53), math.nan)},
            ValueError,
            r"expected `scores` without NaN and \+inf, got one in",
        ),
        ({"target_pair": torch.full((31,), 53)}, ValueError, "expected `target_pair` to hold columns below 53, got 53"),
    ],
)
def test_wrong_searches_are_told(change, error, message):
    arguments, ratings = draw()
    names = ("scores", "target_pair", "pair_attr", "pair_obj", "seen_mask", "eval_mask")
    with pytest.raises(error, match=message):
        search_threshold(**{**dict(zip(names, arguments)), "feasibility": ratings, **change})
