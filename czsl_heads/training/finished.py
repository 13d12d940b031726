"""A finished command: its results, its data, and its models scored again on another split, other data or world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from czsl_heads._checks import check_choice
from czsl_heads._files import read_json
from czsl_heads.data.layout import SPLITS, CompositionDataset, DataError, read_dataset
from czsl_heads.functional.feasibility import Masking
from czsl_heads.models.recipe import from_plain
from czsl_heads.models.saved import CONFIG, RESULTS, space_from_dict
from czsl_heads.space import CompositionSpace
from czsl_heads.training.ablate import compared, row_summary
from czsl_heads.training.config import Config
from czsl_heads.training.open_world import OpenWorld, feasibility_table
from czsl_heads.training.options import Options
from czsl_heads.training.rows import Readout, Row
from czsl_heads.training.run import RECORD, evaluate_model


def finished(run: Path, seed: int | None = None) -> tuple[dict[str, Any], int]:
    """The results of a finished command, and the seed to use; default: the first.

    Raises:
        ValueError: The folder is of no command, of an unfinished one, of another version, or lacks the seed.
    """
    if not (run / CONFIG).is_file():
        raise ValueError(f"expected `run` of czsl train or czsl ablate, got {run}, which has no {CONFIG}")
    if not (run / RESULTS).is_file():
        raise ValueError(
            f"expected `run` to be finished, got {run}, which has no {RESULTS}; its czsl command, given again, "
            "completes it"
        )
    results = read_json(run / RESULTS)
    needed = ("config", "shown", "rows", "comparisons", "studies")
    if missing := [name for name in needed if name not in results]:
        raise ValueError(f"expected {run / RESULTS} of this version of czsl, got one without {', '.join(missing)}")
    seeds = results["config"]["seeds"]
    if seed is not None and seed not in seeds:
        raise ValueError(f"expected `seed` to be one of {', '.join(map(str, seeds))}, got {seed}")
    return results, seeds[0] if seed is None else seed


def dataset_of(run: Path, config: dict[str, Any], data: Path | None = None) -> CompositionDataset:
    """The data set of a command, or the one in another folder."""
    if data is not None:
        return read_dataset(data)
    return read_dataset(run / "shapes" if config["shapes"] else config["data"])


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
    feasibility: str = "encoder",
    masking: Literal["clean", "official"] = "clean",
    rows: list[str] | None = None,
    trainer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Score the models of a finished command on a split, in one pass for each model and seed.

    Args:
        run: Folder of the command.
        data: Another data set over words that the models know; default: its own. A pair is seen if the models were
            trained on it. Memory banks are filled from its training images.
        split: ``"train"``, ``"val"`` or ``"test"``.
        world, feasibility, masking: ``"open"`` also masks the open world's scores, as in ``czsl ablate``.
        rows: Keys of the rows; default: all.
        trainer: Flags of Lightning's Trainer; default: those of the command.

    Returns:
        What :func:`~czsl_heads.training.ablate.run_ablation` writes, without studies, of this split.

    Raises:
        ValueError: The folder is of no finished command, a row or split is unknown, or the data has unknown words.
    """
    check_choice("split", split, SPLITS)
    check_choice("masking", masking, get_args(Masking))
    results, _ = finished(run)
    keys = [row["key"] for row in results["rows"]]
    for key in rows or ():
        check_choice("rows", key, keys)
    config = replace(config_of(results), world=world, feasibility=feasibility, masking=masking)
    if trainer is not None:
        config = replace(config, trainer=trainer)
    wanted = [row for row in config.rows if row.key in (rows or keys) and row.budget == "best"]
    trained_on = run / f"seed{config.seeds[0]}" / wanted[0].model.folder
    dataset = known_words(dataset_of(run, results["config"], data), trained_on)
    open_world = None
    if world == "open":
        open_world = OpenWorld(feasibility_table(config, dataset.space), masking)

    found = [_scored(run, config, wanted, dataset, split, open_world, seed) for seed in config.seeds]
    before = {row["key"]: row for row in results["rows"]}
    lines = []
    for row in wanted:
        by_seed = [scores[row.key] for scores in found]
        kept = {name: before[row.key][name] for name in ("key", "title", "transductive", "model", "budget", "readout")}
        trainable = {"trainable_parameters": before[row.key]["trainable_parameters"]}
        lines.append(kept | trainable | row_summary(by_seed) | {"by_seed": by_seed})
    masked = {"world": world, "feasibility": feasibility, "masking": masking}
    return {
        **results,
        "config": {**results["config"], **(masked if world == "open" else {"world": "closed"})},
        "split": split,
        "data": {**results["data"], "images": {split: len(dataset.samples[split])}},
        "rows": lines,
        "comparisons": compared(config.whole_table, lines),
        "studies": {},
    }


def _scored(
    run: Path,
    config: Config,
    rows: list[Row],
    dataset: CompositionDataset,
    split: str,
    open_world: OpenWorld | None,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """What each row scored with one seed, by key; one pass for each trained model."""
    found: dict[str, dict[str, Any]] = {}
    for folder in dict.fromkeys(row.model.folder for row in rows):
        own = [row for row in rows if row.model.folder == folder]
        path = run / f"seed{seed}" / folder
        budget = read_json(path / RECORD)["budgets"]["best"]
        readouts: dict[str, Readout] = {row.key: config.readout(row) for row in own}
        evaluation = evaluate_model(path, dataset, readouts, split=split, trainer=config.trainer, open_world=open_world)
        searches = {} if evaluation.thresholds is None else evaluation.thresholds.as_dicts()
        for row in own:
            found[row.key] = {
                "seed": seed,
                "best_epoch": budget["best_epoch"],
                "selected": budget["selected"],
                "test": evaluation.as_dicts()[row.key],
                "gap": evaluation.gap,
                "rejected": evaluation.rejected,
                **({"feasibility": searches[row.key]} if searches else {}),
            }
    return found


def known_words(dataset: CompositionDataset, model: Path) -> CompositionDataset:
    """The data set over the words of a trained model, in their order; a pair is seen if the model was trained on it.

    Raises:
        DataError: The data set has a word that the model does not know.
    """
    trained = space_from_dict(read_json(model / CONFIG)["label_space"])
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
    ).subset(names)
    return replace(dataset, space=space)
