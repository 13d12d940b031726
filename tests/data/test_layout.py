import os
import pickle
import shutil
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from czsl_heads.data import DataError, read_dataset
from czsl_heads.data.layout import SPLIT_NAME, ImageSplit, write_metadata
from czsl_heads.data.shapes import split_pairs
from czsl_heads.encoders.transforms import Preprocess
from tests.data.animals import METADATA, PAIRS, row, small_rows, write_pairs


def noisy(image):
    """A transform that draws from torch's global generator."""
    return torch.rand(3) + image.size[0]


class Numbers(torch.utils.data.Dataset):
    """(epoch, number) pairs in front of a split, so that a loader asks for them."""

    def __init__(self, split, epoch):
        self.split, self.epoch = split, epoch

    def __len__(self):
        return len(self.split)

    def __getitem__(self, number):
        return self.split[self.epoch, number]


def test_the_shapes_world_reads_back_as_it_was_written(shapes_root):
    dataset = read_dataset(shapes_root)
    assert dataset.root == shapes_root
    assert list(dataset.space.attributes) == sorted(dataset.space.attributes)
    assert list(dataset.space.objects) == sorted(dataset.space.objects)
    assert dataset.space.pair_names == sorted(dataset.space.pair_names)
    assert len(dataset.space) == 144
    seen = {pair for pair, seen in zip(dataset.space.pair_names, dataset.space.seen_mask.tolist()) if seen}
    assert seen == set(split_pairs("train"))
    for name, count in (("train", 96), ("val", 48), ("test", 48)):
        assert dataset.split_pairs[name] == split_pairs(name)
        assert len(dataset.samples[name]) == count
        for sample in dataset.samples[name]:
            assert sample.path.parent.name == f"{sample.attribute}_{sample.object}"
            assert dataset.space.pair_names[sample.column] == (sample.attribute, sample.object)


def test_names_and_pairs_are_sorted_and_split_pairs_keep_the_order_of_the_file(root):
    dataset = read_dataset(str(root))
    assert dataset.space.attributes == ("old", "wet")
    assert dataset.space.objects == ("cat", "dog")
    assert dataset.space.pair_names == [("old", "cat"), ("old", "dog"), ("wet", "cat"), ("wet", "dog")]
    assert dataset.space.seen_mask.tolist() == [True, True, False, True]
    assert dataset.split_pairs["train"] == [("wet", "dog"), ("old", "cat"), ("old", "dog")]


def test_samples_come_in_the_order_of_the_metadata(root):
    dataset = read_dataset(root)
    assert [sample.path.name for sample in dataset.samples["test"]] == ["4.png", "5.png"]
    assert [sample.column for sample in dataset.samples["test"]] == [2, 1]
    assert dataset.images("test").columns.tolist() == [2, 1]
    write_metadata(root, small_rows()[::-1])
    assert [sample.path.name for sample in read_dataset(root).samples["test"]] == ["5.png", "4.png"]


def test_candidates_are_the_pairs_of_the_split_and_of_training(shapes_root, root):
    dataset = read_dataset(shapes_root)
    for name in ("train", "val", "test"):
        candidates = {pair for pair, on in zip(dataset.space.pair_names, dataset.eval_mask(name).tolist()) if on}
        assert candidates == set(split_pairs("train")) | set(split_pairs(name))
    assert [int(dataset.eval_mask(name).sum()) for name in ("train", "val", "test")] == [96, 120, 120]
    assert read_dataset(root).eval_mask("val").tolist() == [True] * 4
    assert read_dataset(root).eval_mask("train").tolist() == [True, True, False, True]


def test_an_unknown_split_raises(root):
    dataset = read_dataset(root)
    for method in (dataset.eval_mask, dataset.images):
        with pytest.raises(ValueError, match="expected `split` to be one of train, val, test, got 'valid'"):
            method("valid")


def test_folders_with_spaces_are_found_behind_names_with_underscores(root):
    (root / "images" / "wet_dog").rename(root / "images" / "wet dog")
    assert read_dataset(root).samples["train"][0].path == root / "images" / "wet dog" / "1.png"


def test_the_second_name_of_an_image_is_tried_last(root):
    rows = small_rows()
    rows[0]["_image"] = "elsewhere/one.png"
    write_metadata(root, rows)
    assert read_dataset(root).samples["train"][0].path.name == "1.png"
    (root / "images" / "elsewhere").mkdir()
    (root / "images" / "wet_dog" / "1.png").rename(root / "images" / "elsewhere" / "one.png")
    assert read_dataset(root).samples["train"][0].path == root / "images" / "elsewhere" / "one.png"


def test_rows_without_attribute_or_split_and_of_unknown_pairs_are_left_out(root):
    extra = [
        row("none/1.png", "NA", "dog", "train"),
        row("none/2.png", "wet", "dog", "NA"),
        row("none/3.png", "wet", "zebra", "train"),
        row("none/4.png", "shiny", "dog", "nowhere"),
    ]
    write_metadata(root, [*extra[:2], *small_rows(), *extra[2:]])
    dataset = read_dataset(root)
    assert {name: len(group) for name, group in dataset.samples.items()} == {"train": 2, "val": 1, "test": 2}


def test_names_with_spaces_are_read_between_plus_signs(root):
    for name, lines in PAIRS.items():
        write_pairs(root, name, [line.replace("wet ", "soaking wet+").replace("old ", "old + ") for line in lines])
    rows = [{**entry, "attr": entry["attr"].replace("wet", "soaking wet")} for entry in small_rows()]
    write_metadata(root, rows)
    dataset = read_dataset(root)
    assert dataset.space.attributes == ("old", "soaking wet")
    assert dataset.split_pairs["train"][0] == ("soaking wet", "dog")


def test_line_ends_and_trailing_blanks_do_not_matter(root):
    (root / SPLIT_NAME / "train_pairs.txt").write_bytes(b"wet dog\r\nold cat  \r\nold\tdog\r\n\r\n")
    assert read_dataset(root).split_pairs["train"] == [("wet", "dog"), ("old", "cat"), ("old", "dog")]


def test_another_split_may_be_asked_for(root):
    (root / SPLIT_NAME).rename(root / "mine")
    (root / METADATA).rename(root / "metadata_mine.t7")
    assert len(read_dataset(root, split="mine").space) == 4
    with pytest.raises(DataError, match=f"got a folder without metadata_{SPLIT_NAME}.t7, {SPLIT_NAME}/train_pairs.txt"):
        read_dataset(root)


def test_a_folder_that_is_not_there_or_no_folder_raises(tmp_path):
    with pytest.raises(DataError, match="nowhere: expected the folder of a data set, got nothing"):
        read_dataset(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: expected the folder of a data set, got a file"):
        read_dataset(tmp_path / "file")
    with pytest.raises(DataError, match="in the field's layout, got a folder without images, metadata_"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("part", ["images", METADATA, f"{SPLIT_NAME}/val_pairs.txt"])
def test_a_data_set_without_one_of_its_parts_raises(root, part):
    path = root / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=f"animals: expected a data set .* got a folder without {part}$"):
        read_dataset(root)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("train", [], "train_pairs.txt: expected at least one pair, got an empty file"),
        ("val", ["", "  "], "val_pairs.txt: expected at least one pair, got an empty file"),
        ("val", ["wet cat", "old"], "val_pairs.txt, line 2: expected 'attribute object', got 'old'"),
        ("val", ["wet cat", "very old cat"], "val_pairs.txt, line 2: expected 'attribute object', got 'very old cat'"),
        ("val", ["wet cat", "", "old cat"], "val_pairs.txt, line 2: expected 'attribute object', got ''"),
        ("val", ["", "", "wet cat", "old"], "val_pairs.txt, line 1: expected 'attribute object', got ''"),
        ("val", ["wet+cat", "old+"], r"val_pairs.txt, line 2: expected 'attribute object', got 'old\+'"),
        ("val", ["wet+cat+dog"], r"val_pairs.txt, line 1: expected 'attribute object', got 'wet\+cat\+dog'"),
        ("train", ["wet dog", "old cat", "wet dog"], r"train_pairs.txt, line 3: .* got 'wet dog' again \(line 1\)"),
        ("val", ["wet cat", "dry cat"], r"got 1 that are never trained: the attribute 'dry' \(val_pairs.txt, line 2\)"),
        ("test", ["wet cow"], r"got 1 that are never trained: the object 'cow' \(test_pairs.txt, line 1\)"),
    ],
)
def test_a_wrong_pair_file_raises_with_its_line(root, name, lines, message):
    write_pairs(root, name, lines)
    with pytest.raises(DataError, match=message):
        read_dataset(root)


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_pair_file_that_is_no_text_raises(root, name):
    path = root / SPLIT_NAME / f"{name}_pairs.txt"
    path.write_bytes(b"wet dog\n\xff\xfe\n")
    with pytest.raises(
        DataError, match=f"{name}_pairs.txt: expected a text file of pairs, got one that cannot be read"
    ):
        read_dataset(root)
    path.unlink()
    path.mkdir()
    with pytest.raises(
        DataError, match=f"{name}_pairs.txt: expected a text file of pairs, got one that cannot be read"
    ):
        read_dataset(root)


def test_untrained_primitives_are_taken_if_allowed(root):
    write_pairs(root, "val", ["wet cat", "dry cow"])
    dataset = read_dataset(root, allow_untrained_primitives=True)
    assert dataset.space.attributes == ("dry", "old", "wet")
    assert dataset.space.objects == ("cat", "cow", "dog")


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (2, {"set": "valid"}, "entry 2: expected `set` to be one of train, val, test, NA, got 'valid'"),
        (2, {"attr": "wet", "obj": "dog"}, "entry 2: expected a pair of val_pairs.txt, got wet dog"),
        (1, {"set": "val", "obj": "dog"}, "entry 1: expected a pair of val_pairs.txt, got old dog"),
        (4, {"attr": 3}, "entry 4: expected a dict with strings image, attr, obj, set, got .*'attr': 3"),
        (4, {"obj": ["dog"]}, "entry 4: expected a dict with strings image, attr, obj, set, got"),
        (0, {"image": None}, "entry 0: expected a dict with strings image, attr, obj, set, got"),
    ],
)
def test_a_wrong_row_raises_with_its_number(root, number, change, message):
    rows = small_rows()
    rows[number].update(change)
    torch.save(rows, root / METADATA)
    with pytest.raises(DataError, match=f"{METADATA}, {message}"):
        read_dataset(root)


@pytest.mark.parametrize("key", ["image", "attr", "obj", "set"])
def test_a_row_without_one_of_its_keys_raises(root, key):
    rows = small_rows()
    del rows[3][key]
    torch.save(rows, root / METADATA)
    with pytest.raises(
        DataError, match=f"{METADATA}, entry 3: expected a dict with strings image, attr, obj, set, got"
    ):
        read_dataset(root)
    torch.save([*small_rows(), "wet dog"], root / METADATA)
    with pytest.raises(DataError, match=f"{METADATA}, entry 5: expected a dict"):
        read_dataset(root)


def test_metadata_of_another_kind_raises(root):
    torch.save({"image": "wet_dog/1.png"}, root / METADATA)
    with pytest.raises(DataError, match=f"{METADATA}: expected a list, got dict"):
        read_dataset(root)
    torch.save(torch.zeros(2), root / METADATA)
    with pytest.raises(DataError, match=f"{METADATA}: expected a list, got Tensor"):
        read_dataset(root)


@pytest.mark.parametrize("garbage", [b"", b"no pickle", b"PK\x03\x04 no archive", b"\x80\x02.", b"\x80\x05\x95"])
def test_metadata_that_is_garbage_raises(root, garbage):
    (root / METADATA).write_bytes(garbage)
    with pytest.raises(
        DataError, match=f"{METADATA}: expected a torch-saved list of plain dicts, got an unreadable file"
    ):
        read_dataset(root)


def test_any_damage_to_the_metadata_is_reported_as_such(root):
    whole = (root / METADATA).read_bytes()

    @settings(max_examples=40, deadline=None)
    @given(st.one_of(st.binary(max_size=60), st.integers(0, len(whole) - 1).map(lambda length: whole[:length])))
    def check_damage(damaged):
        (root / METADATA).write_bytes(damaged)
        with pytest.raises(DataError, match=METADATA):
            read_dataset(root)

    check_damage()


class Malicious:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def pickle_save(rows, path):
    path.write_bytes(pickle.dumps(rows, protocol=2))


def pickle_load(path):
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize(
    ("save", "trusting_load"),
    [(torch.save, partial(torch.load, weights_only=False)), (pickle_save, pickle_load)],
    ids=["torch", "pickle"],
)
def test_code_inside_the_metadata_is_not_run(root, tmp_path, save, trusting_load):
    save([Malicious(tmp_path / "harm")], root / METADATA)
    with pytest.raises(DataError, match=f"{METADATA}: expected a torch-saved list of plain dicts, got an unreadable"):
        read_dataset(root)
    assert not (tmp_path / "harm").exists()
    trusting_load(root / METADATA)
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_split_without_images_raises(root, name):
    write_metadata(root, [entry for entry in small_rows() if entry["set"] != name])
    with pytest.raises(DataError, match=f"{METADATA}: expected images of the {name} split, got none"):
        read_dataset(root)


def test_a_missing_image_raises_with_its_entry(root):
    (root / "images" / "wet_cat" / "3.png").unlink()
    with pytest.raises(
        DataError, match=rf"images/wet_cat/3.png: expected an image file, got none \({METADATA}, entry 2\)"
    ):
        read_dataset(root)


def test_an_image_comes_with_the_column_of_its_pair(root):
    split = read_dataset(root).images("test")
    image, column = split[1]
    assert isinstance(image, Image.Image)
    assert image.getpixel((0, 0)) == (50, 100, 150)
    assert column == 1
    assert len(split) == 2
    assert torch.equal(read_dataset(root).images("test", lambda image: torch.ones(2))[0][0], torch.ones(2))
    with pytest.raises(IndexError):
        split[2]


def test_what_is_drawn_depends_on_seed_epoch_and_number_alone(root):
    dataset = read_dataset(root)
    draws = {
        (seed, epoch, number): dataset.images("test", noisy, seed=seed)[epoch, number][0]
        for seed in (0, 1)
        for epoch in (0, 1)
        for number in (1, 0)
    }
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 8
    torch.manual_seed(99)
    for (seed, epoch, number), draw in reversed(draws.items()):
        assert torch.equal(dataset.images("test", noisy, seed=seed)[epoch, number][0], draw)


def test_a_plain_number_means_epoch_zero(root):
    split = read_dataset(root).images("test", noisy, seed=3)
    assert torch.equal(split[1][0], split[0, 1][0])


def test_the_global_generators_are_left_as_they_were(root, monkeypatch):
    def forbidden(seed):
        raise AssertionError("the generator of an accelerator was seeded")

    # Dropout on a GPU would otherwise follow from the last image that this process has loaded.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", forbidden)
    split = read_dataset(root).images("test", noisy, seed=3)
    state = torch.get_rng_state()
    split[1, 1]
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_the_transform_draws_from_the_global_generator(root):
    split = read_dataset(root).images("test", noisy)
    torch.manual_seed(5)
    first, second = split[0][0], split[0][0]
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(split[0][0], first)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_draw_what_the_main_process_draws(shapes_root, num_workers):
    split = read_dataset(shapes_root).images("val", Preprocess((48, 48)).transform(train=True), seed=11)
    split.samples = split.samples[:7]
    images, columns = zip(*DataLoader(Numbers(split, epoch=4), batch_size=3, num_workers=num_workers))
    expected = [split[4, number] for number in range(7)]
    assert torch.equal(torch.cat(images), torch.stack([image for image, _ in expected]))
    assert torch.cat(columns).tolist() == [column for _, column in expected]


def test_splits_and_data_sets_travel_to_worker_processes(root):
    dataset = read_dataset(root)
    twin = pickle.loads(pickle.dumps(dataset))
    assert twin == dataset
    split = dataset.images("test", noisy, seed=1)
    again = pickle.loads(pickle.dumps(split))
    assert isinstance(again, ImageSplit)
    assert torch.equal(again[2, 1][0], split[2, 1][0])
