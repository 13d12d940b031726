import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads.data import DataError, splitting
from czsl_heads.data.layout import SPLIT_NAME, SPLITS, read_metadata, write_metadata
from czsl_heads.data.splitting import split_dataset
from tests.data.animals import METADATA


def write_rows(root, pairs, images=4):
    rows = [
        {"image": f"{attribute} {obj}/{number}.png", "attr": attribute, "obj": obj, "set": "NA"}
        for attribute, obj in pairs
        for number in range(images)
    ]
    write_metadata(root, rows)
    return root


def read_split(root):
    """Pairs by split, from the files; and what the rows say of each split."""
    pairs = {}
    for name in SPLITS:
        text = (root / SPLIT_NAME / f"{name}_pairs.txt").read_text(encoding="utf-8")
        pairs[name] = [tuple(line.split("+" if "+" in text else " ")) for line in text.strip().split("\n")]
    rows = read_metadata(root / METADATA)
    shown = {name: {(row["attr"], row["obj"]) for row in rows if row["set"] == name} for name in SPLITS}
    return pairs, shown


GRID = [(attribute, obj) for attribute in "abcdef" for obj in ("cat", "dog", "swan", "fox", "cow")]


@pytest.mark.parametrize("seed", range(5))
def test_a_split_is_as_the_published_ones_are(tmp_path, seed):
    drawn = split_dataset(write_rows(tmp_path, GRID), seed=seed, unseen=0.3)
    pairs, shown = read_split(tmp_path)
    assert {name: set(group) for name, group in pairs.items()} == shown
    train = set(pairs["train"])
    unseen = {name: set(pairs[name]) - train for name in ("val", "test")}
    assert not unseen["val"] & unseen["test"]
    assert len(unseen["val"] | unseen["test"]) == round(0.3 * len(GRID)) == 9
    assert (len(unseen["val"]), len(unseen["test"])) == (4, 5)
    assert {name: len(set(pairs[name]) & train) for name in ("val", "test")} == {"val": 4, "test": 5}
    for kind in (0, 1):
        assert {pair[kind] for pair in train} == {pair[kind] for pair in GRID}
    assert drawn.unseen_pairs == {"train": 0, "val": 4, "test": 5}
    assert sum(drawn.images.values()) == 4 * len(GRID)
    assert json.loads((tmp_path / "split.json").read_text(encoding="utf-8"))["seed"] == seed
    assert f"drawn by seed {seed}" in str(drawn)


def test_the_share_of_pictures_that_is_held_out(tmp_path):
    split_dataset(write_rows(tmp_path, GRID, images=20), held_out=0.25)
    rows = read_metadata(tmp_path / METADATA)
    pairs, _ = read_split(tmp_path)
    counts = Counter((row["attr"], row["obj"], row["set"]) for row in rows)
    both = set(pairs["val"]) & set(pairs["test"])
    for pair in set(pairs["val"]) & set(pairs["train"]) - both:
        assert (counts[(*pair, "val")], counts[(*pair, "train")]) == (5, 15)


def test_the_seed_decides_and_nothing_else_does(tmp_path):
    texts = []
    for number, (seed, hashing) in enumerate([(3, "0"), (3, "1"), (4, "0")]):
        root = tmp_path / str(number)
        root.mkdir()
        write_rows(root, GRID)
        command = f"from czsl_heads.data import split_dataset; split_dataset({str(root)!r}, seed={seed}, unseen=0.6)"
        subprocess.run([sys.executable, "-c", command], check=True, env={**os.environ, "PYTHONHASHSEED": hashing})
        texts.append([(root / SPLIT_NAME / f"{name}_pairs.txt").read_text(encoding="utf-8") for name in SPLITS])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.sets(st.tuples(st.sampled_from("abcde"), st.sampled_from("vwxyz")), min_size=6, max_size=25),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 9),
)
def test_every_word_is_trained_or_the_split_is_refused_rightly(tmp_path_factory, pairs, share, seed):
    root = write_rows(tmp_path_factory.mktemp("drawn"), sorted(pairs), images=3)
    most = len(pairs) - smallest_cover(pairs)
    wanted = max(2, round(share * len(pairs)))
    if wanted > most:
        with pytest.raises(DataError, match=rf"expected {wanted} of {len(pairs)} pairs .*, got {most}"):
            split_dataset(root, seed=seed, unseen=share)
        assert sorted(path.name for path in root.iterdir()) == [METADATA]
        return
    split_dataset(root, seed=seed, unseen=share)
    found, _ = read_split(root)
    train = set(found["train"])
    assert len(pairs - train) == wanted
    for kind in (0, 1):
        assert {pair[kind] for pair in train} == {pair[kind] for pair in pairs}


def smallest_cover(pairs):
    """Pairs that hold every word, at fewest: words less the largest matching, found path by path (Kuhn)."""
    partner = {}

    def augmented(attribute, tried):
        for first, obj in sorted(pairs):
            if first != attribute or obj in tried:
                continue
            tried.add(obj)
            if obj not in partner or augmented(partner[obj], tried):
                partner[obj] = attribute
                return True
        return False

    attributes, objects = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
    matched = sum(augmented(attribute, set()) for attribute in sorted(attributes))
    return len(attributes) + len(objects) - matched


def test_what_stands_in_the_way_is_named(tmp_path):
    with pytest.raises(DataError, match="got 0; words of one pair only: red, wet, cat, dog"):
        split_dataset(write_rows(tmp_path, [("wet", "dog"), ("red", "cat")]))


def test_single_pictures_cannot_be_held_out(tmp_path):
    with pytest.raises(DataError, match="expected a seen pair of two pictures, of which one can be held out, got none"):
        split_dataset(write_rows(tmp_path, GRID, images=1))
    assert not (tmp_path / SPLIT_NAME).exists()


def test_a_published_split_is_never_overwritten(root):
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for overwrite in (False, True):
        with pytest.raises(DataError, match="got one that czsl split has not drawn"):
            split_dataset(root, overwrite=overwrite)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_an_earlier_draw_is_replaced_if_asked_for(tmp_path):
    split_dataset(write_rows(tmp_path, GRID), seed=0)
    before = read_split(tmp_path)
    with pytest.raises(DataError, match="expected a data set without a split, got one; overwrite draws another"):
        split_dataset(tmp_path, seed=1)
    assert read_split(tmp_path) == before
    split_dataset(tmp_path, seed=1, overwrite=True)
    assert read_split(tmp_path) != before
    split_dataset(tmp_path, seed=0, overwrite=True)
    assert read_split(tmp_path) == before


def test_a_picture_of_several_pairs_goes_to_one_split(tmp_path):
    write_rows(tmp_path, GRID, images=3)
    rows = read_metadata(tmp_path / METADATA)
    torch.save([*rows, *({**row, "attr": "new"} for row in rows[::4])], tmp_path / METADATA)
    drawn = split_dataset(tmp_path, seed=1)
    splits = {}
    for row in read_metadata(tmp_path / METADATA):
        if row["set"] != "NA":
            splits.setdefault(row["image"], set()).add(row["set"])
    assert all(len(names) == 1 for names in splits.values())
    absent = sum(row["set"] == "NA" for row in read_metadata(tmp_path / METADATA))
    assert absent == drawn.dropped > 0
    assert f"{drawn.dropped} rows are in no split" in str(drawn)


def test_rows_without_an_attribute_stay_out(tmp_path):
    write_rows(tmp_path, GRID)
    rows = [*read_metadata(tmp_path / METADATA), {"image": "x.png", "attr": "NA", "obj": "cat", "set": "NA"}]
    write_metadata(tmp_path, rows)
    split_dataset(tmp_path)
    assert read_metadata(tmp_path / METADATA)[-1] == rows[-1]


def test_names_with_blanks_are_written_with_a_plus(tmp_path):
    split_dataset(write_rows(tmp_path, [(f"very {attribute}", obj) for attribute, obj in GRID]))
    pairs, shown = read_split(tmp_path)
    assert {name: set(group) for name, group in pairs.items()} == shown
    with pytest.raises(DataError, match="expected names with blanks or with"):
        splitting.write_pairs(tmp_path / "other", {"train": [("very wet", "c+t")]})


@pytest.mark.parametrize("options", [{"unseen": 0}, {"unseen": 1.5}, {"held_out": 0}, {"held_out": 0.7}, {"seed": -1}])
def test_shares_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=f"expected `{next(iter(options))}` to be"):
        split_dataset(write_rows(tmp_path, GRID), **options)


def test_without_metadata_there_is_nothing_to_split(tmp_path):
    with pytest.raises(DataError, match="got none; czsl import makes one"):
        split_dataset(tmp_path)
