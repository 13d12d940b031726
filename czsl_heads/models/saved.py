"""Trained models on disk: a folder of ``config.json``, ``model.safetensors`` and a model card."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from czsl_heads._checks import check_choice
from czsl_heads._files import read_json, whole_file, write_text
from czsl_heads._sealed import SEAL, DamagedError, check_files, file_sha256, read_sealed, write_sealed
from czsl_heads.encoders.digest import differs, identity
from czsl_heads.encoders.names import absolute
from czsl_heads.models.card import NUMBERS, model_card
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Method
from czsl_heads.models.recipe import OF_CONDENSED, Recipe, build, check_wrapped, from_plain, new_bank
from czsl_heads.space import CompositionSpace

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
RECORD = "training.json"  # of a model that a command trained
RESULTS = "results.json"  # of a command that trained one or more models
SCHEMA = 2  # of that file
_KEPT = {"recipe", "encoder_digest", "label_space", "record"}  # what a configuration holds of a model
_BANK = "bank."
_OF_BANK = ("num_pairs", "slots", "temperature", "logit_scale", "empty", "normalize")


def load(folder: str | os.PathLike[str], *, row: str | None = None, seed: int | None = None) -> Any:
    """A trained model in eval mode, from a folder that ``save_pretrained`` or a command of training wrote.

    Args:
        folder: Of one model; or of ``czsl train`` or ``czsl ablate``, which may hold several.
        row: Of the latter, the row of the table whose model it is; default: the one that its report shows.
        seed: Of the latter, which seed's model; default: the first.

    Returns:
        The method, or :class:`~czsl_heads.models.condensed.Condensed` around it, on the CPU.

    Raises:
        ValueError: The folder holds no finished training, no such row or seed, files that do not fit together, or the
            model of another CLIP than the one that its name gives here.

    Example:
        >>> import torch
        >>> from tempfile import mkdtemp
        >>> from czsl_heads import CompositionSpace
        >>> from czsl_heads.models.recipe import Recipe, build
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")])
        >>> folder = mkdtemp()
        >>> _ = build(Recipe("sac"), space).eval().save_pretrained(folder)
        >>> best = load(folder).predict(torch.zeros(1, 3, 48, 48), topk=1)[0][0]
        >>> best.attribute, best.object
        ('red', 'circle')
    """
    folder = Path(folder)
    if (folder / RESULTS).exists():
        return _load_row(folder, row, seed)
    if row is not None or seed is not None:
        raise ValueError(f"expected `row` and `seed` with a folder of several models, got {folder}, which is of one")
    return load_model(folder)


def save_model(model: Method, folder: Path) -> None:
    """Write a model into a folder: what was trained, its recipe and label space, and its card.

    Raises:
        ValueError: As :func:`check_built`.
    """
    check_built(model)
    assert model.recipe is not None
    recipe = replace(model.recipe, encoder=absolute(model.recipe.encoder))  # the folder is used from other places, too
    write_tensors(folder / WEIGHTS, learned_tensors(model))
    content = {
        "czsl_heads": version("czsl-heads"),
        "recipe": recipe.as_dict(),
        **identity(model.encoder, model.encoder_digest),
        "label_space": space_as_dict(model.space),
        "record": model.record,
        "files": {WEIGHTS: file_sha256(folder / WEIGHTS)},
    }
    write_sealed(folder / CONFIG, content)
    write_text(folder / CARD, model_card(model))


def check_built(model: Method) -> None:
    """Raise ValueError unless the recipe of a model says all that its trained tensors do not.

    It does not where the model was put together by hand, or where weights or the bank were exchanged.
    """
    recipe = model.recipe
    if recipe is None:
        raise ValueError("expected a model of a Recipe (czsl_heads.models.recipe.build), got one made by hand")
    check_wrapped(model.encoder, recipe)
    if not isinstance(model, Condensed):
        return
    for name in OF_CONDENSED:
        _check_same(name, getattr(recipe, name), getattr(model, name))
    if model.bank is not None:
        bank = new_bank(model.space, model.encoder, recipe.bank)
        for name in _OF_BANK:
            _check_same(f"bank.{name}", getattr(bank, name), getattr(model.bank, name))


def _check_same(name: str, wanted: Any, got: Any) -> None:
    # An encoder's scale is computed anew, by another exponential on another device.
    close = isinstance(wanted, float) and isinstance(got, float) and math.isclose(wanted, got, rel_tol=1e-3)
    if got != wanted and not close:
        raise ValueError(f"expected `{name}` to be {wanted}, as in the model's recipe, got {got}")


def load_model(folder: Path) -> Method:
    """The model of one folder, in eval mode. Errors as :func:`load`."""
    content = read_saved(folder)
    try:
        space = space_from_dict(content["label_space"])
        model = build(from_plain(Recipe, content["recipe"], "recipe"), space)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected a model in {folder / CONFIG} that can be built, got {error}") from error
    check_encoder(model, folder)
    load_learned(model, folder / WEIGHTS)
    model.record = content["record"]
    return model.eval()


def read_saved(folder: Path) -> dict[str, Any]:
    """The configuration of a saved model, whose files are as they were written.

    Raises:
        ValueError: There is none, or a file is damaged.
    """
    try:
        content = read_sealed(folder / CONFIG)
        if not content.keys() >= _KEPT:
            raise ValueError(f"expected `folder` of a finished training, got {folder}, whose {CONFIG} holds no model")
        check_files(folder, content.get("files", {}))
        if (folder / RECORD).is_file():
            check_files(folder, read_sealed(folder / RECORD).get("files", {}))
    except DamagedError as error:
        way_out = "take another copy"
        if (folder / RECORD).exists():
            way_out = "the czsl command of its run, given again, makes it anew"
        raise DamagedError(f"expected `folder` of a trained model, got {folder} ({error}); {way_out}") from error
    except OSError as error:
        raise ValueError(f"expected `folder` of a trained model, got {folder} ({error})") from error
    return content


def check_encoder(model: Method, folder: Path) -> None:
    """Raise ValueError unless a model has the CLIP, to the bit, that the model of a folder was trained on."""
    content = read_saved(folder)
    found = identity(model.encoder, model.encoder_digest)
    if told := differs(content, found):
        name = content["recipe"]["encoder"]
        raise ValueError(
            f"expected the encoder {name!r} that {folder} was trained on, got one of other weights or kind ({told})"
        )


def load_learned(model: Method, path: Path) -> None:
    """Load what was trained, and the memory bank where the file holds one.

    Raises:
        ValueError: The file is missing or damaged, or has other names or shapes than the model.
    """
    found = read_tensors(path)
    bank = {name.removeprefix(_BANK): found.pop(name) for name in _of_bank(model, found)}
    shapes = {name: tensor.shape for name, tensor in found.items()}
    state = model.state_dict()
    wanted = {name: state[name].shape for name in model.learned}
    if wanted != shapes:
        odd = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
        raise ValueError(f"expected weights of this model in {path}, got other names or shapes: {', '.join(odd)}")
    model.load_state_dict(found, strict=False)
    if bank:
        assert model.recipe is not None
        memory = new_bank(model.space, model.encoder, model.recipe.bank)
        try:
            memory.load_state_dict(bank)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"expected the memory bank of this model in {path}, got another ({error})") from error
        model.bank = memory


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors; errors of a full disk are OSError, as of other files."""
    content = save(dict(tensors))
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What :func:`write_tensors` wrote; DamagedError where it is gone or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise DamagedError(f"expected tensors of a model in {path}, got no such file") from error
    except SafetensorError as error:
        raise DamagedError(f"expected tensors of a model in {path}, got a damaged file ({error})") from error


def learned_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What :func:`load_learned` reads, on the CPU."""
    state = model.state_dict()
    names = [*model.learned, *_of_bank(model, state)]  # type: ignore[misc]
    return {name: state[name].detach().cpu().contiguous().clone() for name in names}


def _of_bank(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those that are the memory bank's; a method may have a part of that name, too."""
    return [name for name in names if isinstance(model, Condensed) and name.startswith(_BANK)]


def read_results(folder: Path) -> dict[str, Any]:
    """The results of a command.

    Raises:
        ValueError: The file is of another version, or damaged.
    """
    path = folder / RESULTS
    try:
        _check_schema(path)
        return read_sealed(path, _RESULTS)
    except DamagedError as error:
        raise DamagedError(f"{error}; the czsl command of {folder}, given again, writes it anew") from error


def _check_schema(path: Path) -> None:
    """Raise ValueError for a file of another version, whose digest may be another, too."""
    try:
        results = read_json(path)
    except ValueError:
        return  # damaged, which is for others to say
    if not isinstance(results, dict) or ("schema" not in results and (SEAL in results or "rows" not in results)):
        return  # damaged, too
    found = results.get("schema")
    if found != SCHEMA:
        raise ValueError(f"expected {path} of schema {SCHEMA}, got schema {found}")


_RESULTS = ("config", "sources", "data", "rows", "comparisons", "studies", "shown", "baseline")


def _load_row(folder: Path, row: str | None, seed: int | None) -> Method:
    """The model behind a row of a table."""
    results = read_results(folder)
    row = results["shown"] if row is None else row
    rows = {each["key"]: each for each in results["rows"]}
    seeds = [of_seed["seed"] for of_seed in results["rows"][0]["by_seed"]]
    check_choice("row", row, rows)
    if seed is not None and seed not in seeds:
        raise ValueError(f"expected `seed` to be one of {', '.join(map(str, seeds))}, got {seed}")
    found = rows[row]
    if found["readout"]["probabilities"]:
        raise ValueError(f"expected `row` that ranks as its model does, got {row}, which ranks by probabilities")
    if found["transductive"]:
        raise ValueError(f"expected `row` whose model stays as it is, got {row}, which learns from test images")
    if found["budget"] != "best":
        raise ValueError(f"expected `row` whose model is kept, got {row}, of which only the shorter budget's is")
    seed = seeds[0] if seed is None else seed
    path = folder / f"seed{seed}" / found["model"]
    if not (path / CONFIG).is_file():
        raise ValueError(f"expected a trained model in {path}, got none")
    model = load_model(path)
    if isinstance(model, Condensed) and found["readout"]["bank"] is None:
        model.bank = None
    table = [{name: each[name] for name in ("key", "title", "transductive", "summary")} for each in rows.values()]
    own = found["by_seed"][seeds.index(seed)]["test"]
    test = {
        world: {protocol: {name: numbers[name] for name in NUMBERS} for protocol, numbers in by_protocol.items()}
        for world, by_protocol in own.items()
    }
    model.record = {**model.record, "row": row, "seeds": seeds, "test": test, "table": table}
    return model


def space_as_dict(space: CompositionSpace) -> dict[str, Any]:
    """A label space as plain values."""
    words = {"words": space.words} if space.words else {}
    return {
        "attributes": list(space.attributes),
        "objects": list(space.objects),
        "pairs": space.pairs.tolist(),
        "seen": space.seen_mask.tolist(),
        **words,
    }


def space_from_dict(record: dict[str, Any]) -> CompositionSpace:
    """The label space that :func:`space_as_dict` wrote down."""
    pairs = [(attr, obj) for attr, obj in record["pairs"]]
    seen, unseen = ([pair for pair, mark in zip(pairs, record["seen"]) if mark is kind] for kind in (True, False))
    named = record["attributes"], record["objects"]
    return CompositionSpace(*named, seen=seen, unseen=unseen, words=record.get("words")).subset(pairs)
