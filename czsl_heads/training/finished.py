"""A finished command: its results, its data, and its models scored again on another split, other data or world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from czsl_heads._checks import check_choice
from czsl_heads._files import plain
from czsl_heads._sealed import SEAL
from czsl_heads.data.digest import PICTURES, check_pictures, labels_digest
from czsl_heads.data.layout import SPLITS, CompositionDataset, DataError, read_dataset
from czsl_heads.functional.feasibility import Masking
from czsl_heads.models.recipe import from_plain
from czsl_heads.models.saved import CONFIG, RESULTS, read_results, read_saved, space_from_dict
from czsl_heads.space import CompositionSpace
from czsl_heads.training.ablate import compared, describe, row_results
from czsl_heads.training.chance import at_chance, chance_of
from czsl_heads.training.config import OPEN_WORLD, Config, reading_of
from czsl_heads.training.environment import environment
from czsl_heads.training.evaluate import Evaluation
from czsl_heads.training.folder import read_settings
from czsl_heads.training.open_world import OpenWorld, feasibility_table
from czsl_heads.training.options import Options
from czsl_heads.training.rows import Readout
from czsl_heads.training.train import evaluate_model, read_record, tested
from czsl_heads.training.trainer import say


def finished(run: Path, seed: int | None = None) -> tuple[dict[str, Any], int]:
    """The results of a finished command, and the seed to use; default: the first.

    Raises:
        ValueError: The folder is of no command, of one model, of an unfinished command, of another version, or lacks
            the seed.
    """
    if not (run / CONFIG).is_file():
        raise ValueError(f"expected `run` of czsl train or czsl ablate, got {run}, which has no {CONFIG}")
    if not (run / RESULTS).is_file():
        if "recipe" in read_settings(run):
            raise ValueError(
                f"expected `run` of czsl train or czsl ablate, got {run}, which holds one saved model; czsl predict "
                "takes it without seed and row, all else asks for the folder of the command that trained it"
            )
        raise ValueError(
            f"expected `run` to be finished, got {run}, which has no {RESULTS}; its czsl command, given again, "
            "completes it"
        )
    results = read_results(run)
    seeds = results["config"]["seeds"]
    if seed is not None and seed not in seeds:
        raise ValueError(f"expected `seed` to be one of {', '.join(map(str, seeds))}, got {seed}")
    return results, seeds[0] if seed is None else seed


def dataset_of(run: Path, config: dict[str, Any], data: Path | None = None) -> CompositionDataset:
    """The data set of a command, where it was or, if it was moved, in another folder.

    Raises:
        ValueError: There is none, or it is not what the command was given.
    """
    folder = Path(run / "shapes" if config["shapes"] else config["data"]) if data is None else data
    if data is None and not folder.exists():
        raise DataError(f"{folder}: expected the data set of {run}, got nothing; pass --data if it was moved")
    try:
        dataset = _same_dataset(run, config, folder)
    except DataError as error:
        if data is not None or not config["shapes"]:
            raise
        raise DataError(f"{error}; the czsl command of {run}, given again, draws it anew") from error
    recorded = read_settings(run)
    return replace(dataset, space=dataset.space.with_words(recorded.get("words", {})))


def _same_dataset(run: Path, config: dict[str, Any], folder: Path) -> CompositionDataset:
    """The data set in a folder, if it is that which a command was given."""
    # The words of prompts were written down: a file of them may be gone, or another by now.
    dataset = read_dataset(folder, **{**reading_of(config), "names": "published"})
    recorded = read_settings(run)
    if recorded.get("data_digest", labels_digest(dataset.root)) != labels_digest(dataset.root):
        raise ValueError(
            f"expected {dataset.root} with the labels that {run} was trained on, got other ones; czsl evaluate scores "
            "other data"
        )
    if "pictures_digest" in recorded:
        check_pictures(dataset, recorded["pictures_digest"], run / PICTURES)
    return dataset


def one_device(trainer: dict[str, Any]) -> dict[str, Any]:
    """Flags of a training, for scoring: what was trained on eight devices may be scored on a laptop."""
    return {name: value for name, value in trainer.items() if name not in ("devices", "strategy", "num_nodes")}


def config_of(results: dict[str, Any]) -> Config:
    """The configuration that a results file quotes."""
    known = {name: value for name, value in results["config"].items() if name != "shapes"}
    options = from_plain(Options, known.pop("options"), "options")
    added = tuple(known.pop("add"))
    return Config(**known, options=options, add=added, sources=results["sources"], shapes=None)


def evaluate(
    run: Path,
    *,
    data: Path | None = None,
    split: str = "test",
    world: Literal["closed", "open"] = "closed",
    feasibility: str | None = None,
    masking: Masking | None = None,
    rows: list[str] | None = None,
    trainer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Score the models of a finished command on a split, in one pass for each model and seed.

    Args:
        run: Folder of the command.
        data: Another data set over words that the models know; default: its own. A pair is seen if the models were
            trained on it. Memory banks are filled from its training images.
        split: ``"train"``, ``"val"`` or ``"test"``.
        world: ``"open"`` also masks the open world's scores, as in ``czsl ablate``.
        feasibility, masking: With world ``"open"``; default: those of the command, else ``"encoder"``, ``"clean"``.
        rows: Keys of the rows; default: all whose models are kept.
        trainer: Flags of Lightning's Trainer; default: those of the command, on one device.

    Returns:
        What :func:`~czsl_heads.training.ablate.run_ablation` writes, without studies, of this split.

    Raises:
        ValueError: The folder is of no finished command, a row or split is unknown or not kept, or the data has
            unknown words.
    """
    check_choice("split", split, SPLITS)
    results, _ = finished(run)
    results = {name: value for name, value in results.items() if name != SEAL}
    budgets = {row["key"]: row["budget"] for row in results["rows"]}
    left_out = [key for key, budget in budgets.items() if budget != "best"]
    for key in rows or ():
        check_choice("rows", key, budgets)
        if key in left_out:
            raise ValueError(f"expected `rows` whose models are kept, got {key}, of which only the shorter budget's is")
    config = _changed(results, data, {"world": world, "feasibility": feasibility, "masking": masking}, trainer)
    wanted = [row for row in config.rows if row.key in (rows or budgets.keys() - left_out)]
    reading = {**reading_of(results["config"]), "names": "published"}  # words are those of the models
    own = dataset_of(run, results["config"]) if data is None else read_dataset(data, **reading)
    dataset = known_words(own, run / f"seed{config.seeds[0]}" / wanted[0].model.folder)
    open_world = None
    if world == "open":
        open_world = OpenWorld(feasibility_table(config, dataset.space), config.masking)
    if left_out and not rows:
        say(f"without rows {', '.join(left_out)}, whose models are not kept")

    readouts: dict[str, dict[str, Readout]] = {}
    for row in wanted:
        readout = config.readout(row)
        readouts.setdefault(row.model.folder, {})[readout.key] = readout
    records: list[dict[str, dict[str, Any]]] = [{} for _ in config.seeds]
    for seed, record in zip(config.seeds, records):
        for folder, ways in readouts.items():
            path = run / f"seed{seed}" / folder
            found = evaluate_model(path, dataset, ways, split=split, trainer=config.trainer, open_world=open_world)
            record[folder] = _record(path, found)
    chance = chance_of(dataset, split)
    lines = [row_results(row, config, records) for row in wanted]
    lines = [line | {"at_chance": at_chance(line, chance)} for line in lines]
    return {
        **results,
        "config": {**plain(config.as_dict()), "shapes": None if data else results["config"]["shapes"]},
        "environment": environment(),
        "split": split,
        "data": {**describe(own), "images": {split: len(own.samples[split])}},
        "chance": chance,
        "rows": lines,
        "comparisons": compared(config.whole_table, lines),
        "studies": {},
    }


def _changed(
    results: dict[str, Any], data: Path | None, masked: dict[str, Any], trainer: dict[str, Any] | None
) -> Config:
    """The configuration of a command, for scoring: with what is given in place of what was trained with."""
    settings = {**OPEN_WORLD, **results["config"]}
    if masked["world"] == "closed":
        settings |= OPEN_WORLD  # a file of the training's open world is not asked for, and may be gone
    settings |= {name: value for name, value in masked.items() if value is not None}
    settings["trainer"] = one_device(settings["trainer"]) if trainer is None else trainer
    if data is not None:
        settings["data"] = str(data.resolve())
    return config_of({**results, "config": settings})


def _record(path: Path, evaluation: Evaluation) -> dict[str, Any]:
    """The record of a trained model, with what was found now in place of what was found behind the training."""
    record: dict[str, Any] = read_record(path)
    best = record["budgets"]["best"]
    chosen = {name: best[name] for name in ("best_epoch", "selected")}
    return {**record, "budgets": {"best": chosen | tested(evaluation)}}


def trained_space(model: Path) -> CompositionSpace:
    """The label space of a trained model, by its folder."""
    return space_from_dict(read_saved(model)["label_space"])


def known_words(dataset: CompositionDataset, model: Path) -> CompositionDataset:
    """The data set over the words of a trained model, in their order; a pair is seen if the model was trained on it.

    Raises:
        DataError: The data set has a word that the model does not know.
    """
    trained = trained_space(model)
    if dataset.space == trained:
        return dataset
    for kind in ("attributes", "objects"):
        known = set(getattr(trained, kind))
        if unknown := [word for word in getattr(dataset.space, kind) if word not in known]:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise DataError(f"{dataset.root}: expected {kind} that the model knows, got {unknown[0]!r}{more}")
    names = dataset.space.pair_names
    seen = {trained.pair_names[column] for column in trained.seen_mask.nonzero()[:, 0].tolist()}
    space = CompositionSpace(
        trained.attributes,
        trained.objects,
        seen=[name for name in names if name in seen],
        unseen=[name for name in names if name not in seen],
        words=trained.words,
    ).subset(names)
    return replace(dataset, space=space)
