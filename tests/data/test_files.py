import os
import unicodedata

import pytest

from czsl_heads._files import write_json
from czsl_heads.data import DataError, read_dataset
from czsl_heads.data.files import ImageFiles
from tests.data.animals import picture


def files(tmp_path, *names, **options):
    for name in names:
        picture(tmp_path / "images" / name)
    return ImageFiles(tmp_path, **options)


def find(found, name, **more):
    return found.find({"image": name, **more})


def test_plain_names_are_found_and_others_are_not(tmp_path):
    found = files(tmp_path, "wet_dog/1.png", "2.png")
    assert find(found, "wet_dog/1.png") == "wet_dog/1.png"
    assert find(found, "2.png") == "2.png"
    assert find(found, "wet_dog/2.png") is None
    assert find(found, "dry_dog/1.png") is None
    assert found.respelled == {}


def test_back_slashes_and_blanks_for_underscores_are_found(tmp_path):
    found = files(tmp_path, "wet dog/1.png", "old_cat/2.png")
    assert find(found, "wet_dog/1.png") == "wet dog/1.png"
    assert find(found, "wet_dog\\1.png") == "wet dog/1.png"
    assert find(found, "old_cat\\2.png") == "old_cat/2.png"
    assert find(found, "elsewhere.png", _image="old_cat/2.png") == "old_cat/2.png"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_another_unicode_form_is_found(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    found = files(tmp_path, unicodedata.normalize(form, "crème_été/é.png"))
    wanted = unicodedata.normalize(other, "crème_été/é.png")
    assert find(found, wanted) == unicodedata.normalize(form, "crème_été/é.png")
    assert list(found.respelled) == [wanted]


def test_another_case_is_found_where_one_file_fits(tmp_path):
    found = files(tmp_path, "Wet_Dog/A.PNG", "old/b.png", "old/B.png")
    assert find(found, "wet_dog/a.png") == "Wet_Dog/A.PNG"
    assert found.respelled == {"wet_dog/a.png": "Wet_Dog/A.PNG"}
    assert find(found, "old/B.png") == "old/B.png"
    assert find(found, "OLD/b.PNG") is None  # two fit


def test_the_nearest_name_is_shown(tmp_path):
    found = files(tmp_path, "old/photo 1.jpeg", "old/photo 2.jpeg")
    assert found.nearest("old/Photo_1.jpg") == "old/photo 1.jpeg"
    assert found.nearest("old/photo_3.jpg") is None


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "..\\secret.png", "{absolute}", "C:\\x.png"])
def test_names_that_lead_out_are_refused_unless_asked_for(tmp_path, name):
    picture(tmp_path / "secret.png")
    root = tmp_path / "data"
    name = name.format(absolute=tmp_path / "secret.png")
    (root / "images" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match=r"expected an image inside the data set, got .* which leads out of it"):
        find(files(root), name)


def test_what_leads_out_is_taken_if_asked_for(tmp_path):
    picture(tmp_path / "secret.png")
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    found = files(root, allow_outside=True)
    for name in ("../../secret.png", "..\\..\\secret.png", str(tmp_path / "secret.png")):
        inside = find(found, name)
        assert inside is not None
        assert os.path.samefile(os.path.join(found.folder, inside), tmp_path / "secret.png")


@pytest.mark.parametrize("place", ["file", "folder", "images"])
def test_links_that_lead_out_are_refused_unless_asked_for(tmp_path, place):
    picture(tmp_path / "elsewhere" / "a" / "1.png")
    root = tmp_path / "data"
    root.mkdir()
    if place == "images":
        (root / "images").symlink_to(tmp_path / "elsewhere")
    else:
        (root / "images").mkdir()
    if place == "folder":
        (root / "images" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    if place == "file":
        (root / "images" / "a").mkdir()
        (root / "images" / "a" / "1.png").symlink_to(tmp_path / "elsewhere" / "a" / "1.png")
    with pytest.raises(DataError, match="got a link that leads out of it"):
        find(files(root), "a/1.png")
    assert find(files(root, allow_outside=True), "a/1.png") == "a/1.png"


def test_links_within_the_data_set_are_followed(tmp_path):
    found = files(tmp_path, "a/1.png")
    (tmp_path / "images" / "b.png").symlink_to("a/1.png")
    (tmp_path / "images" / "c").symlink_to("a")
    assert find(found, "b.png") == "b.png"
    assert find(found, "c/1.png") == "c/1.png"


def test_pictures_are_found_where_the_import_left_them(tmp_path):
    picture(tmp_path / "photos" / "a" / "1.png")
    root = tmp_path / "data"
    write_json(root / "import.json", {"images": str(tmp_path / "photos")})
    found = files(root)
    assert find(found, "a/1.png") == "a/1.png"
    assert found.folder == str(tmp_path / "photos")
    with pytest.raises(DataError, match="which leads out of it"):
        find(found, "../photos/a/1.png")
    write_json(root / "import.json", {"images": str(tmp_path / "gone")})
    with pytest.raises(DataError, match=r"import.json: expected the pictures in .*gone, where they were"):
        files(root)
    (root / "import.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"import.json: expected what czsl import wrote"):
        files(root)


def test_links_lead_where_the_import_made_them(tmp_path):
    picture(tmp_path / "photos" / "1.png")
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "images" / "1.png").symlink_to(tmp_path / "photos" / "1.png")
    write_json(root / "import.json", {"images": None, "links_to": str(tmp_path / "photos")})
    assert find(files(root), "1.png") == "1.png"


def test_a_row_that_leads_out_is_named_with_its_entry(root):
    picture(root.parent / "secret.png")
    (root / "images" / "wet_dog" / "1.png").unlink()
    (root / "images" / "wet_dog" / "1.png").symlink_to(root.parent / "secret.png")
    with pytest.raises(DataError, match=r"metadata_.*, entry 0: expected an image inside the data set, got a link"):
        read_dataset(root)
    dataset = read_dataset(root, allow_outside=True)
    assert dataset.images("train")[0][0].getpixel((0, 0)) == (7, 14, 21)
