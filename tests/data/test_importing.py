import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from czsl_heads.data import DataError, check, import_dataset, read_dataset, split_dataset
from czsl_heads.data.layout import SPLIT_NAME, read_metadata
from tests.data.animals import METADATA, picture

GROCERY = Path(__file__).parents[3] / "shared" / "grocery"
HEAD = "image,attribute,object,split"


@pytest.fixture
def photos(tmp_path):
    """Three pictures beside each other, and one in a folder."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("1.png", "2.png", "3.png", "more/4.png")):
        picture(folder / name, value=20 * number)
    return folder


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows_of(out):
    return [(row["image"], row["attr"], row["obj"], row["set"]) for row in read_metadata(out / METADATA)]


def pairs_of(out, name):
    return (out / SPLIT_NAME / f"{name}_pairs.txt").read_text(encoding="utf-8").split("\n")[:-1]


def about(out):
    return json.loads((out / "import.json").read_text(encoding="utf-8"))


WHOLE = ["1.png,wet,dog,train", "2.png,old,cat,train", "3.png,wet,cat,val", "more/4.png,wet,cat,test"]


def test_a_table_with_a_split_can_be_read_at_once(photos, tmp_path):
    made = import_dataset(write(photos / "list.csv", HEAD, *WHOLE), tmp_path / "out")
    assert (made.rows, made.pictures, made.pairs, made.has_split) == (4, 4, 3, True)
    dataset = read_dataset(tmp_path / "out")
    assert dataset.split_pairs == {
        "train": [("old", "cat"), ("wet", "dog")],
        "val": [("wet", "cat")],
        "test": [("wet", "cat")],
    }
    assert dataset.samples["test"][0].path == photos / "more" / "4.png"
    assert dataset.images("test")[0][0].getpixel((0, 0)) == (60, 120, 180)
    assert not (tmp_path / "out" / "images").exists()
    assert str(made).splitlines()[0] == f"wrote {tmp_path / 'out'}: 4 rows, 4 pictures, 3 pairs"
    assert check(tmp_path / "out").ok


def test_a_table_without_a_split_waits_for_one(photos, tmp_path):
    lines = [line.rpartition(",")[0] for line in WHOLE]
    made = import_dataset(write(photos / "list.csv", "image,attribute,object", *lines), tmp_path / "out")
    assert f"no split yet: czsl split {tmp_path / 'out'} draws one" in str(made)
    assert {row[3] for row in rows_of(tmp_path / "out")} == {"NA"}
    with pytest.raises(DataError, match=r"expected a split, got none yet; czsl split .* draws one"):
        read_dataset(tmp_path / "out")


def test_columns_have_several_names_and_others_are_told(photos, tmp_path):
    source = write(
        photos / "list.tsv", "\t".join(["id", "File_Name", "STATE", "noun"]), "\t".join(["7", "1.png", "wet", "dog"])
    )
    made = import_dataset(source, tmp_path / "out")
    assert rows_of(tmp_path / "out") == [("1.png", "wet", "dog", "NA")]
    assert "columns left out: id" in made.notes


def test_json_lines_and_several_attributes(photos, tmp_path):
    lines = [
        json.dumps({"image": "1.png", "attribute": ["wet", "old"], "object": "dog"}),
        "",
        json.dumps({"image": "2.png", "attribute": "red | striped;new", "object": "cat"}),
    ]
    made = import_dataset(write(photos / "list.jsonl", *lines), tmp_path / "out")
    assert [row[1] for row in rows_of(tmp_path / "out")] == ["wet", "old", "red", "striped", "new"]
    assert "pictures with several attributes: 2; each attribute has become a row" in made.notes
    assert (made.rows, made.pictures) == (5, 2)


def test_names_are_normalised_and_what_became_what_is_kept(photos, tmp_path):
    decomposed = unicodedata.normalize("NFD", "Crème")
    source = write(
        photos / "list.csv", HEAD, f"1.png, {decomposed} ,big   dog,train", "2.png,日本,Dog,val", "3.png,Dog,dog,test"
    )
    made = import_dataset(source, tmp_path / "out")
    assert [row[1:3] for row in rows_of(tmp_path / "out")] == [("Crème", "big dog"), ("日本", "Dog"), ("Dog", "dog")]
    assert about(tmp_path / "out")["names"]["attributes"] == {f" {decomposed} ": "Crème"}
    assert about(tmp_path / "out")["names"]["objects"] == {"big   dog": "big dog"}
    assert "'Dog' and 'dog' are several names; --case lower makes them one" in made.notes
    assert pairs_of(tmp_path / "out", "train") == ["Crème+big dog"]
    import_dataset(source, tmp_path / "lower", case="lower")
    assert [row[2] for row in rows_of(tmp_path / "lower")] == ["big dog", "dog", "dog"]


def test_words_for_splits(photos, tmp_path):
    lines = ["1.png,wet,dog,Training", "2.png,old,cat,VALIDATION", "3.png,wet,cat,test", "more/4.png,wet,cat,"]
    import_dataset(write(photos / "list.csv", HEAD, *lines), tmp_path / "out")
    assert [row[3] for row in rows_of(tmp_path / "out")] == ["train", "val", "test", "NA"]


def test_folders_of_either_form(tmp_path):
    for name in ("wet_dog/1.png", "wet_dog/2.jpg", "old_cat/3.png", ".hidden/4.png"):
        picture(tmp_path / "flat" / name)
    (tmp_path / "flat" / "wet_dog" / "notes.txt").write_text("", encoding="utf-8")
    made = import_dataset(tmp_path / "flat", tmp_path / "out")
    assert [row[:3] for row in rows_of(tmp_path / "out")] == [
        ("old_cat/3.png", "old", "cat"),
        ("wet_dog/1.png", "wet", "dog"),
        ("wet_dog/2.jpg", "wet", "dog"),
    ]
    assert "files left out that are no images: 1" in made.notes
    picture(tmp_path / "deep" / "very_wet" / "dog" / "1.png")
    picture(tmp_path / "deep" / "old" / "dog" / "1.png")
    import_dataset(tmp_path / "deep", tmp_path / "other")
    assert [row[1:3] for row in rows_of(tmp_path / "other")] == [("old", "dog"), ("very_wet", "dog")]


def test_copies_and_links(photos, tmp_path):
    source = write(photos / "list.csv", HEAD, *WHOLE)
    import_dataset(source, tmp_path / "copied", copy=True)
    import_dataset(source, tmp_path / "linked", link=True)
    assert (tmp_path / "linked" / "images" / "more" / "4.png").is_symlink()
    assert read_dataset(tmp_path / "linked").images("test")[0][0].size == (6, 5)
    moved = (tmp_path / "copied").rename(tmp_path / "moved")
    (photos / "more" / "4.png").unlink()
    assert read_dataset(moved).images("test")[0][0].size == (6, 5)
    with pytest.raises(DataError, match="expected an image file, got none"):
        read_dataset(tmp_path / "linked")
    with pytest.raises(ValueError, match="expected `copy` or `link`, got both"):
        import_dataset(source, tmp_path / "both", copy=True, link=True)


def test_pictures_may_lie_in_a_folder_beside_the_list(tmp_path):
    picture(tmp_path / "src" / "images" / "a" / "1.png")
    import_dataset(write(tmp_path / "src" / "list.csv", HEAD.rpartition(",")[0], "a\\1.png,wet,dog"), tmp_path / "out")
    assert about(tmp_path / "out")["images"] == str(tmp_path / "src" / "images" / "a")
    assert rows_of(tmp_path / "out") == [("1.png", "wet", "dog", "NA")]


def test_a_row_that_was_there_before_is_left_out_and_told(photos, tmp_path):
    made = import_dataset(write(photos / "list.csv", HEAD, *WHOLE, WHOLE[0]), tmp_path / "out")
    assert made.rows == 4
    assert "rows that were there before, left out: 1" in made.notes


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HEAD], r"list.csv: expected rows of image, attribute, object, got none"),
        (["image,attribute", "1.png,wet"], r"line 2: expected a column object \(or obj, noun\), got image, attribute"),
        ([HEAD, "1.png,wet,dog"], r"line 2: expected 4 columns, got another number"),
        ([HEAD, "1.png,wet,dog,train,more"], r"line 2: expected 4 columns, got another number"),
        ([HEAD, "1.png, ,dog,train"], r"line 2: expected an attribute, got ' '"),
        ([HEAD, "1.png,wet,,train"], r"line 2: expected a text for object, got ''"),
        ([HEAD, "1.png,NA,dog,train"], r"line 2: expected a name, got 'NA'"),
        ([HEAD, "1.png,wet,dog,treino"], r"line 2: expected a split train, val, test or nothing, got 'treino'"),
        ([HEAD, "1.png,wet,dog,train", "2.png,wet,dog,test"], r"got none for val; --ignore_split true leaves it out"),
        ([HEAD, *WHOLE[:3], "9.png,wet,cat,test"], r"line 5: expected an image file 9.png in .*\(1 of 4 rows"),
        ([HEAD, *WHOLE, "1.png,wet,dog,test"], r"line 6: expected a picture of one split, got 1.png of train and test"),
        ([HEAD, "1.png,very wet,d+g,train", *WHOLE[1:]], r"expected names with blanks or with \+"),
    ],
)
def test_a_wrong_table_is_refused_with_its_line_and_leaves_nothing(photos, tmp_path, lines, message):
    source = write(photos / "list.csv", *lines)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        import_dataset(source, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "list.csv",
            b"image,attribute,object\n1.png,w\xe9t,dog\n",
            "expected a table in UTF-8, got one that cannot be read",
        ),
        ("list.jsonl", b"{'image': 1}", "line 1: expected JSON, got "),
        ("list.jsonl", b"[1]", "line 1: expected an object with image"),
        ("list.jsonl", b'{"image": "1.png", "attribute": 3, "object": "dog"}', "expected a text, or a list of texts"),
        ("list.xml", b"<a/>", "expected a file that ends in .csv, .tsv, .jsonl, or a folder"),
    ],
)
def test_a_file_of_another_kind_is_refused(photos, tmp_path, name, content, message):
    (photos / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        import_dataset(photos / name, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("very_wet_dog/1.png", "very_wet_dog: expected a folder named attribute_object, with one underscore, or"),
        ("wet/1.png", "wet: expected a folder named attribute_object"),
        ("1.png", "got images outside of any; or list the images in a CSV file"),
        ("notes.txt", "expected folders of images named"),
    ],
)
def test_folders_of_other_names_are_refused(tmp_path, name, message):
    if name.endswith("png"):
        picture(tmp_path / "src" / name)
    else:
        (tmp_path / "src").mkdir()
        (tmp_path / "src" / name).write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        import_dataset(tmp_path / "src", tmp_path / "out")


def test_a_folder_that_holds_something_is_left_alone(photos, tmp_path):
    source = write(photos / "list.csv", HEAD, *WHOLE)
    with pytest.raises(ValueError, match=r"expected `out` to be a new or empty folder, got .*photos, which holds"):
        import_dataset(source, photos)
    with pytest.raises(DataError, match="nowhere: expected a file or a folder, got nothing"):
        import_dataset(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    import_dataset(source, tmp_path / "empty")
    assert (tmp_path / "empty" / METADATA).is_file()


def test_a_split_can_be_ignored(photos, tmp_path):
    made = import_dataset(write(photos / "list.csv", HEAD, *WHOLE), tmp_path / "out", ignore_split=True)
    assert not made.has_split
    assert {row[3] for row in rows_of(tmp_path / "out")} == {"NA"}


def test_a_folder_of_hugging_faces_datasets(tmp_path):
    import datasets

    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 11, 3), dtype=np.uint8)
    kinds = datasets.Features(
        {
            "image": datasets.Image(),
            "attribute": datasets.ClassLabel(names=["wet", "old"]),
            "object": datasets.Value("string"),
        }
    )

    def part(start):
        return datasets.Dataset.from_dict(
            {
                "image": [Image.fromarray(pixels[start]), Image.fromarray(pixels[start + 1])],
                "attribute": [0, 1],
                "object": ["dog", "crème"],
            },
            features=kinds,
        )

    whole = datasets.DatasetDict({"train": part(0), "validation": part(2), "test": part(4)})
    whole.save_to_disk(str(tmp_path / "hf"))
    made = import_dataset(tmp_path / "hf", tmp_path / "out")
    assert (made.rows, made.pictures, made.has_split) == (6, 6, True)
    dataset = read_dataset(tmp_path / "out")
    assert dataset.split_pairs["val"] == [("old", "crème"), ("wet", "dog")]
    assert np.array_equal(np.asarray(dataset.images("test")[1][0]), pixels[5])
    part(0).save_to_disk(str(tmp_path / "single"))
    assert not import_dataset(tmp_path / "single", tmp_path / "other").has_split


def test_without_the_package_datasets_it_is_named(tmp_path, monkeypatch):
    write_to = tmp_path / "hf"
    write_to.mkdir()
    (write_to / "dataset_info.json").write_text("{}", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"expected the package datasets to read .*hf, got none: pip install"):
        import_dataset(write_to, tmp_path / "out")


@pytest.mark.skipif(not GROCERY.is_dir(), reason="the photographs are not here")
def test_the_photographs_of_a_shop_become_a_data_set(tmp_path):
    made = import_dataset(GROCERY / "images.csv", tmp_path / "shop")
    assert (made.rows, made.pictures, made.pairs, made.has_split) == (2640, 2640, 42, False)
    assert "columns left out: published_split" in made.notes
    split_dataset(tmp_path / "shop", seed=0, unseen=0.3)
    dataset = read_dataset(tmp_path / "shop")
    assert (len(dataset.space.attributes), len(dataset.space.objects), len(dataset.space)) == (15, 25, 42)
    assert min(dataset.images("val")[0][0].size) == 224
