import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from czsl_heads.functional.bank import (
    arrival_ranks,
    merge_best,
    prediction_entropy,
    retrieve,
    retrieve_prototypes,
    row_counts,
    unit_rows,
)
from tests.references import (
    reference_merge_best,
    reference_prediction_entropy,
    reference_retrieve,
    reference_retrieve_prototypes,
)

SIZES = {"num_pairs": 5, "slots": 3}
MODES = [{"empty": empty, "normalize": normalize} for empty in ("mask", "zero") for normalize in (False, True)]
each_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def draw_entries(num_pairs=5, slots=3, dim=7, *, blocks=2, dtype=torch.float64, seed=0):
    """Random blocks of at most ``slots`` unit vectors a pair, some marked as unused; and the dense rows they mean."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, slots + 1, (num_pairs,), generator=generator)
    pair_index = torch.cat([torch.arange(num_pairs).repeat_interleave(counts), torch.full((2,), num_pairs)])
    pair_index = pair_index[torch.randperm(len(pair_index), generator=generator)]
    vectors = F.normalize(torch.randn(len(pair_index), dim, generator=generator, dtype=torch.float64), dim=-1)
    vectors = vectors.to(dtype)
    rows = [list(vectors[pair_index == pair]) for pair in range(num_pairs)]
    rows = [row + [None] * (slots - len(row)) for row in rows]
    return list(zip(vectors.chunk(blocks), pair_index.chunk(blocks))), rows


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
    arguments = {"pair_index": torch.zeros(3, dtype=torch.long), "entropy": torch.zeros(3), **SIZES}
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


@given(
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 5)),
    batch=st.integers(0, 3),
    blocks=st.integers(1, 3),
    temperature=st.sampled_from([0.01, 0.1, 1.0]),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(deadline=None, max_examples=30)
def test_retrieval_equals_its_formula(sizes, batch, blocks, temperature, mode, seed, data):
    num_pairs, slots, dim = sizes
    sources, rows = draw_entries(num_pairs, slots, dim, blocks=blocks, seed=seed)
    features = draw_features(batch, dim, seed=seed + 1)
    options = {"num_pairs": num_pairs, "slots": slots, "temperature": temperature, **mode}
    expected = reference_retrieve(features, rows, temperature=temperature, **mode)
    torch.testing.assert_close(retrieve(features, sources, **options), expected)
    wanted = torch.tensor(data.draw(st.lists(st.integers(0, num_pairs - 1), max_size=4)), dtype=torch.long)
    expected = reference_retrieve_prototypes(features, rows, temperature=temperature, **mode)[:, wanted]
    torch.testing.assert_close(retrieve_prototypes(features, sources, wanted, **options), expected)


def test_hand_sized_scores():
    feature = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]], dtype=torch.float64)
    sources = [(vectors, torch.tensor([0, 0, 2]))]
    options = {"num_pairs": 3, "slots": 2, "temperature": 1.0}
    e = math.e
    weight = e / (e + 1)  # of the first of two entries, whose cosines are 1 and 0
    for mode, expected in (
        ({}, [weight, -math.inf, 0.8]),
        ({"normalize": True}, [weight / math.hypot(weight, 1 - weight), -math.inf, 0.8]),
        ({"empty": "zero"}, [weight, 0.0, 0.8 * e**0.8 / (e**0.8 + 1)]),
        ({"empty": "zero", "normalize": True}, [weight / math.hypot(weight, 1 - weight), 0.0, 0.8]),
    ):
        scores = retrieve(feature, sources, **options, **mode)
        torch.testing.assert_close(scores, torch.tensor([expected], dtype=torch.float64))


@each_mode
def test_prototypes_times_features_are_the_scores(mode):
    sources, _ = draw_entries()
    features = draw_features()
    prototypes = retrieve_prototypes(features, sources, torch.arange(5), **SIZES, **mode)
    products = (F.normalize(features, dim=-1)[:, None] * prototypes).sum(dim=-1)
    scores = retrieve(features, sources, **SIZES, **mode)
    torch.testing.assert_close(products, scores.nan_to_num(neginf=0.0))


@each_mode
def test_order_and_blocks_of_the_entries_do_not_matter(mode):
    [(vectors, pair_index)], _ = draw_entries(num_pairs=11, slots=5, blocks=1)
    options = {"num_pairs": 11, "slots": 5, **mode}
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
    blocks = [(vectors[part], pair_index[part]) for part in (order[:3], order[:0], order[3:])]
    features = draw_features()
    whole = retrieve(features, [(vectors, pair_index)], **options)
    torch.testing.assert_close(retrieve(features, blocks, **options), whole)


@each_mode
def test_unused_entries_change_nothing(mode):
    sources, _ = draw_entries()
    features = draw_features()
    unused = [(vectors[pair_index < 5], pair_index[pair_index < 5]) for vectors, pair_index in sources]
    torch.testing.assert_close(
        retrieve(features, sources, **SIZES, **mode), retrieve(features, unused, **SIZES, **mode)
    )


@each_mode
def test_length_of_the_features_does_not_matter(mode):
    sources, _ = draw_entries()
    features = draw_features()
    scaled = features * torch.tensor([[1e-3], [1e4]])
    torch.testing.assert_close(retrieve(scaled, sources, **SIZES, **mode), retrieve(features, sources, **SIZES, **mode))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("empty", ["mask", "zero"])
def test_cold_retrieval_is_the_best_entry_and_overflows_nowhere(dtype, empty):
    [(vectors, pair_index)], rows = draw_entries(blocks=1, dtype=dtype, slots=3, seed=2)
    features = draw_features(13, dtype=dtype)
    cosines = F.normalize(features, dim=-1) @ vectors.T
    free = torch.tensor([None in row for row in rows])
    best = torch.stack(
        [
            cosines[:, pair_index == pair].amax(dim=1) if (pair_index == pair).any() else cosines[:, 0]
            for pair in range(5)
        ],
        dim=1,
    )
    occupied = torch.tensor([any(vector is not None for vector in row) for row in rows])
    if empty == "zero":
        best = torch.where(free, best.clamp(min=0), best)  # a free slot is an entry of cosine 0
    scores = retrieve(features, [(vectors, pair_index)], **SIZES, temperature=1e-6, empty=empty)
    torch.testing.assert_close(scores[:, occupied], best[:, occupied])


def test_hot_retrieval_is_the_mean():
    [(vectors, pair_index)], rows = draw_entries(blocks=1, seed=2)
    features = draw_features()
    for empty, slots_of in (("mask", lambda row: sum(vector is not None for vector in row)), ("zero", len)):
        prototypes = torch.stack(
            [sum(v for v in row if v is not None) / slots_of(row) for row in rows if row[0] is not None]
        )
        occupied = [row[0] is not None for row in rows]
        scores = retrieve(features, [(vectors, pair_index)], **SIZES, temperature=1e9, empty=empty)
        torch.testing.assert_close(scores[:, occupied], F.normalize(features, dim=-1) @ prototypes.T)


@given(seed=st.integers(0, 2**31), mode=st.sampled_from(MODES), temperature=st.sampled_from([0.001, 0.1, 10.0]))
@settings(deadline=None, max_examples=30)
def test_scores_lie_between_those_of_the_entries(seed, mode, temperature):
    [(vectors, pair_index)], _ = draw_entries(blocks=1, seed=seed)
    features = draw_features(seed=seed)
    scores = retrieve(
        features, [(vectors, pair_index)], **SIZES, temperature=temperature, **{**mode, "normalize": False}
    )
    cosines = F.normalize(features, dim=-1) @ vectors.T
    for pair in pair_index[pair_index < 5].tolist():
        own = cosines[:, pair_index == pair]
        if mode["empty"] == "zero":
            own = F.pad(own, (0, 1))
        assert (scores[:, pair] <= own.amax(dim=1) + 1e-12).all()
        assert (scores[:, pair] >= own.amin(dim=1) - 1e-12).all()


@pytest.mark.parametrize("mode", [MODES[0], MODES[1], MODES[3]], ids=str)
def test_a_single_entry_is_its_cosine(mode):
    vectors = F.normalize(draw_features(5), dim=-1)
    features = draw_features(3, seed=2)
    scores = retrieve(features, [(vectors, torch.arange(5))], num_pairs=5, slots=16, **mode)
    torch.testing.assert_close(scores, F.cosine_similarity(features[:, None], vectors[None], dim=-1))


def test_copies_of_an_entry_are_one_entry():
    vectors = F.normalize(draw_features(5), dim=-1)
    features = draw_features(3, seed=2)
    once = retrieve(features, [(vectors, torch.arange(5))], **SIZES)
    torch.testing.assert_close(retrieve(features, [(vectors, torch.arange(5))] * 3, **SIZES), once)


@each_mode
@pytest.mark.parametrize("entries", [0, 3])
def test_without_any_entry_all_scores_are_zero(mode, entries):
    sources = [(torch.zeros(entries, 7), torch.full((entries,), 5))]
    assert torch.equal(retrieve(draw_features(), sources, **SIZES, **mode), torch.zeros(2, 5, dtype=torch.float64))
    prototypes = retrieve_prototypes(draw_features(), sources, torch.tensor([4, 0]), **SIZES, **mode)
    assert torch.equal(prototypes, torch.zeros(2, 2, 7, dtype=torch.float64))


def test_opposite_entries_retrieve_nothing_and_break_nothing():
    vectors = torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    feature = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    scores = retrieve(feature, [(vectors, torch.zeros(2, dtype=torch.long))], num_pairs=1, slots=2, normalize=True)
    assert scores.tolist() == [[0.0]]
    scores.sum().backward()
    assert feature.grad.isfinite().all()


@each_mode
def test_zero_features_score_zero(mode):
    sources, _ = draw_entries(seed=2)
    scores = retrieve(torch.zeros(2, 7), sources, **SIZES, **mode)
    assert not scores[scores.isfinite()].any()


@each_mode
def test_nan_propagates_to_its_own_image_only(mode):
    sources, rows = draw_entries(seed=2)
    features = draw_features()
    features[1, 3] = torch.nan
    scores = retrieve(features, sources, **SIZES, **mode)
    occupied = [row[0] is not None for row in rows]
    assert scores[1, occupied].isnan().all()
    assert not scores[0].isnan().any()


@each_mode
def test_gradients_are_right(mode):
    sources, rows = draw_entries(num_pairs=3, dim=5, seed=3)
    occupied = [row[0] is not None for row in rows]
    assert not all(occupied)
    features = draw_features(dim=5).requires_grad_()
    blocks = [(vectors.requires_grad_(), pair_index) for vectors, pair_index in sources]

    def scores(features, *vectors):
        renewed = [(block, pair_index) for block, (_, pair_index) in zip(vectors, blocks)]
        return retrieve(features, renewed, num_pairs=3, slots=3, **mode)[:, occupied]

    assert torch.autograd.gradcheck(scores, (features, *(vectors for vectors, _ in blocks)))


@each_mode
def test_empty_rows_send_no_nan_back(mode):
    sources, rows = draw_entries(seed=3)
    assert any(row[0] is None for row in rows)
    features = draw_features().requires_grad_()
    retrieve(features, sources, **SIZES, **mode).softmax(dim=1).square().sum().backward()
    assert features.grad.isfinite().all()


@each_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(mode, dtype):
    sources, _ = draw_entries(dim=67, dtype=dtype)
    features = draw_features(dim=67, dtype=dtype)
    widened = [(vectors.float(), pair_index) for vectors, pair_index in sources]
    scores = retrieve(features, sources, **SIZES, **mode)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, retrieve(features.float(), widened, **SIZES, **mode))
    prototypes = retrieve_prototypes(features, sources, torch.arange(5), **SIZES, **mode)
    expected = retrieve_prototypes(features.float(), widened, torch.arange(5), **SIZES, **mode)
    assert torch.equal(prototypes, expected)


@each_mode
def test_autocast_changes_nothing(mode):
    sources, _ = draw_entries(dim=67, dtype=torch.float32)
    features = draw_features(dim=67, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = retrieve(features, sources, **SIZES, **mode)
        prototypes = retrieve_prototypes(features, sources, torch.arange(5), **SIZES, **mode)
    assert torch.equal(scores, retrieve(features, sources, **SIZES, **mode))
    assert torch.equal(prototypes, retrieve_prototypes(features, sources, torch.arange(5), **SIZES, **mode))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": "image"}, TypeError, r"expected `features` to be a torch.Tensor, got str"),
        ({"features": torch.zeros(7)}, ValueError, r"expected `features` of shape \(batch, dim\), got \(7,\)"),
        ({"sources": []}, ValueError, r"expected `sources` to be at least one block of entries, got none"),
        (
            {"sources": [(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))]},
            ValueError,
            r"expected `vectors` of shape \(entries, dim\) with batch=2, dim=7, got \(3, 5\)",
        ),
        (
            {"sources": [(torch.zeros(3, 7), torch.zeros(2, dtype=torch.long))]},
            ValueError,
            r"expected `pair_index` of shape \(entries\) with .*entries=3, got \(2,\)",
        ),
        (
            {"sources": [(torch.zeros(3, 7), torch.zeros(3))]},
            TypeError,
            r"expected `pair_index` of dtype torch.int64, got torch.float32",
        ),
        ({"num_pairs": 0}, ValueError, r"expected `num_pairs` to be at least 1, got 0"),
        ({"slots": "3"}, TypeError, r"expected `slots` to be an integer, got '3'"),
        ({"temperature": 0.0}, ValueError, r"expected `temperature` to be positive and finite, got 0.0"),
        ({"empty": "none"}, ValueError, r"expected `empty` to be one of mask, zero, got 'none'"),
    ],
)
def test_wrong_arguments_of_the_retrieval_are_told(change, error, message):
    arguments = {"features": draw_features(), "sources": draw_entries()[0], **SIZES, **change}
    with pytest.raises(error, match=message):
        retrieve(**arguments)
    with pytest.raises(error, match=message):
        retrieve_prototypes(**arguments, pair_index=torch.tensor([0]))


def test_wrong_pairs_of_prototypes_are_told():
    with pytest.raises(TypeError, match=r"expected `pair_index` of dtype torch.int64, got torch.float32"):
        retrieve_prototypes(draw_features(), draw_entries()[0], torch.zeros(2), **SIZES)
    with pytest.raises(ValueError, match=r"expected `pair_index` of shape \(pairs\), got \(\)"):
        retrieve_prototypes(draw_features(), draw_entries()[0], torch.tensor(0), **SIZES)
