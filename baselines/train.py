"""Any row on Lightning: trained over seen pairs, its epoch chosen on validation, tested in the closed world."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from baselines import BASELINES
from baselines.condensed import Condensed
from baselines.method import Align, Method
from baselines.options import Config, Options
from baselines.rows import ROWS, Row
from czsl_heads import CompositionSpace, DynamicMemoryBank, SparseAlignHead, VACondenser, wrap
from czsl_heads._files import write_json
from czsl_heads.data.layout import CompositionDataset
from czsl_heads.functional.protocol import CZSLResult
from czsl_heads.metrics.czsl_score import CZSLScore
from czsl_heads.training.evaluate import PROTOCOLS
from czsl_heads.training.loaders import eval_loader, train_loader
from czsl_heads.training.stage import check_validation
from czsl_heads.training.trainer import (
    BestWithin,
    fitting_trainer,
    interruptible,
    is_main_process,
    quiet,
    testing_trainer,
)

RECORD, CHECKPOINTS = "run.json", "checkpoints"
SELECTED = "val/selected"  # the larger the better


def build(config: Config, space: CompositionSpace, name: str) -> Method:
    """The model of a row, untrained."""
    options, row = config.baseline, ROWS[name]
    head: Align = "cls"
    if row.align != "cls":
        k = options.topk if row.align == "topk" else None
        head = SparseAlignHead(row.align, k=k, include_cls=options.include_cls)  # type: ignore[arg-type]
    method: Method = BASELINES[config.method](wrap(config.encoder), space, align=head, **options.model)
    if row.base is None or row.probabilities:
        return method
    dim, bank = method.encoder.dim, None
    if row.remembers:
        bank = DynamicMemoryBank(len(space), dim, slots=options.slots, temperature=options.bank_temperature)
    weights = {weight: getattr(options, weight) for weight in ("alpha", "beta", "gamma")}
    return Condensed(method, VACondenser(dim, depth=options.depth), bank=bank, **weights)


class Training(lightning.LightningModule):
    """Trains, validates and tests a model; a memory bank is filled from the training images before the test.

    ``row`` says whether and how it is.

    Checkpoints hold all but frozen parameters. Every epoch starts from a generator seeded by (seed, epoch), so one that
    was interrupted gives the same numbers when it is run again.
    """

    def __init__(
        self, model: Any, dataset: CompositionDataset, options: Options, *, seed: int, row: Row = ROWS["cls"]
    ) -> None:
        super().__init__()
        check_validation(dataset)
        self.model, self.dataset, self.options, self.seed = model, dataset, options, seed
        self.row, self._rank = row, model.probabilities if row.probabilities else model.fuse
        self.strict_loading = False
        self.train_pairs = dataset.space.pairs[dataset.space.seen_mask]
        self.register_buffer("_train_row", torch.full((len(dataset.space),), -1), persistent=False)
        self.get_buffer("_train_row")[dataset.space.seen_mask] = torch.arange(len(self.train_pairs))
        self.results: dict[str, CZSLResult] = {}
        self._texts: Any = None
        self._train_texts: Any = None
        self._scores: dict[str, CZSLScore] = {}
        self._loss_sum = torch.zeros((), dtype=torch.float64)
        self.train()

    def train_dataloader(self) -> DataLoader[Any]:
        images = self.dataset.images("train", self.model.encoder.transform(train=True), seed=self.seed)
        ranks = {"rank": self.global_rank, "num_ranks": self.trainer.world_size}
        return train_loader(images, self.options.loading, self.seed, **ranks)

    def val_dataloader(self) -> DataLoader[Any]:
        return eval_loader(self.dataset.images("val", self.model.encoder.transform()), self.options.loading)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        transform = self.model.encoder.transform()
        splits = ("train", "test") if self.row.remembers else ("test",)
        return [eval_loader(self.dataset.images(split, transform), self.options.loading) for split in splits]

    def configure_optimizers(self) -> Any:
        options = self.options
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(learned, lr=options.learning_rate, weight_decay=options.weight_decay)
        every = options.decay_every or options.epochs  # which is never
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, every, options.decay_factor)]

    def on_train_epoch_start(self) -> None:
        torch.manual_seed((self.seed * 1_000_003 + self.current_epoch) * 1_009 + self.global_rank)
        if self.current_epoch:
            # Lightning sets modes around train(), with which a method may have plans of its own.
            self.model.eval()
            self.model.train()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, columns = batch
        if isinstance(self.model, Condensed) and self._train_texts is None:
            self._train_texts = self.model.texts(self.train_pairs)  # which do not learn
        rows = self.get_buffer("_train_row")[columns]
        loss: Tensor = self.model.loss(images, self.train_pairs, rows, self._train_texts)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(images))
        return loss * self._share(batch_idx)

    def _share(self, batch_idx: int) -> float:
        """What makes up for Lightning's division by ``accumulate`` in an incomplete last group."""
        batches, group = int(self.trainer.num_training_batches), self.options.accumulate
        incomplete = batch_idx >= batches - batches % group
        return group / (batches % group) if incomplete and self.options.incomplete_group == "mean" else 1.0

    def on_validation_epoch_start(self) -> None:
        self._start("val")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._score(batch)
        if self.options.selection == "loss":
            images, columns = batch
            loss = getattr(self.model, "validation_loss", self.model.loss)
            self._loss_sum += loss(images, self.dataset.space.pairs, columns, self._texts).cpu().double() * len(images)

    def on_validation_epoch_end(self) -> None:
        result = self._scores["standard"].compute()
        loss = self._loss_sum.item() / len(self.dataset.samples["val"])
        selected = {"auc": result.auc, "loss": -loss, "last": float(self.current_epoch)}[self.options.selection]
        self.log("val/auc", result.auc, prog_bar=True)
        digits = self.options.selection_digits
        self.log(SELECTED, selected if digits is None else round(selected, digits))

    def on_test_epoch_start(self) -> None:
        self._start("test")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.row.remembers and dataloader_idx == 0:
            self.model.adapt(self._logits(batch))
            return
        if self.row.transductive and batch_idx == 0:
            unseen = (~self.dataset.space.seen_mask).nonzero().squeeze(1).to(self.device)
            self.model.bank.fill_texts(self.model.pair_texts(self._texts)[unseen], unseen)
        logits = self._score(batch)
        if self.row.transductive:
            self.model.adapt(logits)

    def on_test_epoch_end(self) -> None:
        self.results = {protocol: score.compute() for protocol, score in self._scores.items()}
        if self.row.remembers:
            self.model.bank.check_updates()

    def _start(self, split: str) -> None:
        space, mask = self.dataset.space, self.dataset.eval_mask(split)
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            self._texts = self.model.texts(space.pairs)
        # Every process evaluates all images, in file order: there is nothing to gather.
        self._scores = {
            protocol: CZSLScore(space, eval_mask=mask, protocol=protocol, sync_on_compute=False)
            for protocol in PROTOCOLS
        }
        self._loss_sum.zero_()

    def _logits(self, batch: tuple[Tensor, Tensor]) -> Any:
        return self.model(batch[0], self.dataset.space.pairs, self._texts)

    def _score(self, batch: tuple[Tensor, Tensor]) -> Any:
        """The logits, too."""
        logits = self._logits(batch)
        scores = self._rank(logits, self.dataset.space.pairs).cpu()
        for score in self._scores.values():
            score.update(scores, batch[1].cpu())
        return logits

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name not in frozen}


def train_row(folder: Path, dataset: CompositionDataset, config: Config, name: str, seed: int) -> dict[str, Any]:
    """Train and test the model of a row; a run that was interrupted goes on from its last whole epoch.

    Args:
        folder: Of the seed: the row has a folder in it, beside that of the row that it is based on.
        dataset: To train, validate and test on.
        config: Of the comparison.
        name: Of the row, in :data:`baselines.rows.ROWS`.
        seed: Decides initialisation, order, augmentation and dropout.

    Returns:
        The record: what was trained, the chosen epoch, and the results on the test images by protocol.

    Raises:
        ValueError: There are epochs, and nothing to train.
        OSError: What the row is based on is missing.
        KeyboardInterrupt: The run was interrupted; calling again resumes it.
    """
    path, row = folder / name / RECORD, ROWS[name]
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text())
        return record
    lightning.seed_everything(seed, verbose=False)
    model, options = build(config, dataset.space, name), config.baseline
    if row.base is not None:
        options = replace(options.condensing, epochs=0) if row.probabilities or row.remembers else options.condensing
        _take_over(model, folder, name)
    learned = check_learning(model, options, config.method)
    module = Training(model, dataset, options, seed=seed, row=row)
    with quiet(), interruptible():
        if options.epochs:
            trainer, chosen = _fit(module, folder / name, config)
        else:
            trainer, chosen = testing_trainer(config.trainer), {"best_epoch": None, "selected": None}
        trainer.test(module, verbose=False)
    tests = {protocol: _shortened(result.as_dict()) for protocol, result in module.results.items()}
    settings = {"method": config.method, "row": name, "seed": seed, "trainable_parameters": learned}
    record = {**settings, **chosen, "test": {"closed": tests}}
    if is_main_process():
        record = write_json(path, record)  # last: it marks the run as finished
    trainer.strategy.barrier()  # no process may look for the record before it is there
    return record


def check_learning(model: nn.Module, options: Options, method: str) -> int:
    """How many parameters are trained; ValueError where there are epochs, and none."""
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if options.epochs and not learned:
        raise ValueError(f"expected `options.epochs` to be 0 for {method}, which learns nothing, got {options.epochs}")
    return learned


def _take_over(model: Any, folder: Path, name: str) -> None:
    """What the rows before have learned."""
    base = ROWS[name].base
    if base is None:
        return
    _take_over(model, folder, base)
    if json.loads((folder / base / RECORD).read_text())["best_epoch"] is not None:
        whole = model.method if isinstance(model, Condensed) and not ROWS[base].base else model
        _load(whole, _learned(folder / base))


def _learned(folder: Path) -> dict[str, Any]:
    """The checkpoint of the chosen epoch, names as in the model."""
    kept: dict[str, Any] = torch.load(folder / CHECKPOINTS / "best.ckpt", weights_only=True, map_location="cpu")
    named = {name.removeprefix("model."): tensor for name, tensor in kept["state_dict"].items()}
    return {**kept, "state_dict": named}


def _load(model: nn.Module, kept: dict[str, Any]) -> None:
    if unknown := model.load_state_dict(kept["state_dict"], strict=False).unexpected_keys:
        raise ValueError(f"expected a checkpoint of this model, got tensors of another, such as {unknown[0]!r}")


def _fit(module: Training, folder: Path, config: Config) -> tuple[lightning.Trainer, dict[str, Any]]:
    """Train, go back to the chosen epoch, and tell which it was."""
    options, images = module.options, len(module.dataset.samples["train"])
    best = BestWithin(folder / CHECKPOINTS, "best", epochs=options.epochs)
    best.monitor = SELECTED
    flags = {**config.trainer, "accumulate_grad_batches": options.accumulate}
    fitter = fitting_trainer(folder, options.loading, images, [best], options.epochs, flags)
    last = folder / CHECKPOINTS / "last.ckpt"
    fitter.fit(module, ckpt_path=last if last.exists() else None, weights_only=True)
    kept = _learned(folder)
    _load(module.model, kept)
    score = best.best_model_score
    return fitter, {"best_epoch": int(kept["epoch"]) + 1, "selected": None if score is None else score.item()}


def _shortened(result: dict[str, Any]) -> dict[str, Any]:
    """The curve to five digits, which tell shares of up to 100,000 images apart; all else as it is."""
    curve = [[None if value is None else round(value, 5) for value in point] for point in result["curve"]]
    return {**result, "curve": curve}
