import copy
import pickle
from itertools import pairwise

import matplotlib.pyplot as plt
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from czsl_heads.functional.gap import relative_modality_gap
from czsl_heads.metrics.modality_gap import RelativeModalityGap

SAMPLES, CLASSES, DIM = 37, 5, 11
EMPTY_WARNING = "The ``compute`` method of metric"
each_mode = pytest.mark.parametrize("mode", ["class", "pair"])


def draw(mode, seed=0, samples=SAMPLES, dtype=torch.float32):
    """The texts given at construction, the images, and what ``update`` takes with them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, DIM, generator=generator).to(dtype)
    texts = torch.randn(CLASSES, DIM, generator=generator).to(dtype)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    return (texts, images, labels) if mode == "class" else (None, images, texts[labels])


def expected(texts, images, match, **options):
    if texts is None:
        return relative_modality_gap(images, match, **options)
    return relative_modality_gap(images, texts, labels=match, **options)


def assert_equal(gap, wanted):
    """To the rounding of float64, which sums of parts may differ by."""
    assert gap.shape == ()
    assert gap.dtype == torch.float64
    torch.testing.assert_close(gap, wanted, rtol=1e-13, atol=0)


@given(
    cuts=st.sets(st.integers(0, SAMPLES)),
    mode=st.sampled_from(["class", "pair"]),
    include_self=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
@settings(deadline=None, max_examples=40)
def test_batches_in_any_cut_equal_the_function(cuts, mode, include_self, dtype):
    texts, images, match = draw(mode, dtype=dtype)
    metric = RelativeModalityGap(texts, include_self=include_self)
    edges = [0, *sorted(cuts), SAMPLES]  # the first and the last batch may be empty
    for first, last in pairwise(edges):
        metric.update(images[first:last], match[first:last])
    assert_equal(metric.compute(), expected(texts, images, match, include_self=include_self))


@each_mode
def test_one_batch_is_the_function_to_the_bit(mode):
    texts, images, match = draw(mode)
    metric = RelativeModalityGap(texts)
    metric.update(images, match)
    assert torch.equal(metric.compute(), expected(texts, images, match))


@each_mode
def test_identical_modalities_keep_the_floor_under_any_cut(mode):
    _, images, _ = draw(mode, dtype=torch.float64)
    labels = torch.arange(SAMPLES)
    metric = RelativeModalityGap(images if mode == "class" else None)
    for rows in (slice(0, 7), slice(7, 20), slice(20, None)):
        metric.update(3 * images[rows], labels[rows] if mode == "class" else images[rows])
    gap = metric.compute()
    assert_equal(gap, relative_modality_gap(images, images))
    assert 0.001 < gap < 0.003


@pytest.mark.parametrize(("mode", "size"), [("class", DIM + 2), ("pair", 2 * DIM + 3)])
def test_state_does_not_grow(mode, size):
    texts, images, match = draw(mode)
    metric = RelativeModalityGap(texts)
    for _ in range(3):
        metric.update(images, match)
        states = [state for name, state in metric.metric_state.items() if name != "digest"]
        assert sum(state.numel() for state in states) == size
        assert metric.digest.numel() == 8


@each_mode
def test_states_hold_no_graph(mode):
    texts, images, match = draw(mode)
    metric = RelativeModalityGap(texts if texts is None else texts.requires_grad_())
    metric.update(images.requires_grad_(), match)
    assert not any(state.requires_grad for state in metric.metric_state.values())
    assert not metric.compute().requires_grad


@each_mode
def test_reset_forgets(mode):
    texts, images, match = draw(mode)
    metric = RelativeModalityGap(texts)
    metric.update(*draw(mode, seed=1)[1:])
    metric.compute()
    metric.reset()
    metric.update(images, match)
    assert torch.equal(metric.compute(), expected(texts, images, match))


def test_after_a_reset_pairs_may_have_another_dim():
    metric = RelativeModalityGap()
    metric.update(torch.eye(3), torch.eye(3).flip(0))
    metric.reset()
    _, images, match = draw("pair")
    metric.update(images, match)
    assert torch.equal(metric.compute(), expected(None, images, match))


@each_mode
def test_compute_in_between_and_forward_leave_the_end_alone(mode):
    texts, images, match = draw(mode)
    metric = RelativeModalityGap(texts)
    metric.update(images[:11], match[:11])
    assert_equal(metric.compute(), expected(texts, images[:11], match[:11]))
    assert_equal(metric(images[11:], match[11:]), expected(texts, images[11:], match[11:]))
    assert_equal(metric.compute(), expected(texts, images, match))


@each_mode
def test_metric_stands_in_a_collection(mode):
    texts, images, match = draw(mode)
    collection = MetricCollection(
        {"plain": RelativeModalityGap(texts), "self": RelativeModalityGap(texts, include_self=True)}
    )
    for rows in (slice(0, 11), slice(11, None)):
        collection.update(images[rows], match[rows])
    gaps = collection.compute()
    assert_equal(gaps["plain"], expected(texts, images, match))
    assert_equal(gaps["self"], expected(texts, images, match, include_self=True))
    assert len(collection.compute_groups) == 1


def test_metrics_of_other_texts_share_no_states():
    texts, images, labels = draw("class")
    collection = MetricCollection({"one": RelativeModalityGap(texts), "other": RelativeModalityGap(texts.flip(1))})
    collection.update(images[:0], labels[:0])  # gives both the same states
    collection.update(images, labels)
    gaps = collection.compute()
    assert_equal(gaps["one"], expected(texts, images, labels))
    assert_equal(gaps["other"], expected(texts.flip(1), images, labels))


@each_mode
@pytest.mark.parametrize("options", [{}, {"dist_sync_on_step": True}])
def test_forward_of_one_image_is_nan_and_adds_it(mode, options):
    texts, images, match = draw(mode)
    metric = RelativeModalityGap(texts, **options)
    edges = [0, 5, 6, 6, 20, 21, SAMPLES]  # batches of one image, and of none
    for first, last in pairwise(edges):
        gap = metric(images[first:last], match[first:last])
        if last - first < 2:
            assert gap.isnan()
            assert gap.shape == ()
            assert gap.dtype == torch.float64
        else:
            assert_equal(gap, expected(texts, images[first:last], match[first:last]))
        if last >= 2:
            assert_equal(metric.compute(), expected(texts, images[:last], match[:last]))
    assert metric.num_images == SAMPLES
    assert metric.update_count == len(edges) - 1


@each_mode
def test_forward_of_one_image_first_is_that_of_update(mode):
    texts, images, match = draw(mode)
    stepped, updated = RelativeModalityGap(texts), RelativeModalityGap(texts)
    for rows in (slice(0, 1), slice(1, None)):
        stepped(images[rows], match[rows])
        updated.update(images[rows], match[rows])
    assert torch.equal(stepped.compute(), updated.compute())


def test_an_image_with_itself_is_a_gap():
    texts, images, labels = draw("class")
    metric = RelativeModalityGap(texts, include_self=True)
    assert_equal(metric(images[:1], labels[:1]), expected(texts, images[:1], labels[:1], include_self=True))


def test_it_can_be_plotted():
    texts, images, labels = draw("class")
    metric = RelativeModalityGap(texts)
    steps = [metric(images[rows], labels[rows]) for rows in (slice(0, 9), slice(9, 10), slice(10, None))]
    for val in (None, steps):
        figure, axes = metric.plot(val)
        assert axes.get_ylim() == pytest.approx((-0.1, 1.1))
        plt.close(figure)


def test_texts_given_are_those_of_construction():
    texts, images, match = draw("class")
    before = texts.clone()
    metric = RelativeModalityGap(texts)
    texts.zero_()
    metric.update(images, match)
    assert torch.equal(metric.compute(), expected(before, images, match))


@each_mode
def test_nothing_enters_a_state_dict(mode):
    texts, images, match = draw(mode)
    metric = RelativeModalityGap(texts)
    metric.update(images, match)
    assert not metric.state_dict()


@each_mode
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric)), RelativeModalityGap.clone]
)
def test_copies_go_on_by_themselves(mode, clone):
    texts, images, match = draw(mode)
    metric = RelativeModalityGap(texts, include_self=True)
    metric.update(images[:11], match[:11])
    twin = clone(metric)
    twin.update(images[11:], match[11:])
    assert_equal(twin.compute(), expected(texts, images, match, include_self=True))
    assert_equal(metric.compute(), expected(texts, images[:11], match[:11], include_self=True))


@each_mode
def test_merged_metrics_equal_one(mode):
    texts, images, match = draw(mode)
    first, second, empty = (RelativeModalityGap(texts) for _ in range(3))
    first.update(images[:11], match[:11])
    second.update(images[11:20], match[11:20])
    second.update(images[20:], match[20:])
    first.merge_state(second)
    first.merge_state(empty)
    assert_equal(first.compute(), expected(texts, images, match))


@each_mode
def test_processes_gathered_by_torchmetrics_equal_one(mode):
    texts, images, match = draw(mode)
    other = RelativeModalityGap(texts)
    other.update(images[20:], match[20:])
    names = iter(other.metric_state)

    def gather(state, group=None):
        # Stands in for all_gather: called once a state, in order, on what this process holds of it.
        return [state, getattr(other, next(names))]

    metric = RelativeModalityGap(texts, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update(images[:11], match[:11])
    metric.update(images[11:20], match[11:20])
    assert_equal(metric.compute(), expected(texts, images, match))
    assert metric.num_images == 20  # what the process itself holds is back after the gathering


def compute_on_one_of_two(rank, folder, rows_of_ranks):
    """Run in a process of its own: what both gather must be the gap of one process with all samples."""
    for case, rows in enumerate(rows_of_ranks):
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{case}", rank=rank, world_size=2)
        for mode in ("class", "pair"):
            texts, images, match = draw(mode)
            metric = RelativeModalityGap(texts)
            for first, last in rows[rank]:
                metric.update(images[first:last], match[first:last])
            assert_equal(metric.compute(), expected(texts, images, match))
            assert metric.num_images == sum(last - first for first, last in rows[rank])
        torch.distributed.destroy_process_group()


def test_two_processes_gather_uneven_samples_and_none(tmp_path):
    uneven = ([(0, 5), (5, 11)], [(11, SAMPLES)])
    empty = ([], [(0, 20), (20, SAMPLES)])
    torch.multiprocessing.spawn(compute_on_one_of_two, (str(tmp_path), (uneven, empty)), nprocs=2)


@each_mode
def test_too_few_samples_are_told_at_the_end(mode):
    texts, images, match = draw(mode)
    metric = RelativeModalityGap(texts)
    with pytest.raises(ValueError, match=r"at least 2 .*got 0 and"):
        metric.compute()
    metric.update(images[:1], match[:1])
    with pytest.raises(ValueError, match=r"expected at least 2 images and 2 texts with include_self=False, got 1 and"):
        metric.compute()
    metric.update(images[1:2], match[1:2])
    assert_equal(metric.compute(), expected(texts, images[:2], match[:2]))


@each_mode
def test_nan_propagates(mode):
    texts, images, match = draw(mode)
    images[20, 3] = torch.nan
    metric = RelativeModalityGap(texts)
    metric.update(images[:11], match[:11])
    assert metric.compute().isfinite()
    metric.update(images[11:], match[11:])
    assert metric.compute().isnan()


@pytest.mark.parametrize(
    ("mode", "change", "error", "message"),
    [
        ("class", {"match": torch.full((SAMPLES,), 5)}, ValueError, r"expected `match` to be in \[0, 4\], got 5"),
        ("class", {"match": torch.full((SAMPLES,), -1)}, ValueError, r"expected `match` to be in \[0, 4\], got -1"),
        ("class", {"match": torch.ones(SAMPLES, DIM)}, TypeError, r"`match` of dtype torch.int64, got torch.float32"),
        ("class", {"match": torch.ones(7).long()}, ValueError, r"`match` of shape .*images=37.*got \(7,\)"),
        ("class", {"match": 3}, TypeError, r"expected `match` to be a torch.Tensor, got int"),
        ("class", {"images": torch.ones(SAMPLES, 7)}, ValueError, r"`images` of shape \(images, 11\), got \(37, 7\)"),
        ("class", {"images": torch.ones(SAMPLES)}, ValueError, r"`images` of shape \(images, 11\), got \(37,\)"),
        ("pair", {"match": torch.ones(SAMPLES).long()}, TypeError, r"`match` of dtype .*got torch.int64"),
        ("pair", {"match": torch.ones(7, DIM)}, ValueError, r"`match` of shape .*images=37.*got \(7, 11\)"),
        ("pair", {"match": torch.ones(SAMPLES, 7)}, ValueError, r"`match` of shape .*dim=11, got \(37, 7\)"),
        ("pair", {"match": torch.zeros(SAMPLES, DIM)}, ValueError, r"`match` without zero vectors, got .*row 0"),
        ("pair", {"images": [1.0]}, TypeError, r"expected `images` to be a torch.Tensor, got list"),
        ("pair", {"images": torch.zeros(SAMPLES, DIM)}, ValueError, r"`images` without zero vectors, got .*row 0"),
        (
            "pair",
            {"images": torch.ones(SAMPLES, 7), "match": torch.ones(SAMPLES, 7)},
            ValueError,
            r"expected `images` of shape \(images, 11\), got \(37, 7\)",
        ),
    ],
)
def test_a_refused_update_leaves_the_metric_as_it_was(mode, change, error, message):
    texts, images, match = draw(mode)
    metric = RelativeModalityGap(texts)
    metric.update(images, match)
    known = metric.compute()
    for refusing in (metric, metric.update):
        with pytest.raises(error, match=message):
            refusing(**{"images": images, "match": match, **change})
        assert torch.equal(metric.compute(), known)
    metric(images[:3], match[:3])
    assert metric.num_images == SAMPLES + 3


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([[1.0]], TypeError, r"expected `texts` to be a torch.Tensor, got list"),
        (torch.ones(5, 7).long(), TypeError, r"expected `texts` of dtype .*got torch.int64"),
        (torch.ones(7), ValueError, r"expected `texts` of shape \(texts, dim\), got \(7,\)"),
        (torch.eye(5)[:, :4], ValueError, r"expected `texts` without zero vectors, got one in row 4"),
    ],
)
def test_wrong_texts_are_told_at_construction(texts, error, message):
    with pytest.raises(error, match=message):
        RelativeModalityGap(texts)


def test_an_option_of_another_kind_is_told():
    with pytest.raises(TypeError, match="expected `include_self` to be a bool, got str"):
        RelativeModalityGap(include_self="no")
