"""Lightning as it is used here: its trainer, and which of its words are let through."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from czsl_heads.training.checkpoints import CHECKPOINTS, LastEpoch, WholeCheckpoints

Found = TypeVar("Found")

_SETTINGS: dict[str, Any] = {
    "devices": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # ours are seeded by epoch, or keep the order of the file
}


def is_main_process() -> bool:
    """Whether this process is the one that writes results; Lightning starts several for several devices."""
    return int(rank_zero_only.rank) == 0  # type: ignore[attr-defined]


def say(words: str) -> None:
    """Tell the terminal, once for all processes."""
    if is_main_process():
        print(words, file=sys.stderr, flush=True)


def testing_trainer(flags: dict[str, Any]) -> lightning.Trainer:
    """A trainer that writes nothing."""
    return lightning.Trainer(**{**_SETTINGS, **flags, "logger": False, "enable_checkpointing": False})


def check_trainer(flags: dict[str, Any]) -> int:
    """How many devices train; ValueError if ``lightning.Trainer`` does not take these flags here.

    A precision that makes float16 of what is trained is refused: after one step of Adam it would be NaN.
    """
    if str(flags.get("precision")) in ("16-true", "transformer-engine-float16"):
        raise ValueError(
            f"expected `trainer.precision` that keeps trained weights out of float16, such as 16-mixed, bf16-mixed or "
            f"bf16-true, got {flags['precision']}"
        )
    return int(_built(flags).world_size)


def _built(flags: dict[str, Any]) -> lightning.Trainer:
    """A testing trainer; ValueError in words if there is none of these flags, or other processes than they ask for."""
    started = _started_together()
    try:
        with quiet():
            trainer = testing_trainer(flags)
    except IndexError as error:  # one process has no device of its own
        if started is None:
            raise
        raise ValueError(f"{_TOGETHER.format(started)}, got {flags}") from error
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise ValueError(
            f"expected `trainer` to hold flags that lightning.Trainer takes, got {flags}: {error}"
        ) from error
    if started not in (None, trainer.world_size):
        raise ValueError(f"{_TOGETHER.format(started)}, got {trainer.num_devices} and {trainer.num_nodes}")
    if started is None and trainer.num_nodes > 1:
        raise ValueError(
            f"expected torchrun or srun to start the processes of several nodes, got `trainer.num_nodes` "
            f"{trainer.num_nodes} without"
        )
    return trainer


_TOGETHER = (
    "expected `trainer.devices` per node and `trainer.num_nodes` that make up the {} processes which were started "
    "together"
)


def _started_together() -> int | None:
    """How many processes a launcher started, this one among them; None if there is no launcher but Lightning's own."""
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            return environment().world_size()
    return None


def main_first(flags: dict[str, Any], work: Callable[[], Found]) -> Found:
    """Do something in the main process, and behind it in the others of a training, which leave if it fails there.

    torchrun and SLURM start all processes at once. Lightning's own launcher has the main one start the others later.

    Args:
        flags: Of Lightning's Trainer.
        work: What is done.

    Raises:
        ValueError: The flags are wrong here.
        SystemExit: In another than the main process: that has failed, and told why.
    """
    strategy = _built(flags).strategy
    environment = getattr(strategy, "cluster_environment", None)
    if environment is None or isinstance(environment, LightningEnvironment):
        return work()

    with quiet():
        strategy.setup_environment()  # lets the processes find each other; trainers to come find it done
    if not is_main_process():
        if not strategy.broadcast(None):
            raise SystemExit(1)
        return work()
    try:
        found = work()
    except Exception:
        strategy.broadcast(False)
        raise
    strategy.broadcast(True)
    return found


def fitting_trainer(
    folder: Path, best: Sequence[ModelCheckpoint], *, epochs: int, batches: int, accumulate: int, flags: dict[str, Any]
) -> lightning.Trainer:
    """A trainer of a model in ``folder``: it logs, and keeps the ``best`` and the last epoch.

    Args:
        folder: Where logs and checkpoints go.
        best: What keeps epochs that are chosen.
        epochs, batches: How many, and how many batches an epoch has.
        accumulate: Batches in a step of the optimiser.
        flags: Of Lightning's Trainer.
    """
    folder = beyond_home(folder)
    settings = {**_SETTINGS, **flags, "max_epochs": epochs, "log_every_n_steps": min(10, batches)}
    settings["accumulate_grad_batches"] = accumulate
    settings["plugins"] = [*_listed(flags.get("plugins")), WholeCheckpoints()]
    # The last of the callbacks, so that it holds the state of the others.
    last = LastEpoch(folder / CHECKPOINTS)
    with quiet():
        # Each attempt gets its own log folder: what an interrupted one logged is kept.
        loggers = [CSVLogger(folder, name="logs"), TensorBoardLogger(folder, name="tensorboard")]
        return lightning.Trainer(**settings, callbacks=[*best, last], logger=loggers)


def beyond_home(folder: Path) -> Path:
    """The same folder under a name that Lightning does not take for somebody's home, as it does ``~``."""
    return Path(os.path.abspath(folder)) if str(folder).startswith("~") else folder


def _listed(plugins: Any) -> list[Any]:
    if plugins is None:
        return []
    return [*plugins] if isinstance(plugins, (list, tuple)) else [plugins]


_UNASKED = (
    "does not have many workers",
    "GPU available but not used",
    "sync_dist=True",  # every process logs what all have found
    "smaller than the logging interval",
    "Checkpoint directory .* exists and is not empty",  # of a run that is resumed
    "LeafSpec.*is deprecated",
    "Found .* module\\(s\\) in eval mode",  # those that are frozen
)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's advice on what is decided here, and its notes on the hardware."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels, told = [logger.level for logger in loggers], threading.excepthook
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    threading.excepthook = _told_once
    try:
        with warnings.catch_warnings():
            for words in _UNASKED:
                warnings.filterwarnings("ignore", message=f".*{words}")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        threading.excepthook = told


def _told_once(found: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread: what that meets, such as a full disk, is raised again in the main one."""
    if not isinstance(found.exc_value, OSError):
        threading.__excepthook__(found)


@contextmanager
def interruptible() -> Iterator[None]:
    """Lightning answers Ctrl-C by leaving Python."""
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
