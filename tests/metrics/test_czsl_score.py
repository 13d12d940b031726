import copy
import logging
import math
import pickle
import warnings
from unittest.mock import patch

import lightning
import matplotlib.pyplot as plt
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection, MetricTracker
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.exceptions import TorchMetricsUserError

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


KEYS = ("seen", "unseen", "harmonic_mean", "auc", "hm_seen", "hm_unseen", "bias", "attr_accuracy", "obj_accuracy")


def expected(scores, target, **options):
    return czsl_scores(scores, target, *SPACE.pairs.unbind(1), SPACE.seen_mask, EVAL_MASK, **options).as_dict()


def expected_scalars(scores, target, **options):
    """What ``compute`` gives, as numbers."""
    whole = expected(scores, target, **options)
    return {key: math.nan if whole[key] is None else whole[key] for key in KEYS}


def numbers(tensors):
    return {key: tensor.item() for key, tensor in tensors.items()}


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
    assert metric.result().as_dict() == expected(scores, target, protocol=protocol, topk=topk)


def test_no_mask_means_all_pairs():
    scores, target = draw()
    metric = CZSLScore(SPACE)
    metric.update(scores, target)
    every = czsl_scores(scores, target, *SPACE.pairs.unbind(1), SPACE.seen_mask)
    assert metric.result().as_dict() == every.as_dict()
    assert every.as_dict() != expected(scores, target)


def test_blocks_of_columns_equal_whole_rows(metric):
    scores, target = draw()
    for rows in (slice(0, 11), slice(11, None)):
        metric.update(((first, scores[rows, first : first + 7]) for first in (14, 0, 21, 7)), target[rows])
    assert metric.result().as_dict() == expected(scores, target)


def test_an_empty_batch_changes_nothing(metric):
    scores, target = draw()
    metric.update(scores[:0], target[:0])
    metric.update(scores, target)
    assert metric.result().as_dict() == expected(scores, target)


def test_state_grows_with_samples_not_with_pairs(metric):
    scores, target = draw()
    metric.update(scores, target)
    digest = metric.metric_state["digest"].numel()
    kept = sum(part.numel() for state in metric.metric_state.values() for part in state)
    assert kept - digest == SAMPLES * (1 + 1 + 4 + 1 + 4)
    assert digest == 8


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
    assert metric.result().as_dict() == expected(scores, target)


def test_compute_in_between_leaves_the_end_alone(metric):
    scores, target = draw()
    metric.update(scores[:11], target[:11])
    assert metric.result().as_dict() == expected(scores[:11], target[:11])
    metric.update(scores[11:], target[11:])
    assert metric.result().as_dict() == expected(scores, target)


@pytest.mark.parametrize("options", [{}, {"dist_sync_on_step": True}, {"compute_on_cpu": True}])
def test_forward_tells_of_its_batch_and_keeps_it(options):
    scores, target = draw()
    metric = CZSLScore(SPACE, eval_mask=EVAL_MASK, **options)
    assert numbers(metric(scores[:11], target[:11])) == expected_scalars(scores[:11], target[:11])
    assert metric.result().as_dict() == expected(scores[:11], target[:11])
    blocks = ((first, scores[11:, first : first + 14]) for first in (0, 14))
    found = metric(blocks, target[11:])
    assert numbers(found) == expected_scalars(scores[11:], target[11:])
    assert metric._forward_cache is found  # which Lightning logs on a step
    assert metric.result().as_dict() == expected(scores, target)
    assert metric.update_count == 2


@pytest.mark.parametrize("key", [None, "auc"])
def test_forward_of_no_samples_is_nan_and_changes_nothing(key):
    scores, target = draw()
    metric = CZSLScore(SPACE, eval_mask=EVAL_MASK, key=key)
    metric.update(scores, target)
    value = metric(scores[:0], target[:0])
    values = [value] if key else list(value.values())
    assert len(values) == (1 if key else len(KEYS))
    assert all(value.isnan() for value in values)
    assert metric.result().as_dict() == expected(scores, target)


@pytest.mark.parametrize("options", [{}, {"dist_sync_on_step": True}])
def test_an_error_in_forward_leaves_the_metric_as_it_was(options):
    scores, target = draw()
    unranked = scores[11:].clone()
    unranked[3, 5] = math.nan
    metric = CZSLScore(SPACE, eval_mask=EVAL_MASK, **options)
    metric(scores[:11], target[:11])
    known = metric.compute()
    wrong = [
        (scores[11:], target[:3]),
        (scores[11:, :7], target[11:]),
        (scores[11:], torch.full((SAMPLES - 11,), 2)),
        (unranked, target[11:]),  # refused by `compute`, after the update of the batch
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="expected `"):
            metric(*arguments)
        assert metric.update_count == 1
        assert metric.compute() is known  # from the cache
    metric(scores[11:], target[11:])
    assert metric.result().as_dict() == expected(scores, target)


def test_forward_on_a_synced_metric_is_refused(metric):
    scores, target = draw()
    metric.update(scores, target)
    metric.sync(dist_sync_fn=lambda part, group: [part], distributed_available=lambda: True)
    with pytest.raises(TorchMetricsUserError, match="expected `forward` before `sync` or after `unsync`"):
        metric(scores, target)
    metric.unsync()
    assert metric.result().as_dict() == expected(scores, target)


def test_an_error_in_compute_gives_back_what_was_gathered(metric):
    scores, target = draw()
    unranked = scores.clone()
    unranked[20, 3] = math.nan
    metric = CZSLScore(SPACE, eval_mask=EVAL_MASK, dist_sync_fn=lambda part, group: [part, part])
    metric.distributed_available_fn = lambda: True
    metric.update(unranked, target)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"expected `scores` without NaN and \+inf, got one in sample 20"):
            metric.compute()
        assert [len(part) for part in metric.target] == [SAMPLES]
    metric.reset()
    metric.update(scores, target)
    assert metric.result().as_dict() == expected(torch.cat([scores, scores]), torch.cat([target, target]))


# What `compute` gives, and who takes it


@pytest.mark.parametrize("protocol", ["standard", "exact"])
def test_compute_gives_scalar_tensors_of_the_result(protocol):
    scores, target = draw()
    metric = CZSLScore(SPACE, eval_mask=EVAL_MASK, protocol=protocol)
    metric.update(scores, target)
    found = metric.compute()
    assert tuple(found) == KEYS
    assert all(value.shape == () and value.dtype == torch.float64 for value in found.values())
    assert numbers(found) == found.scalars() == metric.result().scalars()
    assert found.scalars() == expected_scalars(scores, target, protocol=protocol)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_gives_one_scalar_tensor(key):
    scores, target = draw()
    metric = CZSLScore(SPACE, eval_mask=EVAL_MASK, key=key)
    metric.update(scores, target)
    assert metric.compute().shape == ()
    assert metric.compute().item() == expected(scores, target)[key]
    assert metric.result().as_dict() == expected(scores, target)
    assert metric.higher_is_better is (None if key == "bias" else True)


def test_numbers_that_do_not_exist_are_nan(metric):
    scores, target = draw()
    seen = SPACE.seen_mask[target]
    metric.update(scores[seen], target[seen])
    found = metric.compute().scalars()
    missing = {"unseen", "harmonic_mean", "auc", "hm_unseen"}
    assert {key for key, value in found.items() if math.isnan(value)} == missing
    assert found["seen"] == metric.result().seen


def test_compute_is_on_the_device_of_the_metric(metric):
    metric.to("meta")  # the only other device that is everywhere
    with patch.object(CZSLScore, "_values", return_value=dict.fromkeys(KEYS, 0.5)):
        found = metric.compute()
    assert {value.device.type for value in found.values()} == {"meta"}


def test_result_follows_new_samples_and_is_kept_between(metric):
    scores, target = draw()
    metric.update(scores[:11], target[:11])
    first = metric.result()
    assert metric.result() is first
    metric.update(scores[11:], target[11:])
    assert metric.compute().scalars() == metric.result().scalars() == expected_scalars(scores, target)
    metric.reset()
    with pytest.raises(ValueError, match="expected at least one sample before `compute`, got none"):
        metric.result()


class Logged(lightning.LightningModule):
    """Logs its metrics as ``log`` says, in each of three steps or once at the end."""

    def __init__(self, metrics, log, *, by_step):
        super().__init__()
        self.metrics, self.log_metrics, self.by_step = metrics, log, by_step

    def validation_step(self, batch, number):
        scores, target = draw()
        part = slice(15 * number, 15 * (number + 1))
        if isinstance(self.metrics, MetricCollection) or not self.by_step:
            self.metrics.update(scores[part], target[part])
        else:
            self.metrics(scores[part], target[part])
        if self.by_step:
            self.log_metrics(self, self.metrics)

    def on_validation_epoch_end(self):
        if not self.by_step:
            self.log_metrics(self, self.metrics)


def validated(model):
    """What Lightning logged of three batches."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = lightning.Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        trainer.validate(model, torch.utils.data.DataLoader(torch.zeros(3, 1)), verbose=False)
    return numbers(trainer.callback_metrics)


def keyed():
    return MetricCollection({key: CZSLScore(SPACE, eval_mask=EVAL_MASK, key=key) for key in ("auc", "seen")})


@pytest.mark.parametrize(
    ("metrics", "log", "by_step", "keys"),
    [
        (lambda: CZSLScore(SPACE, eval_mask=EVAL_MASK), lambda m, score: m.log_dict(score.compute()), False, KEYS),
        (
            lambda: CZSLScore(SPACE, eval_mask=EVAL_MASK),
            lambda m, score: m.log_dict(score.result().scalars()),
            False,
            KEYS,
        ),
        (
            lambda: CZSLScore(SPACE, eval_mask=EVAL_MASK, key="auc"),
            lambda m, score: m.log("auc", score),
            True,
            ["auc"],
        ),
        (
            lambda: CZSLScore(SPACE, eval_mask=EVAL_MASK, key="auc"),
            lambda m, score: m.log("auc", score),
            False,
            ["auc"],
        ),
        (keyed, lambda m, scores: m.log_dict(scores), True, ["auc", "seen"]),
        (
            lambda: MetricCollection([CZSLScore(SPACE, eval_mask=EVAL_MASK)]),
            lambda m, scores: m.log_dict(scores.compute()),
            False,
            KEYS,
        ),
    ],
    ids=["dict", "result", "key by step", "key at the end", "collection of keys", "dict of a collection"],
)
def test_lightning_logs_it(metrics, log, by_step, keys):
    found = validated(Logged(metrics(), log, by_step=by_step))
    wanted = expected_scalars(*draw())
    assert found == pytest.approx({key: wanted[key] for key in keys}, abs=1e-6)  # Lightning logs numbers as float32


@pytest.mark.parametrize(("key", "labels"), [(None, [key for key in KEYS if key != "bias"]), ("auc", []), ("bias", [])])
def test_it_can_be_plotted(key, labels):
    metric = CZSLScore(SPACE, eval_mask=EVAL_MASK, key=key)
    steps = [metric(*draw(seed)) for seed in range(3)]
    for val in (None, steps):
        figure, axes = metric.plot(val)
        assert len(axes.lines) == max(1, len(labels))
        assert axes.get_legend_handles_labels()[1] == labels
        plt.close(figure)


def test_a_tracker_finds_the_best_epoch():
    tracker = MetricTracker(CZSLScore(SPACE, eval_mask=EVAL_MASK, key="auc"))
    areas = []
    for seed in range(3):
        tracker.increment()
        tracker.update(*draw(seed))
        areas.append(expected(*draw(seed))["auc"])
    assert tracker.maximize is True
    assert tracker.compute_all().tolist() == areas
    assert tracker.best_metric(return_step=True) == (max(areas), areas.index(max(areas)))


def test_a_tracker_stacks_all_numbers():
    tracker = MetricTracker(CZSLScore(SPACE, eval_mask=EVAL_MASK))
    for seed in range(3):
        tracker.increment()
        tracker.update(*draw(seed))
    found = tracker.compute_all()
    for key in KEYS:
        assert found[key].tolist() == [expected(*draw(seed))[key] for seed in range(3)]


def test_a_tracker_finds_the_best_of_a_collection():
    tracker = MetricTracker(keyed())
    for seed in range(3):
        tracker.increment()
        tracker.update(*draw(seed))
    best, step = tracker.best_metric(return_step=True)
    for key in ("auc", "seen"):
        values = [expected(*draw(seed))[key] for seed in range(3)]
        assert (best[key], step[key]) == (max(values), values.index(max(values)))


@pytest.mark.parametrize("protocol", ["standard", "exact"])
def test_results_pass_through_torchmetrics_unharmed(protocol):
    # One point, and a curve of one point: torchmetrics squeezes tensors of one element.
    metric = CZSLScore(SPACE, protocol=protocol)
    scores = torch.zeros(1, len(SPACE))
    scores[0, 0] = 1.0
    metric.update(scores, torch.tensor([0]))
    result = metric.result()
    assert isinstance(result, CZSLResult)
    assert result.curve.ndim == 2
    assert result.curve.shape[1] == 2
    assert result.unbiased.match == 1.0
    assert metric.result() is result  # from the cache
    assert isinstance(metric.to("cpu").result(), CZSLResult)  # moving a metric moves what it has cached


def test_metric_stands_in_a_collection(metric):
    scores, target = draw()
    exact = CZSLScore(SPACE, eval_mask=EVAL_MASK, protocol="exact")
    collection = MetricCollection({"standard": metric, "exact": exact})
    for rows in (slice(0, 11), slice(11, None)):
        collection.update(scores[rows], target[rows])
    found = collection.compute()
    for name in ("standard", "exact"):
        wanted = expected(scores, target, protocol=name)
        assert {key: found[f"{name}_{key}"].item() for key in KEYS} == expected_scalars(scores, target, protocol=name)
        assert collection[name].result().as_dict() == wanted
    assert len(collection.compute_groups) == 1


def test_a_collection_of_one_names_numbers_as_they_are(metric):
    collection = MetricCollection({"score": metric}, prefix="val/")
    collection.update(*draw())
    assert {key.removeprefix("val/"): value.item() for key, value in collection.compute().items()} == expected_scalars(
        *draw()
    )


@pytest.mark.parametrize("options", [{}, {"dist_sync_on_step": True}])
def test_metrics_that_share_states_see_each_batch_once(options):
    scores, target = draw()
    names = {"standard": "auc", "exact": "harmonic_mean"}
    collection = MetricCollection(
        {name: CZSLScore(SPACE, eval_mask=EVAL_MASK, protocol=name, key=key, **options) for name, key in names.items()}
    )
    parts = slice(0, 11), slice(11, 20), slice(20, 21), slice(21, None)
    for step, part in enumerate(parts):
        # Some steps ask for the value of the batch, some do not, and one fails.
        found = collection(scores[part], target[part]) if step % 2 else collection.update(scores[part], target[part])
        if step % 2:
            wanted = {
                name: expected_scalars(scores[part], target[part], protocol=name)[key] for name, key in names.items()
            }
            assert numbers(found) == pytest.approx(wanted, nan_ok=True)
        with pytest.raises(ValueError, match="expected `scores` of shape"):
            collection(scores[part], target[:2])
    assert len(collection.compute_groups) == 1
    for name, key in names.items():
        assert collection.compute()[name].item() == expected(scores, target, protocol=name)[key]
    collection.reset()
    collection.update(scores, target)
    assert collection["exact"].result().as_dict() == expected(scores, target, protocol="exact")


def test_metrics_of_other_columns_share_no_states():
    scores, target = draw()
    collection = MetricCollection({"mask": CZSLScore(SPACE, eval_mask=EVAL_MASK), "all": CZSLScore(SPACE)})
    collection.update(scores[:0], target[:0])  # gives both the same states
    collection.update(scores, target)
    assert len(collection.compute_groups) == 2
    assert collection["mask"].result().as_dict() == expected(scores, target)
    assert collection["all"].result().as_dict() != expected(scores, target)


def test_nothing_enters_a_state_dict(metric):
    metric.update(*draw())
    assert not metric.state_dict()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric)), CZSLScore.clone])
def test_copies_go_on_by_themselves(metric, clone):
    scores, target = draw()
    metric.update(scores[:11], target[:11])
    twin = clone(metric)
    twin.update(scores[11:], target[11:])
    assert twin.result().as_dict() == expected(scores, target)
    assert metric.result().as_dict() == expected(scores[:11], target[:11])
    with pytest.raises(ValueError, match="expected at least one sample before `compute`, got none"):
        clone(CZSLScore(SPACE)).compute()


@pytest.mark.parametrize("protocol", ["standard", "exact"])
def test_merged_metrics_equal_one(protocol):
    scores, target = draw()
    first, second = (CZSLScore(SPACE, eval_mask=EVAL_MASK, protocol=protocol) for _ in range(2))
    first.update(scores[:11], target[:11])
    second.update(scores[11:20], target[11:20])
    second.update(scores[20:], target[20:])
    assert first.result().as_dict() == expected(scores[:11], target[:11], protocol=protocol)
    first.merge_state(second)
    assert first.result().as_dict() == expected(scores, target, protocol=protocol)


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
    assert metric.result().as_dict() == expected(scores, target)
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
            assert metric.result().as_dict() == expected(scores, target, topk=topk), (case, topk)
            assert metric.compute().scalars() == expected_scalars(scores, target, topk=topk), (case, topk)
            assert sum(map(len, metric.target)) == sum(last - first for first, last in rows[rank])
        # On a step the value is that of the own batch, or of the batches of all processes.
        own = CZSLScore(SPACE, eval_mask=EVAL_MASK, key="auc")
        for first, last in rows[rank]:
            batch = scores[first:last], target[first:last]
            assert own(*batch).item() == pytest.approx(expected_scalars(*batch)["auc"], nan_ok=True)
        assert own.compute().item() == expected(scores, target)["auc"]
        metric = CZSLScore(SPACE, eval_mask=EVAL_MASK, dist_sync_on_step=True, key="auc")
        mine = slice(0, 11) if rank == 0 else slice(11, SAMPLES)
        for _ in range(2):
            assert metric(scores[mine], target[mine]).item() == expected(scores, target)["auc"]
            assert len(metric.target) == metric.update_count  # what the process itself holds
        twice = torch.cat([scores, scores]), torch.cat([target, target])
        assert metric.compute().item() == pytest.approx(expected(*twice)["auc"])
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
        ({"key": "area"}, ValueError, r"expected `key` to be one of seen, unseen, harmonic_mean, auc, .*got 'area'"),
        ({"key": "curve"}, ValueError, r"expected `key` to be one of seen, unseen, harmonic_mean, auc, .*got 'curve'"),
        ({"key": 3}, ValueError, r"expected `key` to be one of seen, unseen, harmonic_mean, auc, .*got 3"),
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
    with pytest.raises(TypeError, match=r"expected `scores` to hold \(first_column, block\) pairs, got str"):
        metric.update("scores", target)
    with pytest.raises(TypeError, match=r"expected `scores` of dtype .*, got torch.int64"):
        metric.update(scores.long(), target)
    with pytest.raises(TypeError, match=r"expected `target` to be a torch.Tensor, got int"):
        metric.update(scores, 3)
    with pytest.raises(TypeError, match=r"expected `target` of dtype torch.int64, got torch.float32"):
        metric.update(scores, target.float())


def test_a_refused_update_leaves_the_metric_as_it_was(metric):
    scores, target = draw()
    metric.update(scores, target)
    outside = target.clone()
    outside[3] = 2
    for wrong, message in (
        ((scores, outside), r"`target` to be candidates under `eval_mask`, got column 2 of sample 3"),
        ((scores, target + 24), r"expected `target` to hold columns below 24, got \d+"),
        ((scores, target[:, None]), r"expected `target` of shape \(samples\), got \(37, 1\)"),
        ((scores[:, :7], target), r"`scores` to cover all 24 columns, got none for column 7"),
        ((scores, target[:5]), r"expected `scores` of shape \(5, pairs\), got \(37, 24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(*wrong)
    assert metric.result().as_dict() == expected(scores, target)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_cannot_be_ranked_are_refused_at_the_end(metric, value):
    scores, target = draw()
    scores[20, 3] = value
    metric.update(scores[:11], target[:11])
    metric.update(scores[11:], target[11:])
    with pytest.raises(ValueError, match=r"expected `scores` without NaN and \+inf, got one in sample 20"):
        metric.compute()


@pytest.mark.parametrize("change", [{"eval_mask": None}, {"topk": 2}])
def test_samples_of_other_labels_or_options_are_not_merged_or_loaded(change):
    scores, target = draw(SAMPLES)
    own, other = CZSLScore(SPACE, eval_mask=EVAL_MASK), CZSLScore(SPACE, **{"eval_mask": EVAL_MASK, **change})
    for metric in (own, other):
        metric.persistent(True)
        metric.update(scores, target)
    before = own.compute()
    with pytest.raises(ValueError, match="expected `incoming_state` of a metric of the same labels and options"):
        own.merge_state(other)
    with pytest.raises(ValueError, match="expected `state_dict` of a metric of the same labels and options"):
        own.load_state_dict(other.state_dict())
    assert own.compute() == before


def test_a_loaded_state_is_what_is_computed():
    scores, target = draw(SAMPLES)
    first, second = CZSLScore(SPACE, eval_mask=EVAL_MASK), CZSLScore(SPACE, eval_mask=EVAL_MASK)
    for metric, part in ((first, slice(0, 20)), (second, slice(20, None))):
        metric.persistent(True)
        metric.update(scores[part], target[part])
    expected = second.compute()
    assert first.compute() != expected
    first.load_state_dict(second.state_dict())
    assert first.compute() == expected
