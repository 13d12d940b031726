"""Stage I on Lightning: train the alignment branch, validate by AUC, test in the closed and the open world."""

from __future__ import annotations

from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from czsl_heads.data.layout import CompositionDataset, DataError
from czsl_heads.functional.protocol import CZSLResult
from czsl_heads.metrics.czsl_score import CZSLScore
from czsl_heads.models.sac import SAC, SpaceTexts
from czsl_heads.space import CompositionSpace
from czsl_heads.training.loaders import eval_loader, train_loader
from czsl_heads.training.options import AlignOptions

World = Literal["closed", "open"]
WORLDS: tuple[World, ...] = ("closed", "open")
PROTOCOLS: tuple[Literal["standard", "exact"], ...] = ("standard", "exact")


def check_validation(dataset: CompositionDataset) -> None:
    """Raise DataError unless validation has images of seen and of unseen pairs: the epoch is chosen by their AUC."""
    seen = dataset.space.seen_mask[dataset.images("val").columns]
    for word, count in (("seen", int(seen.sum())), ("unseen", int((~seen).sum()))):
        if not count:
            raise DataError(
                f"{dataset.root}: expected validation images of seen and of unseen pairs (the epoch is chosen by their "
                f"AUC), got none of {word} pairs"
            )


class AlignStage(lightning.LightningModule):
    """Trains :class:`~czsl_heads.models.sac.SAC` over the seen pairs (Eq. 4) and evaluates it.

    Checkpoints hold the trainable parameters only. Every epoch starts from a generator seeded by (seed, epoch), so one
    that was interrupted gives the same numbers when it is run again.
    """

    def __init__(self, sac: SAC, dataset: CompositionDataset, options: AlignOptions, *, seed: int) -> None:
        super().__init__()
        check_validation(dataset)
        self.sac, self.dataset, self.options, self.seed = sac, dataset, options, seed
        self.strict_loading = False
        space = dataset.space
        self.train_space = space.subset(space.seen_mask)
        self._train_column = torch.full((len(space),), -1)
        self._train_column[space.seen_mask] = torch.arange(len(self.train_space))
        self._open_space = space.open_world()
        self._open_column = self._open_space.index(space.pairs)
        self._texts: dict[str, SpaceTexts] = {}
        self._scores: dict[tuple[str, str], CZSLScore] = {}
        self.results: dict[World, dict[str, CZSLResult]] = {}

    def train_dataloader(self) -> DataLoader[Any]:
        ranks = {"rank": self.global_rank, "num_ranks": self.trainer.world_size}
        return train_loader(self.dataset, self.sac.encoder, self.options, self.seed, **ranks)

    def val_dataloader(self) -> DataLoader[Any]:
        return eval_loader(self.dataset, self.sac.encoder, self.options, "val")

    def test_dataloader(self) -> DataLoader[Any]:
        return eval_loader(self.dataset, self.sac.encoder, self.options, "test")

    def configure_optimizers(self) -> Any:
        options = self.options
        trainable = [parameter for parameter in self.sac.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=options.learning_rate, weight_decay=options.weight_decay)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, options.decay_every, options.decay_factor)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_epoch_start(self) -> None:
        torch.manual_seed((self.seed * 1_000_003 + self.current_epoch) * 1_009 + self.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, columns = batch
        target = self._train_column.to(columns.device)[columns]
        out = self.sac(images, self.sac.texts(self.train_space))
        losses = self.sac.losses(out, target, stage="align")
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, batch_size=len(images))
        self.log("loss", losses["loss"].detach(), prog_bar=True, logger=False, batch_size=len(images))
        return losses["loss"]

    def _start_evaluation(self, split: str, spaces: dict[World, CompositionSpace]) -> None:
        with torch.no_grad():
            self._texts = {world: self.sac.texts(space) for world, space in spaces.items()}
        masks = {"closed": self.dataset.eval_mask(split), "open": None}
        # Every process evaluates all images, in file order: there is nothing to gather.
        self._scores = {
            (world, protocol): CZSLScore(space, eval_mask=masks[world], protocol=protocol, sync_on_compute=False)
            for world, space in spaces.items()
            for protocol in PROTOCOLS
        }

    def _evaluation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, columns = batch
        tokens = self.sac.encoder.encode_tokens(images)
        for world, texts in self._texts.items():
            scores = self.sac.compare(tokens, texts).scores.cpu()
            target = columns.cpu() if world == "closed" else self._open_column[columns.cpu()]
            for protocol in PROTOCOLS:
                self._scores[world, protocol].update(scores, target)

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation("val", {"closed": self.dataset.space})

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._evaluation_step(batch)

    def on_validation_epoch_end(self) -> None:
        result = self._scores["closed", "standard"].compute()
        values = {"seen": result.seen, "unseen": result.unseen, "harmonic_mean": result.harmonic_mean}
        self.log("val/auc", result.auc, prog_bar=True)
        self.log_dict({f"val/{name}": value for name, value in values.items()})
        self.log("val/auc_exact", self._scores["closed", "exact"].compute().auc)

    def on_test_epoch_start(self) -> None:
        self._start_evaluation("test", {"closed": self.dataset.space, "open": self._open_space})

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._evaluation_step(batch)

    def on_test_epoch_end(self) -> None:
        self.results = {
            world: {protocol: self._scores[world, protocol].compute() for protocol in PROTOCOLS} for world in WORLDS
        }
        for world, by_protocol in self.results.items():
            self.log(f"test/{world}_auc", by_protocol["standard"].auc)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in trainable}
