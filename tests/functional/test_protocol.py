import json
import math
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from czsl_heads.functional import CZSLResult, czsl_scores, score_statistics_op
from tests.references import reference_czsl_scores, reference_exact_curve

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "evaluator").glob("*.safetensors"))
GOLDEN_KEYS = {
    "best_seen": "seen",
    "best_unseen": "unseen",
    "best_hm": "harmonic_mean",
    "AUC": "auc",
    "attr_acc": "attr_accuracy",
    "obj_acc": "obj_accuracy",
    "hm_seen": "hm_seen",
    "hm_unseen": "hm_unseen",
    "biasterm": "bias",
    "closed_match": "biased.match",
    "closed_seen_match": "biased.seen",
    "closed_unseen_match": "biased.unseen",
    "closed_attr_match": "biased.attr",
    "closed_obj_match": "biased.obj",
    "closed_ub_match": "unbiased.match",
    "closed_ub_seen_match": "unbiased.seen",
    "closed_ub_unseen_match": "unbiased.unseen",
}
KINDS = ("logits", "halves", "cosines", "probabilities", "integers", "masked")


def draw(kind="logits", *, samples=41, seen=11, unseen=9, others=4, open_world=False, seed=0):
    """Arguments of ``czsl_scores``, with samples of both sorts, some right; ``others`` are seen or unseen at random.

    In the closed world about a fifth of the columns are no candidates.
    """
    rng = np.random.default_rng(seed)
    num_pairs = seen + unseen + others
    seen_mask = np.zeros(num_pairs, dtype=bool)
    seen_mask[:seen] = True
    seen_mask[seen + unseen :] = rng.random(others) < 0.5
    rng.shuffle(seen_mask)
    candidates = np.ones(num_pairs, dtype=bool) if open_world else rng.random(num_pairs) < 0.8
    firsts = [np.flatnonzero(seen_mask)[0], np.flatnonzero(~seen_mask)[0]]
    candidates[firsts] = True
    target = np.concatenate([firsts, rng.choice(np.flatnonzero(candidates), samples - 2)])
    cosines = rng.normal(0.2, 0.03, (samples, num_pairs)) + 0.02 * seen_mask
    cosines[np.arange(samples), target] += 0.06
    logits = 100 * cosines
    scores = {
        "logits": logits,
        "masked": logits,
        "halves": logits.astype(np.float16),
        "cosines": cosines,
        "probabilities": np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True),
        "integers": np.round(logits / 3),
    }[kind].astype(np.float32)
    if kind == "masked":
        scores[rng.random(scores.shape) < 0.2] = -np.inf
        # At least as many finite candidates as any top k here.
        finite = [*np.flatnonzero(seen_mask & candidates)[:4], *np.flatnonzero(~seen_mask & candidates)[:4]]
        scores[:, finite] = logits[:, finite]
        scores[:, np.flatnonzero(seen_mask)[:6]] = logits[:, np.flatnonzero(seen_mask)[:6]]
    primitives = rng.permutation(5 * num_pairs)[:num_pairs]
    tensors = (scores, target, primitives // 5, primitives % 5, seen_mask, candidates)
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in tensors)


def flat(result):
    values = dict(vars(result) if isinstance(result, CZSLResult) else result)
    for name in ("unbiased", "biased"):
        point = values.pop(name)
        point = point if isinstance(point, dict) else point._asdict()
        values.update({f"{name}.{key}": value for key, value in point.items()})
    return values


def assert_equal(result, expected, *, but=(), tolerance=1e-12):
    result, expected = flat(result), flat(expected)
    assert result.keys() == expected.keys()
    np.testing.assert_allclose(result.pop("curve"), expected.pop("curve"), atol=tolerance, rtol=0)
    for name in result.keys() - set(but):
        assert result[name] == pytest.approx(expected[name], abs=tolerance, rel=0, nan_ok=True), name


def cut(scores, edges, order=None):
    blocks = [(first, scores[:, first:last]) for first, last in zip([0, *edges], [*edges, scores.shape[1]])]
    return blocks if order is None else [blocks[i] for i in order]


# The official numbers


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("evaluate", [czsl_scores, reference_czsl_scores])
def test_every_official_number_is_met(path, evaluate):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expected = file.metadata()
    names = ("scores", "target_pair", "pair_attr", "pair_obj", "seen_mask", "eval_mask")
    result = flat(evaluate(*(tensors[name] for name in names)))
    assert expected.keys() == GOLDEN_KEYS.keys()
    for key, value in expected.items():
        assert result[GOLDEN_KEYS[key]] == pytest.approx(float(value), abs=1e-6, rel=0), key


def test_all_golden_files_are_there():
    assert [path.stem for path in GOLDEN] == [
        "closed_test",
        "closed_val",
        "no_unseen_correct",
        "open_test",
        "ties_quantised",
    ]


# Standard protocol against the full matrix


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 2**31),
    samples=st.integers(2, 131),
    open_world=st.booleans(),
    topk=st.sampled_from([1, 2, 5]),
    tile=st.sampled_from([2, 3, 32]),
)
@settings(deadline=None, max_examples=30)
def test_standard_equals_the_full_matrix(kind, seed, samples, open_world, topk, tile):
    arguments = draw(kind, samples=samples, open_world=open_world, seed=seed)
    with patch.object(score_statistics_op, "_TILE", tile):
        result = czsl_scores(*arguments, topk=topk)
    expected = reference_czsl_scores(*arguments, topk=topk)
    assert_equal(result, expected)
    assert result.bias == expected["bias"]  # float32 margins, to the bit


@pytest.mark.parametrize("kind", ["cosines", "probabilities"])
@pytest.mark.parametrize("shift", [0.0, 0.25, 24.0, -3.0])
def test_scores_that_collapse_at_the_first_bias_collapse_alike(kind, shift):
    # At 1e3 neighbouring float32 are 6e-5 apart: many scores become equal, and the first column wins.
    for seed in range(8):
        scores, *rest = draw(kind, samples=97, seen=23, unseen=67, open_world=True, seed=seed)
        scores = 1e-3 * scores + shift
        assert len((scores[0] + 1e3).unique()) < len(scores[0].unique())
        for topk in (1, 2, 5):
            assert_equal(czsl_scores(scores, *rest, topk=topk), reference_czsl_scores(scores, *rest, topk=topk))


def test_no_unseen_sample_right_in_the_first_pass():
    scores, target, attr, obj, seen, candidates = draw()
    unseen_sample = ~seen[target]
    scores[unseen_sample, target[unseen_sample]] = -50.0
    result = czsl_scores(scores, target, attr, obj, seen, candidates)
    assert_equal(result, reference_czsl_scores(scores, target, attr, obj, seen, candidates))
    assert (result.auc, result.harmonic_mean, result.unseen, result.bias) == (0.0, 0.0, 0.0, 1e3)
    assert result.curve.shape == (1, 2)


def test_number_of_biases_follows_the_stride():
    for samples, points in ((2, 2), (21, 21), (40, 40), (41, 21), (60, 31)):
        # All unseen and right with different margins, but for one seen sample.
        scores = torch.zeros(samples, 2)
        scores[1:, 0] = torch.arange(1, samples)
        target = torch.tensor([0] + [1] * (samples - 1))
        pair = torch.arange(2)
        result = czsl_scores(scores, target, pair, pair, torch.tensor([True, False]))
        assert len(result.curve) == points, samples


# Streaming


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 2**31),
    edges=st.sets(st.integers(1, 23), max_size=23),
    shuffle=st.randoms(use_true_random=False),
    topk=st.sampled_from([1, 2, 5]),
    name=st.sampled_from(["standard", "exact"]),
    tile=st.sampled_from([2, 3, 32]),
)
@settings(deadline=None, max_examples=15)
def test_blocks_of_any_width_in_any_order_change_nothing(kind, seed, edges, shuffle, topk, name, tile):
    scores, *rest = draw(kind, seed=seed)
    order = list(range(len(edges) + 1))
    shuffle.shuffle(order)
    blocks = cut(scores, sorted(edges), order)
    whole = czsl_scores(scores, *rest, protocol=name, topk=topk)
    with patch.object(score_statistics_op, "_TILE", tile):
        streamed = czsl_scores((block for block in blocks), *rest, protocol=name, topk=topk)
    assert streamed.as_dict() == whole.as_dict()


def test_empty_blocks_change_nothing():
    scores, *rest = draw()
    blocks = [(0, scores[:, :0]), (0, scores), (24, scores[:, :0])]
    assert czsl_scores(blocks, *rest).as_dict() == czsl_scores(scores, *rest).as_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_ranked_a_few_at_a_time_change_nothing(kind, monkeypatch):
    arguments = draw(kind)
    whole = czsl_scores(*arguments, topk=2)
    monkeypatch.setattr(score_statistics_op, "_CHUNK", 5 * 128)
    assert czsl_scores(*arguments, topk=2).as_dict() == whole.as_dict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floats_are_used_as_float32(dtype):
    scores, *rest = draw("cosines")
    scores = scores.to(dtype)
    assert czsl_scores(scores, *rest).as_dict() == czsl_scores(scores.float(), *rest).as_dict()


def test_inputs_are_left_alone_and_need_no_gradient():
    arguments = draw()
    before = [tensor.clone() for tensor in arguments]
    czsl_scores(arguments[0].requires_grad_(), *arguments[1:])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(arguments, before))


# Exact protocol


@pytest.mark.parametrize("kind", ["logits", "halves", "cosines", "integers", "masked"])
@given(
    seed=st.integers(0, 2**31),
    samples=st.integers(2, 13),
    open_world=st.booleans(),
    topk=st.sampled_from([1, 2, 5]),
)
@settings(deadline=None, max_examples=12)
def test_exact_equals_all_biases_tried(kind, seed, samples, open_world, topk):
    arguments = draw(kind, samples=samples, seen=6, unseen=5, others=0, open_world=open_world, seed=seed)
    scores, target, _, _, seen_mask, eval_mask = arguments
    result = czsl_scores(*arguments, protocol="exact", topk=topk)
    points = reference_exact_curve(scores, target, seen_mask, eval_mask, topk=topk)
    np.testing.assert_allclose(result.curve, points, atol=1e-12)
    means = [2 * s * u / (s + u) if s + u else 0.0 for s, u in points]
    area = sum((u1 - u0) * (s0 + s1) / 2 for (s0, u0), (s1, u1) in zip(points[:-1], points[1:]))  # noqa: RUF007
    assert result.auc == pytest.approx(area, abs=1e-12)
    assert result.harmonic_mean == pytest.approx(max(means), abs=1e-12)
    assert (result.seen, result.unseen) == pytest.approx((points[0][0], points[-1][1]))
    assert (result.hm_seen, result.hm_unseen) in [tuple(point) for point in result.curve.tolist()]


def test_exact_values_by_hand():
    # Columns: two seen, two unseen. Margins to the best of the other group: +2 and +1 (seen), 1 and 3 (unseen).
    scores = torch.tensor([[5.0, 0.0, 3.0, 1.0], [0.0, 5.0, 4.0, 1.0], [5.0, 0.0, 4.0, 1.0], [0.0, 4.0, 0.5, 1.0]])
    pair = torch.arange(4)
    result = czsl_scores(scores, pair, pair, pair, torch.tensor([True, True, False, False]), protocol="exact")
    # Thresholds 1 (a seen one lost, an unseen one won), 2 (a seen one lost) and 3 (an unseen one won).
    assert result.curve.tolist() == [[1.0, 0.0], [0.5, 0.5], [0.0, 0.5], [0.0, 1.0]]
    assert result.auc == pytest.approx(0.5 * 0.75)
    assert (result.harmonic_mean, result.hm_seen, result.hm_unseen, result.bias) == (0.5, 0.5, 0.5, 1.5)
    assert result.unbiased == (0.5, 1.0, 0.0, 0.5, 0.5)
    assert result.biased == (0.5, 0.0, 1.0, 0.5, 0.5)


@given(seed=st.integers(0, 2**31), topk=st.sampled_from([1, 2, 5]))
@settings(deadline=None, max_examples=30)
def test_the_bias_of_the_exact_protocol_gives_its_point(seed, topk):
    scores, target, attr, obj, seen, candidates = draw("cosines", seed=seed)
    result = czsl_scores(scores, target, attr, obj, seen, candidates, protocol="exact", topk=topk)
    biased = scores.double() + result.bias * ~seen if math.isfinite(result.bias) else scores.double()
    biased[:, ~candidates] = -torch.inf
    right = (biased.argsort(dim=1, descending=True, stable=True)[:, :topk] == target[:, None]).any(1).double()
    if math.isfinite(result.bias):
        assert right[seen[target]].mean().item() == pytest.approx(result.hm_seen)
        assert right[~seen[target]].mean().item() == pytest.approx(result.hm_unseen)
    else:
        assert result.bias == -math.inf or result.hm_unseen == result.unseen


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31), topk=st.sampled_from([1, 2, 5]))
@settings(deadline=None, max_examples=10)
def test_relations_between_the_numbers(kind, seed, topk):
    arguments = draw(kind, seed=seed)
    target, seen_mask = arguments[1], arguments[4]
    exact, standard = (czsl_scores(*arguments, protocol=name, topk=topk) for name in ("exact", "standard"))
    seen, unseen = exact.curve.unbind(dim=1)
    assert (seen.diff() <= 0).all()
    assert (unseen.diff() >= 0).all()
    assert (exact.curve.diff(dim=0).abs().sum(dim=1) > 0).all()
    assert exact.auc <= exact.seen * exact.unseen + 1e-12
    # A seen sample that is right at some bias is so at -inf; an unseen one may owe it to the collapse at 1e3.
    assert exact.seen >= standard.seen - 1e-12
    assert exact.unbiased == standard.unbiased
    assert exact.biased == standard.biased
    for result in (exact, standard):
        assert result.seen >= result.hm_seen
        assert result.unseen >= result.hm_unseen
        for point in (result.unbiased, result.biased):
            seen_share = seen_mask[target].double().mean().item()
            assert point.match == pytest.approx(seen_share * point.seen + (1 - seen_share) * point.unseen)
            assert min(point.attr, point.obj) >= point.match


# What must not matter


@pytest.mark.parametrize("name", ["standard", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_order_of_samples_does_not_matter(kind, name):
    scores, target, *rest = draw(kind)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(1))
    permuted = czsl_scores(scores[order], target[order], *rest, protocol=name, topk=2)
    assert_equal(permuted, czsl_scores(scores, target, *rest, protocol=name, topk=2))


def distinct(seed=0):
    """Scores without ties, all multiples of 1/64: sums are exact."""
    scores, *rest = draw(seed=seed, open_world=True)
    ranks = scores.argsort(dim=1).argsort(dim=1).float()
    return (ranks / 64, *rest)


@pytest.mark.parametrize("topk", [1, 2, 5])
def test_order_of_columns_does_not_matter_without_ties(topk):
    scores, target, *columns = distinct()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved = order.argsort()[target]
    for name in ("standard", "exact"):
        permuted = czsl_scores(
            scores[:, order], moved, *(column[order] for column in columns), protocol=name, topk=topk
        )
        assert_equal(permuted, czsl_scores(scores, target, *columns, protocol=name, topk=topk))


@pytest.mark.parametrize("topk", [1, 2, 5])
def test_a_constant_of_each_sample_does_not_matter(topk):
    scores, *rest = distinct()
    constants = torch.randint(-64, 64, (41, 1), generator=torch.Generator().manual_seed(1)) / 32
    for name in ("standard", "exact"):
        for shift in (3.5, constants):
            moved = czsl_scores(scores + shift, *rest, protocol=name, topk=topk)
            assert_equal(moved, czsl_scores(scores, *rest, protocol=name, topk=topk))


@pytest.mark.parametrize("power", [-5, 3, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_scale_does_not_matter_to_the_exact_protocol(kind, power):
    scores, *rest = draw(kind)
    # The point at 1e3 is by definition not one of the curve's.
    but = ("bias", *(f"biased.{name}" for name in ("match", "seen", "unseen", "attr", "obj")))
    result, scaled = (czsl_scores(part, *rest, protocol="exact") for part in (scores, scores * 2.0**power))
    assert_equal(scaled, result, but=but)
    assert scaled.bias == result.bias * 2.0**power


def test_a_bias_that_is_already_there_only_moves_the_exact_one():
    scores, target, attr, obj, seen, candidates = distinct()
    result, moved = (
        czsl_scores(scores + shift * ~seen, target, attr, obj, seen, candidates, protocol="exact") for shift in (0, 1.5)
    )
    assert torch.equal(moved.curve, result.curve)
    assert moved.auc == result.auc
    assert moved.bias == result.bias - 1.5


@pytest.mark.parametrize("name", ["standard", "exact"])
def test_masked_unseen_columns_might_as_well_be_absent(name):
    scores, target, attr, obj, seen, candidates = draw()
    kept = candidates | seen  # the standard margins look at seen columns that are no candidates
    left = czsl_scores(
        scores[:, kept], kept.cumsum(0)[target] - 1, attr[kept], obj[kept], seen[kept], candidates[kept], protocol=name
    )
    assert not kept.all()
    assert_equal(left, czsl_scores(scores, target, attr, obj, seen, candidates, protocol=name))


def test_no_mask_is_the_open_world():
    scores, target, attr, obj, seen, _ = draw(open_world=True)
    every = czsl_scores(scores, target, attr, obj, seen, torch.ones_like(seen))
    assert czsl_scores(scores, target, attr, obj, seen).as_dict() == every.as_dict()


# Ends


@pytest.mark.parametrize("name", ["standard", "exact"])
def test_every_pair_allowed_is_always_right(name):
    result = czsl_scores(*draw(), protocol=name, topk=24)
    assert result.unbiased == result.biased == (1.0, 1.0, 1.0, 1.0, 1.0)
    assert (result.seen, result.unseen, result.harmonic_mean) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["standard", "exact"])
def test_a_true_pair_of_score_minus_infinity_is_never_right(name):
    scores, target, *rest = draw(open_world=True)
    scores[:3] = -torch.inf
    scores[3, target[3]] = -torch.inf
    result = czsl_scores(scores, target, *rest, protocol=name, topk=24)
    assert result.unbiased.match == result.biased.match == pytest.approx(37 / 41)


def test_a_model_that_never_predicts_seen_pairs_still_has_a_curve():
    scores, target, attr, obj, seen, candidates = draw(open_world=True)
    scores[:, seen] = -torch.inf
    for name in ("standard", "exact"):
        result = czsl_scores(scores, target, attr, obj, seen, candidates, protocol=name)
        assert (result.seen, result.auc, result.harmonic_mean) == (0.0, 0.0, 0.0)
        assert result.unseen == result.unbiased.unseen > 0


@pytest.mark.parametrize("name", ["standard", "exact"])
@pytest.mark.parametrize("missing", ["seen", "unseen"])
def test_without_samples_of_one_sort_what_needs_them_is_nan(name, missing):
    scores, target, attr, obj, seen, candidates = draw()
    kept = ~seen[target] if missing == "seen" else seen[target]
    result = czsl_scores(scores[kept], target[kept], attr, obj, seen, candidates, protocol=name)
    values, there = flat(result), "unseen" if missing == "seen" else "seen"
    for key in (missing, f"hm_{missing}", "harmonic_mean", "auc", f"unbiased.{missing}", f"biased.{missing}"):
        assert math.isnan(values[key]), key
    for key in (there, f"hm_{there}", f"unbiased.{there}", "unbiased.match", "attr_accuracy", "obj_accuracy"):
        assert 0 <= values[key] <= 1, key
    assert values[f"unbiased.{there}"] == values["unbiased.match"]
    column = ["seen", "unseen"].index(missing)
    assert result.curve[:, column].isnan().all()
    assert not result.curve[:, 1 - column].isnan().any()
    assert values[f"hm_{there}"] == result.curve[0, 1 - column]


def test_all_of_a_result_goes_into_json():
    for name in ("standard", "exact"):
        result = czsl_scores(*draw(), protocol=name)
        values = json.loads(json.dumps(result.as_dict(), allow_nan=False))
        assert values["auc"] == result.auc
        assert values["unbiased"]["match"] == result.unbiased.match
        assert values["curve"] == result.curve.tolist()


def test_scalars_are_the_single_numbers_as_they_are():
    scores, target, attr, obj, seen, candidates = draw()
    kept = seen[target]
    result = czsl_scores(scores[kept], target[kept], attr, obj, seen, candidates, protocol="exact")
    single = {name: value for name, value in vars(result).items() if isinstance(value, float)}
    assert list(result.scalars()) == list(single)
    np.testing.assert_equal(result.scalars(), single)  # with NaN and -inf
    assert math.isnan(result.scalars()["auc"])


def test_what_json_cannot_say_is_none():
    scores, target, attr, obj, seen, candidates = draw()
    kept = seen[target]
    result = czsl_scores(scores[kept], target[kept], attr, obj, seen, candidates, protocol="exact")
    values = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert math.isnan(result.unseen)
    assert math.isinf(result.bias)
    assert (values["unseen"], values["bias"], values["curve"][0][1]) == (None, None, None)
    assert values["unbiased"]["unseen"] is None


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(41, 24, dtype=torch.long)}, TypeError, r"expected `scores` of dtype .*torch.int64"),
        ({"scores": [(0, [0.1])]}, TypeError, r"expected `scores` to be a torch.Tensor, got list"),
        (
            {"target_pair": torch.zeros(41)},
            TypeError,
            r"expected `target_pair` of dtype torch.int64, got torch.float32",
        ),
        ({"pair_attr": [0] * 24}, TypeError, r"expected `pair_attr` to be a torch.Tensor, got list"),
        ({"pair_obj": torch.zeros(24)}, TypeError, r"expected `pair_obj` of dtype torch.int64, got torch.float32"),
        ({"seen_mask": torch.zeros(24)}, TypeError, r"expected `seen_mask` of dtype torch.bool, got torch.float32"),
        ({"eval_mask": torch.ones(24)}, TypeError, r"expected `eval_mask` of dtype torch.bool, got torch.float32"),
        ({"scores": torch.zeros(40, 24)}, ValueError, r"expected `scores` of shape \(41, pairs\), got \(40, 24\)"),
        ({"scores": torch.zeros(41)}, ValueError, r"expected `scores` of shape \(41, pairs\), got \(41,\)"),
        ({"scores": torch.zeros(41, 25)}, ValueError, r"expected `scores` of 24 columns, got columns 0 to 24"),
        ({"scores": torch.zeros(41, 23)}, ValueError, r"`scores` to cover all 24 columns, got none for column 23"),
        ({"scores": []}, ValueError, r"`scores` to cover all 24 columns, got none for column 0"),
        ({"scores": [(-1, torch.zeros(41, 24))]}, ValueError, r"`scores` of 24 columns, got columns -1 to 22"),
        (
            {"scores": [(0, torch.zeros(41, 20)), (19, torch.zeros(41, 5))]},
            ValueError,
            r"expected `scores` to cover each column once, got columns from 19 on again",
        ),
        (
            {"scores": [(0, torch.zeros(41, 7)), (11, torch.zeros(41, 13))]},
            ValueError,
            r"expected `scores` to cover all 24 columns, got none for column 7",
        ),
        ({"target_pair": torch.zeros(41, 1).long()}, ValueError, r"`target_pair` of shape \(samples\), got \(41, 1\)"),
        (
            {"pair_attr": torch.zeros(23).long()},
            ValueError,
            r"`pair_obj` of shape \(pairs\) with .*pairs=23, got \(24,\)",
        ),
        (
            {"seen_mask": torch.zeros(5).bool()},
            ValueError,
            r"`seen_mask` of shape \(pairs\) with .*pairs=24, got \(5,\)",
        ),
        (
            {"eval_mask": torch.ones(5).bool()},
            ValueError,
            r"`eval_mask` of shape \(pairs\) with .*pairs=24, got \(5,\)",
        ),
        ({"target_pair": torch.full((41,), 24)}, ValueError, r"`target_pair` to hold columns below 24, got 24"),
        ({"target_pair": torch.full((41,), -1)}, ValueError, r"`target_pair` to hold columns below 24, got -1"),
        ({"scores": 3}, TypeError, r"`scores` to be a tensor or an iterable of blocks, got int"),
        ({"scores": [torch.zeros(41, 24)]}, TypeError, r"`scores` to hold \(first_column, block\) pairs, got Tensor"),
        ({"scores": [("0", torch.zeros(41, 24))]}, TypeError, r"`scores` to hold \(first_column, block\) pairs"),
        ({"topk": 1.0}, TypeError, r"expected `topk` to be an integer, got 1.0"),
        ({"topk": 0}, ValueError, r"expected `topk` to be in \[1, 24\], got 0"),
        ({"topk": 25}, ValueError, r"expected `topk` to be in \[1, 24\], got 25"),
        ({"protocol": "loose"}, ValueError, r"expected `protocol` to be one of standard, exact, got 'loose'"),
    ],
)
def test_wrong_arguments_are_told(change, error, message):
    names = ("scores", "target_pair", "pair_attr", "pair_obj", "seen_mask", "eval_mask")
    with pytest.raises(error, match=message):
        czsl_scores(**{**dict(zip(names, draw(open_world=True))), **change})


def test_a_true_pair_that_is_no_candidate_is_named():
    scores, target, attr, obj, seen, candidates = draw()
    target[7] = int((~candidates).nonzero()[0])
    message = rf"`target_pair` to be candidates under `eval_mask`, got column {target[7]} of sample 7, which is masked"
    with pytest.raises(ValueError, match=message):
        czsl_scores(scores, target, attr, obj, seen, candidates)


@pytest.mark.parametrize("name", ["standard", "exact"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 23])
def test_scores_that_cannot_be_ranked_are_refused(name, value, column):
    scores, *rest = draw()
    scores[7, column] = value
    for given_scores in (scores, cut(scores, [5, 20]), cut(scores, [5, 20], [2, 0, 1])):
        with pytest.raises(ValueError, match=r"expected `scores` without NaN and \+inf, got one in sample 7"):
            czsl_scores(given_scores, *rest, protocol=name)


def test_no_sample_is_refused():
    scores, target, *rest = draw()
    with pytest.raises(ValueError, match="expected at least one sample, got none"):
        czsl_scores(scores[:0], target[:0], *rest)
