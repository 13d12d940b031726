"""One trained model in one folder: build, fit or resume, keep the best epoch, test."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from czsl_heads._files import whole_file, write_json
from czsl_heads.adapters.lora import add_lora
from czsl_heads.adapters.patch_drop import drop_patches
from czsl_heads.data.layout import CompositionDataset
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.encoders.wrap import wrap
from czsl_heads.heads.condenser import VACondenser
from czsl_heads.heads.sparse_align import POOLS, Reduce, SparseAlignHead
from czsl_heads.models.sac import SAC, TrainStage
from czsl_heads.space import CompositionSpace
from czsl_heads.training.evaluate import WORLDS, Evaluation, Readout, World, new_bank
from czsl_heads.training.open_world import OpenWorld
from czsl_heads.training.options import SACOptions
from czsl_heads.training.stage import Stage
from czsl_heads.training.trainer import (
    BestWithin,
    check_trainer,
    fitting_trainer,
    interruptible,
    is_main_process,
    quiet,
    testing_trainer,
)

WEIGHTS, BANK, RECORD = "weights.safetensors", "bank.safetensors", "run.json"


def build_sac(
    encoder_name: str,
    space: CompositionSpace,
    options: SACOptions,
    *,
    reduce: Reduce = "max",
    condenser: bool = False,
) -> SAC:
    """A SAC ready to be trained: frozen CLIP, LoRA on its vision tower, soft prompts, heads."""
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
    if options.patch_drop:
        drop_patches(encoder, options.patch_drop)
    gathering = VACondenser(encoder.dim, depth=options.depth, dropout=options.condenser_dropout) if condenser else False
    return SAC(
        encoder,
        space,
        head=build_head(encoder, options, reduce),
        condenser=gathering,
        bank=False,
        context=options.context,
        prompt_dropout=options.prompt_dropout,
        fusion=options.fusion,
        alpha=options.alpha,
        beta=options.beta,
        gamma=options.gamma,
        direction=options.direction,
        checkpoint=options.checkpoint,
    )


def build_head(encoder: Encoder, options: SACOptions, reduce: Reduce) -> SparseAlignHead:
    """The alignment head that the options describe."""
    return SparseAlignHead(
        reduce,
        k=options.topk if reduce == "topk" else None,
        temperature=options.temperature,
        dim=encoder.dim if reduce in POOLS else None,
        include_cls=options.include_cls,
        cls_weight=options.cls_weight,
        logit_scale=encoder.logit_scale,
    )


def train_model(
    folder: Path,
    dataset: CompositionDataset,
    options: SACOptions,
    readouts: dict[str, Readout],
    *,
    encoder: str = "tiny",
    reduce: Reduce = "max",
    stage: TrainStage = "align",
    base: Path | None = None,
    extra_epochs: int = 0,
    seed: int = 0,
    trainer: dict[str, Any] | None = None,
    open_world: OpenWorld | None = None,
) -> dict[str, Any]:
    """Train and test one model; a run that was interrupted goes on from its last whole epoch.

    Args:
        folder: Of this run. A finished run there is not repeated: its record is returned.
        dataset: Data set to train, validate and test on.
        options: What is trained, and how.
        readouts: Ways to score the test images.
        encoder: A name that :func:`czsl_heads.wrap` takes.
        reduce: Reduction of the :class:`~czsl_heads.SparseAlignHead`.
        stage: ``"align"`` has no condenser; ``"condense"`` trains one on the frozen model of ``base``; ``"joint"``
            trains both at once.
        base: Folder of the finished run that ``"condense"`` starts from.
        extra_epochs: Of ``"align"``: trained on behind ``options.epochs``, for a second result with the longer budget.
        seed: Decides initialisation, order, augmentation and dropout.
        trainer: Arguments of ``lightning.Trainer``, such as ``precision="bf16-mixed"``, ``accelerator``, ``devices``.
        open_world: Also test with the scores of the open world masked by feasibility.

    Returns:
        The record: settings, and by budget (``"best"``, and ``"longer"`` with ``extra_epochs``) the best epoch, its
        validation AUC, the results on the test images by readout, world and protocol, and the modality gap; with
        ``open_world`` also world ``"feasible"``, and by readout what the search for the threshold found.

    Raises:
        KeyboardInterrupt: The run was interrupted; calling again resumes it.
    """
    record_path = folder / RECORD
    if record_path.exists():
        record: dict[str, Any] = json.loads(record_path.read_text())
        return record
    lightning.seed_everything(seed, verbose=False)
    sac = build_sac(encoder, dataset.space, options, reduce=reduce, condenser=stage != "align")
    if base is not None:
        load_weights(sac, base / WEIGHTS, partial=True)
    budgets = _budgets(options, stage, extra_epochs)
    learned = _learned(sac)
    module = Stage(sac, dataset, options, stage=stage, seed=seed)
    checkpoints = [BestWithin(folder / "checkpoints", name, epochs=epochs) for name, epochs in budgets.items()]
    fitter = fitting_trainer(
        folder, options, len(dataset.samples["train"]), checkpoints, max(budgets.values()), trainer or {}
    )
    last = folder / "checkpoints" / "last.ckpt"
    results = {}
    with quiet(), interruptible():
        fitter.fit(module, ckpt_path=last if last.exists() else None, weights_only=True)
        for name, checkpoint in reversed([*zip(budgets, checkpoints)]):  # "best" comes last, and stays in the model
            best = torch.load(checkpoint.best_model_path, weights_only=True, map_location="cpu")
            module.load_state_dict(best["state_dict"], strict=False)
            tested = _test(sac, dataset, options, readouts, fitter, folder, open_world)
            results[name] = _epoch(checkpoint, best) | tested
    record = {
        "encoder": encoder,
        "reduce": reduce,
        "stage": stage,
        "seed": seed,
        "options": asdict(options),
        "space": _space_record(dataset.space),
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "budgets": dict(reversed(results.items())),
    }
    if is_main_process():
        with whole_file(folder / WEIGHTS) as path:
            save_file({name: sac.get_parameter(name).detach().cpu().contiguous() for name in learned}, path)
        record = write_json(record_path, record)  # last: it marks the run as finished
    fitter.strategy.barrier()  # no process may look for the record before it is there
    return record


def _budgets(options: SACOptions, stage: TrainStage, extra_epochs: int) -> dict[str, int]:
    """Epochs by the name of the budget, ascending."""
    if stage == "condense":
        return {"best": options.extra_epochs}
    if stage == "joint":
        return {"best": options.epochs + options.extra_epochs}
    longer = {"longer": options.epochs + extra_epochs} if extra_epochs else {}
    return {"best": options.epochs, **longer}


def _learned(sac: SAC) -> list[str]:
    """What is trained in some stage, and so belongs into a file of weights."""
    return [name for name, parameter in sac.named_parameters() if parameter.requires_grad]


def _epoch(checkpoint: ModelCheckpoint, best: dict[str, Any]) -> dict[str, Any]:
    score = checkpoint.best_model_score
    return {
        "best_epoch": int(best["epoch"]) + 1,
        "validation_auc": None if score is None or not score.isfinite() else score.item(),
    }


def _test(
    sac: SAC,
    dataset: CompositionDataset,
    options: SACOptions,
    readouts: dict[str, Readout],
    fitter: lightning.Trainer,
    folder: Path,
    open_world: OpenWorld | None,
) -> dict[str, Any]:
    evaluation = Evaluation(sac, dataset, options, readouts, open_world=open_world)
    fitter.test(evaluation, verbose=False)
    if any(plan.slots == options.slots for plan in evaluation.plans) and is_main_process():
        with whole_file(folder / BANK) as path:
            save_file(evaluation.filled_bank("closed", options.slots).cpu().state_dict(), path)
    found = {"test": as_dicts(evaluation), "gap": evaluation.gap, "rejected": evaluation.rejected}
    return found if evaluation.thresholds is None else found | {"feasibility": evaluation.thresholds.as_dicts()}


def as_dicts(evaluation: Evaluation) -> dict[str, Any]:
    """The results of an evaluation, for a JSON file: by readout, world and protocol."""
    return {
        name: {
            world: {protocol: result.as_dict() for protocol, result in by_protocol.items()}
            for world, by_protocol in by_world.items()
        }
        for name, by_world in evaluation.results.items()
    }


def evaluate_model(
    folder: Path,
    dataset: CompositionDataset,
    readouts: dict[str, Readout],
    *,
    split: str = "test",
    worlds: tuple[World, ...] = WORLDS,
    trainer: dict[str, Any] | None = None,
) -> Evaluation:
    """Score a finished run in other ways, in one pass; nothing is written."""
    record = json.loads((folder / RECORD).read_text())
    options = SACOptions(**record["options"])
    evaluation = Evaluation(load_run(folder), dataset, options, readouts, split=split, worlds=worlds)
    check_trainer(trainer or {})
    with quiet(), interruptible():
        testing_trainer(trainer or {}).test(evaluation, verbose=False)
    return evaluation


def load_run(folder: Path) -> SAC:
    """The trained model of a finished run, in eval mode, with its memory bank if it has one.

    Raises:
        ValueError: The files do not fit together.
        OSError: A file is missing.
    """
    record = json.loads((folder / RECORD).read_text())
    space, options = _recorded_space(record["space"]), SACOptions(**record["options"])
    aligned = record["stage"] == "align"
    sac = build_sac(record["encoder"], space, options, reduce=record["reduce"], condenser=not aligned)
    load_weights(sac, folder / WEIGHTS)
    if (folder / BANK).exists():
        bank = new_bank(space, sac.encoder.dim, sac, options)
        bank.load_state_dict(_tensors(folder / BANK))
        sac.use_bank(bank, space)
    return sac.eval()


def load_weights(sac: SAC, path: Path, *, partial: bool = False) -> None:
    """Load what a run has learned; with ``partial`` the file may lack parts of the model.

    Raises:
        ValueError: The file has other names or shapes than the model.
    """
    found = _tensors(path)
    wanted = {name: sac.get_parameter(name).shape for name in _learned(sac)}
    if partial:
        wanted = {name: shape for name, shape in wanted.items() if name in found}
    shapes = {name: tensor.shape for name, tensor in found.items()}
    if wanted != shapes:
        odd = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
        raise ValueError(f"expected weights of this model in {path}, got other names or shapes: {', '.join(odd)}")
    sac.load_state_dict(found, strict=False)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"expected tensors of a run in {path}, got a damaged file ({error})") from error


def _space_record(space: CompositionSpace) -> dict[str, Any]:
    return {
        "attributes": list(space.attributes),
        "objects": list(space.objects),
        "pairs": space.pairs.tolist(),
        "seen": space.seen_mask.tolist(),
    }


def _recorded_space(record: dict[str, Any]) -> CompositionSpace:
    pairs = [(attr, obj) for attr, obj in record["pairs"]]
    seen, unseen = ([pair for pair, mark in zip(pairs, record["seen"]) if mark is kind] for kind in (True, False))
    return CompositionSpace(record["attributes"], record["objects"], seen=seen, unseen=unseen).subset(pairs)
