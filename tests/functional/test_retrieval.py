import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads.functional.retrieval import PairTexts, retrieve, retrieve_prototypes
from tests.references import reference_retrieve, reference_retrieve_prototypes

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


@given(
    sizes=st.tuples(st.integers(1, 11), st.integers(1, 4), st.integers(1, 5)),
    batch=st.integers(0, 3),
    in_order=st.booleans(),
    blocks=st.integers(0, 2),
    temperature=st.sampled_from([0.01, 0.1, 1.0]),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_a_text_of_each_pair_is_one_more_entry_where_there_is_room(
    sizes, batch, in_order, blocks, temperature, mode, seed
):
    num_pairs, slots, dim = sizes
    sources, rows = draw_entries(num_pairs, slots, dim, blocks=max(blocks, 1), seed=seed)
    if blocks == 0:
        sources, rows = [], [[None] * slots for _ in range(num_pairs)]
    generator = torch.Generator().manual_seed(seed + 2)
    count = num_pairs if in_order else int(torch.randint(0, num_pairs + 1, (1,), generator=generator))
    vectors = F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=-1)
    row = torch.arange(num_pairs)
    if not in_order:
        row = F.pad(torch.arange(count), (0, num_pairs - count), value=-1)
        row = row[torch.randperm(num_pairs, generator=generator)]
    for places, place in zip(rows, row.tolist()):
        if place >= 0 and None in places:
            places[places.index(None)] = vectors[place]
    features = draw_features(batch, dim, seed=seed + 1)
    options = {"num_pairs": num_pairs, "slots": slots, "temperature": temperature, **mode}
    options["texts"] = PairTexts(vectors, None if in_order else row)
    expected = reference_retrieve(features, rows, temperature=temperature, **mode)
    torch.testing.assert_close(retrieve(features, sources, **options), expected)
    wanted = torch.tensor([num_pairs - 1, 0])
    expected = reference_retrieve_prototypes(features, rows, temperature=temperature, **mode)[:, wanted]
    torch.testing.assert_close(retrieve_prototypes(features, sources, wanted, **options), expected)


@each_mode
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_gradients_are_right_beside_texts(mode, used, temperature):
    features = draw_features(2, 5).requires_grad_()
    vectors, texts = (F.normalize(draw_features(n, 5, seed=n), dim=1).requires_grad_() for n in (4, 3))
    pair_index = torch.tensor([1, 3, 1, 3]) if used else torch.full((4,), 3)
    options = {"num_pairs": 3, "slots": 3, "temperature": temperature, **mode}

    def scores(features, vectors, texts):
        return retrieve(features, [(vectors, pair_index)], texts=PairTexts(texts), **options)

    # Slopes of a cold softmax are steep.
    assert torch.autograd.gradcheck(scores, (features, vectors, texts), eps=1e-8, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (PairTexts(torch.zeros(4, 7)), ValueError, r"expected `texts.vectors` of shape \(5, dim\) .*, got \(4, 7\)"),
        (PairTexts(torch.zeros(5, 6)), ValueError, r"`texts.vectors` of shape \(5, dim\) with .*dim=7, got \(5, 6\)"),
        (PairTexts([0.0]), TypeError, r"expected `texts.vectors` to be a torch.Tensor, got list"),
        (
            PairTexts(torch.zeros(2, 7), torch.zeros(4, dtype=torch.long)),
            ValueError,
            r"expected `texts.row` of shape \(5\), got \(4,\)",
        ),
        (PairTexts(torch.zeros(2, 7), torch.zeros(5)), TypeError, r"expected `texts.row` of dtype torch.int64"),
    ],
)
def test_wrong_texts_are_told(texts, error, message):
    with pytest.raises(error, match=message):
        retrieve(draw_features(), [], texts=texts, **SIZES)


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
        (
            {"sources": []},
            ValueError,
            r"expected `sources` to be at least one block of entries where there are no `texts`",
        ),
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
