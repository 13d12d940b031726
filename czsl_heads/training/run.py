"""One training run in one folder: build, fit or resume, keep the best epoch, test."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file, save_file

from czsl_heads._files import whole_file, write_json
from czsl_heads.adapters.lora import add_lora
from czsl_heads.data.layout import CompositionDataset
from czsl_heads.encoders.wrap import wrap
from czsl_heads.heads.sparse_align import Reduce, SparseAlignHead
from czsl_heads.models.sac import SAC
from czsl_heads.space import CompositionSpace
from czsl_heads.training.align import AlignStage
from czsl_heads.training.options import AlignOptions

WEIGHTS, RECORD = "weights.safetensors", "run.json"


def build_sac(encoder_name: str, space: CompositionSpace, options: AlignOptions, *, reduce: Reduce = "max") -> SAC:
    """A SAC ready for stage I: frozen CLIP, LoRA on its vision tower, soft prompts, an alignment head."""
    encoder = wrap(encoder_name)
    if options.lora_rank:
        add_lora(
            encoder,
            matrices=options.lora_matrices,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            dropout=options.lora_dropout,
            layers=options.lora_layers,
        )
    dim = encoder.dim if reduce in ("linear", "attention") else None
    head = SparseAlignHead(reduce, dim=dim, logit_scale=encoder.logit_scale)
    return SAC(
        encoder,
        space,
        head=head,
        context=options.context,
        prompt_dropout=options.prompt_dropout,
        fusion=options.fusion,
    )


def train_align(
    folder: Path,
    dataset: CompositionDataset,
    options: AlignOptions,
    *,
    encoder: str = "tiny",
    reduce: Reduce = "max",
    seed: int = 0,
    trainer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train and test one alignment branch; a run that was interrupted goes on from its last whole epoch.

    Args:
        folder: Of this run. A finished run there is not repeated: its record is returned.
        dataset: Data set to train, validate and test on.
        options: What is trained, and how.
        encoder: A name that :func:`czsl_heads.wrap` takes.
        reduce: Reduction of the :class:`~czsl_heads.SparseAlignHead`.
        seed: Decides initialisation, order, augmentation and dropout.
        trainer: Arguments of ``lightning.Trainer``, such as ``precision="bf16-mixed"``, ``accelerator``, ``devices``.

    Returns:
        The record: settings, best epoch, trainable parameters, and the results on the test images by world and
        protocol.

    Raises:
        KeyboardInterrupt: The run was interrupted; calling again resumes it.
    """
    record_path = folder / RECORD
    if record_path.exists():
        record: dict[str, Any] = json.loads(record_path.read_text())
        return record
    lightning.seed_everything(seed, verbose=False)
    stage = AlignStage(build_sac(encoder, dataset.space, options, reduce=reduce), dataset, options, seed=seed)
    stage.train()  # Lightning keeps the mode it is given, and a wrapped CLIP comes in eval mode
    checkpoint = ModelCheckpoint(
        folder / "checkpoints", "best", monitor="val/auc", mode="max", save_last=True, enable_version_counter=False
    )
    steps = math.ceil(len(dataset.samples["train"]) / options.batch_size)
    fitter = _trainer(folder, options, steps, checkpoint, trainer or {})
    last = folder / "checkpoints" / "last.ckpt"
    with _quiet():
        try:
            fitter.fit(stage, ckpt_path=last if last.exists() else None, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
        best = torch.load(checkpoint.best_model_path, weights_only=True, map_location="cpu")
        stage.load_state_dict(best["state_dict"], strict=False)
        fitter.test(stage, verbose=False)

    score = checkpoint.best_model_score
    trainable = {name: p.detach().cpu() for name, p in stage.sac.named_parameters() if p.requires_grad}
    record = {
        "encoder": encoder,
        "reduce": reduce,
        "seed": seed,
        "options": asdict(options),
        "trainable_parameters": sum(tensor.numel() for tensor in trainable.values()),
        "best_epoch": int(best["epoch"]) + 1,
        "validation_auc": None if score is None or not score.isfinite() else score.item(),
        "test": {
            world: {protocol: result.as_dict() for protocol, result in results.items()}
            for world, results in stage.results.items()
        },
    }
    if is_main_process():
        with whole_file(folder / WEIGHTS) as path:
            save_file({name: tensor.contiguous() for name, tensor in trainable.items()}, path)
        record = write_json(record_path, record)  # last: it marks the run as finished
    return record


def is_main_process() -> bool:
    """Whether this process is the one that writes results; Lightning starts several for several devices."""
    return int(rank_zero_only.rank) == 0  # type: ignore[attr-defined]


def load_align(folder: Path, space: CompositionSpace) -> SAC:
    """The trained model of a finished run, in eval mode; ``space`` must be over the primitives it was trained on."""
    record = json.loads((folder / RECORD).read_text())
    sac = build_sac(record["encoder"], space, AlignOptions(**record["options"]), reduce=record["reduce"])
    weights = load_file(folder / WEIGHTS)
    wanted = {name: p.shape for name, p in sac.named_parameters() if p.requires_grad}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(f"expected `folder` with weights for this space, got other names or shapes: {', '.join(odd)}")
    sac.load_state_dict(weights, strict=False)
    return sac.eval()


_SETTINGS: dict[str, Any] = {
    "devices": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # ours is seeded by epoch, and evaluation stays whole in every process
}


def check_trainer(flags: dict[str, Any]) -> None:
    """Raise ValueError if ``lightning.Trainer`` does not take these flags here."""
    try:
        with _quiet():
            lightning.Trainer(**{**_SETTINGS, **flags}, logger=False, enable_checkpointing=False)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ValueError(
            f"expected `trainer` to hold flags that lightning.Trainer takes, got {flags}: {error}"
        ) from error


def _trainer(
    folder: Path, options: AlignOptions, steps: int, checkpoint: ModelCheckpoint, flags: dict[str, Any]
) -> lightning.Trainer:
    settings = {**_SETTINGS, **flags, "max_epochs": options.epochs, "log_every_n_steps": min(10, steps)}
    with _quiet():
        # Each attempt gets its own log folder: what an interrupted one logged is kept.
        loggers = [CSVLogger(folder, name="logs"), TensorBoardLogger(folder, name="tensorboard")]
        return lightning.Trainer(**settings, callbacks=[checkpoint], logger=loggers)


_UNASKED = (
    "does not have many workers",
    "GPU available but not used",
    "sync_dist=True",  # every process evaluates everything
    "smaller than the logging interval",
    "Checkpoint directory .* exists and is not empty",  # of a run that is resumed
    "LeafSpec.*is deprecated",
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice on what is decided here, and its notes on the hardware."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for words in _UNASKED:
                warnings.filterwarnings("ignore", message=f".*{words}")
            yield
    finally:
        logger.setLevel(level)
