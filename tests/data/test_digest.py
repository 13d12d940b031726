import shutil

import pytest

from czsl_heads.data import DataError, read_dataset
from czsl_heads.data.digest import labels_digest, pictures_digest
from tests.data.animals import picture


def test_a_data_set_that_moved_is_the_same(root, tmp_path):
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "again")
    assert labels_digest(moved) == labels_digest(root)
    for pictures in ("sample", "all"):
        assert pictures_digest(read_dataset(moved), pictures) == pictures_digest(read_dataset(root), pictures)


def test_a_picture_of_another_size_is_noticed(root):
    before = pictures_digest(read_dataset(root))
    picture(root / "images" / "wet_dog" / "1.png", size=(60, 50))
    assert pictures_digest(read_dataset(root)) != before


def test_a_picture_of_the_same_size_is_noticed_among_all(root, monkeypatch):
    monkeypatch.setattr("czsl_heads.data.digest._SAMPLE", 1)
    dataset = read_dataset(root)
    before = {kind: pictures_digest(dataset, kind) for kind in ("sample", "all")}
    path = root / "images" / "wet_dog" / "1.png"  # the last by name: no sample of one holds it
    path.write_bytes(path.read_bytes()[::-1])
    assert pictures_digest(dataset, "sample") == before["sample"]
    assert pictures_digest(dataset, "all") != before["all"]


def test_a_picture_that_is_gone_is_named(root):
    dataset = read_dataset(root)
    (root / "images" / "wet_dog" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1.png: expected an image file, got one that cannot be read"):
        pictures_digest(dataset)
