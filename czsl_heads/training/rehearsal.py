"""All that a command asks for, tried before anything is written."""

from __future__ import annotations

import sys
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from czsl_heads.data.integrity import broken_images
from czsl_heads.data.layout import CompositionDataset, DataError
from czsl_heads.data.shapes import shapes_space
from czsl_heads.encoders.digest import identity, weights_digest
from czsl_heads.encoders.wrap import wrap
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Method
from czsl_heads.models.recipe import build, new_bank
from czsl_heads.space import CompositionSpace
from czsl_heads.training.config import Config
from czsl_heads.training.open_world import feasibility_table
from czsl_heads.training.options import Options
from czsl_heads.training.rows import Row
from czsl_heads.training.stage import check_validation
from czsl_heads.training.train import check_learning
from czsl_heads.training.trainer import check_trainer


def wanted_rows(config: Config) -> list[Row]:
    """The rows of the table and the points of the studies that a command asks for."""
    points = [point for name in config.studies for point in config.study(name).points]
    return [*config.rows, *points]


def rehearse(config: Config, dataset: CompositionDataset | None) -> tuple[torch.Tensor | None, dict[str, str]]:
    """Try everything that can be wrong: trainer, encoder, options, every model that is trained, and every image.

    Returns:
        The feasibility of pairs, where it is asked for, and what the CLIP is.

    Raises:
        ValueError: As :func:`czsl_heads.training.folder.open_folder`.
    """
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
            _score_blank(model, options, images // devices)
    table = None if config.world == "closed" else feasibility_table(config, space)
    if dataset is not None:
        _decode_all(dataset)
    return table, identified(encoders["none"])


def identified(encoder: nn.Module) -> dict[str, str]:
    """What a folder says of the CLIP that it was run with."""
    return identity(encoder, weights_digest(encoder))


def _training_images(config: Config, dataset: CompositionDataset | None, space: CompositionSpace) -> int:
    if dataset is not None:
        return len(dataset.samples["train"])
    assert config.shapes is not None
    return config.shapes.train_per_pair * int(space.seen_mask.sum())


@torch.no_grad()
def _score_blank(model: Method, options: Options, images: int) -> None:
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


def _decode_all(dataset: CompositionDataset) -> None:
    print(f"decoding all images of {dataset.root} once", file=sys.stderr, flush=True)
    if broken := broken_images(dataset):
        more = f" (and {len(broken) - 1} more; czsl check lists them)" if len(broken) > 1 else ""
        raise DataError(broken[0] + more)
