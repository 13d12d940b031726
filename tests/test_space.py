import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads import CompositionSpace
from czsl_heads.space import clean_name

ATTRIBUTES = ("wet", "dry", "Old")
OBJECTS = ("dog", "cat", "tree", "Boat.Shoe", "car")
SEEN = (("dry", "car"), ("wet", "dog"), ("Old", "tree"))
UNSEEN = (("wet", "Boat.Shoe"), ("dry", "dog"))


@pytest.fixture
def space():
    return CompositionSpace(ATTRIBUTES, OBJECTS, seen=SEEN, unseen=UNSEEN)


@st.composite
def spaces(draw):
    num_attrs, num_objs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    product = [(attr, obj) for attr in range(num_attrs) for obj in range(num_objs)]
    pairs = draw(st.permutations(product))[: draw(st.integers(1, len(product)))]
    num_seen = draw(st.integers(1, len(pairs)))
    names = [f"a{i}" for i in range(num_attrs)], [f"o{i}" for i in range(num_objs)]
    return CompositionSpace(*names, seen=pairs[:num_seen], unseen=pairs[num_seen:])


def test_order_is_kept_as_given(space):
    assert space.attributes == ATTRIBUTES
    assert space.objects == OBJECTS
    assert space.pairs.tolist() == [[1, 4], [0, 0], [2, 2], [0, 3], [1, 0]]
    assert space.seen_mask.tolist() == [True, True, True, False, False]
    assert space.pair_names == [*SEEN, *UNSEEN]
    assert len(space) == 5
    assert (space.pairs.dtype, space.seen_mask.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize(
    "convert",
    [
        lambda pairs: pairs,
        lambda pairs: [list(pair) for pair in pairs],
        lambda pairs: [tuple(map(np.int64, pair)) for pair in pairs],
        lambda pairs: np.array(pairs),
        lambda pairs: torch.tensor(pairs),
        lambda pairs: [tuple(torch.tensor(pair)) for pair in pairs],
        lambda pairs: (pair for pair in pairs),
        lambda pairs: [(ATTRIBUTES[attr], obj) for attr, obj in pairs],
        lambda pairs: [(np.str_(ATTRIBUTES[attr]), np.str_(OBJECTS[obj])) for attr, obj in pairs],
    ],
    ids=["tuples", "lists", "numpy-ints", "array", "tensor", "tensor-ints", "generator", "mixed", "numpy-strings"],
)
def test_indices_of_any_kind_say_the_same_as_names(space, convert):
    seen, unseen = [(1, 4), (0, 0), (2, 2)], [(0, 3), (1, 0)]
    assert CompositionSpace(ATTRIBUTES, OBJECTS, seen=convert(seen), unseen=convert(unseen)) == space
    assert space.index(convert(unseen)).tolist() == [3, 4]


def test_names_may_come_from_any_iterable(space):
    names = (name for name in ATTRIBUTES), dict.fromkeys(OBJECTS)
    assert CompositionSpace(*names, seen=SEEN, unseen=UNSEEN) == space


@pytest.mark.parametrize("role", ["attributes", "objects"])
@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["wet", "dry", "wet"], ValueError, "without repeats, got 'wet' twice"),
        (["wet", " "], ValueError, "to hold names, got ' '"),
        (["wet", 3], TypeError, "to hold strings, got 3"),
        ([], ValueError, "to hold at least one name, got none"),
        (5, TypeError, "to be a sequence of names, got 5"),
        ("wet", TypeError, "to be a sequence of names, got the string 'wet'"),
    ],
)
def test_wrong_names_are_told(role, names, error, message):
    arguments = {"attributes": ["wet"], "objects": ["wet"], role: names}
    with pytest.raises(error, match=f"expected `{role}` {message}"):
        CompositionSpace(**arguments, seen=[(0, 0)])


@pytest.mark.parametrize(
    ("seen", "unseen", "error", "message"),
    [
        ([], [(0, 0)], ValueError, r"`seen` to hold at least one pair, got none"),
        ([(0, 0), ("wet", "dog")], [], ValueError, r"`seen` without repeats, got \(wet, dog\) twice"),
        ([(0, 0)], [(1, 1), (1, 1)], ValueError, r"`unseen` without repeats, got \(dry, cat\) twice"),
        ([(0, 1)], [("wet", "cat")], ValueError, r"`seen` and `unseen` to be disjoint, got \(wet, cat\) in both"),
        ([("icy", "dog")], [], ValueError, r"`seen` .* unknown attribute 'icy' in \('icy', 'dog'\)"),
        ([(0, 0)], [("wet", "cow")], ValueError, r"`unseen` .* unknown object 'cow' in \('wet', 'cow'\)"),
        ([("dog", "wet")], [], ValueError, r"unknown attribute 'dog'"),
        ([(3, 0)], [], ValueError, r"`seen` to hold attribute indices below 3, got 3 in \(3, 0\)"),
        ([(0, 5)], [], ValueError, r"`seen` to hold object indices below 5, got 5 in \(0, 5\)"),
        ([(0, -1)], [], ValueError, r"`seen` to hold object indices below 5, got -1"),
        ([(True, 0)], [], TypeError, r"`seen` to hold names or indices, got True"),
        ([(0.0, 0)], [], TypeError, r"`seen` to hold names or indices, got 0.0"),
        ([("wet", None)], [], TypeError, r"`seen` to hold names or indices, got None"),
        ([(0, 0, 0)], [], TypeError, r"`seen` to hold \(attribute, object\) pairs, got \(0, 0, 0\)"),
        (["ab"], [], TypeError, r"`seen` to hold \(attribute, object\) pairs, got 'ab'"),
        ([7], [], TypeError, r"`seen` to hold \(attribute, object\) pairs, got 7"),
        (None, [], TypeError, r"expected `seen` to be an iterable of pairs, got None"),
        ("ab", [], TypeError, r"expected `seen` to be an iterable of pairs, got 'ab'"),
        ([(0, 0)], 5, TypeError, r"expected `unseen` to be an iterable of pairs, got 5"),
        (torch.zeros(1, 2), [], TypeError, r"`seen` to hold names or indices, got 0.0"),
    ],
)
def test_wrong_pairs_are_named(seen, unseen, error, message):
    with pytest.raises(error, match=message):
        CompositionSpace(ATTRIBUTES, OBJECTS, seen=seen, unseen=unseen)


def test_index_takes_names_and_tensors(space):
    assert space.index([("wet", "Boat.Shoe"), ("dry", "car")]).tolist() == [3, 0]
    assert space.index(torch.tensor([[0, 3], [1, 4], [0, 3]])).tolist() == [3, 0, 3]
    assert space.index(torch.tensor([[2, 2]], dtype=torch.int32)).tolist() == [2]
    assert space.index([]).tolist() == []
    assert space.index([]).dtype == torch.int64


def test_index_names_a_pair_that_is_elsewhere(space):
    with pytest.raises(ValueError, match=r"expected `pairs` of this space, got \(Old, dog\), which is not in it"):
        space.index([("wet", "dog"), ("Old", "dog")])
    with pytest.raises(ValueError, match=r"unknown object 'cow'"):
        space.index([("wet", "cow")])
    with pytest.raises(ValueError, match=r"expected `pairs` of indices below \(3, 5\), got \(3, 0\)"):
        space.index(torch.tensor([[0, 0], [3, 0]]))
    # Without the limits this would wrap to the code of another pair.
    with pytest.raises(ValueError, match=r"below \(3, 5\), got \(1, -5\)"):
        space.index(torch.tensor([[1, -5]]))


def test_index_checks_tensors(space):
    with pytest.raises(TypeError, match=r"expected `pairs` of dtype torch.int64, torch.int32, got torch.float32"):
        space.index(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"expected `pairs` of shape \(pairs, 2\), got \(2,\)"):
        space.index(torch.tensor([0, 0]))


def test_subset_by_mask_keeps_the_order(space):
    part = space.subset(torch.tensor([False, True, False, True, True]))
    assert part.pair_names == [("wet", "dog"), ("wet", "Boat.Shoe"), ("dry", "dog")]
    assert part.seen_mask.tolist() == [True, False, False]
    assert (part.attributes, part.objects) == (ATTRIBUTES, OBJECTS)


def test_subset_by_pairs_takes_their_order(space):
    part = space.subset([("dry", "dog"), ("Old", "tree")])
    assert part.pair_names == [("dry", "dog"), ("Old", "tree")]
    assert part.seen_mask.tolist() == [False, True]
    assert part == space.subset(torch.tensor([[1, 0], [2, 2]]))


def test_training_pairs_are_a_subset(space):
    assert space.subset(space.seen_mask) == CompositionSpace(ATTRIBUTES, OBJECTS, seen=SEEN)


def test_wrong_subsets_are_told(space):
    with pytest.raises(ValueError, match=r"expected `mask_or_pairs` of shape \(5\), got \(3,\)"):
        space.subset(torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match=r"expected `mask_or_pairs` without repeats, got \(wet, dog\) twice"):
        space.subset([("wet", "dog"), ("dry", "car"), ("wet", "dog")])
    with pytest.raises(ValueError, match=r"got \(Old, cat\), which is not in it"):
        space.subset([("Old", "cat")])
    for empty in ([], torch.zeros(5, dtype=torch.bool)):
        with pytest.raises(ValueError, match="expected `mask_or_pairs` to keep at least one pair, got none"):
            space.subset(empty)


def test_open_world_is_attribute_major(space):
    world = space.open_world()
    assert world.pair_names == [(attr, obj) for attr in ATTRIBUTES for obj in OBJECTS]
    assert {name for name, seen in zip(world.pair_names, world.seen_mask) if seen} == set(SEEN)
    assert world.open_world() == world


def test_derived_spaces_leave_the_first_alone(space):
    before = copy.deepcopy(space)
    space.subset(space.seen_mask).pairs.zero_()
    space.open_world().seen_mask.zero_()
    assert space == before


def test_equality_compares_names_order_and_what_is_seen(space):
    assert space == CompositionSpace(ATTRIBUTES, OBJECTS, seen=SEEN, unseen=UNSEEN)
    assert space != CompositionSpace(ATTRIBUTES, OBJECTS, seen=SEEN[::-1], unseen=UNSEEN)
    assert space != CompositionSpace(ATTRIBUTES, OBJECTS, seen=(*SEEN, UNSEEN[0]), unseen=UNSEEN[1:])
    assert space != CompositionSpace(("moist", *ATTRIBUTES[1:]), OBJECTS, seen=[(1, 4)])
    assert space != "space"
    assert hash(space) == hash(CompositionSpace(ATTRIBUTES, OBJECTS, seen=SEEN, unseen=UNSEEN))


def test_a_pickled_space_is_the_same(space):
    restored = pickle.loads(pickle.dumps(space))
    assert restored == space
    assert restored.index(UNSEEN).tolist() == [3, 4]


def test_repr_counts(space):
    assert repr(space) == "CompositionSpace(attributes=3, objects=5, seen=3, unseen=2)"


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("Faux.Fur", "faux fur"),
        ("Shoes.Boat.Shoes", "shoes boat shoes"),
        ("traffic_light", "traffic_light"),
        ("dry-erase_board", "dry-erase_board"),
        ("Boots.Mid-Calf", "boots mid-calf"),
    ],
)
def test_cleaning_lowers_letters_and_opens_dots(name, cleaned):
    assert clean_name(name) == cleaned


@given(space=spaces())
@settings(deadline=None, max_examples=30)
def test_index_is_the_inverse_of_pairs(space):
    columns = torch.arange(len(space))
    assert torch.equal(space.index(space.pairs), columns)
    assert torch.equal(space.index(space.pair_names), columns)


@given(space=spaces(), generator=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_the_open_world_holds_every_space(space, generator):
    world = space.open_world()
    assert len(world) == len(space.attributes) * len(space.objects)
    # Pairs that were listed as unseen and those that were not listed at all are the same to the open world.
    assert world.subset(space.pairs) == space
    order = list(range(len(space)))
    generator.shuffle(order)
    assert space.subset(space.pairs[order]).subset(space.pairs) == space


def test_pairs_are_copied_to_a_device_once_and_not_into_pickles_or_deep_copies():
    space = CompositionSpace(["black", "white"], ["swan"], seen=[("white", "swan")])
    assert space.pairs_on(torch.device("cpu")) is space.pairs
    with torch.inference_mode():
        there = space.pairs_on(torch.device("meta"))
    assert not there.is_inference()
    assert (there.device.type, there.shape) == ("meta", (1, 2))
    assert space.pairs_on(torch.device("meta")) is there
    for twin in (pickle.loads(pickle.dumps(space)), copy.deepcopy(space)):
        assert twin == space
        assert twin.pairs_on(torch.device("meta")) is not there
    assert space.open_world().pairs_on(torch.device("meta")).shape == (2, 2)


def test_a_space_is_a_sequence_of_its_pairs_by_name(space):
    pairs = [*SEEN, *UNSEEN]
    assert list(space) == pairs == space.pair_names
    assert [space[column] for column in range(len(space))] == pairs
    assert (space[-1], space[np.int64(1)], space[torch.tensor(2)]) == (pairs[-1], pairs[1], pairs[2])
    assert (space[1:3], space[::-2]) == (pairs[1:3], pairs[::-2])
    assert list(reversed(space)) == pairs[::-1]
    for column in (5, -6):
        with pytest.raises(IndexError, match=rf"expected `column` of the 5 pairs, got {column}"):
            space[column]
    for column in ("dry", 1.0, True):
        with pytest.raises(TypeError, match="expected `column` to be an integer or a slice, got"):
            space[column]


def test_a_space_tells_membership(space):
    assert ("dry", "car") in space
    assert ["wet", "Boat.Shoe"] in space
    assert (1, 4) in space
    assert torch.tensor([0, 0]) in space
    for other in (("wet", "car"), ("car", "dry"), ("none", "dog"), (0, 9), (-1, 0), "dry", ("dry",), 3, None):
        assert other not in space
    assert all(pair in space.open_world() for pair in space)


WORDS = {"Old": "aged", "Boat.Shoe": "deck shoe"}


@pytest.fixture
def worded(space):
    return CompositionSpace(ATTRIBUTES, OBJECTS, seen=SEEN, unseen=UNSEEN, words=WORDS)


def test_words_stand_for_names_and_cleaned_names_where_there_are_none(space, worded):
    assert (space.words, worded.words) == ({}, WORDS)
    assert (space.attribute_words, worded.attribute_words) == (("wet", "dry", "old"), ("wet", "dry", "aged"))
    assert space.object_words == ("dog", "cat", "tree", "boat shoe", "car")
    assert worded.object_words == ("dog", "cat", "tree", "deck shoe", "car")
    assert (worded.attributes, worded.pair_names, repr(worded)) == (ATTRIBUTES, space.pair_names, repr(space))


def test_a_name_of_both_kinds_has_one_word():
    space = CompositionSpace(["Wool"], ["Wool", "coat"], seen=[(0, 1)], words={"Wool": "woollen"})
    assert (space.attribute_words, space.object_words) == (("woollen",), ("woollen", "coat"))


def test_spaces_with_other_words_differ(space, worded):
    assert worded != space
    assert worded == space.with_words(WORDS)
    assert worded.with_words({}) == space
    assert worded != space.with_words({"Old": "aged"})
    assert worded != space.with_words({**WORDS, "Boat.Shoe": "moccasin"})
    assert hash(worded) == hash(space.with_words(WORDS))


def test_words_that_say_the_cleaned_name_are_none(space):
    plain = {"Old": "old", "Boat.Shoe": "boat shoe", "cat": "cat"}
    assert space.with_words(plain).words == {}
    assert space.with_words(plain) == space
    assert space.with_words({"Boat.Shoe": "Boat.Shoe"}).object_words[3] == "Boat.Shoe"


def test_derived_spaces_pickles_and_copies_keep_the_words(worded):
    twins = worded.subset(worded.seen_mask), worded.open_world(), pickle.loads(pickle.dumps(worded))
    for twin in (*twins, copy.deepcopy(worded)):
        assert twin.words == WORDS
        assert (twin.attribute_words, twin.object_words) == (worded.attribute_words, worded.object_words)
    assert twins[2] == worded
    assert twins[1].subset(worded.pairs) == worded


def test_words_of_one_space_are_its_own(space):
    given = dict(WORDS)
    worded = space.with_words(given)
    given["Old"] = "ancient"
    worded.open_world().words["Old"] = "young"
    assert worded.words == WORDS
    assert space.words == {}


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (
            {"Boat.Shoes": "deck shoe"},
            ValueError,
            r"of known primitives, got the unknown 'Boat.Shoes'; did you mean 'B",
        ),
        ({"zebra": "horse"}, ValueError, r"of known primitives, got the unknown 'zebra'$"),
        ({3: "three"}, ValueError, "of known primitives, got the unknown 3$"),
        ({"Old": ""}, ValueError, "to hold words, got '' for 'Old'"),
        ({"Old": " \t"}, ValueError, r"to hold words, got ' \\t' for 'Old'"),
        ({"Old": None}, TypeError, "to hold strings, got None for 'Old'"),
        ([("Old", "aged")], TypeError, r"to be a mapping of names to words, got \[\('Old', 'aged'\)\]"),
        ([], TypeError, r"to be a mapping of names to words, got \[\]"),
        ("", TypeError, "to be a mapping of names to words, got ''"),
    ],
)
def test_wrong_words_are_told(space, words, error, message):
    with pytest.raises(error, match=f"expected `words` {message}"):
        CompositionSpace(ATTRIBUTES, OBJECTS, seen=SEEN, words=words)
    with pytest.raises(error, match=f"expected `words` {message}"):
        space.with_words(words)
