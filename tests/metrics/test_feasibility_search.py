import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from czsl_heads import CompositionSpace
from czsl_heads.functional import FeasibilityCurve, search_threshold
from czsl_heads.metrics import CZSLScore, FeasibilitySearch

SAMPLES, STEPS = 37, 11
SPACE = CompositionSpace(
    [f"attribute {i}" for i in range(5)],
    [f"object {i}" for i in range(7)],
    seen=[(attr, obj) for attr in range(5) for obj in range(7) if (attr + obj) % 3 == 0],
    unseen=[(attr, obj) for attr in range(5) for obj in range(7) if (attr + obj) % 3 == 1],
).open_world()
EVAL_MASK = torch.arange(len(SPACE)) % 5 != 2
FEASIBILITY = torch.linspace(-0.3, 0.9, len(SPACE))[torch.randperm(35, generator=torch.Generator().manual_seed(0))]


def draw(seed=0, samples=SAMPLES):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(samples, len(SPACE), generator=generator)
    columns = EVAL_MASK.nonzero()[:, 0]
    target = columns[torch.randint(len(columns), (samples,), generator=generator)]
    scores[torch.arange(samples), target] += 2
    return scores, target


def expected(scores, target, **options):
    options = {"feasibility": FEASIBILITY, "steps": STEPS, **options}
    return search_threshold(scores, target, *SPACE.pairs.unbind(1), SPACE.seen_mask, EVAL_MASK, **options).as_dict()


def expected_scalars(scores, target, **options):
    """What ``compute`` gives, as numbers."""
    curve = expected(scores, target, **options)
    return {"threshold": curve["threshold"], "auc": max(curve["auc"]), "auc_unmasked": curve["auc_unmasked"]}


@pytest.fixture
def search():
    return FeasibilitySearch(SPACE, FEASIBILITY, eval_mask=EVAL_MASK, steps=STEPS)


@given(
    cuts=st.sets(st.integers(1, SAMPLES - 1)),
    masking=st.sampled_from(["clean", "official"]),
    protocol=st.sampled_from(["standard", "exact"]),
    topk=st.sampled_from([1, 2, 5]),
)
@settings(deadline=None, max_examples=25)
def test_batches_in_any_cut_equal_the_function(cuts, masking, protocol, topk):
    scores, target = draw()
    options = {"masking": masking, "protocol": protocol, "topk": topk}
    search = FeasibilitySearch(SPACE, FEASIBILITY, eval_mask=EVAL_MASK, steps=STEPS, **options)
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), SAMPLES]):
        search.update(scores[first:last], target[first:last])
    assert search.result().as_dict() == expected(scores, target, **options)


def test_default_is_50_steps_over_all_pairs():
    scores, target = draw()
    search = FeasibilitySearch(SPACE, FEASIBILITY)
    search.update(scores, target)
    every = search_threshold(scores, target, *SPACE.pairs.unbind(1), SPACE.seen_mask, feasibility=FEASIBILITY)
    assert search.result().as_dict() == every.as_dict()
    assert len(every.thresholds) == 50


def test_blocks_of_columns_equal_whole_rows(search):
    scores, target = draw()
    for rows in (slice(0, 11), slice(11, None)):
        search.update(((first, scores[rows, first : first + 7]) for first in (14, 0, 28, 21, 7)), target[rows])
    assert search.result().as_dict() == expected(scores, target)


def test_state_grows_with_samples_and_steps_not_with_pairs(search):
    search.update(*draw())
    kept = sum(part.numel() for state in search.metric_state.values() for part in state)
    assert kept - search.digest.numel() == SAMPLES * (1 + 1 + 2 * (1 + STEPS) + 1)


def test_empty_batches_and_forward_and_reset(search):
    search.update(*draw(seed=1))
    search.reset()
    scores, target = draw()
    search.update(scores[:0], target[:0])
    assert search(scores[:11], target[:11]).scalars() == expected_scalars(scores[:11], target[:11])
    search.update(scores[11:], target[11:])
    result = search.result()
    assert isinstance(result, FeasibilityCurve)
    assert result.as_dict() == expected(scores, target)
    assert search.result() is result  # from the cache


def test_compute_gives_scalar_tensors_of_the_curve(search):
    scores, target = draw()
    search.update(scores, target)
    found = search.compute()
    assert list(found) == ["threshold", "auc", "auc_unmasked"]
    assert all(value.shape == () and value.dtype == torch.float64 for value in found.values())
    assert found.scalars() == search.result().scalars() == expected_scalars(scores, target)
    curve = search.result()
    assert found["auc"] == curve.auc[curve.thresholds == curve.threshold][0]


@pytest.mark.parametrize("key", ["threshold", "auc", "auc_unmasked"])
def test_a_key_gives_one_scalar_tensor(key):
    scores, target = draw()
    search = FeasibilitySearch(SPACE, FEASIBILITY, eval_mask=EVAL_MASK, steps=STEPS, key=key)
    search.update(scores, target)
    assert search.compute().shape == ()
    assert search.compute().item() == expected_scalars(scores, target)[key]
    assert search.higher_is_better is (None if key == "threshold" else True)


def test_areas_that_do_not_exist_are_nan(search):
    scores, target = draw()
    seen = SPACE.seen_mask[target]
    search.update(scores[seen], target[seen])
    found = search.compute().scalars()
    assert found["threshold"] == -10
    assert math.isnan(found["auc"])
    assert math.isnan(found["auc_unmasked"])


def test_an_error_in_forward_leaves_the_search_as_it_was(search):
    scores, target = draw()
    search(scores[:11], target[:11])
    with pytest.raises(ValueError, match=r"expected `scores` of shape \(3, pairs\), got"):
        search(scores[11:], target[:3])
    assert search.result().as_dict() == expected(scores[:11], target[:11])
    search(scores[11:], target[11:])
    assert search.result().as_dict() == expected(scores, target)


def test_copies_go_their_own_way(search):
    scores, target = draw()
    search.update(scores[:11], target[:11])
    for other in (copy.deepcopy(search), pickle.loads(pickle.dumps(search))):
        other.update(scores[11:], target[11:])
        assert other.result().as_dict() == expected(scores, target)
    assert search.result().as_dict() == expected(scores[:11], target[:11])


def test_search_stands_in_a_collection_beside_scores(search):
    scores, target = draw()
    collection = MetricCollection({"search": search, "score": CZSLScore(SPACE, eval_mask=EVAL_MASK)})
    for rows in (slice(0, 11), slice(11, None)):
        collection.update(scores[rows], target[rows])
    found = collection.compute()
    for name, value in expected_scalars(scores, target).items():
        assert found[f"search_{name}"].item() == value
    assert found["score_auc"] == found["search_auc_unmasked"]
    assert collection["search"].result().as_dict() == expected(scores, target)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"space": 3}, TypeError, "expected `space` to be a CompositionSpace, got int"),
        ({"feasibility": torch.ones(34)}, ValueError, r"expected `feasibility` of shape \(35\), got \(34,\)"),
        ({"feasibility": torch.ones(5, 7)}, ValueError, r"expected `feasibility` of shape \(35\), got \(5, 7\)"),
        ({"feasibility": torch.ones(35).long()}, TypeError, "expected `feasibility` of dtype .*, got torch.int64"),
        ({"feasibility": torch.full((35,), math.nan)}, ValueError, "expected `feasibility` of finite numbers, got"),
        (
            {"eval_mask": torch.ones(34).bool()},
            ValueError,
            r"`eval_mask` of shape \(pairs\) with pairs=35, got \(34,\)",
        ),
        ({"eval_mask": torch.ones(35)}, TypeError, "expected `eval_mask` of dtype torch.bool, got torch.float32"),
        ({"masking": "soft"}, ValueError, "expected `masking` to be one of clean, official, got 'soft'"),
        ({"protocol": "loose"}, ValueError, "expected `protocol` to be one of standard, exact, got 'loose'"),
        ({"steps": 0}, ValueError, "expected `steps` to be at least 1, got 0"),
        ({"topk": 36}, ValueError, r"expected `topk` to be in \[1, 35\], got 36"),
        ({"topk": 1.5}, TypeError, "expected `topk` to be an integer, got 1.5"),
        ({"key": "kept"}, ValueError, "expected `key` to be one of threshold, auc, auc_unmasked, got 'kept'"),
        ({"steps": 1.5}, TypeError, "expected `steps` to be an integer, got 1.5"),
        ({"feasibility": [0.5] * 35}, TypeError, "expected `feasibility` to be a torch.Tensor, got list"),
    ],
)
def test_wrong_options_are_told(change, error, message):
    with pytest.raises(error, match=message):
        FeasibilitySearch(**{"space": SPACE, "feasibility": FEASIBILITY, **change})


def test_a_space_without_unseen_pairs_is_told():
    seen = SPACE.subset(SPACE.seen_mask)
    with pytest.raises(ValueError, match="expected `space` with an unseen pair, got none"):
        FeasibilitySearch(seen, torch.zeros(len(seen)))


def test_what_cannot_be_computed_is_told(search):
    with pytest.raises(ValueError, match="expected at least one sample before `compute`, got none"):
        search.compute()
    scores, target = draw()
    with pytest.raises(ValueError, match="expected `target` to be candidates under `eval_mask`"):
        search.update(scores, torch.full((SAMPLES,), 2))
    with pytest.raises(TypeError, match=r"expected `target` to be a torch.Tensor, got list"):
        search.update(scores, target.tolist())
    scores[3, 5] = math.nan
    search.update(scores, target)
    with pytest.raises(ValueError, match=r"expected `scores` without NaN and \+inf, got one in sample 3"):
        search.compute()
