import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, RandomErasing

from czsl_heads.data import DataError, packed, read_dataset
from czsl_heads.data.packed import PackedBatches, PackedImages, built_once, in_batches
from czsl_heads.encoders.transforms import Preprocess
from czsl_heads.training.loaders import eval_loader

MODES = ("shortest", "longest", "squash")


@pytest.fixture
def photos(root):
    """The small data set, of pictures in several shapes."""
    generator = np.random.default_rng(0)
    for number, path in enumerate(sorted((root / "images").rglob("*.png"))):
        pixels = generator.integers(0, 256, (40 + 9 * number, 61, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return read_dataset(root)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("train", [False, True])
def test_every_number_is_the_same_with_and_without(photos, tmp_path, mode, train):
    transform = Preprocess((24, 32), resize_mode=mode).transform(train=train)
    plain = photos.images("test", transform, seed=5)
    kept = packed.packed(plain, tmp_path / "cache")
    assert isinstance(kept, PackedImages)
    for index in (0, 1, (3, 0), (3, 1)):
        assert torch.equal(kept[index][0], plain[index][0])
        assert kept[index][1] == plain[index][1]
    assert torch.equal(kept.columns, plain.columns)
    with pytest.raises(IndexError):
        kept[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_map_the_file_by_themselves(photos, tmp_path, workers):
    plain = photos.images("test", Preprocess((24, 24)).transform())
    kept = packed.packed(plain, tmp_path / "cache")
    kept[0]
    again = pickle.loads(pickle.dumps(kept))
    assert len(pickle.dumps(kept)) < 20_000
    images, _ = next(iter(DataLoader(again, 2, num_workers=workers)))
    assert torch.equal(images, torch.stack([plain[0][0], plain[1][0]]))


def test_a_data_set_with_a_folder_for_caches_uses_it(photos, tmp_path):
    from dataclasses import replace

    cached = replace(photos, cache_dir=tmp_path / "cache")
    transform = Preprocess((24, 24)).transform()
    assert isinstance(cached.images("train", transform), PackedImages)
    assert not isinstance(cached.images("train"), PackedImages)
    assert len(list((tmp_path / "cache").glob("pixels-*.npy"))) == 1
    cached.images("train", transform)
    cached.images("train", Preprocess((24, 24)).transform(train=True))  # the same geometry
    assert len(list((tmp_path / "cache").glob("pixels-*.npy"))) == 1
    cached.images("train", Preprocess((24, 24), interpolation="bilinear").transform())
    cached.images("val", transform)
    assert len(list((tmp_path / "cache").glob("pixels-*.npy"))) == 3


def test_an_exchanged_picture_of_equal_size_and_time_is_noticed(photos, tmp_path):
    path = photos.samples["test"][0].path
    path = path.rename(path.with_suffix(".bmp"))
    Image.new("RGB", (30, 30), "red").save(path)
    path = path.rename(path.with_suffix(".png"))  # the kind is known by the content
    transform = Preprocess((24, 24)).transform()
    before, stat = packed.packed(photos.images("test", transform), tmp_path / "cache"), path.stat()
    path.rename(path.with_suffix(".bmp"))
    Image.new("RGB", (30, 30), "blue").save(path.with_suffix(".bmp"))
    path.with_suffix(".bmp").rename(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = packed.packed(photos.images("test", transform), tmp_path / "cache")
    assert not torch.equal(before[0][0], after[0][0])
    assert torch.equal(after[0][0], photos.images("test", transform)[0][0])


def test_transforms_that_cannot_be_split_leave_images_as_they_are(photos, tmp_path):
    plain = photos.images("test", lambda image: torch.ones(2))
    assert packed.packed(plain, tmp_path / "cache") is plain
    assert not (tmp_path / "cache").exists()


def test_a_short_file_is_built_anew(photos, tmp_path):
    plain = photos.images("test", Preprocess((24, 24)).transform())
    path = packed.packed(plain, tmp_path / "cache").path
    whole = path.read_bytes()
    for length in (0, 50, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert torch.equal(packed.packed(plain, tmp_path / "cache")[1][0], plain[1][0])
        assert path.read_bytes() == whole


def test_a_broken_picture_leaves_no_file(photos, tmp_path):
    path = photos.samples["test"][1].path
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="expected a whole image, got one that cannot be decoded"):
        packed.packed(photos.images("test", Preprocess((24, 24)).transform()), tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.npy")) == []
    assert list((tmp_path / "cache").glob(".*.npy")) == []


def test_a_folder_that_cannot_be_written_is_named(photos, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match=r"expected `cache_dir` to be a folder that can be written, got .*file"):
        packed.packed(photos.images("test", Preprocess((24, 24)).transform()), tmp_path / "file")


_BUILDER = """
import sys, time
from pathlib import Path
import numpy as np
from czsl_heads.data.packed import built_once

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])

def build(path):
    np.save(path, np.arange(1000))
    with open(folder / "builds", "a", encoding="utf-8") as file:
        file.write("x")
    time.sleep(seconds)

built_once(folder, "one.npy", build)
"""


def start(folder, seconds):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", _BUILDER, str(folder), str(seconds)])


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise TimeoutError(path)


def test_of_two_processes_one_builds(tmp_path):
    folder = tmp_path / "cache"
    both = [start(folder, 1), start(folder, 1)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert (folder / "builds").read_text(encoding="utf-8") == "x"
    assert np.load(folder / "one.npy").sum() == 499500


def test_what_was_killed_in_the_middle_leaves_nothing_that_is_read(tmp_path):
    folder = tmp_path / "cache"
    killed = start(folder, 600)
    wait_for(folder / "builds")
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    assert not (folder / "one.npy").exists()
    assert len(list(folder.glob(".unfinished-*.npy"))) == 1
    built_once(folder, "one.npy", lambda path: np.save(path, np.zeros(3)))
    assert np.load(folder / "one.npy").tolist() == [0, 0, 0]
    assert list(folder.glob(".unfinished-*")) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workers", [0, 2])
def test_whole_batches_are_to_the_bit_those_of_single_pictures(photos, tmp_path, mode, workers):
    transform = Preprocess((24, 32), resize_mode=mode).transform()
    plain, kept = (data.images("test", transform) for data in (photos, replace(photos, cache_dir=tmp_path / "cache")))
    assert isinstance(in_batches(kept), PackedBatches)
    expected, found = (list(eval_loader(images, 3, workers=workers)) for images in (plain, kept))
    assert [len(columns) for _, columns in found] == [len(columns) for _, columns in expected]
    for (images, columns), (same_images, same_columns) in zip(expected, found):
        assert torch.equal(images, same_images)
        assert torch.equal(columns, same_columns)
        assert same_images.is_contiguous()
    by_epoch = in_batches(kept).__getitems__([(4, 1), (0, 0)])
    assert torch.equal(by_epoch[0], torch.stack([plain[1][0], plain[0][0]]))


def test_pictures_that_are_changed_at_random_come_one_by_one(photos, tmp_path):
    cached, size = replace(photos, cache_dir=tmp_path / "cache"), Preprocess((24, 32))
    assert in_batches(cached.images("train", size.transform(train=True), seed=0)) is None
    assert in_batches(photos.images("train", size.transform())) is None  # not packed
    more = Compose([*size.transform().transforms, RandomErasing()])
    assert in_batches(cached.images("train", more)) is None
