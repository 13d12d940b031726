"""A folder is claimed by one command: all is tried before anything is written, and other settings are refused."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from czsl_heads import wrap
from czsl_heads.data import DataError, digest
from czsl_heads.data.shapes import ShapesSpec
from czsl_heads.encoders.digest import weights_digest
from czsl_heads.models.saved import CONFIG
from czsl_heads.training import rehearsal
from czsl_heads.training.config import configure, configure_model
from czsl_heads.training.folder import open_folder

SPLIT, METADATA = "compositional-split-natural", "metadata_compositional-split-natural.t7"


@pytest.fixture
def data(shapes_root: Path, tmp_path: Path) -> Path:
    """A copy of the data set that a test may spoil."""
    return Path(shutil.copytree(shapes_root, tmp_path / "data"))


def lines(data: Path, name: str) -> list[str]:
    return (data / SPLIT / f"{name}_pairs.txt").read_text().split("\n")


def keep(data: Path, wanted: Callable[[dict], bool]) -> None:
    """Leave out images."""
    rows = torch.load(data / METADATA, weights_only=True)
    torch.save([row for row in rows if wanted(row)], data / METADATA)


def modified(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("csp", {}, "whose method is 'sac' instead of 'csp'"),
        ("sac", {"options": {"learning_rate": 0.5}}, r"whose options\.learning_rate is 0\.0001 instead of 0\.5"),
        ("sac", {"options": {"model.context": "the"}}, r"whose options\.model\.context is None instead of 'the'"),
        ("sac", {"by": configure_model}, "whose align is None instead of 'max'"),
        ("sac", {"table": "alignment"}, "whose table is 'steps' instead of 'alignment'"),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    small_ablation: Path, configured, method: str, arguments: dict, message: str
) -> None:
    before = modified(small_ablation)
    with pytest.raises(ValueError, match=f"expected `out` to be new or of the same settings, got .*, {message}"):
        open_folder(small_ablation, configured(method, **arguments))
    assert modified(small_ablation) == before


def test_data_that_was_moved_is_taken_up_and_other_data_is_refused(configured, data: Path, tmp_path: Path) -> None:
    out, by = tmp_path / "out", {"method": "clip", "by": configure_model}
    open_folder(out, configured(**by, data=str(data)))
    moved = data.rename(tmp_path / "elsewhere")
    assert open_folder(out, configured(**by, data=str(moved))).root == moved
    assert json.loads((out / CONFIG).read_text())["data"] == str(moved)

    dropped = lines(moved, "test")[0]
    (moved / SPLIT / "test_pairs.txt").write_text("\n".join(lines(moved, "test")[1:]))
    keep(moved, lambda row: row["set"] != "test" or f"{row['attr']} {row['obj']}" != dropped)
    with pytest.raises(ValueError, match="whose data_digest is"):
        open_folder(out, configured(**by, data=str(moved)))


@pytest.mark.parametrize("word", ["seen", "unseen"])
def test_validation_without_one_sort_is_refused(configured, data: Path, tmp_path: Path, word: str) -> None:
    train = set(lines(data, "train"))
    keep(data, lambda row: row["set"] != "val" or (f"{row['attr']} {row['obj']}" in train) != (word == "seen"))
    message = rf"expected validation images of seen and of unseen pairs.*got none of {word} pairs"
    with pytest.raises(DataError, match=message):
        open_folder(tmp_path / "out", configured(data=str(data)))
    assert not (tmp_path / "out").exists()


def test_a_truncated_image_is_found_before_anything_is_written(configured, data: Path, tmp_path: Path) -> None:
    image = sorted((data / "images").rglob("test_*.png"))[3]
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(DataError, match=rf"{image.name}: expected a whole image"):
        open_folder(tmp_path / "out", configured("clip", by=configure_model, data=str(data)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("images", "devices", "options", "refused"),
    [
        (12, 2, {"batch_size": 5}, True),  # one is left of the six of each device
        (12, 1, {"batch_size": 11}, True),
        (12, 1, {"batch_size": 1}, True),
        (12, 1, {"batch_size": 12, "micro_batch": 11}, True),
        (13, 1, {"batch_size": 7, "micro_batch": 5}, True),  # one is left of the last batch of six
        (11, 2, {"batch_size": 5}, False),
        (12, 2, {"batch_size": 100}, False),
        (12, 1, {"batch_size": 7, "micro_batch": 5}, False),
        (11, 1, {"batch_size": 5, "epochs": 0}, False),
    ],
)
def test_batch_norm_never_sees_one_image_by_itself(
    configured, data: Path, tmp_path: Path, monkeypatch, images: int, devices: int, options: dict, refused: bool
) -> None:
    monkeypatch.setattr(rehearsal, "check_trainer", lambda flags: devices)
    rows = torch.load(data / METADATA, weights_only=True)
    few = [row["image"] for row in rows if row["set"] == "train"][:images]
    keep(data, lambda row: row["set"] != "train" or row["image"] in few)
    arguments = {"by": configure_model, "data": str(data), "options": options}
    out = tmp_path / "out"
    open_folder(out / "csp", configured("csp", **arguments))  # has no batch norm
    if not refused:
        open_folder(out / "troika", configured("troika", **arguments))
        return
    message = rf"that leave no batch of one of {images // devices} images, for batch norm, got {options['batch_size']}"
    with pytest.raises(ValueError, match=message):
        open_folder(out / "troika", configured("troika", **arguments))
    assert not (out / "troika").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "ViT-Z"}, "expected `model_or_name`"),
        ({"reductions": True, "options": {"head.topk": 50}}, r"expected `k` to be in \[1, 37\], got 50"),
        ({"method": "csp", "options": {"head.topk": 99}}, "expected `k` to be"),
        ({"options": {"lora.layers": 40}}, "expected `layers`"),
        ({"options": {"lora.matrices": ["z"]}}, "expected `matrices`"),
        ({"method": "troika", "options": {"model.layers": -1}}, "expected `layers` to be"),
        ({"method": "clip", "options": {"epochs": 1}}, r"expected `options\.epochs` to be 0 for clip, which learns"),
        ({"method": "clip", "options": {"checkpoint": True}}, "expected `checkpoint` to be false for clip"),
        ({"trainer": {"foo": 3}}, "expected `trainer` to hold flags that lightning.Trainer takes"),
        ({"trainer": {"accelerator": "nope"}}, "expected `trainer` to hold flags that lightning.Trainer takes"),
    ],
)
def test_settings_are_tried_before_anything_is_written(shapes_root: Path, tmp_path: Path, arguments, message) -> None:
    for data in ("shapes", str(shapes_root)):
        with pytest.raises((ValueError, TypeError), match=message):
            open_folder(tmp_path / "out", configure(data=data, preset="shapes", **arguments))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_had_is_named(configured, tmp_path: Path) -> None:
    config = configured("clip", by=configure_model)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected `out` to be a new or empty folder"):
        open_folder(tmp_path, config)
    with pytest.raises(OSError, match=r"expected `out` to be a folder that can be written, got .*mine\.txt/out"):
        open_folder(tmp_path / "mine.txt" / "out", config)
    with pytest.raises(DataError, match="expected the folder of a data set, got nothing"):
        open_folder(tmp_path / "out", configured("clip", data=str(tmp_path / "absent")))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def other_clip(folder: Path) -> None:
    """One weight of a CLIP in a folder, changed."""
    weights = load_file(folder / "tiny_clip.safetensors")
    weights["logit_scale"] += 1e-3
    save_file(weights, folder / "tiny_clip.safetensors")


def test_the_clip_is_recorded_and_another_one_is_refused(configured, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(str(files("czsl_heads.encoders") / "assets"), tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    config, out = configured("clip", by=configure_model, encoder="tiny:clip"), tmp_path / "out"
    open_folder(out, config)
    content = json.loads((out / CONFIG).read_text())
    assert content["encoder"] == f"tiny:{tmp_path / 'clip'}"
    assert (content["encoder_container"], content["encoder_activation"]) == ("open_clip", "GELU")
    assert content["encoder_digest"] == weights_digest(wrap("tiny:clip"))

    monkeypatch.chdir("/")
    open_folder(out, config)  # the same one, from another place
    other_clip(tmp_path / "clip")
    before = modified(out)
    message = r"expected `out` to be new or of the same encoder 'tiny:.*clip', got .*out of another \(open_clip, GELU"
    with pytest.raises(ValueError, match=message):
        open_folder(out, config)
    assert modified(out) == before


def test_a_clip_that_cannot_be_had_is_told_before_an_image_is_decoded(configured, tmp_path: Path, monkeypatch) -> None:
    def decode(dataset) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(rehearsal, "_decode_all", decode)
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04 and nothing else")
    for encoder in ("ViT-B-32-quickgelu:openai", f"ViT-B-32:{tmp_path / 'half.pt'}", "hf:nobody/nothing", "ViT-B-99"):
        with pytest.raises(ValueError, match="expected") as raised:
            open_folder(tmp_path / "out", configured("clip", by=configure_model, encoder=encoder))
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_row_with_dense_patches_is_tried_with_them(configured, tmp_path: Path) -> None:
    changes = {"options": {"dense": "naclip"}}
    open_folder(tmp_path / "out", configured("clip", by=configure_model, **changes))
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["options"]["dense"] == "naclip"
    with pytest.raises(ValueError, match="expected `dense` to be one of none, value, sclip, clearclip, naclip, got"):
        configured("clip", by=configure_model, options={"dense": "maskclip"})


def test_a_folder_of_an_earlier_version_is_taken_up(configured, tmp_path: Path) -> None:
    config, out = configured("clip", by=configure_model), tmp_path / "out"
    open_folder(out, config)
    content = json.loads((out / CONFIG).read_text())
    recorded = {name: content.pop(name) for name in ("encoder_container", "encoder_activation", "encoder_digest")}
    del content["options"]["dense"], content["sha256"], content["pictures_digest"]
    (out / CONFIG).write_text(json.dumps(content))
    open_folder(out, config)
    assert json.loads((out / CONFIG).read_text()).items() >= recorded.items()


def test_a_name_that_lightning_reads_as_two_addresses_is_refused(configured, tmp_path: Path, monkeypatch) -> None:
    config = configured("clip", by=configure_model)
    with pytest.raises(ValueError, match=r"expected `out` without ::, which Lightning reads as .*, got a::b"):
        open_folder(Path("a::b"), config)
    monkeypatch.setenv("CZSL_ELSEWHERE", "/elsewhere")
    with pytest.raises(ValueError, match=r"expected `out` without the name of a variable, .*, got a\$CZSL_ELSEWHERE"):
        open_folder(Path("a$CZSL_ELSEWHERE"), config)
    with pytest.raises(ValueError, match=r"expected `out` of Unicode, .*, got 'caf\\udce9'"):
        open_folder(Path("caf\udce9"), config)
    inside = tmp_path / "a::b"
    inside.mkdir()
    monkeypatch.chdir(inside)
    with pytest.raises(ValueError, match=r"expected `out` without ::"):
        open_folder(Path("out"), config)
    assert list(inside.iterdir()) == []


def replace_in_silence(path: Path) -> None:
    """Another picture of as many bytes, whose time of change is that of the first."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_picture_that_was_replaced_between_two_calls_is_told_by_its_name(
    configured, data: Path, tmp_path: Path
) -> None:
    out, config = tmp_path / "out", configured("clip", by=configure_model, data=str(data))
    open_folder(out, config)
    picture = sorted((data / "images").rglob("*.png"))[7]
    whole = picture.read_bytes()
    replace_in_silence(picture)
    name = picture.relative_to(data / "images")
    with pytest.raises(DataError, match=rf"with the pictures that .*out was trained on, got other ones: {name}$"):
        open_folder(out, config)
    picture.write_bytes(whole)
    open_folder(out, config)

    (out / "pictures.npz").unlink()  # then every picture is read again
    replace_in_silence(picture)
    with pytest.raises(DataError, match=r"got other ones$"):
        open_folder(out, config)
    picture.write_bytes(whole)
    open_folder(out, config)
    assert (out / "pictures.npz").exists()


def test_pictures_that_were_not_touched_are_not_read_again(configured, data: Path, tmp_path: Path, monkeypatch) -> None:
    out, config = tmp_path / "out", configured("clip", by=configure_model, data=str(data))
    open_folder(out, config)
    read: list[str] = []
    real = digest.file_digest
    monkeypatch.setattr(digest, "file_digest", lambda path: read.append(path) or real(path))
    open_folder(out, config)
    assert read == []
    picture = next((data / "images").rglob("*.png"))
    picture.touch()
    open_folder(out, config)
    assert read == [str(picture)]
    open_folder(out, config)
    assert read == [str(picture)]


@pytest.mark.parametrize("spoil", ["picture", "mask", "labels", "gone"])
def test_shapes_that_were_damaged_are_drawn_again(configured, tmp_path: Path, spoil: str, capsys) -> None:
    spec = ShapesSpec(train_per_pair=1, val_per_pair=1, test_per_pair=1)
    config = replace(configured("clip", by=configure_model), data="shapes", shapes=spec)
    out = tmp_path / "out"
    root = open_folder(out, config).root
    kept = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    settings = (out / CONFIG).read_bytes()
    if spoil == "picture":
        replace_in_silence(sorted((root / "images").rglob("*.png"))[3])
    elif spoil == "mask":
        sorted((root / "masks").rglob("*.png"))[3].unlink()
    elif spoil == "labels":
        path = root / SPLIT / "test_pairs.txt"
        path.write_text("\n".join(sorted(path.read_text().split("\n"))[1:]))
    else:
        shutil.rmtree(root / "images")
    open_folder(out, config)
    assert "it is drawn again" in capsys.readouterr().err
    assert {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()} == kept
    assert (out / CONFIG).read_bytes() == settings


def test_the_settings_of_a_folder_cannot_be_guessed(configured, tmp_path: Path) -> None:
    out, config = tmp_path / "out", configured("clip", by=configure_model)
    open_folder(out, config)
    (out / CONFIG).write_text((out / CONFIG).read_text().replace('"clip"', '"csp"', 1))
    with pytest.raises(ValueError, match=r"other content: its digest .*; take it from a copy of the folder, or give"):
        open_folder(out, config)
