"""One trained model in one folder: build, fit or resume, keep the best epoch, test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from czsl_heads._files import flatten, naming, plain
from czsl_heads._sealed import DamagedError, check_files, file_sha256, read_sealed, write_sealed
from czsl_heads.data.layout import CompositionDataset
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Method
from czsl_heads.models.recipe import Recipe, build, from_plain
from czsl_heads.models.saved import CONFIG, RECORD, WEIGHTS, check_encoder, load_learned, load_model, save_model
from czsl_heads.training.checkpoints import CHECKPOINTS, BestWithin, checkpoint_of, last_good, read_trained
from czsl_heads.training.evaluate import WORLDS, Evaluation, World
from czsl_heads.training.open_world import OpenWorld
from czsl_heads.training.options import Options
from czsl_heads.training.rows import BankPlan, Readout
from czsl_heads.training.stage import Stage
from czsl_heads.training.summary import numbers_of
from czsl_heads.training.threads import fitting_threads
from czsl_heads.training.trainer import (
    beyond_home,
    check_trainer,
    fitting_trainer,
    interruptible,
    is_main_process,
    quiet,
    say,
    testing_trainer,
)


def train_model(
    folder: Path,
    dataset: CompositionDataset,
    recipe: Recipe,
    options: Options,
    readouts: Mapping[str, Readout],
    *,
    base: Path | None = None,
    extra_epochs: int = 0,
    seed: int = 0,
    trainer: dict[str, Any] | None = None,
    open_world: OpenWorld | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train and test one model; a training that was interrupted goes on from its last whole epoch.

    Args:
        folder: Of this model. A finished training there is not repeated; only ways to score that it lacks are added.
        dataset: Data set to train, validate and test on.
        recipe: What the model is made of. With a condenser, and not joint, the condenser alone is trained.
        options: How it is trained.
        readouts: Ways to score the test images, by the names that they get in the record; all their numbers are known.
        base: Folder of the finished model whose method is taken over.
        extra_epochs: Trained on behind ``options.epochs``, for a second result with the longer budget.
        seed: Decides initialisation, order, augmentation and dropout.
        trainer: Arguments of ``lightning.Trainer``, such as ``precision="bf16-mixed"``, ``accelerator``, ``devices``.
        open_world: Also test with the scores of the open world masked by feasibility.
        about: What else the model's card says of the data.

    Returns:
        The record: settings, and by budget (``"best"``, and ``"longer"`` with ``extra_epochs``) the best epoch, the
        number that it was selected by, the results on the test images by readout, world and protocol, and the modality
        gap; with ``open_world`` also world ``"feasible"``, and by readout what the search for the threshold found.

    Raises:
        ValueError: There are epochs, and nothing to train; or ``folder`` holds a model of other settings.
        KeyboardInterrupt: The training was interrupted; calling again resumes it.
    """
    if (finished := _finished(folder)) is not None:
        _check_same(folder, finished, recipe, options, seed)
        return _completed(folder, finished, dataset, readouts, trainer=trainer, open_world=open_world)
    lightning.seed_everything(seed, verbose=False)
    model = build(recipe, dataset.space)
    if base is not None:
        check_encoder(model, base)
        load_learned(getattr(model, "method", model), base / WEIGHTS)
    epochs = _epochs(model, options, extra_epochs)
    learned = check_learning(model, epochs["best"], recipe.method)
    module = Stage(model, dataset, options, seed=seed)
    fitter, checkpoints = _fitter(folder, module, epochs, trainer or {})

    results: dict[str, Any] = {}
    with quiet(), interruptible(), naming(folder), fitting_threads(model.encoder, fitter):
        if epochs["best"]:
            start = last_good(folder / CHECKPOINTS, [*checkpoints], module, say)
            fitter.fit(module, ckpt_path=start, weights_only=True)
        for name in reversed(epochs):  # "best" comes last, and stays in the model
            chosen = _take_best(module, checkpoints[name]) if epochs["best"] else _UNTRAINED
            results[name] = chosen | _test(model, dataset, options, readouts, fitter, open_world)
    record = {
        "recipe": recipe.as_dict(),
        "seed": seed,
        "options": options.as_dict(),
        "trainable_parameters": learned,
        "budgets": dict(reversed(results.items())),
    }
    if is_main_process():
        model.record = _about(model, about or {}, record, readouts)
        record = _save(model, folder, record)
    fitter.strategy.barrier()  # no process may look for the record before it is there
    return record


def _save(model: Method, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write a model, and last its record, which marks the training as finished and says what the files hold."""
    save_model(model, folder)
    files = {name: file_sha256(folder / name) for name in (CONFIG, WEIGHTS)}
    return write_sealed(folder / RECORD, {**record, "files": files})


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished training.

    Raises:
        DamagedError: It, or a file of the model, is not as it was written.
    """
    record = read_sealed(folder / RECORD, ("recipe", "seed", "options", "trainable_parameters", "budgets"))
    check_files(folder, record.get("files", {}))
    return record


def _finished(folder: Path) -> dict[str, Any] | None:
    """The record of a training that need not be repeated."""
    if not (folder / RECORD).exists():
        return None
    try:
        return read_record(folder)
    except DamagedError as error:
        say(f"{error}; the model is made again, from its checkpoints where they are whole")
        return None


_UNTRAINED: dict[str, Any] = {"best_epoch": None, "selected": None}


def check_learning(model: Method, epochs: int, method: str) -> int:
    """How many parameters are trained; ValueError where there are epochs, and none."""
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if epochs and not learned:
        raise ValueError(f"expected `options.epochs` to be 0 for {method}, which learns nothing, got {epochs}")
    return learned


def _epochs(model: Method, options: Options, extra_epochs: int) -> dict[str, int]:
    """Epochs by the name of the budget, ascending."""
    if isinstance(model, Condensed):
        return {"best": options.extra_epochs + (options.epochs if model.joint else 0)}
    longer = {"longer": options.epochs and options.epochs + extra_epochs} if extra_epochs else {}
    return {"best": options.epochs, **longer}


def _fitter(
    folder: Path, module: Stage, epochs: dict[str, int], flags: dict[str, Any]
) -> tuple[lightning.Trainer, dict[str, BestWithin]]:
    """The trainer, and what keeps the best epoch of each budget; where there are no epochs, one that writes nothing."""
    if not epochs["best"]:
        with quiet():
            return testing_trainer(flags), {}
    options = module.options
    place = beyond_home(folder) / CHECKPOINTS
    kept = {name: BestWithin(place, name, epochs=count) for name, count in epochs.items()}
    batches = math.ceil(len(module.dataset.samples["train"]) / options.batch_size)
    longest = max(epochs.values())
    settings: dict[str, Any] = {"epochs": longest, "batches": batches, "accumulate": options.accumulate}
    return fitting_trainer(folder, [*kept.values()], **settings, flags=flags), kept


def _take_best(module: Stage, checkpoint: ModelCheckpoint) -> dict[str, Any]:
    """Go back to the epoch that was chosen, and tell which it was."""
    best = read_trained(checkpoint_of(checkpoint), module)
    module.load_state_dict(best["state_dict"], strict=False)
    score = checkpoint.best_model_score
    selected = None if score is None or not score.isfinite() else score.item()
    return {"best_epoch": int(best["epoch"]) + 1, "selected": selected}


def _test(
    model: Method,
    dataset: CompositionDataset,
    options: Options,
    readouts: Mapping[str, Readout],
    fitter: lightning.Trainer,
    open_world: OpenWorld | None,
) -> dict[str, Any]:
    if not readouts:
        return {"test": {}, "gap": {}, "rejected": 0}
    evaluation = Evaluation(model, dataset, options, dict(readouts), open_world=open_world)
    fitter.test(evaluation, verbose=False)
    _keep_bank(model, evaluation)
    return tested(evaluation)


def _keep_bank(model: Method, evaluation: Evaluation) -> bool:
    """Give the model the bank that its readouts read; whether there is one."""
    slots = evaluation.options.bank.slots
    if not isinstance(model, Condensed) or all(plan.slots != slots for plan in evaluation.plans):
        return False
    model.bank = evaluation.filled_bank("closed", slots)
    return True


def tested(evaluation: Evaluation) -> dict[str, Any]:
    found = {"test": _short_curves(evaluation.as_dicts()), "gap": evaluation.gap, "rejected": evaluation.rejected}
    thresholds = evaluation.thresholds
    return found if thresholds is None else found | {"feasibility": thresholds.as_dicts()}


def _short_curves(test: dict[str, Any]) -> dict[str, Any]:
    """Curves to five digits, which tell shares of up to 100,000 images apart; all else as it is."""

    def shortened(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: _rounded(each) if name == "curve" else shortened(each) for name, each in value.items()}
        return value

    short: dict[str, Any] = shortened(test)
    return short


def _rounded(curve: list[list[float | None]]) -> list[list[float | None]]:
    return [[None if value is None else round(value, 5) for value in point] for point in curve]


def _check_same(folder: Path, record: dict[str, Any], recipe: Recipe, options: Options, seed: int) -> None:
    """Raise ValueError unless the finished model of a folder has this recipe, these options and this seed."""
    # A model of an earlier version lacks the options of later ones, and was trained without.
    defaults = {"recipe": Recipe(recipe.method).as_dict(), "options": Options().as_dict()}
    found = flatten(plain(defaults)) | flatten({name: record[name] for name in ("recipe", "options", "seed")})
    wanted = flatten(plain({"recipe": recipe.as_dict(), "options": options.as_dict(), "seed": seed}))
    for name in sorted(found.keys() | wanted.keys()):
        before, now = found.get(name), wanted.get(name)
        if before != now and name.rpartition(".")[2] not in _SPEED_ONLY:
            raise ValueError(
                f"expected `folder` to be new or of the same settings, got {folder}, whose {name} is {before!r} "
                f"instead of {now!r}"
            )


_SPEED_ONLY = ("workers", "checkpoint")  # they change no number beyond rounding


def _completed(
    folder: Path,
    record: dict[str, Any],
    dataset: CompositionDataset,
    readouts: Mapping[str, Readout],
    *,
    trainer: dict[str, Any] | None,
    open_world: OpenWorld | None,
) -> dict[str, Any]:
    """The record of a finished training, with ways to score that it lacked."""
    best = record["budgets"]["best"]
    missing = {name: readout for name, readout in readouts.items() if name not in best["test"]}
    if not missing:
        return record
    evaluation = evaluate_model(folder, dataset, missing, trainer=trainer, open_world=open_world)
    found = tested(evaluation)
    best["test"] |= found["test"]
    if "feasibility" in found:
        best["feasibility"] = best.get("feasibility", {}) | found["feasibility"]
    best["gap"] = best["gap"] or found["gap"]
    best["rejected"] = max(best["rejected"], found["rejected"])
    if is_main_process():
        model = evaluation.model
        if _keep_bank(model, evaluation):
            model.record = _about(model, model.record, record, readouts)
            record = _save(model, folder, record)
        else:
            record = write_sealed(folder / RECORD, record)
    evaluation.trainer.strategy.barrier()  # no process may read the files while they are written
    return record


def evaluate_model(
    folder: Path,
    dataset: CompositionDataset,
    readouts: Mapping[str, Readout],
    *,
    split: str = "test",
    worlds: tuple[World, ...] = WORLDS,
    trainer: dict[str, Any] | None = None,
    open_world: OpenWorld | None = None,
) -> Evaluation:
    """Score a finished model in other ways, in one pass; nothing is written."""
    options = recorded_options(folder)
    model = load_model(folder)
    evaluation = Evaluation(model, dataset, options, dict(readouts), split=split, worlds=worlds, open_world=open_world)
    check_trainer(trainer or {})
    with quiet(), interruptible():
        testing_trainer(trainer or {}).test(evaluation, verbose=False)
    return evaluation


def recorded_options(folder: Path) -> Options:
    """The options that the model of a folder was trained with."""
    return from_plain(Options, read_record(folder)["options"], "options")


def _about(
    model: Method, about: dict[str, Any], record: dict[str, Any], readouts: Mapping[str, Readout]
) -> dict[str, Any]:
    """What a saved model knows of its training; the numbers are those of its own way to rank, if it was scored so."""
    options, best = from_plain(Options, record["options"], "options"), record["budgets"]["best"]
    own = Readout()
    if isinstance(model, Condensed):
        own = Readout(None, probabilities=True) if model.bank is None else Readout(None, None, BankPlan())
    scored = [name for name, readout in readouts.items() if readout == own.resolved(options)]
    test = numbers_of(best["test"][scored[0]]) if scored else None
    known = {"seed": record["seed"], "epoch": best["best_epoch"], "selection": record["options"]["selection"]}
    return {**about, **known, "test": test}
