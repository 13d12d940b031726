import copy
import pickle
import warnings

import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection
from torchmetrics.utilities.data import dim_zero_cat

from czsl_heads import CompositionSpace
from czsl_heads.functional import CZSLResult, czsl_scores
from czsl_heads.metrics import CZSLScore

SAMPLES = 37
SPACE = CompositionSpace(
    [f"attribute {i}" for i in range(5)],
    [f"object {i}" for i in range(7)],
    seen=[(attr, obj) for attr in range(5) for obj in range(7) if (attr + obj) % 3 == 0],
    unseen=[(attr, obj) for attr in range(5) for obj in range(7) if (attr + obj) % 3 == 1],
)
EVAL_MASK = torch.arange(len(SPACE)) % 5 != 2


def draw(seed=0, samples=SAMPLES):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(samples, len(SPACE), generator=generator)
    columns = EVAL_MASK.nonzero()[:, 0]
    target = columns[torch.randint(len(columns), (samples,), generator=generator)]
    scores[torch.arange(samples), target] += 2
    return scores, target


def expected(scores, target, **options):
    return czsl_scores(scores, target, *SPACE.pairs.unbind(1), SPACE.seen_mask, EVAL_MASK, **options).as_dict()


@pytest.fixture
def metric():
    return CZSLScore(SPACE, eval_mask=EVAL_MASK)


@given(
    cuts=st.sets(st.integers(1, SAMPLES - 1)),
    protocol=st.sampled_from(["standard", "exact"]),
    topk=st.sampled_from([1, 2, 5]),
)
@settings(deadline=None, max_examples=25)
def test_batches_in_any_cut_equal_the_function(cuts, protocol, topk):
    scores, target = draw()
    metric = CZSLScore(SPACE, eval_mask=EVAL_MASK, protocol=protocol, topk=topk)
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), SAMPLES]):
        metric.update(scores[first:last], target[first:last])
    assert metric.compute().as_dict() == expected(scores, target, protocol=protocol, topk=topk)


def test_no_mask_means_all_pairs():
    scores, target = draw()
    metric = CZSLScore(SPACE)
    metric.update(scores, target)
    every = czsl_scores(scores, target, *SPACE.pairs.unbind(1), SPACE.seen_mask)
    assert metric.compute().as_dict() == every.as_dict()
    assert every.as_dict() != expected(scores, target)


def test_blocks_of_columns_equal_whole_rows(metric):
    scores, target = draw()
    for rows in (slice(0, 11), slice(11, None)):
        metric.update(((first, scores[rows, first : first + 7]) for first in (14, 0, 21, 7)), target[rows])
    assert metric.compute().as_dict() == expected(scores, target)


def test_an_empty_batch_changes_nothing(metric):
    scores, target = draw()
    metric.update(scores[:0], target[:0])
    metric.update(scores, target)
    assert metric.compute().as_dict() == expected(scores, target)


def test_state_grows_with_samples_not_with_pairs(metric):
    scores, target = draw()
    metric.update(scores, target)
    kept = sum(part.numel() for state in metric.metric_state.values() for part in state)
    assert kept == SAMPLES * (1 + 1 + 4 + 1 + 4)


def test_states_hold_no_graph(metric):
    scores, target = draw()
    metric.update(scores.requires_grad_(), target)
    assert not any(part.requires_grad for state in metric.metric_state.values() for part in state)


def test_reset_forgets(metric):
    metric.update(*draw(seed=1))
    metric.compute()
    metric.reset()
    scores, target = draw()
    metric.update(scores, target)
    assert metric.compute().as_dict() == expected(scores, target)


def test_compute_in_between_leaves_the_end_alone(metric):
    scores, target = draw()
    metric.update(scores[:11], target[:11])
    assert metric.compute().as_dict() == expected(scores[:11], target[:11])
    metric.update(scores[11:], target[11:])
    assert metric.compute().as_dict() == expected(scores, target)


def test_forward_tells_of_its_batch_and_keeps_it(metric):
    scores, target = draw()
    assert metric(scores[:11], target[:11]).as_dict() == expected(scores[:11], target[:11])
    blocks = ((first, scores[11:, first : first + 14]) for first in (0, 14))
    assert metric(blocks, target[11:]).as_dict() == expected(scores[11:], target[11:])
    assert metric.compute().as_dict() == expected(scores, target)


@pytest.mark.parametrize("protocol", ["standard", "exact"])
def test_results_pass_through_torchmetrics_unharmed(protocol):
    # One point, and a curve of one point: torchmetrics squeezes tensors of one element.
    metric = CZSLScore(SPACE, protocol=protocol)
    scores = torch.zeros(1, len(SPACE))
    scores[0, 0] = 1.0
    metric.update(scores, torch.tensor([0]))
    result = metric.compute()
    assert isinstance(result, CZSLResult)
    assert result.curve.ndim == 2
    assert result.curve.shape[1] == 2
    assert result.unbiased.match == 1.0
    assert metric.compute() is result  # from the cache
    assert isinstance(metric.to("cpu").compute(), CZSLResult)  # moving a metric moves what it has cached


def test_metric_stands_in_a_collection(metric):
    scores, target = draw()
    exact = CZSLScore(SPACE, eval_mask=EVAL_MASK, protocol="exact")
    collection = MetricCollection({"standard": metric, "exact": exact})
    for rows in (slice(0, 11), slice(11, None)):
        collection.update(scores[rows], target[rows])
    results = collection.compute()
    assert results["standard"].as_dict() == expected(scores, target)
    assert results["exact"].as_dict() == expected(scores, target, protocol="exact")


def test_nothing_enters_a_state_dict(metric):
    metric.update(*draw())
    assert not metric.state_dict()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric)), CZSLScore.clone])
def test_copies_go_on_by_themselves(metric, clone):
    scores, target = draw()
    metric.update(scores[:11], target[:11])
    twin = clone(metric)
    twin.update(scores[11:], target[11:])
    assert twin.compute().as_dict() == expected(scores, target)
    assert metric.compute().as_dict() == expected(scores[:11], target[:11])
    with pytest.raises(ValueError, match="expected at least one sample before `compute`, got none"):
        clone(CZSLScore(SPACE)).compute()


@pytest.mark.parametrize("protocol", ["standard", "exact"])
def test_merged_metrics_equal_one(protocol):
    scores, target = draw()
    first, second = (CZSLScore(SPACE, eval_mask=EVAL_MASK, protocol=protocol) for _ in range(2))
    first.update(scores[:11], target[:11])
    second.update(scores[11:20], target[11:20])
    second.update(scores[20:], target[20:])
    first.merge_state(second)
    assert first.compute().as_dict() == expected(scores, target, protocol=protocol)


def test_processes_gathered_by_torchmetrics_equal_one():
    scores, target = draw()
    other = CZSLScore(SPACE, eval_mask=EVAL_MASK)
    other.update(scores[20:], target[20:])
    names = iter(other.metric_state)

    def gather(part, group=None):
        # Stands in for all_gather: called once a state, in order, on what this process holds of it.
        return [part, dim_zero_cat(getattr(other, next(names)))]

    metric = CZSLScore(
        SPACE, eval_mask=EVAL_MASK, dist_sync_fn=gather, distributed_available_fn=lambda: True, compute_with_cache=False
    )
    metric.update(scores[:11], target[:11])
    metric.update(scores[11:20], target[11:20])
    assert metric.compute().as_dict() == expected(scores, target)
    # What the process itself holds is back after the gathering.
    assert [len(part) for part in metric.target] in ([11, 9], [20])


def compute_on_one_of_two(rank, folder, rows_of_ranks):
    """Run in a process of its own: what both gather must be the numbers of one process with all samples."""
    for case, rows in enumerate(rows_of_ranks):
        store = f"file://{folder}/{case}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        scores, target = draw()
        for topk in (1, 2):
            metric = CZSLScore(SPACE, eval_mask=EVAL_MASK, topk=topk)
            for first, last in rows[rank]:
                metric.update(scores[first:last], target[first:last])
            assert metric.compute().as_dict() == expected(scores, target, topk=topk), (case, topk)
            assert sum(map(len, metric.target)) == sum(last - first for first, last in rows[rank])
        torch.distributed.destroy_process_group()


def test_two_processes_gather_uneven_samples_and_none(tmp_path):
    uneven = ([(0, 5), (5, 11)], [(11, SAMPLES)])
    empty = ([], [(0, 20), (20, SAMPLES)])
    torch.multiprocessing.spawn(compute_on_one_of_two, (str(tmp_path), (uneven, empty)), nprocs=2)


def test_compute_before_update_raises_and_does_not_warn(metric):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="expected at least one sample before `compute`, got none"):
            metric.compute()
    assert not caught
    metric.update(*draw())
    metric.reset()
    with pytest.raises(ValueError, match="expected at least one sample before `compute`, got none"):
        metric.compute()


def test_only_empty_batches_are_no_sample(metric):
    scores, target = draw()
    metric.update(scores[:0], target[:0])
    with pytest.raises(ValueError, match="expected at least one sample"):
        metric.compute()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"protocol": "loose"}, ValueError, r"expected `protocol` to be one of standard, exact, got 'loose'"),
        ({"topk": 0}, ValueError, r"expected `topk` to be in \[1, 24\], got 0"),
        ({"topk": 25}, ValueError, r"expected `topk` to be in \[1, 24\], got 25"),
        ({"eval_mask": torch.ones(7).bool()}, ValueError, r"expected `eval_mask` of shape \(24\), got \(7,\)"),
        ({"eval_mask": torch.ones(24)}, TypeError, r"expected `eval_mask` of dtype torch.bool, got torch.float32"),
        ({"topk": 1.5}, TypeError, r"expected `topk` to be an integer, got 1.5"),
        ({"eval_mask": [True] * 24}, TypeError, r"expected `eval_mask` to be a torch.Tensor, got list"),
    ],
)
def test_wrong_options_are_told(options, error, message):
    with pytest.raises(error, match=message):
        CZSLScore(SPACE, **options)


@pytest.mark.parametrize("space", [5, None, SPACE.pairs])
def test_what_is_no_space_is_told(space):
    with pytest.raises(TypeError, match="expected `space` to be a CompositionSpace, got "):
        CZSLScore(space)


def test_scores_of_another_kind_are_told(metric):
    scores, target = draw()
    with pytest.raises(TypeError, match="expected `scores` to be a tensor or an iterable of blocks, got int"):
        metric.update(3, target)
    with pytest.raises(TypeError, match=r"expected `scores` to hold \(first_column, block\) pairs, got Tensor"):
        metric.update([scores], target)
    with pytest.raises(TypeError, match=r"expected `target_pair` to be a torch.Tensor, got int"):
        metric.update(scores, 3)


def test_a_refused_update_leaves_the_metric_as_it_was(metric):
    scores, target = draw()
    metric.update(scores, target)
    outside = target.clone()
    outside[3] = 2
    for wrong, message in (
        ((scores, outside), r"`target_pair` to be candidates under `eval_mask`, got column 2 of sample 3"),
        ((scores[:, :7], target), r"`scores` to cover all 24 columns, got none for column 7"),
        ((scores, target[:5]), r"expected `scores` of shape \(5, pairs\), got \(37, 24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(*wrong)
    assert metric.compute().as_dict() == expected(scores, target)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_cannot_be_ranked_are_refused_at_the_end(metric, value):
    scores, target = draw()
    scores[20, 3] = value
    metric.update(scores[:11], target[:11])
    metric.update(scores[11:], target[11:])
    with pytest.raises(ValueError, match=r"expected `scores` without NaN and \+inf, got one in sample 20"):
        metric.compute()
