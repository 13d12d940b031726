"""One folder, one command: nothing is written before all its settings were tried, and other settings are refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from czsl_heads._files import flatten, plain, remove_unfinished
from czsl_heads._sealed import SEAL, DamagedError, file_sha256, read_sealed, write_sealed
from czsl_heads.data.digest import PICTURES, check_pictures, labels_digest, look_at_pictures
from czsl_heads.data.layout import CompositionDataset, DataError, read_dataset
from czsl_heads.data.shapes import beyond_shapes, make_shapes, shapes_space
from czsl_heads.encoders.digest import differs
from czsl_heads.encoders.wrap import wrap
from czsl_heads.models.saved import CONFIG
from czsl_heads.training.config import OPEN_WORLD, READING, Config
from czsl_heads.training.holder import HOLDER, LOCK, FolderBusyError, Holder
from czsl_heads.training.open_world import FEASIBILITY, feasibility_table, keep_feasibility, table_sha256
from czsl_heads.training.options import Options
from czsl_heads.training.rehearsal import identified, rehearse
from czsl_heads.training.trainer import check_trainer, is_main_process, say

# Recorded by :func:`czsl_heads.encoders.digest.identity`, and compared when the CLIP is loaded.
_OF_CLIP = ("encoder_container", "encoder_activation", "encoder_preprocess", "encoder_digest")
# Compared with the files themselves; and the labels with them, where the shapes are drawn into the folder.
_OF_FOLDER = ("data_digest", "pictures_digest", "files")
# May differ when a command is taken up again: they decide which numbers there are, or how fast, but beyond rounding
# none of them.
_FREE = ("seeds", "studies", "add", "options.workers", "options.checkpoint", "trainer.enable_progress_bar")


def open_folder(out: Path, config: Config, holder: Holder | None = None) -> CompositionDataset:
    """Claim ``out`` for a command, or take it up again, and give its data set.

    A new folder is made only after the data was read, the trainer built, the encoder loaded, every model that the
    command trains built once and shown a blank image, the feasibility of pairs found where it is asked for, and last
    every image decoded; so a wrong argument leaves nothing behind. The folder says what its CLIP was, and is taken up
    with that one only.

    Args:
        out: The folder.
        config: What the command asks for.
        holder: Holds the folder from here on; None: it is held within this call only.

    Raises:
        ValueError: The data, the encoder, an option or a flag is wrong; or ``out`` is of another command.
        OSError: ``out`` holds something else, cannot be written, or another process works on it.
    """
    if holder is None:
        with Holder(out) as own:
            return open_folder(out, config, own)
    _check_name(out)
    dataset = None if config.shapes else config.read()
    if dataset is not None and (told := beyond_shapes(config.encoder, dataset.space)):
        say(told)
    if dataset is not None and (unlisted := dataset.left_out.unlisted):
        say(_left_out(dataset.root, len(unlisted)))
    if (out / LOCK).exists():
        with _writing(out):
            holder.take()  # or tell who works there
    if (out / CONFIG).exists():
        return _taken_up(out, config, dataset, holder)
    if out.exists() and (not out.is_dir() or _occupied(out)):
        raise FileExistsError(f"expected `out` to be a new or empty folder or one of the same command, got {out}")

    table, clip = rehearse(config, dataset)
    pictures = None if dataset is None else look_at_pictures(dataset, config.digest)
    with _writing(out):
        holder.take()
        if (out / CONFIG).exists():  # another process was first, and is done
            return _taken_up(out, config, dataset, holder)
        remove_unfinished(out)
        settings = _settings(config, dataset) | clip
        if pictures is not None:
            settings["pictures_digest"] = pictures.digest
        if table is not None:
            settings["files"] = {FEASIBILITY: table_sha256(table)}
        write_sealed(out / CONFIG, settings)
        if pictures is not None and pictures.kind == "all":
            pictures.write(out / PICTURES)
        if table is not None:
            keep_feasibility(out, table)
        dataset = dataset or _drawn_dataset(out, config, settings)
    return _cached(dataset, config)


def _left_out(root: Path, rows: int) -> str:
    some = f"{rows} rows of {root} are left out, whose pairs are"
    if rows == 1:
        some = f"1 row of {root} is left out, whose pair is"
    return f"{some} in no split file: czsl check {root} says which"


def _taken_up(out: Path, config: Config, dataset: CompositionDataset | None, holder: Holder) -> CompositionDataset:
    """The data set of a folder that a command had before, which goes on with it."""
    with _writing(out):
        holder.take()
        if is_main_process():
            _sweep(out)
    before = read_settings(out)
    settings = _settings(config, dataset)
    _compare(out, before, settings)
    check_trainer(config.trainer)
    clip = identified(wrap(config.encoder))
    _compare_clips(out, config.encoder, before, clip)
    if dataset is not None and "pictures_digest" in before:
        check_pictures(dataset, before["pictures_digest"], out / PICTURES)

    settings |= clip
    settings |= {name: before[name] for name in _OF_FOLDER if name in before and name not in settings}
    with _writing(out):
        if config.world == "open":
            settings["files"] = _whole_feasibility(out, config, before, dataset)
        if is_main_process():
            write_sealed(out / CONFIG, settings)
        dataset = dataset or _drawn_dataset(out, config, settings)
    return _cached(dataset, config)


def _sweep(out: Path) -> None:
    """Remove what killed processes left half-written."""
    for folder in (out, *out.glob("seed*"), *out.glob("seed*/*"), *out.glob("seed*/*/checkpoints")):
        if folder.is_dir():
            remove_unfinished(folder)


def read_settings(out: Path) -> dict[str, Any]:
    """What a command wrote down of itself in its folder.

    Raises:
        DamagedError: The file is damaged. Nobody else knows what the command was.
    """
    try:
        settings = read_sealed(out / CONFIG)
    except DamagedError as error:
        raise DamagedError(
            f"{error}; take it from a copy of the folder, or give the czsl command another `out`"
        ) from error
    return {name: value for name, value in settings.items() if name != SEAL}


def _check_name(out: Path) -> None:
    """Refuse what Lightning's loggers would take for another place than it says."""
    try:
        str(out).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected `out` of Unicode, which TensorBoard's log asks for, got {str(out)!a}") from error
    place = os.path.abspath(out)
    if "::" in place:
        raise ValueError(f"expected `out` without ::, which Lightning reads as an address behind another, got {out}")
    if os.path.expandvars(place) != place:
        raise ValueError(f"expected `out` without the name of a variable, which Lightning replaces, got {out}")


def _occupied(out: Path) -> bool:
    """Whether a folder holds more than a process leaves there that was killed before it claimed it."""
    remove_unfinished(out)
    return any(entry.name not in (LOCK, HOLDER) for entry in out.iterdir())


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except FolderBusyError:
        raise
    except OSError as error:
        if error.errno is None:
            raise  # it has been said in words
        raise OSError(f"expected `out` to be a folder that can be written, got {out} ({error.strerror})") from error


def _cached(dataset: CompositionDataset, config: Config) -> CompositionDataset:
    return dataset if config.cache_dir is None else replace(dataset, cache_dir=Path(config.cache_dir))


def _whole_feasibility(
    out: Path, config: Config, before: dict[str, Any], dataset: CompositionDataset | None
) -> dict[str, str]:
    """The digest of the feasibility of pairs; where the file is gone or damaged, it is computed and written again."""
    recorded = before.get("files", {}).get(FEASIBILITY)
    path = out / FEASIBILITY
    found = file_sha256(path) if path.is_file() else None
    if found is not None and recorded in (None, found):
        return {FEASIBILITY: found}

    say(f"{path} is gone or damaged, and is computed again")
    table = feasibility_table(config, shapes_space() if dataset is None else dataset.space)
    if recorded not in (None, table_sha256(table)):
        raise DamagedError(
            f"expected {path} as it was written, got none or a damaged file, and another table from "
            f"{config.feasibility}; take it from a copy of the folder, or give the czsl command another `out`"
        )
    keep_feasibility(out, table)
    return {FEASIBILITY: table_sha256(table)}


def _drawn_dataset(out: Path, config: Config, settings: dict[str, Any]) -> CompositionDataset:
    """The shapes of a folder, drawn where they are not there or not whole; the folder says their digests."""
    assert config.shapes is not None
    root = out / "shapes"
    if root.exists() and (told := _damage(out, root, settings)):
        say(f"{told}; it is drawn again")
        shutil.rmtree(root)
    if not root.exists():
        say(f"drawing the shapes data set in {root}")
        make_shapes(root, **asdict(config.shapes))
    if told := _damage(out, root, settings):
        raise DataError(f"{told}; what is drawn here differs, perhaps by another version of Pillow")

    dataset = read_dataset(root)
    if "pictures_digest" not in settings:
        pictures = look_at_pictures(dataset, "all")
        digests = {"data_digest": labels_digest(root), "pictures_digest": pictures.digest}
        write_sealed(out / CONFIG, settings | digests)
        pictures.write(out / PICTURES)
    return dataset


def _damage(out: Path, root: Path, settings: dict[str, Any]) -> str:
    """How drawn shapes differ from what the folder says of them, in words; empty if they do not."""
    try:
        dataset = read_dataset(root)
        if settings.get("data_digest", labels_digest(root)) != labels_digest(root):
            return f"expected {root} with the labels that were trained on, got other ones"
        if "pictures_digest" in settings:
            check_pictures(dataset, settings["pictures_digest"], out / PICTURES)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _settings(config: Config, dataset: CompositionDataset | None) -> dict[str, Any]:
    """What is kept in the folder: the configuration, and what the files of the data set say."""
    settings: dict[str, Any] = plain(config.as_dict())
    if dataset is None:
        return settings
    words = {"words": dataset.space.words} if dataset.space.words else {}
    return settings | {"data_digest": labels_digest(dataset.root)} | words


def _compare(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    apart = {*_OF_CLIP, *_OF_FOLDER} - ({"data_digest"} if "data_digest" in wanted else set())
    found = {name: value for name, value in found.items() if name not in apart}
    before, now = (flatten({**OPEN_WORLD, **READING, **settings}) for settings in (found, wanted))
    # A folder of an earlier version lacks the options of later ones, and was run without.
    before = flatten({"options": plain(Options().as_dict())}) | before
    digest = before.get("data_digest")
    moved = ("data",) if digest is not None and digest == now.get("data_digest") else ()  # the same data elsewhere
    free = [name for name in _FREE if name != "seeds" or now["table"] != "one"]  # one model has one seed
    for name in sorted(before.keys() | now.keys()):
        if name not in (*free, *moved) and before.get(name) != now.get(name):
            raise ValueError(
                f"expected `out` to be new or of the same settings, got {out}, whose {name} is {before.get(name)!r} "
                f"instead of {now.get(name)!r}"
            )


def _compare_clips(out: Path, name: str, before: dict[str, Any], clip: dict[str, str]) -> None:
    if "encoder_digest" in before and (told := differs(before, clip)):
        raise ValueError(f"expected `out` to be new or of the same encoder {name!r}, got {out} of another ({told})")
