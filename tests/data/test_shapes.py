import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from czsl_heads.data import make_shapes, read_dataset, shapes
from czsl_heads.data.drawing import ATTRIBUTES, OBJECTS
from czsl_heads.data.shapes import SPLITS, ShapesSpec, companions, draw, shapes_space, split_pairs, unseen_pairs

SMALL = {"train_per_pair": 1, "val_per_pair": 1, "test_per_pair": 1}


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def quick(monkeypatch):
    """Blank drawings, where files matter and pixels do not."""
    blank = Image.new("RGB", (48, 48)), Image.new("L", (48, 48))
    monkeypatch.setattr(shapes, "draw", lambda *arguments: blank)


def test_the_splits_have_the_sizes_of_the_card():
    assert [len(split_pairs(split)) for split in SPLITS] == [96, 48, 48]
    assert len(unseen_pairs()) == 48
    for split in SPLITS:
        pairs = split_pairs(split)
        assert pairs == sorted(set(pairs))


def test_validation_and_test_mix_seen_and_unseen_pairs():
    train, val, test = (set(split_pairs(split)) for split in SPLITS)
    assert len(val & train) == len(val - train) == len(test & train) == len(test - train) == 24
    assert not val & test
    assert set(unseen_pairs()) == (val | test) - train
    assert len(train | val | test) == 144


def test_every_attribute_and_object_has_as_many_pairs_of_each_role():
    for pairs, count in (
        (split_pairs("train"), 8),
        (split_pairs("val"), 4),
        (split_pairs("test"), 4),
        (sorted(set(split_pairs("val")) - set(split_pairs("train"))), 2),
        (sorted(set(split_pairs("test")) - set(split_pairs("train"))), 2),
    ):
        assert Counter(attribute for attribute, _ in pairs) == dict.fromkeys(ATTRIBUTES, count)
        assert Counter(obj for _, obj in pairs) == dict.fromkeys(OBJECTS, count)


def test_companions_are_the_seen_pairs():
    assert {(attribute, obj) for obj, group in companions().items() for attribute in group} == set(split_pairs("train"))
    assert {len(group) for group in companions().values()} == {8}


def test_the_folder_is_in_the_layout_of_the_field(shapes_root):
    files = contents(shapes_root)
    assert {name.split("/")[0] for name in files} == {
        "images",
        "masks",
        "compositional-split-natural",
        "metadata_compositional-split-natural.t7",
        "shapes.json",
    }
    images = {name.removeprefix("images/") for name in files if name.startswith("images/")}
    masks = {name.removeprefix("masks/") for name in files if name.startswith("masks/")}
    assert images == masks
    assert images == {f"{a}_{o}/{split}_0000.png" for split in SPLITS for a, o in split_pairs(split)}
    lines = (shapes_root / "compositional-split-natural" / "val_pairs.txt").read_text().splitlines()
    assert [tuple(line.split()) for line in lines] == split_pairs("val")
    assert json.loads(files["shapes.json"]) == {"seed": 0, "imbalance": 0.5, "image_size": 48, **SMALL}
    assert shapes_root.stat().st_mode & 0o777 == 0o755


def test_the_same_seed_writes_the_same_bytes(shapes_root, tmp_path):
    again = make_shapes(tmp_path / "again", **SMALL)
    assert again == tmp_path / "again"
    assert contents(again) == contents(shapes_root)


def test_another_seed_draws_other_images_of_the_same_pairs():
    for split, (attribute, obj) in (("train", ("red", "fish")), ("test", ("shaded", "moon"))):
        first, second = (draw(ShapesSpec(seed=seed), split, attribute, obj, 0)[0] for seed in (0, 1))
        assert first.tobytes() != second.tobytes()


def test_every_image_is_drawn_anew():
    spec = ShapesSpec()
    drawings = [
        draw(spec, split, attribute, obj, number)[0].tobytes()
        for split in SPLITS
        for attribute in ("red", "blue")
        for obj in ("fish", "moon")
        for number in (0, 1)
    ]
    assert len(set(drawings)) == len(drawings) == 24


def test_the_numbers_of_images_do_not_change_pixels(shapes_root, tmp_path):
    more = contents(make_shapes(tmp_path / "more", train_per_pair=2, val_per_pair=1, test_per_pair=1))
    small = {name: data for name, data in contents(shapes_root).items() if name.endswith(".png")}
    assert {name: more[name] for name in small} == small
    assert len([name for name in more if name.startswith("images/")]) == 2 * 96 + 48 + 48


@pytest.mark.parametrize("imbalance", [0, 1])
def test_both_ends_of_the_imbalance_draw(imbalance):
    for attribute, obj in split_pairs("train")[::5]:
        image, mask = draw(ShapesSpec(imbalance=imbalance, image_size=53), "train", attribute, obj, 0)
        assert image.size == mask.size == (53, 53)
        assert np.asarray(mask).any()


def test_masks_are_beside_the_images_and_of_plausible_area(shapes_root):
    areas = []
    for path in sorted((shapes_root / "masks").rglob("*.png")):
        with Image.open(path) as mask, Image.open(shapes_root / "images" / path.relative_to(path.parents[1])) as image:
            assert (image.mode, image.size, mask.mode, mask.size) == ("RGB", (48, 48), "L", (48, 48))
            values = np.asarray(mask)
        assert set(np.unique(values)) == {0, 255}
        areas.append((values > 0).mean())
    assert len(areas) == 192
    assert min(areas) > 0.02
    assert max(areas) < 0.45


def test_masks_outline_what_differs_from_another_object():
    spec = ShapesSpec(imbalance=0.0)
    image, mask = (np.asarray(part).astype(int) for part in draw(spec, "train", "red", "arrow", 0))
    reddish = (image[..., 0] - image[..., 1:].max(axis=2)) > 60
    assert ((mask > 0) & reddish).sum() > 0.85 * (mask > 0).sum()
    assert ((mask == 0) & reddish).sum() < 0.15 * (mask > 0).sum()


def test_an_empty_folder_is_taken(quick, tmp_path):
    (tmp_path / "world").mkdir()
    root = make_shapes(str(tmp_path / "world"), **SMALL)
    assert isinstance(root, Path)
    assert (root / "shapes.json").is_file()


def test_missing_parents_are_made(quick, tmp_path):
    assert (make_shapes(tmp_path / "a" / "b" / "world", **SMALL) / "shapes.json").is_file()


def test_a_folder_that_holds_something_is_left_alone(quick, tmp_path):
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"expected `out` to be a new or empty folder, got .*world, which holds"):
        make_shapes(tmp_path / "world", **SMALL)
    assert contents(tmp_path) == {"world/mine.txt": b"mine"}


def test_a_file_in_the_way_is_left_alone(quick, tmp_path):
    (tmp_path / "world").write_text("mine")
    with pytest.raises(FileExistsError, match=r"expected `out` to be a new or empty folder, got .*world"):
        make_shapes(tmp_path / "world", **SMALL)
    assert contents(tmp_path) == {"world": b"mine"}


def test_a_place_that_cannot_be_written_raises_an_os_error(quick, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        make_shapes(tmp_path / "file" / "world", **SMALL)
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("seed", -1, "expected `seed` to be at least 0, got -1"),
        ("imbalance", -0.1, r"expected `imbalance` to be in \[0, 1\], got -0.1"),
        ("imbalance", 1.5, r"expected `imbalance` to be in \[0, 1\], got 1.5"),
        ("imbalance", float("nan"), r"expected `imbalance` to be in \[0, 1\], got nan"),
        ("image_size", 47, "expected `image_size` to be at least 48, got 47"),
        ("train_per_pair", 0, "expected `train_per_pair` to be at least 1, got 0"),
        ("val_per_pair", 0, "expected `val_per_pair` to be at least 1, got 0"),
        ("test_per_pair", -3, "expected `test_per_pair` to be at least 1, got -3"),
    ],
)
def test_an_argument_out_of_range_raises_and_writes_nothing(tmp_path, argument, value, message):
    with pytest.raises(ValueError, match=message):
        make_shapes(tmp_path / "world", **{argument: value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_nothing_half_written_is_left_behind(monkeypatch, tmp_path, error, exists):
    picture = Image.new("L", (48, 48))
    drawings = iter([(picture, picture)] * 5)

    def interrupted(*arguments):
        pictures = next(drawings, None)
        if pictures is None:
            written = [path for path in tmp_path.rglob("*.png") if path.is_file()]
            assert len(written) == 10
            raise error("stop")
        return pictures

    if exists:
        (tmp_path / "world").mkdir()
    monkeypatch.setattr(shapes, "draw", interrupted)
    with pytest.raises(error, match="stop"):
        make_shapes(tmp_path / "world", **SMALL)
    assert list(tmp_path.rglob("*")) == ([tmp_path / "world"] if exists else [])


def test_the_folder_appears_when_it_is_whole(monkeypatch, tmp_path):
    picture = Image.new("L", (48, 48))
    seen = []
    monkeypatch.setattr(
        shapes, "draw", lambda *arguments: seen.append((tmp_path / "world").exists()) or (picture, picture)
    )
    make_shapes(tmp_path / "world", **SMALL)
    assert seen == [False] * 192
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_the_space_is_that_of_the_written_data_set(shapes_root):
    assert shapes_space() == read_dataset(shapes_root).space
