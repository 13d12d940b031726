from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads.functional import score_statistics as module
from czsl_heads.functional import score_statistics_op
from czsl_heads.functional.score_statistics import PairColumns, ScoreStatistics, score_statistics
from tests.references import reference_score_statistics

SAMPLES, PAIRS = 13, 71


def draw(kind="normal", *, seed=0, samples=SAMPLES, pairs=PAIRS, num_buckets=5):
    """Scores, targets, the arguments of ``PairColumns``, and buckets."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(samples, pairs, generator=generator)
    if kind == "ties":
        scores = scores.mul(2).round()
    if kind == "collapse":  # neighbours at a bias of 1e3
        scores = scores * 1e-4
    if kind == "masked":
        scores[torch.rand(samples, pairs, generator=generator) < 0.7] = -torch.inf
    seen, candidates = torch.rand(2, pairs, generator=generator) < torch.tensor([[0.4], [0.7]])
    candidates[int(torch.randint(pairs, (), generator=generator))] = True
    columns = candidates.nonzero()[:, 0]
    target = columns[torch.randint(len(columns), (samples,), generator=generator)]
    attr, obj, bucket = (torch.randint(size, (pairs,), generator=generator) for size in (5, 7, num_buckets))
    return scores, target, (attr, obj, seen, candidates), bucket


def assert_same(found, expected, *, but=()):
    for name, part, other in zip(ScoreStatistics._fields, found, expected):
        assert name in but or torch.equal(part, other), name


KINDS = ("normal", "ties", "collapse", "masked")
sizes = st.fixed_dictionaries(
    {
        "_TILE": st.sampled_from([1, 2, 3, 32]),
        "_CHUNK": st.sampled_from([1, 200, 1 << 18]),
    }
)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31), topk=st.sampled_from([1, 2, 5, PAIRS]), sizes=sizes)
@settings(deadline=None, max_examples=12)
def test_statistics_are_what_a_look_at_each_column_finds(kind, seed, topk, sizes):
    scores, target, pairs, _ = draw(kind, seed=seed)
    with patch.multiple(score_statistics_op, **sizes):
        found = score_statistics(scores, target, PairColumns(*pairs), topk=topk)
    assert_same(found, reference_score_statistics(scores, target, pairs, topk=topk))


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 2**31),
    topk=st.sampled_from([1, 3]),
    num_buckets=st.sampled_from([1, 5, 50]),
    edges=st.sets(st.integers(1, PAIRS - 1), max_size=5),
    shuffle=st.randoms(use_true_random=False),
    sizes=sizes,
)
@settings(deadline=None, max_examples=12)
def test_buckets_are_kept_apart_under_any_cut(kind, seed, topk, num_buckets, edges, shuffle, sizes):
    scores, target, pairs, bucket = draw(kind, seed=seed, num_buckets=num_buckets)
    blocks = [(a, scores[:, a:b]) for a, b in zip([0, *sorted(edges)], [*sorted(edges), PAIRS])]
    shuffle.shuffle(blocks)
    columns = PairColumns(*pairs, bucket=bucket, num_buckets=num_buckets)
    with patch.multiple(score_statistics_op, **sizes):
        found = score_statistics(iter(blocks), target, columns, topk=topk)
    expected = reference_score_statistics(scores, target, pairs, bucket, num_buckets=num_buckets, topk=topk)
    assert_same(found, expected, but=["primitives"])
    assert found.primitives.shape == (SAMPLES, 0, 2)


def test_columns_are_laid_out_once_for_all_samples():
    scores, target, pairs, _ = draw()
    columns = PairColumns(*pairs)
    expected = reference_score_statistics(scores, target, pairs)
    for rows in (slice(0, 5), slice(5, None)):
        with patch.object(module, "lay_out", wraps=module.lay_out) as lay_out:
            found = score_statistics(scores[rows], target[rows], columns)
        assert lay_out.call_count == (1 if rows.start == 0 else 0)
        assert_same(found, [part[rows] for part in expected])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("topk", [1, 3])
def test_other_floats_are_used_as_float32(dtype, topk):
    scores, target, pairs, _ = draw()
    scores = scores.to(dtype)
    columns = PairColumns(*pairs)
    found, expected = (score_statistics(part, target, columns, topk=topk) for part in (scores, scores.float()))
    assert_same(found, expected)
    assert found.score.dtype == found.negatives.dtype == found.best_seen.dtype == torch.float32


def test_rows_with_strides_are_read_as_they_are():
    scores, target, pairs, _ = draw()
    columns = PairColumns(*pairs)
    assert_same(score_statistics(scores.T.contiguous().T, target, columns), score_statistics(scores, target, columns))


def test_without_seen_or_without_unseen_candidates_there_are_no_negatives_of_that_sort():
    scores, target, (attr, obj, _, _), _ = draw()
    for seen in (torch.zeros(PAIRS, dtype=torch.bool), torch.ones(PAIRS, dtype=torch.bool)):
        found = score_statistics(scores, target, PairColumns(attr, obj, seen))
        assert_same(found, reference_score_statistics(scores, target, (attr, obj, seen, torch.ones_like(seen))))
        missing = slice(2, 4) if seen.all() else slice(0, 2)
        assert (found.negatives[:, missing] == -torch.inf).all()


def test_no_samples_give_empty_statistics():
    scores, target, pairs, _ = draw()
    found = score_statistics(scores[:0], target[:0], PairColumns(*pairs), topk=2)
    assert [tuple(part.shape) for part in found] == [(0,), (0,), (0, 4, 2), (0,), (0, 2, 2)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("topk", [1, 3])
def test_a_score_that_cannot_be_ranked_marks_its_sample_wherever_it_stands(value, topk):
    scores, target, pairs, _ = draw()
    for column in range(PAIRS):  # candidates, seen pairs and the rest
        changed = scores.clone()
        changed[7, column] = value
        found = score_statistics(changed, target, PairColumns(*pairs), topk=topk)
        assert found.score.isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target_pair": [0] * SAMPLES}, TypeError, r"expected `target_pair` to be a torch.Tensor, got list"),
        (
            {"target_pair": [0] * SAMPLES, "name": "label"},
            TypeError,
            r"expected `label` to be a torch.Tensor, got list",
        ),
        ({"target_pair": torch.full((SAMPLES,), -1), "name": "label"}, ValueError, "`label` to hold .* 71, got -1"),
        ({"scores": torch.zeros(SAMPLES, PAIRS).long()}, TypeError, "expected `scores` of dtype .*, got torch.int64"),
        ({"scores": torch.zeros(3, PAIRS)}, ValueError, r"expected `scores` of shape \(13, pairs\), got \(3, 71\)"),
        ({"columns": torch.zeros(PAIRS)}, TypeError, "expected `columns` to be a PairColumns, got Tensor"),
        ({"topk": 0}, ValueError, r"expected `topk` to be in \[1, 71\], got 0"),
        ({"topk": 1.0}, TypeError, r"expected `topk` to be an integer, got 1.0"),
    ],
)
def test_wrong_arguments_are_told(change, error, message):
    scores, target, pairs, _ = draw()
    arguments = {"scores": scores, "target_pair": target, "columns": PairColumns(*pairs), **change}
    with pytest.raises(error, match=message):
        score_statistics(**arguments)
