import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from czsl_heads.data import DataError, check, integrity, make_shapes, read_dataset
from czsl_heads.data.layout import write_metadata
from czsl_heads.data.published import PUBLISHED
from tests.data.animals import METADATA, picture, row, small_rows, write_pairs

SPLITS = Path(__file__).parents[3] / "shared" / "splits"


def test_a_truncated_image_shows_when_it_is_loaded_and_in_the_check(root):
    path = root / "images" / "wet_cat" / "4.png"
    path.write_bytes(path.read_bytes()[:-30])
    dataset = read_dataset(root)
    assert dataset.images("test")[1][1] == 1
    with pytest.raises(DataError, match=r"wet_cat/4.png: expected a whole image, got one that cannot be decoded"):
        dataset.images("test")[0]
    report = check(root)
    assert not report.ok
    assert len(report.broken) == 1
    assert str(path) in report.broken[0]
    assert report.broken[0] in str(report)


def test_the_check_counts_pairs_and_images(root, shapes_root):
    report = check(root)
    assert report.ok
    assert report.pairs == {"train": 3, "val": 2, "test": 2}
    assert report.images == {"train": 2, "val": 1, "test": 2}
    assert report.seen_images == {"train": 2, "val": 0, "test": 1}
    assert report.pairs_without_images == {"train": [("old", "dog")], "val": [("old", "cat")], "test": []}
    assert "1 pair without images" in str(report).splitlines()[0]
    assert "warning: train: 1 pair without images: old dog" in str(report).splitlines()
    assert report.verdict.startswith("fit to train on, but look at ")
    shapes = check(shapes_root)
    assert shapes.ok
    assert shapes.seen_images == {"train": 96, "val": 24, "test": 24}
    assert str(shapes).splitlines()[-1] == shapes.verdict == "fit to train on"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda each: each.update(attr=each["attr"].capitalize()),
        lambda each: each.update(obj=each["obj"] + " "),
        lambda each: each.update(obj=unicodedata.normalize("NFD", each["obj"])),
    ],
    ids=["capital", "blank", "accent"],
)
def test_rows_left_out_by_a_slip_of_spelling_are_an_error_with_a_hint(root, spoil):
    def renamed(each):
        each.update(obj=each["obj"].replace("cat", "crème"))

    for name in ("train", "val", "test"):
        path = root / "compositional-split-natural" / f"{name}_pairs.txt"
        write_pairs(root, name, path.read_text(encoding="utf-8").replace("cat", "crème").split("\n"))
    rows = small_rows()
    for each in rows:
        renamed(each)
    rows.append(row("old_cat/2.png", "old", "crème", "train"))
    spoil(rows[-1])
    write_metadata(root, rows)
    report = check(root)
    assert not report.ok
    (told,) = report.problems
    assert told.startswith("1 row left out: their pair is in no split file (first: entry 5, '")
    assert "1 of them differ from a pair by a capital, a blank or an accent only (entry 5: " in told
    assert "is not 'old crème')" in told


def test_other_rows_left_out_are_a_warning(root):
    rows = [*small_rows(), row("old_dog/5.png", "wet", "cow", "train"), row("old_dog/5.png", "NA", "dog", "train")]
    write_metadata(root, [*rows, row("old_dog/5.png", "old", "dog", "NA")])
    report = check(root)
    assert report.ok
    assert "2 rows left out: NA in place of an attribute or a split" in report.warnings
    assert any("1 row left out: " in text and "entry 5, 'wet cow'" in text for text in report.warnings)
    assert any("did it mean 'wet dog'" in text or "did it mean" not in text for text in report.warnings)


def test_all_missing_images_are_named_at_once(root):
    for name in ("wet_dog/1.png", "wet_cat/3.png"):
        (root / "images" / name).unlink()
    report = check(root)
    assert not report.ok
    missing = [text for text in report.problems if "expected an image file, got none" in text]
    assert ["wet_dog/1.png" in missing[0], "wet_cat/3.png" in missing[1]] == [True, True]


def test_all_untrained_words_are_named_at_once_and_can_be_allowed(root):
    write_pairs(root, "val", ["wet cat", "old cat", "dry cow"])
    write_pairs(root, "test", ["old dog", "wet cat", "hot dog", "dry cow"])
    report = check(root)
    (told,) = report.problems
    assert "got 3 that are never trained" in told
    for word, place in (
        ("'dry'", "val_pairs.txt, line 3"),
        ("'hot'", "test_pairs.txt, line 3"),
        ("'cow'", "val_pairs"),
    ):
        assert word in told
        assert place in told
    assert check(root, allow_untrained_primitives=True).ok


def test_the_same_picture_is_found_by_its_content(root):
    images = root / "images"
    shutil.copy(images / "wet_dog" / "1.png", images / "old_dog" / "5.png")  # train and test, two labels
    Image.open(images / "old_cat" / "2.png").save(images / "old_cat" / "again.bmp")
    write_metadata(root, [*small_rows(), row("old_cat/again.bmp", "old", "cat", "train")])
    warnings = check(root).warnings
    assert any(text.startswith("1 picture in two splits: wet_dog/1.png (train: wet dog), ") for text in warnings)
    assert any(text.startswith("1 picture under two labels: wet_dog/1.png (train: wet dog)") for text in warnings)
    assert any("1 picture twice in one split under one label: old_cat/2.png" in text for text in warnings)
    assert not any("picture" in text for text in check(make_shapes(root.parent / "world", train_per_pair=1)).warnings)


def test_turned_and_deep_pictures_are_counted(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 40)).save(root / "images" / "wet_dog" / "1.png", exif=exif)
    Image.new("I;16", (30, 9)).save(root / "images" / "old_cat" / "2.png")
    facts = check(root).facts
    assert facts["turned by EXIF"] == "1 image, and shown upright"
    assert facts["bits a channel"] == "8: 4 images, 16: 1 images"
    assert facts["shorter side"] == "5 to 20 pixels, median 5"
    stored = check(root, upright=False).facts
    assert stored["turned by EXIF"] == "1 image, but read as they are stored (upright turns them)"


def test_names_that_make_one_prompt_are_named(root):
    write_pairs(root, "train", ["wet dog", "old cat", "old dog", "Wet dog"])
    picture(root / "images" / "more.png")
    write_metadata(root, [*small_rows(), row("more.png", "Wet", "dog", "train")])
    assert any("names that make one prompt: 'Wet', 'wet'" in text for text in check(root).warnings)


def test_images_under_another_spelling_are_counted(root):
    rows = small_rows()
    rows[0]["image"] = "WET_dog/1.PNG"
    write_metadata(root, rows)
    assert "1 image found under another spelling: 'WET_dog/1.PNG' is 'wet_dog/1.png'" in check(root).warnings


def test_a_published_set_is_compared_with_its_counts_and_digests(root):
    report = check(root, dataset="ut-zappos")
    assert not report.ok
    assert "train: expected the 83 pairs of UT-Zappos, got 3" in report.problems
    assert any(text.startswith("test: expected the 2914 images of UT-Zappos (") for text in report.problems)
    assert report.facts["published SHA-256"] == PUBLISHED["ut-zappos"].digests
    with pytest.raises(ValueError, match="expected `dataset` to be one of ut-zappos, mit-states, cgqa, got 'zappos'"):
        check(root, dataset="zappos")


@pytest.mark.skipif(not SPLITS.is_dir(), reason="the published lists are not here")
def test_published_pairs_are_known_and_read_as_they_are_stored(tmp_path):
    root, rows = tmp_path / "ut-zappos", []
    (root / "images").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 40)).save(root / "images" / "one.png", exif=exif)
    for name in ("train", "val", "test"):
        lines = (SPLITS / "ut-zappos" / f"{name}_pairs.txt").read_text(encoding="utf-8").strip().split("\n")
        write_pairs(root, name, lines)
        attribute, obj = lines[0].split()
        rows.append(row("one.png", attribute, obj, name))
    write_metadata(root, rows)
    assert read_dataset(root).images("test")[0][0].size == (20, 40)
    assert read_dataset(root, upright=True).images("test")[0][0].size == (40, 20)
    report = check(root, dataset="ut-zappos")
    assert not any("pairs of UT-Zappos" in text for text in report.problems)  # images alone are too few
    swapped = (root / "compositional-split-natural" / "val_pairs.txt").read_text(encoding="utf-8").strip().split("\n")
    test = (root / "compositional-split-natural" / "test_pairs.txt").read_text(encoding="utf-8").strip().split("\n")
    other = next(line for line in test if line not in swapped)
    write_pairs(root, "val", [swapped[0], other, *swapped[2:]])
    told = check(root, dataset="ut-zappos").problems
    assert any(text.startswith("val: expected the pairs of UT-Zappos, got others (SHA-256") for text in told)


def test_worker_processes_find_the_same(shapes_root):
    dataset = read_dataset(shapes_root)
    assert integrity.look_at_images(dataset, workers=2) == integrity.look_at_images(dataset, workers=0)


def test_progress_is_told(root):
    steps = []

    def watched(batches, count):
        for batch in batches:
            steps.append((len(batch), count))
            yield batch

    check(root, progress=watched)
    assert steps == [(5, 1)]


def test_a_report_is_plain_values(root):
    content = check(root).as_dict()
    assert content["ok"]
    assert content["pairs_without_images"]["train"] == [("old", "dog")]
    assert torch.load(root / METADATA, weights_only=True) == small_rows()
