"""A training stage on Lightning: what is trained, on which texts, and the number by which an epoch is chosen."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from czsl_heads.data.layout import CompositionDataset, DataError
from czsl_heads.functional.score_statistics import ScoreStatistics
from czsl_heads.metrics.czsl_score import CZSLScore
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Method
from czsl_heads.prompts.soft import TextFeatures
from czsl_heads.training.cache import CACHE_BYTES, EncodedImages, encode_images
from czsl_heads.training.checkpoints import SELECTED, trained_names
from czsl_heads.training.evaluate import PROTOCOLS
from czsl_heads.training.feature_cache import encoded, evaluation_images
from czsl_heads.training.gap_loss import add_gap_loss
from czsl_heads.training.loaders import eval_loader, train_loader
from czsl_heads.training.micro_batch import losses_in_parts
from czsl_heads.training.options import Options
from czsl_heads.training.shares import Processes, Shares
from czsl_heads.training.threads import take_up


def check_validation(dataset: CompositionDataset) -> None:
    """Raise DataError unless validation has images of seen and of unseen pairs (the epoch is chosen by their AUC)."""
    seen = dataset.space.seen_mask[dataset.images("val").columns]
    for word, count in (("seen", int(seen.sum())), ("unseen", int((~seen).sum()))):
        if not count:
            raise DataError(
                f"{dataset.root}: expected validation images of seen and of unseen pairs (the epoch is chosen by their "
                f"AUC), got none of {word} pairs"
            )
    if len(dataset.samples["test"]) < 2:
        raise DataError(f"{dataset.root}: expected at least two test images, which the modality gap needs, got one")


class Stage(lightning.LightningModule):
    """Trains a method over the seen pairs, and validates it over the pairs of the data set.

    Behind a frozen method (:class:`~czsl_heads.models.condensed.Condensed`, unless joint) the condenser alone is
    trained: texts are encoded once, and images too where nothing random stands before that.

    Checkpoints hold all but frozen parameters. Every epoch starts from a generator seeded by (seed, epoch), so one that
    was interrupted gives the same numbers when it is run again.

    Args:
        model: What is trained.
        dataset: To train and validate on.
        options: How.
        seed: Decides order, augmentation and dropout.
    """

    def __init__(self, model: Method, dataset: CompositionDataset, options: Options, *, seed: int) -> None:
        super().__init__()
        check_validation(dataset)
        self.model, self.dataset, self.options, self.seed = model, dataset, options, seed
        self.strict_loading = False
        space = dataset.space
        self.train_space = space.subset(space.seen_mask)
        self.register_buffer("_train_column", torch.full((len(space),), -1), persistent=False)
        self.get_buffer("_train_column")[space.seen_mask] = torch.arange(len(self.train_space))
        self._train_texts: TextFeatures | None = None
        self._val_texts: TextFeatures | None = None
        self._encoded: dict[str, EncodedImages] = {}
        self._scores: dict[str, CZSLScore] = {}
        self._losses_seen: list[Tensor] = []  # of the own validation batches, each times its images
        self._shares: Shares | None = None
        self.train()  # Lightning keeps the modes it is given, and a wrapped CLIP comes in eval mode

    @property
    def behind(self) -> Condensed | None:
        """The model, where its condenser alone is trained; no attribute, which would be saved beside it."""
        return self.model if isinstance(self.model, Condensed) and not self.model.joint else None

    def train_dataloader(self) -> DataLoader[Any]:
        ranks = {"rank": self.global_rank, "num_ranks": self.trainer.world_size}
        augment = self.behind is None or self.options.condense_augment
        transform = self.model.encoder.transform(train=augment)
        images = self._encoded.get("train") or self.dataset.images("train", transform, seed=self.seed)
        return train_loader(images, self.options.batch_size, self.seed, workers=self.options.workers, **ranks)

    def val_dataloader(self) -> DataLoader[Any]:
        images = self._encoded.get("val") or self._plain_images("val")
        self._shares = self._shares_of(images)
        return eval_loader(images, self._shares, workers=self.options.workers)

    def _shares_of(self, images: Any) -> Shares:
        processes = Processes(self.global_rank, self.trainer.world_size, self.device)
        return Shares(len(images), self.options.eval_batch_size, processes)

    def _plain_images(self, split: str) -> Any:
        """Images as they are evaluated, or their tokens where no epoch changes them."""
        options, precision = self.options, self.trainer.precision_plugin
        return evaluation_images(
            self.dataset,
            split,
            self.model,
            precision.forward_context,
            precision=str(precision.precision),
            batch_size=options.eval_batch_size,
            workers=options.workers,
        )

    def configure_optimizers(self) -> Any:
        options = self.options
        rate = options.learning_rate
        if self.behind is not None and options.condense_learning_rate is not None:
            rate = options.condense_learning_rate
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=rate, weight_decay=options.weight_decay)
        if options.decay_every is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, options.decay_every, options.decay_factor)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_fit_start(self) -> None:
        if self.behind is None:
            return
        method = self.behind.method
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            spaces = self.train_space, self.dataset.space
            self._train_texts, self._val_texts = (method.texts(each.pairs_on(self.device)) for each in spaces)
            self._encode_once(method, "val", self._val_texts)
            if not self.options.condense_augment:
                self._encode_once(method, "train", self._train_texts)

    def _encode_once(self, method: Method, split: str, texts: TextFeatures) -> None:
        if self.options.cache is False:
            return
        used = sum(each.num_bytes for each in self._encoded.values())
        limit = None if self.options.cache else CACHE_BYTES - used
        images = self._plain_images(split)
        loader = eval_loader(images, self._shares_of(images), workers=self.options.workers)
        dtype = next(self.model.parameters()).dtype  # half with Lightning's precision "bf16-true"
        found = encode_images(method, loader, texts, device=self.device, dtype=dtype, limit=limit)
        if found is not None:
            self._encoded[split] = found

    def on_train_epoch_start(self) -> None:
        torch.manual_seed((self.seed * 1_000_003 + self.current_epoch) * 1_009 + self.global_rank)
        if self.current_epoch:
            # Lightning sets modes around train(), with which a method may have plans of its own.
            self.model.eval()
            self.model.train()

    def _compare(self, batch: Any, texts: TextFeatures) -> tuple[Any, Any]:
        """Encoding and logits of images, or of images that were encoded before."""
        if len(batch) == 3:
            assert self.behind is not None
            known, aligned, _ = batch
            return known, self.behind.compare(known, texts, aligned=aligned)[0]
        found = encoded(self.model, batch[0])
        return found, self.model.compare(found, texts)[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        size = len(batch[-1])
        texts = self._train_texts or self.model.texts(self.train_space.pairs_on(self.device))
        part = self.options.micro_batch or size
        losses = self._losses(batch, texts) if part >= size else self._losses_in_parts(batch, texts)
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, batch_size=size)
        self.log("loss", losses["loss"].detach(), prog_bar=True, logger=False, batch_size=size)
        share = self._share(batch_idx)
        return losses["loss"] if share == 1 else losses["loss"] * share

    def _share(self, batch_idx: int) -> float:
        """What makes up for Lightning's division by ``accumulate`` in an incomplete last group."""
        batches, group = int(self.trainer.num_training_batches), self.options.accumulate
        incomplete = batch_idx >= batches - batches % group
        return group / (batches % group) if incomplete and self.options.incomplete_group == "mean" else 1.0

    def _losses(self, batch: Any, texts: TextFeatures) -> dict[str, Tensor]:
        target = self.get_buffer("_train_column")[batch[-1]]
        found, logits = self._compare(batch, texts)
        losses = self.model.losses(logits, self.train_space.pairs_on(self.device), target)
        kind, weight = self.options.gap_loss, self.options.gap_weight
        if kind is None:
            return losses
        vectors = self.model.vectors(found, logits, texts.pairs[target])
        return add_gap_loss(losses, vectors, texts.pairs, target, kind=kind, weight=weight)

    def _losses_in_parts(self, batch: Any, texts: TextFeatures) -> dict[str, Tensor]:
        assert self.options.micro_batch is not None
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return losses_in_parts(
            self._losses,
            batch,
            texts,
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            size=self.options.micro_batch,
            scale=1.0 if scaler is None else scaler.get_scale(),
        )

    def on_validation_epoch_start(self) -> None:
        space, mask = self.dataset.space, self.dataset.eval_mask("val")
        if self.behind is None:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                self._val_texts = self.model.texts(space.pairs_on(self.device))
        # Processes gather what these keep in file order; by themselves they would take it as it comes.
        self._scores = {
            protocol: CZSLScore(space, eval_mask=mask, protocol=protocol, sync_on_compute=False)
            for protocol in PROTOCOLS
        }
        self._losses_seen = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self._val_texts is not None
        assert self._shares is not None
        if not self._shares.has_own(batch_idx):
            return
        pairs, columns = self.dataset.space.pairs_on(self.device), batch[-1]
        _, logits = self._compare(batch, self._val_texts)
        scores = self.model.fuse(logits, pairs).cpu()
        statistics = self._scores["standard"].statistics(scores, columns.cpu())  # of both protocols
        for score in self._scores.values():
            score.add(statistics)
        if self.options.selection == "loss":
            loss = self.model.validation_losses(logits, pairs, columns)["loss"]
            self._losses_seen.append(loss.cpu().double() * len(columns))

    def on_validation_epoch_end(self) -> None:
        assert self._shares is not None
        joined = ScoreStatistics(*self._shares.joined(self._scores["standard"].kept()))
        for score in self._scores.values():
            score.keep(joined)
        result = self._scores["standard"].result()
        values = {"seen": result.seen, "unseen": result.unseen, "harmonic_mean": result.harmonic_mean}
        self.log("val/auc", result.auc, prog_bar=True)
        self.log_dict({f"val/{name}": value for name, value in values.items()})
        self.log("val/auc_exact", self._scores["exact"].result().auc)
        self.log(SELECTED, self._selected(result.auc))

    def _selected(self, auc: float) -> float:
        """The number by which epochs are compared, the larger the better."""
        loss = self._loss_sum() / len(self.dataset.samples["val"])
        found = {"auc": auc, "loss": -loss, "last": float(self.current_epoch)}[self.options.selection]
        digits = self.options.selection_digits
        return found if digits is None else round(found, digits)

    def _loss_sum(self) -> float:
        """Of all validation images, added batch by batch in file order."""
        if self.options.selection != "loss":
            return 0.0
        assert self._shares is not None
        total = torch.zeros((), dtype=torch.float64)
        for loss in self._shares.joined_batches(self._losses_seen):
            total += loss
        return total.item()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = trained_names(self)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in kept}
        checkpoint["threads"] = torch.get_num_threads()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "threads" in checkpoint and self.device.type == "cpu":
            take_up(checkpoint["threads"])
