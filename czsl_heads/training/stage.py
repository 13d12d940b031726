"""The training stages on Lightning: what is trained, on which texts, and validation by AUC."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from czsl_heads.data.layout import CompositionDataset, DataError
from czsl_heads.metrics.czsl_score import CZSLScore
from czsl_heads.models.sac import SAC, BranchLogits, SACOutput, SpaceTexts, TrainStage
from czsl_heads.training.cache import CACHE_BYTES, EncodedImages, encode_images
from czsl_heads.training.evaluate import PROTOCOLS
from czsl_heads.training.loaders import eval_loader, train_loader
from czsl_heads.training.micro_batch import losses_in_parts
from czsl_heads.training.options import SACOptions


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
    """Trains :class:`~czsl_heads.SAC` over the seen pairs, and validates it over the pairs of the data set.

    In stage ``"condense"`` the condenser alone is trained: everything else is frozen and in eval mode, so that the
    teacher is deterministic; texts are encoded once, and images too where nothing random stands before that.

    Checkpoints hold the trainable parameters only. Every epoch starts from a generator seeded by (seed, epoch), so one
    that was interrupted gives the same numbers when it is run again.
    """

    def __init__(
        self, sac: SAC, dataset: CompositionDataset, options: SACOptions, *, stage: TrainStage = "align", seed: int
    ) -> None:
        super().__init__()
        check_validation(dataset)
        self.sac, self.dataset, self.options, self.stage, self.seed = sac, dataset, options, stage, seed
        self.strict_loading = False
        space = dataset.space
        self.train_space = space.subset(space.seen_mask)
        self.register_buffer("_train_column", torch.full((len(space),), -1), persistent=False)
        self.get_buffer("_train_column")[space.seen_mask] = torch.arange(len(self.train_space))
        self._train_texts: SpaceTexts | None = None
        self._val_texts: SpaceTexts | None = None
        self._encoded: dict[str, EncodedImages] = {}
        self._scores: dict[str, CZSLScore] = {}
        # Lightning keeps the modes it is given, and a wrapped CLIP comes in eval mode.
        self.train(stage != "condense")
        if stage == "condense":
            assert sac.condenser is not None
            self.requires_grad_(False)
            sac.condenser.train().requires_grad_(True)

    def train_dataloader(self) -> DataLoader[Any]:
        ranks = {"rank": self.global_rank, "num_ranks": self.trainer.world_size}
        augment = self.stage != "condense" or self.options.condense_augment
        images = self._encoded.get("train") or self.dataset.images(
            "train", self.sac.encoder.transform(train=augment), seed=self.seed
        )
        return train_loader(images, self.options, self.seed, **ranks)

    def val_dataloader(self) -> DataLoader[Any]:
        images = self._encoded.get("val") or self.dataset.images("val", self.sac.encoder.transform())
        return eval_loader(images, self.options)

    def configure_optimizers(self) -> Any:
        options = self.options
        rate = options.learning_rate
        if self.stage == "condense" and options.condense_learning_rate is not None:
            rate = options.condense_learning_rate
        trainable = [parameter for parameter in self.sac.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=rate, weight_decay=options.weight_decay)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, options.decay_every, options.decay_factor)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_fit_start(self) -> None:
        if self.stage != "condense":
            return
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            self._train_texts, self._val_texts = (self.sac.texts(s) for s in (self.train_space, self.dataset.space))
            self._encode_once("val", self._val_texts)
            if not self.options.condense_augment:
                self._encode_once("train", self._train_texts)

    def _encode_once(self, split: str, texts: SpaceTexts) -> None:
        if self.options.cache is False:
            return
        used = sum(encoded.num_bytes for encoded in self._encoded.values())
        limit = None if self.options.cache else CACHE_BYTES - used
        loader = eval_loader(self.dataset.images(split, self.sac.encoder.transform()), self.options)
        dtype = next(self.sac.parameters()).dtype  # half with Lightning's precision "bf16-true"
        encoded = encode_images(self.sac, loader, texts, device=self.device, dtype=dtype, limit=limit)
        if encoded is not None:
            self._encoded[split] = encoded

    def on_train_epoch_start(self) -> None:
        torch.manual_seed((self.seed * 1_000_003 + self.current_epoch) * 1_009 + self.global_rank)

    def _compare(self, batch: tuple[Any, ...], texts: SpaceTexts) -> SACOutput:
        """Of images, or of images that were encoded before."""
        if len(batch) == 3:
            tokens, logits, _ = batch
            return self.sac.compare(tokens, texts, sa=BranchLogits(*logits))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage != "condense"):
            tokens = self.sac.encode(batch[0])
        return self.sac.compare(tokens, texts)

    def training_step(self, batch: tuple[Any, ...]) -> Tensor:
        size = len(batch[-1])
        texts = self._train_texts or self.sac.texts(self.train_space)
        part = self.options.micro_batch or size
        losses = self._losses(batch, texts) if part >= size else self._losses_in_parts(batch, texts)
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, batch_size=size)
        self.log("loss", losses["loss"].detach(), prog_bar=True, logger=False, batch_size=size)
        return losses["loss"]

    def _losses(self, batch: tuple[Any, ...], texts: SpaceTexts) -> dict[str, Tensor]:
        target = self.get_buffer("_train_column")[batch[-1]]
        return self.sac.losses(self._compare(batch, texts), target, stage=self.stage)

    def _losses_in_parts(self, batch: tuple[Any, ...], texts: SpaceTexts) -> dict[str, Tensor]:
        assert self.options.micro_batch is not None
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return losses_in_parts(
            lambda part, features: self._losses(part, SpaceTexts(texts.space, features)),
            batch,
            texts.features,
            [parameter for parameter in self.sac.parameters() if parameter.requires_grad],
            size=self.options.micro_batch,
            scale=1.0 if scaler is None else scaler.get_scale(),
        )

    def on_validation_epoch_start(self) -> None:
        if self.stage != "condense":
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                self._val_texts = self.sac.texts(self.dataset.space)
        mask = self.dataset.eval_mask("val")
        # Every process evaluates all images, in file order: there is nothing to gather.
        self._scores = {
            protocol: CZSLScore(self.dataset.space, eval_mask=mask, protocol=protocol, sync_on_compute=False)
            for protocol in PROTOCOLS
        }

    def validation_step(self, batch: tuple[Any, ...]) -> None:
        assert self._val_texts is not None
        scores = self._compare(batch, self._val_texts).scores.cpu()
        for score in self._scores.values():
            score.update(scores, batch[-1].cpu())

    def on_validation_epoch_end(self) -> None:
        result = self._scores["standard"].compute()
        values = {"seen": result.seen, "unseen": result.unseen, "harmonic_mean": result.harmonic_mean}
        self.log("val/auc", result.auc, prog_bar=True)
        self.log_dict({f"val/{name}": value for name, value in values.items()})
        self.log("val/auc_exact", self._scores["exact"].compute().auc)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in trainable}
