import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from czsl_heads.functional.bank import merge_best, prediction_entropy
from czsl_heads.functional.retrieval import PairTexts, retrieve
from czsl_heads.functional.unit import unit_rows
from czsl_heads.heads.memory_bank import DynamicMemoryBank
from czsl_heads.heads.update_check import Found, UpdateCheck
from tests.references import reference_bank_insert, reference_retrieve, reference_retrieve_prototypes

PAIRS, DIM, SLOTS = 5, 7, 3
MODES = [{"empty": empty, "normalize": normalize} for empty in ("mask", "zero") for normalize in (False, True)]
each_mode = pytest.mark.parametrize("mode", MODES, ids=str)
two_modes = pytest.mark.parametrize("mode", [MODES[0], MODES[3]], ids=str)  # which differ in every branch


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw_features(batch=11, dim=DIM, *, dtype=torch.float32, seed=0):
    return 3 * torch.randn(batch, dim, generator=seeded(seed), dtype=torch.float64).to(dtype)


def draw_probs(batch=11, pairs=PAIRS, *, dtype=torch.float32, seed=0):
    return (2 * torch.randn(batch, pairs, generator=seeded(seed + 1), dtype=torch.float64)).softmax(1).to(dtype)


def draw(batch=11, **kwargs):
    return draw_features(batch, **kwargs), draw_probs(batch, **kwargs)


def draw_ties(batch, seed):
    """Few predictions and few vectors, so that equal entropies and duplicates abound, and some of no use."""
    features, probs = draw(6, seed=seed)
    features[4], probs[5, 1] = 0, torch.nan
    choice = torch.randint(0, 6, (2, batch), generator=seeded(seed))
    return features[choice[0]], probs[choice[1]]


def build(**options):
    return DynamicMemoryBank(PAIRS, DIM, slots=SLOTS, **options)


def fill(bank, batch=11, *, texts=True, seed=0):
    """A bank with full and empty rows, rows of images, of texts, and of both."""
    if texts:
        bank.fill_texts(F.normalize(draw_features(4, seed=seed + 2), dim=1), torch.tensor([4, 2, 4, 0]))
    features, probs = draw(batch, seed=seed)
    probs[:, 3:] = 0  # rows 3 and 4 get no image
    bank.update(features, F.normalize(probs, p=1, dim=1))
    return bank


def state_of(bank):
    return {name: tensor.clone() for name, tensor in bank.state_dict().items()}


def same(state, other):
    """Equal to the last bit, rows and their order included."""
    return state.keys() == other.keys() and all(
        state[name].dtype == other[name].dtype and torch.equal(state[name], other[name]) for name in state
    )


def rows_of(bank):
    """What the bank holds, as rows of ``(is_text, entropy, vector)`` in its order."""
    rows = [[] for _ in range(bank.num_pairs)]
    state = bank.state_dict()
    for vector, entropy, pair in zip(state["features"], state["entropy"], state["pair"]):
        rows[int(pair)].append((False, float(entropy), vector.tolist()))
    for vector, pair, rank in zip(bank.texts, bank.text_pair, bank.text_rank):
        images = sum(not is_text for is_text, _, _ in rows[int(pair)])
        if images + int(rank) < bank.slots:
            rows[int(pair)].append((True, 0.0, vector.tolist()))
    return rows


def dense_rows(bank):
    rows = [[torch.tensor(vector) for *_, vector in row] for row in rows_of(bank)]
    return [row + [None] * (bank.slots - len(row)) for row in rows]


def cuts_of(data, length):
    """A random cut of ``range(length)`` into batches, some of them empty."""
    edges = sorted(data.draw(st.lists(st.integers(0, length), max_size=5)))
    return [slice(start, stop) for start, stop in zip([0, *edges], [*edges, length])]


@given(
    batch=st.integers(0, 40), slots=st.integers(1, 5), labels=st.booleans(), seed=st.integers(0, 2**31), data=st.data()
)
@settings(deadline=None, max_examples=30)
def test_bank_is_the_dense_one_of_insertions_one_at_a_time(batch, slots, labels, seed, data):
    features, probs = draw_ties(batch, seed)
    pair_index = torch.randint(0, PAIRS, (batch,), generator=seeded(seed + 3)) if labels else None
    bank = DynamicMemoryBank(PAIRS, DIM, slots=slots)
    rows, arrival, rejected = [[None] * slots for _ in range(PAIRS)], 0, 0
    for cut in cuts_of(data, batch):
        text_index = torch.tensor(data.draw(st.lists(st.integers(0, PAIRS - 1), max_size=4)), dtype=torch.long)
        texts = F.normalize(draw_features(len(text_index), seed=seed + cut.start), dim=1)
        bank.fill_texts(texts, text_index)
        for text, pair in zip(texts, text_index.tolist()):
            reference_bank_insert(rows[pair], (True, 0.0, (arrival := arrival + 1), text.tolist()))
        bank.update(features[cut], probs[cut], pair_index=None if pair_index is None else pair_index[cut])
        for b in range(cut.start, cut.stop):
            if probs[b].isnan().any() or not features[b].any():
                rejected += 1
                continue
            pair = int(probs[b].argmax() if pair_index is None else pair_index[b])
            entropy, vector = prediction_entropy(probs[b : b + 1]), unit_rows(features[b : b + 1])[0]
            reference_bank_insert(rows[pair], (False, float(entropy), (arrival := arrival + 1), vector[0].tolist()))
    expected = [sorted((entry for entry in row if entry is not None), key=lambda entry: entry[:3]) for row in rows]
    assert rows_of(bank) == [[(is_text, entropy, vector) for is_text, entropy, _, vector in row] for row in expected]
    assert bank.counts.tolist() == [len(row) for row in expected]
    assert int(bank.num_rejected) == rejected


@given(batch=st.integers(0, 60), slots=st.integers(1, 7), seed=st.integers(0, 2**31), data=st.data())
@settings(deadline=None, max_examples=30)
def test_the_cut_into_batches_does_not_matter_to_the_last_bit(batch, slots, seed, data):
    features, probs = draw_ties(batch, seed)
    whole, parts = (DynamicMemoryBank(PAIRS, DIM, slots=slots) for _ in range(2))
    whole.update(features, probs)
    for cut in cuts_of(data, batch):
        parts.update(features[cut], probs[cut])
    assert same(parts.state_dict(), whole.state_dict())


@given(batch=st.integers(0, 60), seed=st.integers(0, 2**31), data=st.data())
@settings(deadline=None, max_examples=30)
def test_the_order_does_not_matter_where_entropies_differ(batch, seed, data):
    features, probs = draw(batch, seed=seed)
    assume(len(prediction_entropy(probs).unique()) == batch)
    whole, shuffled = build(), build()
    whole.update(features, probs)
    order = torch.randperm(batch, generator=seeded(seed))
    for cut in cuts_of(data, batch):
        shuffled.update(features[order[cut]], probs[order[cut]])
    assert same(shuffled.state_dict(), whole.state_dict())


@given(texts_at=st.integers(0, 3), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_it_does_not_matter_when_texts_come(texts_at, seed):
    features, probs = draw(30, seed=seed)
    banks = build(), build()
    for bank, moment in zip(banks, (0, texts_at)):
        for part in range(4):
            if part == moment:
                bank.fill_texts(F.normalize(draw_features(4, seed=seed + 2), dim=1), torch.tensor([4, 2, 4, 0]))
            if part < 3:
                bank.update(features[10 * part : 10 * part + 10], probs[10 * part : 10 * part + 10])
    assert same(banks[0].state_dict(), banks[1].state_dict())


def test_the_surer_replaces_the_worst_and_among_equals_the_earlier_stays():
    bank = DynamicMemoryBank(2, 2, slots=2)
    unsure, sure = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.9, 0.1]])
    first, second, third = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.6, 0.8]]])
    bank.update(first, unsure)
    bank.update(second, unsure)
    bank.update(third, unsure)
    assert torch.equal(bank.state_dict()["features"], torch.cat([first, second]))
    bank.update(third, sure)
    torch.testing.assert_close(bank.state_dict()["features"], torch.cat([third, first]))
    expected = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (0.9, 0.6)]
    torch.testing.assert_close(bank.state_dict()["entropy"], torch.tensor(expected))
    assert bank.counts.tolist() == [2, 0]


def test_of_equal_probabilities_the_lower_index_names_the_row():
    bank = build()
    bank.update(draw_features(1), torch.tensor([[0.1, 0.4, 0.0, 0.4, 0.1]]))
    assert bank.counts.tolist() == [0, 1, 0, 0, 0]


def test_labels_name_the_row_instead_of_the_prediction():
    features, probs = draw()
    labels = torch.arange(11) % PAIRS
    bank, expected = build(), build()
    bank.update(features, probs, pair_index=labels)
    assert bank.counts.tolist() == [3, 2, 2, 2, 2]
    expected.update(features, probs, pair_index=probs.argmax(dim=1))
    predicted = build()
    predicted.update(features, probs)
    assert same(expected.state_dict(), predicted.state_dict())
    assert not same(bank.state_dict(), predicted.state_dict())


def test_texts_leave_a_row_full_of_images_the_later_first():
    texts, images = torch.eye(DIM)[:3], torch.eye(DIM)[3:6]
    certain = torch.eye(PAIRS)[[1]]
    bank = build()
    bank.fill_texts(texts, torch.tensor([1, 1, 1]))
    held = [texts]
    for image in images:
        bank.update(image[None], certain)
        held.append(torch.cat([images[: len(held)], texts[: 3 - len(held)]]))
        assert torch.equal(torch.tensor([vector for *_, vector in rows_of(bank)[1]]), held[-1])
        assert bank.counts.tolist() == [0, 3, 0, 0, 0]
        expected = retrieve(texts, [(held[-1], torch.ones(3, dtype=torch.long))], num_pairs=PAIRS, slots=SLOTS)
        torch.testing.assert_close(bank(texts), 100 * expected)
    bank.fill_texts(texts[:1], torch.tensor([1]))  # comes too late
    assert torch.equal(bank(texts), 100 * expected)


def test_a_text_gives_way_to_the_most_uncertain_image():
    bank = DynamicMemoryBank(2, 2, slots=1)
    bank.fill_texts(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    bank.update(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]))
    assert rows_of(bank) == [[(False, pytest.approx(math.log(2)), [0.0, 1.0])], []]


def test_texts_of_several_calls_queue_up():
    texts = F.normalize(draw_features(9), dim=1)
    pair_index = torch.tensor([4, 2, 4, 4, 0, 4, 2, 4, 1])
    once, twice = build(), build()
    once.fill_texts(texts, pair_index)
    twice.fill_texts(texts[:4], pair_index[:4])
    twice.fill_texts(texts[4:], pair_index[4:])
    assert same(once.state_dict(), twice.state_dict())
    assert once.counts.tolist() == [1, 1, 2, 0, 3]


def test_unit_texts_are_kept_by_reference_and_others_as_unit_copies():
    texts = F.normalize(draw_features(1000, 67), dim=1)
    pair_index = torch.arange(1000).flip(0)
    bank = DynamicMemoryBank(1000, 67)
    bank.fill_texts(texts, pair_index)
    assert bank.texts.data_ptr() == texts.data_ptr()
    assert copy.deepcopy(bank).texts.data_ptr() == texts.data_ptr()
    assert bank.to("cpu").texts.data_ptr() == texts.data_ptr()
    bank.reset()
    bank.fill_texts(3 * texts, pair_index)
    torch.testing.assert_close(bank.texts, texts)
    for other in (texts.bfloat16(), texts.double(), texts.mT.contiguous().mT):
        bank.reset()
        bank.fill_texts(other, pair_index)
        assert bank.texts.dtype == torch.float32
        assert bank.texts.is_contiguous()
        torch.testing.assert_close(bank.texts, F.normalize(other.float(), dim=1))


def test_texts_need_no_gradient():
    texts = F.normalize(draw_features(2), dim=1).requires_grad_()
    bank = build()
    bank.fill_texts(texts, torch.tensor([0, 1]))
    assert not bank(draw_features()).requires_grad


def test_writing_needs_no_gradient():
    features, logits = draw_features().requires_grad_(), draw_features(11, PAIRS).requires_grad_()
    bank = build()
    bank.update(features, logits.softmax(dim=1))
    assert not bank.features.requires_grad
    assert not bank.entropy.requires_grad


NOT_FINITE = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("labels", [None, torch.arange(11) % PAIRS], ids=["predicted", "labelled"])
def test_what_is_not_finite_is_not_stored_and_counted(value, labels):
    features, probs = draw()
    features[2, 3] = features[7, 0] = value
    probs[5, 1] = probs[7, 4] = value
    features[9] = 0
    bank, expected = build(), build()
    bank.update(features, probs, pair_index=labels)
    good = torch.tensor([0, 1, 3, 4, 6, 8, 10])
    expected.update(features[good], probs[good], pair_index=None if labels is None else labels[good])
    assert int(bank.num_rejected) == 4
    expected.num_rejected = bank.num_rejected
    assert same(bank.state_dict(), expected.state_dict())
    bank.update(features, probs)
    assert int(bank.num_rejected) == 8


@pytest.mark.parametrize("value", NOT_FINITE)
def test_texts_that_are_not_finite_are_not_stored_and_counted(value):
    texts = F.normalize(draw_features(5), dim=1)
    texts[1, 3], texts[3] = value, 0
    bank = build()
    bank.fill_texts(texts, torch.tensor([2, 2, 2, 1, 0]))
    torch.testing.assert_close(bank.texts, texts[[0, 2, 4]])
    assert bank.text_rank.tolist() == [0, 1, 0]
    assert int(bank.num_rejected) == 2


def test_reset_forgets_everything():
    bank = fill(build())
    bank.update(torch.full((1, DIM), torch.nan), draw_probs(1))
    bank.reset()
    assert same(bank.state_dict(), build().state_dict())
    assert same(fill(bank).state_dict(), fill(build()).state_dict())


def test_memory_grows_with_what_is_stored():
    bank = DynamicMemoryBank(278_362, DIM)
    assert sum(tensor.numel() for tensor in bank.buffers()) < 10
    lengths = set()
    for batch in range(40):
        labels = torch.arange(50 * batch, 50 * batch + 50)
        bank.update(draw_features(50, seed=batch), torch.eye(1, 278_362).expand(50, -1), pair_index=labels)
        assert int(bank.count) == 50 * batch + 50
        lengths.add(len(bank.features))
        assert (
            len(bank.features)
            == len(bank.entropy)
            == len(bank.pair)
            <= int(bank.count) + max(int(bank.count) // 8, 8 * 50) + 1
        )
    assert len(lengths) < 9  # it need not grow each time
    assert len(bank.state_dict()["features"]) == 2000
    full = build()
    for seed in range(30):
        full.update(*draw(seed=seed))
    assert len(full.features) == PAIRS * SLOTS + 1


@each_mode
@given(
    texts=st.booleans(),
    batch=st.integers(0, 11),
    temperature=st.sampled_from([0.01, 0.1, 1.0]),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=15)
def test_logits_are_those_of_the_dense_prototypes(mode, texts, batch, temperature, seed):
    bank = fill(build(temperature=temperature, logit_scale=1.0, **mode), batch, texts=texts, seed=seed)
    features = draw_features(2, dtype=torch.float64, seed=seed + 7)
    options = {"temperature": temperature, **mode}
    expected = reference_retrieve(features, dense_rows(bank), **options)
    torch.testing.assert_close(bank(features), expected, atol=1e-6, rtol=1e-5)
    wanted = torch.tensor([4, 0, 4])
    expected = reference_retrieve_prototypes(features, dense_rows(bank), **options)[:, wanted]
    torch.testing.assert_close(bank.prototypes(features, wanted), expected, atol=1e-6, rtol=1e-5)


@each_mode
def test_head_is_the_function_times_the_scale(mode):
    bank = fill(build(temperature=0.3, logit_scale=7.0, **mode))
    assert bank.counts[bank.text_pair].tolist() == [2, 3, 2, 3]
    assert (bank.counts - torch.bincount(bank.pair, minlength=6)[:5]).tolist() == [0, 0, 0, 0, 2]  # full rows: no text
    images, texts = (bank.features, bank.pair), (bank.texts, torch.tensor([4, 5, 4, 5]))
    features, options = draw_features(2, seed=5), {"num_pairs": PAIRS, "slots": SLOTS, "temperature": 0.3, **mode}
    torch.testing.assert_close(bank(features), 7 * retrieve(features, [images, texts], **options))
    sources = [images, (bank.texts[2:3], torch.tensor([4]))]  # the second text of row 4
    first = PairTexts(bank.texts, torch.tensor([3, -1, 1, -1, 0]))
    assert torch.equal(bank(features), 7 * retrieve(features, sources, texts=first, **options))


@pytest.mark.parametrize(("empty", "logit"), [("mask", -math.inf), ("zero", 0.0)])
@pytest.mark.parametrize("normalize", [False, True])
def test_empty_rows_and_empty_banks(empty, logit, normalize):
    bank = build(empty=empty, normalize=normalize)
    features = draw_features(2)
    assert torch.equal(bank(features), torch.zeros(2, PAIRS))
    bank.fill_texts(draw_features(1), torch.tensor([2]))
    assert bank(features)[:, [0, 1, 3, 4]].eq(logit).all()
    assert bank(features)[:, 2].isfinite().all()
    bank.update(draw_features(1), torch.eye(PAIRS)[[3]])
    assert bank(features)[:, [0, 1, 4]].eq(logit).all()
    assert not bank.prototypes(features, torch.tensor([0, 1, 4])).any()


def test_zero_vectors_dilute_a_row_as_the_paper_says():
    bank = DynamicMemoryBank(1, 2, slots=16, empty="zero")
    bank.fill_texts(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    for cosine, loss in ((0.7, 0.9), (0.5, 4.6), (0.27, 13.6)):
        logit = float(bank(torch.tensor([[cosine, math.sqrt(1 - cosine**2)]])))
        assert 100 * cosine - logit == pytest.approx(loss, abs=0.2)


@each_mode
def test_reading_writes_nothing(mode):
    bank = fill(build(**mode))
    state, features = state_of(bank), draw_features(2)
    before = features.clone()
    bank(features)
    bank.prototypes(features, torch.tensor([0, 3]))
    assert same(bank.state_dict(), state)
    assert torch.equal(features, before)


def test_writing_leaves_its_inputs_and_older_states_alone():
    features, probs = draw()
    texts = F.normalize(draw_features(2), dim=1)
    before = [tensor.clone() for tensor in (features, probs, texts)]
    bank = fill(build())
    kept, clone = bank.state_dict(), state_of(bank)
    bank.update(features, probs)
    bank.fill_texts(texts, torch.tensor([0, 0]))
    fill(bank, seed=3)
    assert same(kept, clone)
    for tensor, copied in zip((features, probs, texts), before):
        assert torch.equal(tensor, copied)


def test_a_batch_of_none_changes_nothing():
    bank = fill(build())
    state = state_of(bank)
    bank.update(draw_features(0), draw_probs(0), pair_index=torch.empty(0, dtype=torch.long))
    bank.update(draw_features(0), draw_probs(0))
    bank.fill_texts(draw_features(0), torch.empty(0, dtype=torch.long))
    assert same(bank.state_dict(), state)
    assert bank(draw_features(0)).shape == (0, PAIRS)
    assert bank.prototypes(draw_features(2), torch.empty(0, dtype=torch.long)).shape == (2, 0, DIM)


@each_mode
def test_each_image_alone_gives_the_same_logits(mode):
    bank = fill(build(**mode))
    features = draw_features(5, seed=4)
    torch.testing.assert_close(bank(features), torch.cat([bank(features[b : b + 1]) for b in range(5)]))


def test_duplicates_fill_slots_but_do_not_change_the_score():
    features, probs = draw(1)
    once, often = build(), build()
    once.update(features, probs)
    often.update(features.expand(7, -1), probs.expand(7, -1))
    assert int(often.count) == SLOTS
    torch.testing.assert_close(often(draw_features(2, seed=3)), once(draw_features(2, seed=3)))


@pytest.mark.parametrize("batch", [0, 11])
@pytest.mark.parametrize("texts", [False, True])
def test_state_makes_another_bank_the_same(batch, texts):
    bank = fill(build(), batch, texts=texts)
    bank.update(torch.full((1, DIM), torch.nan), draw_probs(1))
    buffer = io.BytesIO()
    torch.save(bank.state_dict(), buffer)
    buffer.seek(0)
    for state in (bank.state_dict(), torch.load(buffer, weights_only=True), load(save(bank.state_dict()))):
        for other in (build(), fill(build(), 30, seed=5)):
            other.load_state_dict(state)
            assert same(other.state_dict(), bank.state_dict())
            torch.testing.assert_close(other(draw_features(2)), bank(draw_features(2)))
            other.update(*draw(seed=9))
    bank.update(*draw(seed=9))
    assert same(other.state_dict(), bank.state_dict())


def test_loading_copies_and_writes_into_nothing_that_others_hold():
    texts = F.normalize(draw_features(4), dim=1)
    bank, other = build(), build()
    bank.fill_texts(texts, torch.tensor([0, 1, 2, 3]))
    twin, before = copy.deepcopy(bank), texts.clone()
    other.fill_texts(F.normalize(draw_features(4, seed=2), dim=1), torch.tensor([0, 1, 2, 3]))
    bank.load_state_dict(other.state_dict())
    assert torch.equal(texts, before)
    assert torch.equal(twin.texts, before)
    assert torch.equal(bank.texts, other.texts)
    assert bank.texts.data_ptr() != other.texts.data_ptr()


def test_bank_loads_inside_a_module_and_onto_meta():
    model = nn.Sequential(nn.Linear(DIM, DIM), fill(build()))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(DIM, DIM), build())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert same(empty.state_dict(), model.state_dict())
    other = nn.Sequential(nn.Linear(DIM, DIM), build())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(draw_features()), model(draw_features()))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((PAIRS + 1, DIM), {}, "expected the state of a bank of num_pairs=6, got num_pairs=5"),
        ((PAIRS, DIM + 1), {}, "expected the state of a bank of dim=8, got dim=7"),
        ((PAIRS, DIM), {"slots": SLOTS + 1}, "expected the state of a bank of slots=4, got slots=3"),
    ],
)
@pytest.mark.parametrize("filled", [False, True])
def test_states_of_other_sizes_are_told_and_change_nothing(sizes, options, message, filled):
    state = (fill(build()) if filled else build()).state_dict()
    bank = DynamicMemoryBank(*sizes, **{"slots": SLOTS, **options})
    before = state_of(bank)
    with pytest.raises(ValueError, match=message):
        bank.load_state_dict(state, strict=False)
    assert same(bank.state_dict(), before)


def test_torn_states_are_told():
    bank = fill(build())
    state, before = bank.state_dict(), state_of(bank)
    short = {**state, "entropy": state["entropy"][1:]}
    with pytest.raises(ValueError, match=r"expected `entropy` of shape \(rows\) with rows=8, got \(7,\)"):
        bank.load_state_dict(short)
    del short["pair"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"pair\""):
        bank.load_state_dict(short)
    assert bank.load_state_dict({}, strict=False).missing_keys == list(state)
    assert same(bank.state_dict(), before)


def test_a_deep_copy_is_independent():
    bank = fill(build())
    state, twin = state_of(bank), copy.deepcopy(bank)
    assert same(twin.state_dict(), state)
    fill(twin, 40, seed=3)
    assert not same(twin.state_dict(), state)
    twin.features.zero_()
    assert same(bank.state_dict(), state)
    nested = copy.deepcopy(nn.ModuleList([bank, bank]))
    assert nested[0] is nested[1]
    assert same(nested[0].state_dict(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_moves_round_vectors_but_not_who_is_better(dtype):
    bank = fill(build())
    entropy = bank.entropy.clone()
    moved = copy.deepcopy(bank).to(dtype)
    assert moved.features.dtype == moved.texts.dtype == dtype
    assert moved.entropy.dtype == torch.float32
    assert torch.equal(moved.entropy, entropy)
    assert moved.pair.dtype == torch.long
    logits = moved(draw_features(2))
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logits, bank(draw_features(2)).to(logits.dtype), atol=2.0, rtol=0)
    # The same vectors stay as if nothing had moved.
    for each in (bank, moved):
        each.update(*draw(40, seed=3))
    assert torch.equal(moved.entropy, bank.entropy)
    assert torch.equal(moved.pair, bank.pair)
    again = build().to(dtype)
    again.load_state_dict(moved.state_dict())
    assert same(again.state_dict(), moved.state_dict())


def test_entropies_of_doubles_are_doubles_from_then_on():
    probs = torch.tensor([[0.5, 0.5], [0.5 + 1e-6, 0.5 - 1e-6], [0.5 + 2e-6, 0.5 - 2e-6]], dtype=torch.float64)
    probs = torch.cat([probs, torch.zeros(3, 3, dtype=torch.float64)], dim=1)
    assert len(prediction_entropy(probs.float()).unique()) == 1
    features = torch.eye(DIM)[:3]
    bank = fill(build(), texts=False)
    bank.reset()
    bank.update(features, probs, pair_index=torch.zeros(3, dtype=torch.long))
    assert bank.entropy.dtype == torch.float64
    assert torch.equal(bank.state_dict()["features"], features.flip(0))
    bank.float()
    assert bank.entropy.dtype == torch.float64
    other = build()
    other.load_state_dict(bank.state_dict())
    assert same(other.state_dict(), bank.state_dict())
    bank.update(*draw(4))
    assert bank.entropy.dtype == torch.float64


def test_meta_device_gives_shapes():
    with torch.device("meta"):
        bank = build()
    assert bank(draw_features(2).to("meta")).shape == (2, PAIRS)
    for mode in MODES:
        bank = fill(build(**mode)).to("meta")
        logits = bank(draw_features(2).to("meta"))
        assert (logits.device.type, logits.shape, logits.dtype) == ("meta", (2, PAIRS), torch.float32)
        assert bank.entropy.device.type == "meta"


@each_mode
def test_gradients_are_right(mode):
    bank = fill(build(logit_scale=1.0, **mode)).double()
    features = draw_features(2, dtype=torch.float64, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda features: bank(features)[:, [0, 1, 2, 4]], features)
    assert torch.autograd.gradcheck(lambda features: bank.prototypes(features, torch.tensor([4, 0])), features)


@each_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_floats_give_float32_logits_of_the_rounded_inputs(mode, dtype):
    bank = fill(build(**mode))
    features, probs = draw(40, dtype=dtype, seed=4)
    logits = bank(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, bank(features.float()))
    twin = copy.deepcopy(bank)
    bank.update(features, probs)
    twin.update(features.float(), probs.float())
    assert same(bank.state_dict(), twin.state_dict())


@each_mode
def test_autocast_changes_nothing(mode):
    bank, expected = build(**mode), fill(build(**mode))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fill(bank)
        logits = bank(draw_features(2))
    assert same(bank.state_dict(), expected.state_dict())
    assert torch.equal(logits, expected(draw_features(2)))


def test_a_bank_filled_in_inference_mode_still_takes_part_in_training():
    bank, expected = build(), fill(build())
    with torch.inference_mode():
        fill(bank)
    assert same(bank.state_dict(), expected.state_dict())
    assert not any(tensor.is_inference() for tensor in bank.buffers())
    features = draw_features(2).requires_grad_()
    bank(features)[:, 0].sum().backward()
    assert features.grad.any()


def test_nan_propagates_to_its_own_image_only():
    bank = fill(build())
    features = draw_features(2)
    features[1, 3] = torch.nan
    logits = bank(features)
    assert logits[1, [0, 1, 2, 4]].isnan().all()
    assert not logits[0].isnan().any()


@two_modes
def test_bank_compiles_whole(mode):
    torch.compiler.reset()
    bank = fill(build(**mode))
    compiled = torch.compile(bank, fullgraph=True, backend="eager")
    features = draw_features(2)
    torch.testing.assert_close(compiled(features), bank(features))
    fill(bank, 40, seed=3)  # the buffers are other ones now
    torch.testing.assert_close(compiled(features), bank(features))


@two_modes
@pytest.mark.parametrize("filled", [False, True])
def test_bank_exports_with_any_batch(mode, filled):
    bank = fill(build(**mode)) if filled else build(**mode)
    sizes = {"features": {0: torch.export.Dim("batch")}}
    program = torch.export.export(bank, (draw_features(2),), dynamic_shapes=sizes)
    features = draw_features(5, seed=4)
    torch.testing.assert_close(program.module()(features), bank(features))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_pairs": 0}, ValueError, "expected `num_pairs` to be at least 1, got 0"),
        ({"dim": 0}, ValueError, "expected `dim` to be at least 1, got 0"),
        ({"dim": 1.5}, TypeError, "expected `dim` to be an integer, got 1.5"),
        ({"slots": 0}, ValueError, "expected `slots` to be at least 1, got 0"),
        ({"temperature": 0.0}, ValueError, "expected `temperature` to be positive and finite, got 0.0"),
        ({"temperature": "a"}, TypeError, "expected `temperature` to be a number, got 'a'"),
        ({"logit_scale": -1.0}, ValueError, "expected `logit_scale` to be positive and finite, got -1.0"),
        ({"logit_scale": torch.ones(3)}, ValueError, r"expected `logit_scale` of shape \(\), got \(3,\)"),
        ({"empty": "none"}, ValueError, "expected `empty` to be one of mask, zero, got 'none'"),
    ],
)
def test_wrong_options_are_told(change, error, message):
    with pytest.raises(error, match=message):
        DynamicMemoryBank(**{"num_pairs": PAIRS, "dim": DIM, **change})


def test_a_scalar_tensor_is_read_as_the_scale():
    assert build(logit_scale=torch.tensor(7.0)).logit_scale == 7.0


def test_wrong_features_are_told():
    bank = build()
    for call in (bank, lambda features: bank.prototypes(features, torch.tensor([0]))):
        with pytest.raises(TypeError, match=r"expected `features` to be a torch.Tensor, got list"):
            call([[0.0] * DIM])
        with pytest.raises(ValueError, match=r"expected `features` of shape \(batch, 7\), got \(2, 5\)"):
            call(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"expected `pair_index` to be in \[0, 4\], got -1"):
        bank.prototypes(draw_features(2), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"expected `pair_index` of shape \(pairs\), got \(1, 1\)"):
        bank.prototypes(draw_features(2), torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(TypeError, match=r"expected `pair_index` of dtype torch.int64, got torch.float32"):
        bank.prototypes(draw_features(2), torch.zeros(1))


def changed(probs, row, values):
    probs = probs.clone()
    probs[row] = torch.tensor(values)
    return probs


UNIFORM = torch.full((3, PAIRS), 0.2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(3, 5)}, ValueError, r"expected `features` of shape \(batch, 7\), got \(3, 5\)"),
        ({"features": torch.zeros(3, DIM, dtype=torch.long)}, TypeError, r"expected `features` of dtype .*torch.int64"),
        ({"probs": UNIFORM[:2]}, ValueError, r"expected `probs` of shape \(batch, 5\) with batch=3.*, got \(2, 5\)"),
        ({"probs": UNIFORM[:, :4]}, ValueError, r"expected `probs` of shape \(batch, 5\) with .*, got \(3, 4\)"),
        ({"probs": None}, TypeError, r"expected `probs` to be a torch.Tensor, got NoneType"),
        ({"probs": 5 * UNIFORM}, ValueError, r"`probs` of rows that sum to 1 .*got a sum of 5 .* value of 1 in row 0"),
        (
            {"probs": changed(UNIFORM, 1, [0.5, 0.7, -0.2, 0.0, 0.0])},
            ValueError,
            r"`probs` of rows .* no negative value, got a sum of 1 and a smallest value of -0.2 in row 1",
        ),
        (
            {"probs": changed(changed(UNIFORM, 0, [torch.nan] * 5), 2, [0.9, 0.08, 0.0, 0.0, 0.0])},
            ValueError,
            r"got a sum of 0.98 and a smallest value of 0 in row 2",
        ),
        ({"pair_index": torch.tensor([0, 5, 1])}, ValueError, r"expected `pair_index` to be in \[0, 4\], got 5"),
        ({"pair_index": torch.tensor([0, 4, -2])}, ValueError, r"expected `pair_index` to be in \[0, 4\], got -2"),
        ({"pair_index": torch.tensor([0, 1])}, ValueError, r"`pair_index` of shape \(batch\) with .*, got \(2,\)"),
        ({"pair_index": torch.zeros(3)}, TypeError, r"expected `pair_index` of dtype torch.int64, got torch.float32"),
    ],
)
def test_wrong_updates_are_told_and_store_nothing(change, error, message):
    bank = fill(build())
    before = state_of(bank)
    with pytest.raises(error, match=message):
        bank.update(**{"features": draw_features(3), "probs": UNIFORM, **change})
    assert same(bank.state_dict(), before)


def test_probabilities_in_half_precision_sum_to_one_closely_enough():
    logits = torch.randn(5, 1262, generator=seeded(0))
    for dtype in (torch.bfloat16, torch.float16):
        bank = DynamicMemoryBank(1262, DIM)
        bank.update(draw_features(5), logits.softmax(dim=1).to(dtype))
        assert int(bank.count) == 5


@pytest.mark.parametrize(
    ("texts", "pair_index", "error", "message"),
    [
        ("text", torch.tensor([0]), TypeError, r"expected `texts` to be a torch.Tensor, got str"),
        (torch.ones(2, 5), torch.tensor([0, 1]), ValueError, r"expected `texts` of shape \(n, 7\), got \(2, 5\)"),
        (torch.ones(2, DIM), torch.tensor([0]), ValueError, r"`pair_index` of shape \(n\) with n=2.*, got \(1,\)"),
        (
            torch.ones(2, DIM),
            torch.zeros(2),
            TypeError,
            r"expected `pair_index` of dtype torch.int64, got torch.float32",
        ),
        (torch.ones(2, DIM), torch.tensor([0, 5]), ValueError, r"expected `pair_index` to be in \[0, 4\], got 5"),
    ],
)
def test_wrong_texts_are_told_and_store_nothing(texts, pair_index, error, message):
    bank = fill(build())
    before = state_of(bank)
    with pytest.raises(error, match=message):
        bank.fill_texts(texts, pair_index)
    assert same(bank.state_dict(), before)


@each_mode
@given(batches=st.integers(0, 9), in_order=st.booleans(), several=st.booleans(), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_texts_of_all_pairs_and_of_several_to_a_pair_are_read_right(mode, batches, in_order, several, seed):
    texts = F.normalize(draw_features(PAIRS + 3, seed=seed + 5), dim=1)
    pair_index = torch.arange(PAIRS) if in_order else torch.randperm(PAIRS, generator=seeded(seed))
    bank = build(logit_scale=1.0, **mode)
    bank.fill_texts(texts[:PAIRS], pair_index)
    for batch in range(batches):
        bank.update(*draw(2, seed=seed + batch))
        if several and batch == 1:
            bank.fill_texts(texts[PAIRS:], torch.tensor([1, 1, 4]))
    features = draw_features(3, dtype=torch.float64, seed=seed + 7)
    expected = reference_retrieve(features, dense_rows(bank), temperature=0.1, **mode)
    torch.testing.assert_close(bank(features), expected, atol=1e-6, rtol=1e-5)


def test_an_update_asks_a_gpu_for_nothing():
    bank = fill(build())
    for seed in range(9):
        bank.update(*draw(seed=seed))  # until it need not grow any more
    with FakeTensorMode():  # whose tensors have no values, and raise where one is asked for
        for name, buffer in list(bank.named_buffers()):
            setattr(bank, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
        features, probs = torch.empty(11, DIM, device="cuda"), torch.empty(11, PAIRS, device="cuda")
        bank.update(features, probs)
        bank.update(features, probs, pair_index=torch.empty(11, dtype=torch.long, device="cuda"))
        assert bank(features).device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            bank.state_dict()


@pytest.mark.parametrize("pairs", [3, 10_000])
def test_a_gpu_is_waited_for_once_in_several_batches(pairs, monkeypatch):
    bank, asked = DynamicMemoryBank(10_000, DIM, slots=100), []
    monkeypatch.setattr(UpdateCheck, "tell", lambda self: asked.append(1))
    probs = torch.full((1, 10_000), 1e-4).expand(20, -1)
    for batch in range(100):
        labels = torch.randint(0, pairs, (20,), generator=seeded(batch))  # the rows of few pairs fill up at once
        bank.update(draw_features(20), probs, pair_index=labels)
    told = 100  # on a CPU, each update tells its own
    assert 2 < len(asked) - told < 25


def test_faults_of_a_batch_on_a_gpu_are_told_when_a_number_is_asked_for(monkeypatch):
    bank, expected = fill(build()), fill(build())
    tell = UpdateCheck.tell
    with monkeypatch.context() as patch:  # as where the values cannot be seen without waiting
        patch.setattr(UpdateCheck, "tell", lambda self: None)
        bank.update(draw_features(3), UNIFORM, pair_index=torch.tensor([0, 7, 1]))
        bank.update(draw_features(3), 5 * UNIFORM)
        bank.update(*draw(seed=3))
    assert UpdateCheck.tell is tell
    with pytest.raises(ValueError, match=r"expected `pair_index` to be in \[0, 4\], got 7"):
        bank.counts  # noqa: B018
    expected.update(*draw(seed=3))
    assert same(bank.state_dict(), expected.state_dict())


def test_a_fault_that_is_told_late_loses_no_other_batch(monkeypatch):
    bank, expected = build(), build()
    with monkeypatch.context() as patch:
        bank._check.fault = torch.tensor([2.0, 1.0, 5.0, 1.0])  # of a batch before
        patch.setattr(
            UpdateCheck, "look", lambda self, probs, *_: Found(torch.ones(len(probs)) > 0, torch.tensor(True))
        )
        with pytest.raises(ValueError, match=r"got a sum of 5 and a smallest value of 1 in row 1"):
            bank.update(*draw(seed=3))
    expected.update(*draw(seed=3))
    assert same(bank.state_dict(), expected.state_dict())
    bank.check_updates()


def test_faults_go_along_with_the_bank():
    bank = fill(build())
    bank._check.fault = torch.tensor([1.0, 0.0, 7.0, 0.0])
    assert copy.deepcopy(bank).to("meta")._check.fault.device.type == "meta"
    with pytest.raises(ValueError, match="got 7"):
        bank.double().check_updates()


def test_a_bank_without_values_has_a_state_to_plan_with():
    state = fill(build()).to("meta").state_dict()
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
    assert state.keys() == build().state_dict().keys()


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_update_spoils_no_backward_pass(when):
    bank, twin = (fill(build(), 40) for _ in range(2))
    features, expected = draw_features(2, seed=8).requires_grad_(), draw_features(2, seed=8).requires_grad_()
    twin(expected)[:, 0].sum().backward()
    scores = bank(features)[:, 0].sum()
    prototype = bank.prototypes(features, torch.tensor([0])).sum()
    if when == "before":
        bank.update(draw_features(3), torch.eye(PAIRS)[[0, 0, 0]])
    scores.backward()
    prototype.backward()
    expected.grad += torch.autograd.grad(twin.prototypes(expected, torch.tensor([0])).sum(), expected)[0]
    assert torch.equal(features.grad, expected.grad)


def test_updates_write_into_no_state_that_was_loaded_or_copied():
    state = fill(build(), 40).state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    assigned = build()
    assigned.load_state_dict(state, assign=True)
    with torch.inference_mode():
        copied = copy.deepcopy(assigned)
        loaded = build()
        loaded.load_state_dict(state)
    for bank in (assigned, copied, loaded):
        bank.update(draw_features(9, seed=3), torch.eye(PAIRS)[[0] * 9])
        assert same(state, kept)
        assert not any(tensor.is_inference() for tensor in (bank.features, bank.pair))
    assert same(assigned.state_dict(), copied.state_dict())
    assert same(assigned.state_dict(), loaded.state_dict())


def test_repr_tells_the_options():
    shown = repr(build(temperature=0.3, empty="zero", logit_scale=7.0))
    options = "temperature=0.3, empty='zero', normalize=False, logit_scale=7.0"
    assert shown == f"DynamicMemoryBank(num_pairs=5, dim=7, slots=3, {options})"


def test_stored_order_is_that_of_the_merge():
    state = fill(build(), 40, texts=False).state_dict()
    used = int(state["count"])
    order = merge_best(state["pair"], state["entropy"], num_pairs=PAIRS, slots=SLOTS)
    assert torch.equal(order, torch.arange(used))
    assert len(state["features"]) == used


def test_a_scale_that_is_trained_gets_its_gradient_or_is_refused():
    log_scale = nn.Parameter(torch.tensor(2.0))
    with pytest.raises(ValueError, match="expected `logit_scale` to be a constant, got a tensor that requires grad"):
        build(logit_scale=log_scale.exp())
    bank = fill(build())
    features = draw_features(3, seed=5)
    logits = bank(features, logit_scale=log_scale.exp())
    torch.testing.assert_close(logits, fill(build(logit_scale=log_scale.exp().detach()))(features))
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), log_scale)
    torch.testing.assert_close(gradient, logits[:, 0].sum())  # of exp(s) times a constant: itself


@pytest.mark.parametrize("exponent", [-25, 25])
def test_the_norm_of_what_is_stored_and_asked_does_not_matter(exponent):
    bank, other, factor = build(), build(), 10.0**exponent
    features, probs = draw()
    texts, index = draw_features(2, seed=7), torch.tensor([1, 4])
    bank.fill_texts(texts, index)
    bank.update(features, probs)
    other.fill_texts(texts * factor, index)
    other.update(features * factor, probs)
    assert int(other.num_rejected) == 0
    torch.testing.assert_close(other.state_dict(), bank.state_dict())
    torch.testing.assert_close(other(features * factor), bank(features))
    every = torch.arange(PAIRS)
    torch.testing.assert_close(other.prototypes(features * factor, every), bank.prototypes(features, every))


IMPOSSIBLE = {
    "pair out of range": ("pair", lambda pair: pair + PAIRS, r"expected `pair` to be in \[0, 4\], got"),
    "negative pair": ("pair", lambda pair: pair - PAIRS, r"expected `pair` to be in \[0, 4\], got -"),
    "too many images": ("pair", torch.zeros_like, "expected `pair` of at most 3 entries in a row, got 8"),
    "NaN vector": (
        "features",
        lambda rows: rows * torch.nan,
        "expected `features` of unit length, got a length of nan",
    ),
    "long vector": (
        "features",
        lambda rows: rows * 2,
        "expected `features` of unit length, got a length of 2 in row 0",
    ),
    "zero vector": ("features", torch.zeros_like, "expected `features` of unit length, got a length of 0 in row 0"),
    "NaN entropy": ("entropy", lambda values: values * torch.nan, "expected `entropy` between 0 and log 5, got nan"),
    "low entropy": ("entropy", lambda values: values - 5, "expected `entropy` between 0 and log 5, got -"),
    "high entropy": ("entropy", lambda values: values + 5, "expected `entropy` between 0 and log 5, got "),
    "text pair": ("text_pair", lambda pair: pair - 9, r"expected `text_pair` to be in \[0, 4\], got -"),
    "too many texts": ("text_pair", torch.zeros_like, "expected `text_pair` of at most 3 entries in a row, got 4"),
    "NaN text": ("texts", lambda rows: rows * torch.nan, "expected `texts` of unit length, got a length of nan"),
    "rank": ("text_rank", lambda rank: rank + 1, "expected `text_rank` to count the texts of each row"),
    "count": ("count", lambda count: count + 1, "expected `count` to be the 8 entries, got 9"),
    "rejected": ("num_rejected", lambda count: count - 9, "expected `num_rejected` to be at least 0, got -9"),
}


@pytest.mark.parametrize(("name", "change", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_states_that_cannot_be_are_told_and_change_nothing(name, change, message):
    state = fill(build()).state_dict()
    assert len(state["pair"]) == 8
    bank = fill(build(), seed=4)
    before = state_of(bank)
    with pytest.raises(ValueError, match=message):
        bank.load_state_dict({**state, name: change(state[name])})
    assert same(bank.state_dict(), before)


def test_states_of_other_kinds_are_told():
    state = fill(build()).state_dict()
    with pytest.raises(TypeError, match=r"expected `pair` of dtype torch.int64, got torch.float32"):
        build().load_state_dict({**state, "pair": state["pair"].float()})
    with pytest.raises(TypeError, match=r"expected `features` of dtype torch.float32, .*, got torch.int64"):
        build().load_state_dict({**state, "features": state["features"].long()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_state_that_a_bank_saves_can_be_loaded(dtype):
    bank = fill(build(dtype=dtype), 60)
    assert bank.features.dtype == dtype
    twin = build(dtype=dtype)
    twin.load_state_dict(bank.state_dict())
    assert same(twin.state_dict(), bank.state_dict())


def test_a_bank_is_made_where_and_as_is_asked():
    bank = build(device="meta", dtype=torch.bfloat16)
    assert {buffer.device.type for buffer in bank.buffers()} == {"meta"}
    assert bank.features.dtype == bank.texts.dtype == torch.bfloat16
    assert bank.entropy.dtype == torch.float32


def test_a_scale_of_a_call_is_a_scalar_and_may_be_a_constant():
    bank = fill(build())
    features = draw_features(3, seed=5)
    for shape in ((3,), (3, 5)):
        with pytest.raises(ValueError, match=r"expected `logit_scale` of shape \(\), got"):
            bank(features, logit_scale=torch.ones(shape))
    assert torch.equal(bank(features, logit_scale=torch.tensor(100.0)), bank(features))


def test_a_wrong_state_is_named_as_it_stands_in_the_whole():
    model = nn.Sequential(nn.Linear(2, 2), fill(build()))
    state = model.state_dict()
    state["1.pair"] = state["1.pair"] + PAIRS
    with pytest.raises(ValueError, match=r"expected `1.pair` to be in \[0, 4\]"):
        model.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_a_bank_holds_floats(dtype):
    with pytest.raises(TypeError, match=r"expected `dtype` to be one of floats, got torch\."):
        build(dtype=dtype)
