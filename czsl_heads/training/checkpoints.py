"""Checkpoints of a training: written whole, on the file system of the run, and verified when they are read."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from czsl_heads._files import whole_file
from czsl_heads._sealed import SEAL, DamagedError

CHECKPOINTS, LAST = "checkpoints", "last"
SELECTED = "val/selected"  # what an epoch is chosen by: the larger the better


class WholeCheckpoints(CheckpointIO):
    """Lightning's door to files, for checkpoints that appear whole or not at all and hold a digest of their content.

    Lightning's own writes to the folder of temporary files first, which may be another file system: what it moves from
    there can be cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        whole = io.BytesIO()
        torch.save({**checkpoint, SEAL: content_digest(checkpoint)}, whole)
        with whole_file(Path(path)) as temporary:
            temporary.write_bytes(whole.getbuffer())

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class LastEpoch(ModelCheckpoint):
    """Keeps the last epoch, in a folder that may be moved between two attempts.

    Lightning would forget then what was best.
    """

    def __init__(self, folder: Path, name: str = LAST, **arguments: Any) -> None:
        super().__init__(folder, name, enable_version_counter=False, **arguments)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        here = {name: self._here(state_dict[name]) for name in paths}
        best = {self._here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **here, "best_k_models": best, "dirpath": self.dirpath})

    def _here(self, path: str) -> str:
        return str(Path(str(self.dirpath)) / Path(path).name) if path else path


class BestWithin(LastEpoch):
    """Keeps the best of the first epochs; later ones are trained for other rows of a table."""

    def __init__(self, folder: Path, name: str, *, epochs: int) -> None:
        super().__init__(folder, name, monitor=SELECTED, mode="max")
        self.epochs = epochs  # the trainer validates once an epoch: the flags that change that are refused

    @property
    def state_key(self) -> str:
        return f"{super().state_key}, within {self.epochs} epochs"

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.current_epoch < self.epochs:
            super().on_train_epoch_end(trainer, pl_module)


def content_digest(content: Any) -> str:
    """SHA-256 of nested mappings and lists of tensors and plain values, wherever the tensors are.

    Example:
        >>> state = {"weight": torch.ones(2), "step": 3}
        >>> content_digest(state) == content_digest({**state, "step": 4})
        False
    """
    digest = hashlib.sha256()
    _update(digest.update, content)
    return digest.hexdigest()


def _update(update: Callable[[Any], None], content: Any) -> None:
    if isinstance(content, Tensor):
        update(f"tensor {content.dtype} {tuple(content.shape)};".encode())
        flat = content.detach().cpu().contiguous().reshape(-1)
        update(flat.view(torch.uint8).numpy().data)
    elif isinstance(content, Mapping):
        update(f"mapping {len(content)};".encode())
        for name, value in content.items():
            update(f"{name!r}:".encode())
            _update(update, value)
    elif isinstance(content, (list, tuple)):
        update(f"list {len(content)};".encode())
        for value in content:
            _update(update, value)
    else:
        update(f"{content!r};".encode())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, on the CPU. One without a digest, of an earlier version, is taken as it is.

    Raises:
        DamagedError: It is not as it was written.
        OSError: It cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of pickle, of zip, of torch: whatever the damaged bytes say
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise DamagedError(f"expected the checkpoint {path} as it was written, got damage ({reason})") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise DamagedError(f"expected a checkpoint in {path}, got another file")
    seal = content.pop(SEAL, None)
    if seal is not None and seal != content_digest(content):
        raise DamagedError(f"expected the checkpoint {path} as it was written, got other content")
    return content


def trained_names(module: nn.Module) -> set[str]:
    """Names of the tensors that a checkpoint holds: all but frozen parameters."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return set(module.state_dict()) - frozen


def read_trained(path: Path, module: nn.Module) -> dict[str, Any]:
    """A checkpoint that has the tensors which training changes in a module, no more and no less.

    Raises:
        DamagedError: As :func:`read_checkpoint`, or it has others.
    """
    content = read_checkpoint(path)
    wanted, found = trained_names(module), set(content["state_dict"])
    if odd := sorted(wanted ^ found):
        raise DamagedError(f"expected a checkpoint of this model in {path}, got one of other tensors: {odd[0]}")
    return content


def last_good(folder: Path, names: Sequence[str], module: nn.Module, say: Callable[[str], None]) -> Path | None:
    """Where a training goes on: its last checkpoint, or an earlier one where that is damaged; None: from the start.

    Where what was chosen among the epochs is damaged, that epoch has to be trained again. A damaged folder of
    checkpoints is removed then.

    Args:
        folder: Of the checkpoints.
        names: Of the checkpoints that keep chosen epochs, in the order in which they are written.
        module: What is trained.
        say: Is told what is damaged, and what follows from that.
    """
    damaged: dict[str, str] = {}
    for name in (LAST, *names):
        path = folder / f"{name}.ckpt"
        try:
            if path.exists():
                read_trained(path, module)
        except (DamagedError, OSError) as error:
            damaged[name] = str(error)
    # Among chosen epochs only the one that is written last knows of the others.
    last, earlier = folder / f"{LAST}.ckpt", folder / f"{names[-1]}.ckpt"
    if set(damaged) == {LAST} and earlier.exists():
        say(f"{damaged[LAST]}; the training goes on from {earlier.name}, the last good one")
        return earlier
    if damaged:
        say(f"{next(iter(damaged.values()))}; no other one will do: the training starts anew")
        shutil.rmtree(folder)
        return None
    return last if last.exists() else None


def checkpoint_of(callback: ModelCheckpoint) -> Path:
    """The file of the epoch that was chosen."""
    return Path(os.fspath(callback.best_model_path))
