"""Trained models on disk: a folder of ``config.json``, ``model.safetensors`` and a model card."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from czsl_heads._checks import check_choice
from czsl_heads._files import read_json, whole_file, write_json, write_text
from czsl_heads.models.card import model_card
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Method
from czsl_heads.models.recipe import Recipe, build, from_plain, new_bank
from czsl_heads.space import CompositionSpace

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
RESULTS = "results.json"  # of a command that trained one or more models
_BANK = "bank."


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
        ValueError: The model was put together by hand, so that nobody could build it again.
    """
    if model.recipe is None:
        raise ValueError("expected a model of a Recipe (czsl_heads.models.recipe.build), got one made by hand")
    content = {
        "czsl_heads": version("czsl-heads"),
        "recipe": model.recipe.as_dict(),
        "encoder_digest": model.encoder_digest,
        "label_space": space_as_dict(model.space),
        "record": model.record,
    }
    with whole_file(folder / WEIGHTS) as path:
        save_file(learned_tensors(model), path)
    write_json(folder / CONFIG, content)
    write_text(folder / CARD, model_card(model))


def load_model(folder: Path) -> Method:
    """The model of one folder, in eval mode. Errors as :func:`load`."""
    try:
        content = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected `folder` of a trained model, got {folder} ({error})") from error
    if "recipe" not in content:
        raise ValueError(f"expected `folder` of a finished training, got {folder}, whose {CONFIG} holds no model")

    space = space_from_dict(content["label_space"])
    model = build(from_plain(Recipe, content["recipe"], "recipe"), space)
    if model.encoder_digest != content["encoder_digest"]:
        name = content["recipe"]["encoder"]
        raise ValueError(f"expected the encoder {name!r} that {folder} was trained on, got one of other weights")
    load_learned(model, folder / WEIGHTS)
    model.record = content["record"]
    return model.eval()


def load_learned(model: Method, path: Path) -> None:
    """Load what was trained, and the memory bank where the file holds one.

    Raises:
        ValueError: The file has other names or shapes than the model.
    """
    found = _tensors(path)
    bank = {name: found.pop(name) for name in list(found) if name.startswith(_BANK)}
    shapes = {name: tensor.shape for name, tensor in found.items()}
    state = model.state_dict()
    wanted = {name: state[name].shape for name in model.learned}
    if wanted != shapes:
        odd = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
        raise ValueError(f"expected weights of this model in {path}, got other names or shapes: {', '.join(odd)}")
    model.load_state_dict(found, strict=False)
    if bank:
        assert isinstance(model, Condensed)
        assert model.recipe is not None
        model.bank = new_bank(model.space, model.encoder, model.recipe.bank)
        model.bank.load_state_dict({name.removeprefix(_BANK): tensor for name, tensor in bank.items()})


def learned_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What :func:`load_learned` reads, on the CPU."""
    state = model.state_dict()
    names = [*model.learned, *(name for name in state if name.startswith(_BANK))]  # type: ignore[union-attr, misc]
    return {name: state[name].detach().cpu().contiguous().clone() for name in names}


def _load_row(folder: Path, row: str | None, seed: int | None) -> Method:
    """The model behind a row of a table."""
    results = read_json(folder / RESULTS)
    row = results["shown"] if row is None else row
    rows = {each["key"]: each for each in results["rows"]}
    seeds = [run["seed"] for run in results["rows"][0]["by_seed"]]
    check_choice("row", row, rows)
    if seed is not None and seed not in seeds:
        raise ValueError(f"expected `seed` to be one of {', '.join(map(str, seeds))}, got {seed}")
    found = rows[row]
    path = folder / f"seed{seeds[0] if seed is None else seed}" / found["model"]
    if not (path / CONFIG).is_file():
        raise ValueError(f"expected a trained model in {path}, got none")
    model = load_model(path)
    if isinstance(model, Condensed) and found["readout"]["bank"] is None:
        model.bank = None
    return model


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"expected tensors of a model in {path}, got no such file") from error
    except SafetensorError as error:
        raise ValueError(f"expected tensors of a model in {path}, got a damaged file ({error})") from error


def space_as_dict(space: CompositionSpace) -> dict[str, Any]:
    """A label space as plain values."""
    return {
        "attributes": list(space.attributes),
        "objects": list(space.objects),
        "pairs": space.pairs.tolist(),
        "seen": space.seen_mask.tolist(),
    }


def space_from_dict(record: dict[str, Any]) -> CompositionSpace:
    """The label space that :func:`space_as_dict` wrote down."""
    pairs = [(attr, obj) for attr, obj in record["pairs"]]
    seen, unseen = ([pair for pair, mark in zip(pairs, record["seen"]) if mark is kind] for kind in (True, False))
    return CompositionSpace(record["attributes"], record["objects"], seen=seen, unseen=unseen).subset(pairs)
