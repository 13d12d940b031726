"""One folder, one command: nothing is written before all its settings were tried, and other settings are refused."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from czsl_heads._files import flatten, plain, read_json, write_json
from czsl_heads.data.digest import labels_digest, pictures_digest
from czsl_heads.data.integrity import broken_images
from czsl_heads.data.layout import CompositionDataset, DataError, read_dataset
from czsl_heads.data.shapes import beyond_shapes, make_shapes, shapes_space
from czsl_heads.encoders.digest import differs, identity, weights_digest
from czsl_heads.encoders.wrap import wrap
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Method
from czsl_heads.models.recipe import build, new_bank
from czsl_heads.models.saved import CONFIG
from czsl_heads.space import CompositionSpace
from czsl_heads.training.config import OPEN_WORLD, READING, Config
from czsl_heads.training.open_world import FEASIBILITY, feasibility_table, keep_feasibility
from czsl_heads.training.options import Options
from czsl_heads.training.rows import Row
from czsl_heads.training.stage import check_validation
from czsl_heads.training.train import check_learning
from czsl_heads.training.trainer import check_trainer

# Recorded by :func:`czsl_heads.encoders.digest.identity`, and compared when the CLIP is loaded.
_OF_CLIP = ("encoder_container", "encoder_activation", "encoder_preprocess", "encoder_digest")
# May differ when a command is taken up again: they decide which numbers there are, or how fast, but beyond rounding
# none of them.
_FREE = ("seeds", "studies", "add", "options.workers", "options.checkpoint", "trainer.enable_progress_bar")


def open_folder(out: Path, config: Config) -> CompositionDataset:
    """Claim ``out`` for a command, or take it up again, and give its data set.

    A new folder is made only after the data was read, the trainer built, the encoder loaded, every model that the
    command trains built once and shown a blank image, the feasibility of pairs found where it is asked for, and last
    every image decoded; so a wrong argument leaves nothing behind. The folder says what its CLIP was, and is taken up
    with that one only.

    Raises:
        ValueError: The data, the encoder, an option or a flag is wrong; or ``out`` is of another command.
        OSError: ``out`` holds something else, or cannot be written.
    """
    path, table = out / CONFIG, None
    dataset = None if config.shapes else config.read()
    if dataset is not None and (told := beyond_shapes(config.encoder, dataset.space)):
        print(told, file=sys.stderr, flush=True)
    before = read_json(path) if path.exists() else {}
    settings = _settings(config, dataset, before)
    if path.exists():
        _compare(out, before, settings)
        check_trainer(config.trainer)
        clip = _identified(wrap(config.encoder))
        _compare_clips(out, config.encoder, before, clip)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"expected `out` to be a new or empty folder or one of the same command, got {out}")
    else:
        table, clip = _tried(config, dataset)
    try:
        write_json(path, settings | clip)
        if dataset is None:
            dataset = _drawn_dataset(out / "shapes", config)
        if config.world == "open" and not (out / FEASIBILITY).exists():
            keep_feasibility(out, feasibility_table(config, dataset.space) if table is None else table)
    except OSError as error:
        raise OSError(f"expected `out` to be a folder that can be written, got {out} ({error.strerror})") from error
    return dataset if config.cache_dir is None else replace(dataset, cache_dir=Path(config.cache_dir))


def wanted_rows(config: Config) -> list[Row]:
    """The rows of the table and the points of the studies that a command asks for."""
    points = [point for name in config.studies for point in config.study(name).points]
    return [*config.rows, *points]


def _tried(config: Config, dataset: CompositionDataset | None) -> tuple[torch.Tensor | None, dict[str, str]]:
    """Everything that can be wrong, tried; the feasibility of pairs, where it is asked for, and what the CLIP is."""
    devices = check_trainer(config.trainer)
    if dataset is not None:
        check_validation(dataset)
    space = shapes_space() if dataset is None else dataset.space
    images = _training_images(config, dataset, space)
    encoders = {"none": wrap(config.encoder)}  # each loaded once; models get copies, and put their adapters into them
    asked = [row.model for row in wanted_rows(config)]
    bases = [model.base for model in asked if model.base is not None]
    tried: list[tuple[Any, ...]] = []
    for trained in dict.fromkeys([*bases, *asked]):
        options = config.options_of(trained)
        key = trained.align, trained.stage, options
        if key not in tried:
            tried.append(key)
            behind = trained.stage == "condense"
            recipe = options.recipe(config.method, config.encoder, trained.align, condenser=behind)
            if recipe.dense not in encoders:
                encoders[recipe.dense] = wrap(config.encoder, dense=recipe.dense)
            model = build(recipe, space.subset(space.pairs[:1]), encoder=deepcopy(encoders[recipe.dense]))
            _rehearse(model, options, images // devices)
    table = None if config.world == "closed" else feasibility_table(config, space)
    if dataset is not None:
        _decode_all(dataset)
    return table, _identified(encoders["none"])


def _identified(encoder: nn.Module) -> dict[str, str]:
    return identity(encoder, weights_digest(encoder))


def _training_images(config: Config, dataset: CompositionDataset | None, space: CompositionSpace) -> int:
    if dataset is not None:
        return len(dataset.samples["train"])
    assert config.shapes is not None
    return config.shapes.train_per_pair * int(space.seen_mask.sum())


@torch.no_grad()
def _rehearse(model: Method, options: Options, images: int) -> None:
    """Look for what training would end by, and score a blank image; ``images`` are those that each device trains on."""
    assert model.recipe is not None
    behind = isinstance(model, Condensed)
    if not behind:
        check_learning(model, options.epochs, model.recipe.method)
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    learns = options.epochs and (not behind or options.joint)
    if normed and learns and 1 in _sizes(images, options):
        raise ValueError(
            "expected `options.batch_size` and `options.micro_batch` that leave no batch of one of "
            f"{images} images, for batch norm, got {options.batch_size} and {options.micro_batch}"
        )
    size = model.encoder.image_size
    blank = torch.zeros(1, 3, *((size, size) if isinstance(size, int) else size))
    if isinstance(model, Condensed):
        model.bank = new_bank(model.space, model.encoder, options.bank)
    model.eval().scores(blank, model.space.pairs)


def _sizes(images: int, options: Options) -> set[int]:
    """How many images are run at once in an epoch."""
    batches = {min(options.batch_size, images), images % options.batch_size} - {0}
    part = options.micro_batch or options.batch_size
    parts = {min(part, batch) for batch in batches}
    return parts | {batch % part for batch in batches}


def _drawn_dataset(root: Path, config: Config) -> CompositionDataset:
    assert config.shapes is not None
    if not root.exists():
        print(f"drawing the shapes data set in {root}", file=sys.stderr, flush=True)
        make_shapes(root, **asdict(config.shapes))
    return read_dataset(root)


def _decode_all(dataset: CompositionDataset) -> None:
    print(f"decoding all images of {dataset.root} once", file=sys.stderr, flush=True)
    if broken := broken_images(dataset):
        more = f" (and {len(broken) - 1} more; czsl check lists them)" if len(broken) > 1 else ""
        raise DataError(broken[0] + more)


def _settings(config: Config, dataset: CompositionDataset | None, before: dict[str, Any]) -> dict[str, Any]:
    """What is kept in the folder: the configuration, and what the files of the data set say."""
    settings: dict[str, Any] = plain(config.as_dict())
    if dataset is None:
        return settings
    known: Any = before.get("pictures_digest", config.digest).partition(":")[0]  # which pictures were read before
    digests = {"data_digest": labels_digest(dataset.root), "pictures_digest": pictures_digest(dataset, known)}
    words = {"words": dataset.space.words} if dataset.space.words else {}
    return settings | digests | words


def _compare(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = {name: value for name, value in found.items() if name not in _OF_CLIP}
    before, now = (flatten({**OPEN_WORLD, **READING, **settings}) for settings in (found, wanted))
    # A folder of an earlier version lacks the options of later ones, and was run without.
    before = flatten({"options": plain(Options().as_dict())}) | before
    before.setdefault("pictures_digest", now.get("pictures_digest"))
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
