import hashlib
import shutil
from types import SimpleNamespace

import pytest

from czsl_heads.data import DataError, read_dataset
from czsl_heads.data.digest import Pictures, labels_digest, look_at_pictures, pictures_digest
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


@pytest.mark.parametrize("read", ["sample", "all"])
@pytest.mark.parametrize("count", [1, 3, 64, 65, 300])
def test_the_digest_is_that_of_a_plain_loop(tmp_path, read, count):
    samples = []
    for number in range(count):
        path = tmp_path / f"{number}.png"
        path.write_bytes(bytes([number % 256]) * (number % 7))
        samples.append(SimpleNamespace(name=path.name, folder=str(tmp_path)))
    dataset = SimpleNamespace(root=tmp_path, samples={"train": samples, "val": [], "test": samples[:1]})

    names = sorted(sample.name for sample in samples)
    step = 1 if read == "all" else max(1, count // 64)
    whole = hashlib.sha256()
    for number, name in enumerate(names):
        content = (tmp_path / name).read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest() if number % step == 0 else ""
        whole.update(f"{name}\0{len(content)}\0{digest}\n".encode())
    assert pictures_digest(dataset, read) == f"{read}:{whole.hexdigest()}"

    found = look_at_pictures(dataset, read)
    found.write(tmp_path / "index")
    known = Pictures.read(tmp_path / "index", names)
    assert look_at_pictures(dataset, "all", known if read == "all" else None).digest == pictures_digest(dataset, "all")
    assert Pictures.read(tmp_path / "index", names[1:]) is None
    assert Pictures.read(tmp_path / "nothing", names) is None
