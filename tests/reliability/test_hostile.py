"""Data sets as nobody should make them: each is read in time, and refused in one line that names what is wrong.

Those that are merely odd are trained on, and what is odd in them changes no number in silence.
"""

import io
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from czsl_heads.data.layout import SPLIT_NAME
from tests.reliability.conftest import TRAIN, write_pictures

META = f"metadata_{SPLIT_NAME}.t7"
SECONDS = 60  # what is read in seconds, even on a slow machine


def rows_of(root: Path) -> list[dict]:
    return torch.load(root / META, weights_only=False)


def save_rows(root: Path, rows: object) -> None:
    torch.save(rows, root / META)


def change_row(root: Path, number: int, **values: object) -> None:
    rows = rows_of(root)
    rows[number] = {**rows[number], **values}
    save_rows(root, rows)


def first_picture(root: Path) -> Path:
    return root / "images" / rows_of(root)[0]["image"]


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class Payload:
    """Makes a folder when it is unpickled by a reader that runs what it reads."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def pipe_for_picture(root: Path) -> None:
    first_picture(root).unlink()
    os.mkfifo(first_picture(root))


def pipe_for_pairs(root: Path) -> None:
    path = root / SPLIT_NAME / "val_pairs.txt"
    path.unlink()
    os.mkfifo(path)


def device_for_picture(root: Path) -> None:
    first_picture(root).unlink()
    first_picture(root).symlink_to("/dev/zero")


def loop_of_links(root: Path) -> None:
    path = first_picture(root)
    path.unlink()
    path.symlink_to(path.name)


def folder_for_picture(root: Path) -> None:
    first_picture(root).unlink()
    first_picture(root).mkdir()


def bomb(root: Path) -> None:
    first_picture(root).write_bytes(png(60_000, 60_000, zlib.compress(bytes(60_001))))


def cut_picture(root: Path) -> None:
    path = first_picture(root)
    path.write_bytes(path.read_bytes()[:-200])


def text_for_picture(root: Path) -> None:
    first_picture(root).write_text("<html>404</html>", encoding="utf-8")


def program_in_rows(root: Path) -> None:
    with open(root / META, "wb") as file:
        pickle.dump([Payload(root / "was_here")], file)


def deep_rows(root: Path) -> None:
    nested: list = []
    for _ in range(300):
        nested = [nested]
    save_rows(root, nested)


def pairs_of(root: Path, split: str, content: bytes) -> None:
    (root / SPLIT_NAME / f"{split}_pairs.txt").write_bytes(content)


REFUSED = {
    "a pipe for a picture": (pipe_for_picture, "0.png"),
    "a pipe for a list": (pipe_for_pairs, "val_pairs.txt"),
    "a device for a picture": (device_for_picture, "0.png"),
    "a loop of links": (loop_of_links, "0.png"),
    "a folder for a picture": (folder_for_picture, "0.png"),
    "a bomb": (bomb, "0.png"),
    "a picture that was cut": (cut_picture, "0.png"),
    "text for a picture": (text_for_picture, "0.png"),
    "an empty picture": (lambda root: first_picture(root).write_bytes(b""), "0.png"),
    "a program among the rows": (program_in_rows, META),
    "rows in rows in rows": (deep_rows, META),
    "empty rows": (lambda root: (root / META).write_bytes(b""), META),
    "no rows": (lambda root: save_rows(root, []), "pictures"),
    "rows of text": (lambda root: save_rows(root, ["wet dog"] * 9), META),
    "one row": (lambda root: save_rows(root, {"image": "0.png"}), META),
    "a number for a name": (lambda root: change_row(root, 0, image=7), META),
    "no name": (lambda root: change_row(root, 0, image=""), "pictures"),
    "a name with a zero byte": (lambda root: change_row(root, 0, image="a\0b.png"), "pictures"),
    "a name of 5,000 letters": (lambda root: change_row(root, 0, image="a" * 5000), "pictures"),
    "a name of lines": (lambda root: change_row(root, 0, image="a\nTraceback\nb.png"), "pictures"),
    "a name outside": (lambda root: change_row(root, 0, image="../../etc/passwd"), "outside|inside"),
    "a name from the root": (lambda root: change_row(root, 0, image="/etc/passwd"), "outside|inside"),
    "an unknown split": (lambda root: change_row(root, 0, set="training"), "training"),
    "an empty list": (lambda root: pairs_of(root, "train", b""), "train_pairs.txt"),
    "a list of one word": (lambda root: pairs_of(root, "train", b"wet\n"), "train_pairs.txt"),
    "a list of three words": (lambda root: pairs_of(root, "train", b"wet big dog\n"), "train_pairs.txt"),
    "a list in UTF-16": (lambda root: pairs_of(root, "val", "wet cat\nold cat\n".encode("utf-16")), "val_pairs.txt"),
    "a list of noise": (lambda root: pairs_of(root, "val", bytes(range(128, 256))), "val_pairs.txt"),
    "a pair twice": (lambda root: pairs_of(root, "val", b"wet cat\nold cat\nwet cat\n"), "val_pairs.txt"),
    "no list": (lambda root: (root / SPLIT_NAME / "test_pairs.txt").unlink(), "test_pairs.txt"),
    "no pictures": (lambda root: shutil.rmtree(root / "images"), "images"),
    "a file for the pictures": (
        lambda root: (shutil.rmtree(root / "images"), (root / "images").write_text("x", encoding="utf-8")),
        "images",
    ),
    "a file for the folder": (lambda root: (shutil.rmtree(root), root.write_text("x", encoding="utf-8")), "pictures"),
}


@pytest.fixture
def root(pictures, tmp_path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "pictures"))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_and_leaves_nothing(czsl, root, tmp_path, kind):
    spoil, named = REFUSED[kind]
    spoil(root)
    out = tmp_path / "out"
    answer = czsl("train", "--data", root, "--out", out, *TRAIN, seconds=SECONDS)
    assert answer["status"] == 1, answer
    assert "Traceback (most" not in answer["said"], answer["said"]
    last = answer["said"].strip().splitlines()[-1]
    assert last.startswith("czsl train: "), answer["said"]
    assert any(word in last for word in named.split("|")), last
    assert len(last) < 700, last
    assert not out.exists()
    assert not (root / "was_here").exists()

    answer = czsl("check", root, seconds=SECONDS)
    assert answer["status"] == 1, answer
    assert "Traceback (most" not in answer["said"], answer["said"]


def renamed(root: Path, name: str) -> None:
    rows = rows_of(root)
    folder = root / "images"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / rows[0]["image"]).rename(folder / name)
    change_row(root, 0, image=name)


def transparent(root: Path) -> None:
    picture = Image.open(first_picture(root)).convert("RGBA")
    picture.putalpha(0)
    picture.save(first_picture(root))


def other_kind(root: Path, kind: str, mode: str) -> None:
    """The same picture in another format, under its old name."""
    content = io.BytesIO()
    Image.open(first_picture(root)).convert(mode).save(content, kind)
    first_picture(root).write_bytes(content.getvalue())


def crlf(root: Path) -> None:
    for path in (root / SPLIT_NAME).iterdir():
        text = path.read_text(encoding="utf-8")
        path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n")


TAKEN = {
    "a name with blanks and quotes": lambda root: renamed(root, 'it\'s a "wet" dog $(rm -rf).png'),
    "a name in other letters": lambda root: renamed(root, "мокрая/собака 🐕.png"),
    "a name with a line break": lambda root: renamed(root, "a\nb.png"),
    "a name of 250 letters": lambda root: renamed(root, "a" * 246 + ".png"),
    "a name with a dash in front": lambda root: renamed(root, "--out.png"),
    "wholly transparent": transparent,
    "a JPEG named PNG": lambda root: other_kind(root, "JPEG", "RGB"),
    "a palette": lambda root: other_kind(root, "GIF", "P"),
    "black and white": lambda root: other_kind(root, "PNG", "1"),
    "CMYK": lambda root: other_kind(root, "TIFF", "CMYK"),
    "one pixel": lambda root: Image.new("RGB", (1, 1)).save(first_picture(root)),
    "a thin line": lambda root: Image.new("RGB", (3000, 1)).save(first_picture(root)),
    "CRLF and a byte order mark": crlf,
}


@pytest.mark.parametrize("kind", TAKEN)
def test_what_is_only_odd_is_trained_on_and_predicted(czsl, root, tmp_path, kind):
    TAKEN[kind](root)
    out = tmp_path / "out"
    answer = czsl("train", "--data", root, "--out", out, *TRAIN, seconds=SECONDS)
    assert answer["status"] == 0, answer["said"]
    image = first_picture(root)
    answer = czsl("predict", image, "--run", out, "--out", tmp_path / "maps", seconds=SECONDS)
    assert answer["status"] == 0, answer["said"]
    assert len([*(tmp_path / "maps").iterdir()]) == 1


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "gone"])
def test_a_prediction_of_what_is_no_picture_goes_on_with_the_next(czsl, pictures, tmp_path, kind, trained):
    path = tmp_path / "odd.png"
    {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "gone": lambda: None,
    }[kind]()
    image = pictures / "images/old_cat/1.png"
    answer = czsl("predict", path, image, "--run", trained, "--out", tmp_path / "maps", seconds=SECONDS)
    assert answer["status"] == 1, answer
    assert "1 of 2 images not read" in answer["said"].strip().splitlines()[-1]
    assert [each.name for each in (tmp_path / "maps").iterdir()] == ["1-maps.png"]


@pytest.fixture(scope="module")
def trained(czsl, pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hostile") / "out"
    assert czsl("train", "--data", pictures, "--out", out, *TRAIN)["status"] == 0
    return out


@pytest.mark.parametrize("word", ["wet\nold", "", "gone"], ids=["two lines", "empty", "unknown"])
def test_rows_of_a_pair_that_no_list_has_are_left_out_aloud(czsl, root, tmp_path, word):
    change_row(root, 0, attr=word)
    answer = czsl("train", "--data", root, "--out", tmp_path / "out", *TRAIN, seconds=SECONDS)
    assert answer["status"] == 0, answer["said"]
    assert (
        f"1 row of {root} is left out, whose pair is in no split file: czsl check {root} says which" in answer["said"]
    )
    assert "1 row left out: their pair is in no split file" in czsl("check", root)["said"]


def test_folders_may_have_names_that_are_no_unicode(czsl, tmp_path):
    home = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write_pictures(home / "pictures")
    command = ("train", "--data", "pictures", "--out", "out", *TRAIN)
    for _ in range(2):
        answer = czsl(*command, cwd=str(home), seconds=SECONDS)
        assert answer["status"] == 0, ascii(answer["said"])
    assert czsl("evaluate", "out", cwd=str(home), seconds=SECONDS)["status"] == 0


@pytest.mark.parametrize("name", ["~", "~root", "out with blanks", "{epoch}", "a[1]*?", "%s", "-o", "a:b", "http:"])
def test_a_run_lies_where_its_name_says_whatever_the_name(czsl, pictures, tmp_path, name):
    answer = czsl("train", "--data", pictures, f"--out={name}", *TRAIN, cwd=str(tmp_path), seconds=SECONDS)
    assert answer["status"] == 0, answer["said"]
    assert os.listdir(tmp_path) == [name]
    for folder in ("checkpoints", "logs", "tensorboard"):
        assert (tmp_path / name / "seed0" / "max" / folder).is_dir()
    assert czsl("evaluate", f"./{name}", cwd=str(tmp_path), seconds=SECONDS)["status"] == 0
