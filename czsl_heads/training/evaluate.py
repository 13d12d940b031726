"""One pass over the images of a split, scored in as many ways as are asked for, in the closed and the open world.

Stage III is here: a memory bank is filled from the training images, and the split is streamed, each batch being
predicted before a bank that adapts may see it. Every pass fills its banks anew and leaves the model as it was. Where
feasibility masks the open world, the validation images go before, for the thresholds.

Several processes share the batches. Banks and metrics see them in file order, so that all numbers are those of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from czsl_heads.data.layout import CompositionDataset
from czsl_heads.functional.protocol import CZSLResult
from czsl_heads.functional.score_statistics import ScoreStatistics
from czsl_heads.heads.memory_bank import DynamicMemoryBank
from czsl_heads.metrics.czsl_score import CZSLScore
from czsl_heads.metrics.gathered import GatheredMetric
from czsl_heads.metrics.modality_gap import RelativeModalityGap
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Method, tokens_of
from czsl_heads.space import CompositionSpace
from czsl_heads.training.columns import Columns, columns_of
from czsl_heads.training.feature_cache import encoded as encoded_images
from czsl_heads.training.feature_cache import evaluation_images
from czsl_heads.training.gap_vectors import GapVectors
from czsl_heads.training.loaders import eval_loader
from czsl_heads.training.open_world import OpenWorld, Thresholds
from czsl_heads.training.options import Options
from czsl_heads.training.rows import Readout
from czsl_heads.training.scored_world import Batch, Exchange, ScoredWorld, Seen, alone, in_turn
from czsl_heads.training.shares import Processes, Shares, map_tensors, with_tensors

World = Literal["closed", "open"]
WORLDS: tuple[World, ...] = ("closed", "open")
PROTOCOLS: tuple[Literal["standard", "exact"], ...] = ("standard", "exact")
SHARE_OVER = 256 * 2**20  # bytes of the pairs' text features that each process has by itself


class Evaluation(lightning.LightningModule):
    """Scores a split by every readout; run it by ``trainer.test(evaluation)``, then read :attr:`results`.

    Args:
        model: In eval mode; its own bank and weights of fusion are not used.
        dataset: Its training images fill the banks.
        options: Batch size, and how banks are made.
        readouts: By name; their numbers are all known.
        split: ``"train"``, ``"val"`` or ``"test"``.
        worlds: Label spaces.
        open_world: Also mask the scores of the open world, each readout at a threshold that is searched on the
            validation images first; the results stand under ``"feasible"``.
        share_over: Where there are several processes, and the features of the open world's pairs take more bytes, each
            has texts of its share of the pairs only. Numbers are then equal up to the rounding of a softmax; else they
            are those of one process, to the bit.
    """

    def __init__(
        self,
        model: Method,
        dataset: CompositionDataset,
        options: Options,
        readouts: dict[str, Readout],
        *,
        split: str = "test",
        worlds: tuple[World, ...] = WORLDS,
        open_world: OpenWorld | None = None,
        share_over: int = SHARE_OVER,
    ) -> None:
        super().__init__()
        if open_world is not None and "open" not in worlds:
            raise ValueError(f"expected `worlds` with open where it is to be masked, got {', '.join(worlds)}")
        self.model = model.eval()
        self.method = model.method if isinstance(model, Condensed) else model
        self.condenser = model.condenser if isinstance(model, Condensed) else None
        for name, readout in readouts.items():
            if self.condenser is None and not readout.alone:
                raise ValueError(f"expected `readouts` of the method alone without a condenser, got {name}")
            if readout.gamma and readout.bank is None:
                raise ValueError(f"expected `readouts` with a bank where gamma is above 0, got {name} without")
        self.dataset, self.options, self.readouts, self.split = dataset, options, readouts, split
        self.plans = sorted({readout.bank for readout in readouts.values() if readout.bank is not None})
        space = dataset.space
        every: dict[World, CompositionSpace] = {"closed": space, "open": space.open_world()}
        self.spaces = {world: every[world] for world in worlds}
        self.columns = {world: every[world].index(space.pairs) for world in worlds}
        # The parts of a pass, in order, and the splits that they are over.
        self.parts = {
            **({"fill": "train"} if self.plans else {}),
            **({"search": "val"} if open_world else {}),
            "score": split,
        }
        self.open_world, self.share_over = open_world, share_over
        self.thresholds: Thresholds | None = None
        self.results: dict[str, dict[str, dict[str, CZSLResult]]] = {}
        self.gap: dict[str, dict[str, float]] = {}
        self.rejected = 0  # vectors that were not finite, and so did not enter a bank
        self._shares: dict[str, Shares] = {}
        self._worlds: dict[World, ScoredWorld] = {}
        # By readout and view of the scores, one for each protocol; these keep the same of every image.
        self._scores: dict[tuple[str, str], list[CZSLScore]] = {}
        self._gap: GapVectors | None = None
        self.register_buffer("_candidates", dataset.eval_mask(split), persistent=False)

    @property
    def _processes(self) -> Processes:
        return Processes(self.global_rank, self.trainer.world_size, self.device)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        options, precision = self.options, self.trainer.precision_plugin
        loaders = []
        for part, split in self.parts.items():
            images = evaluation_images(
                self.dataset,
                split,
                self.model,
                precision.forward_context,
                precision=str(precision.precision),
                batch_size=options.eval_batch_size,
                workers=options.workers,
            )
            self._shares[part] = Shares(len(images), options.eval_batch_size, self._processes)
            loaders.append(eval_loader(images, self._shares[part], workers=options.workers))
        return loaders

    def on_test_epoch_start(self) -> None:
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            self._worlds = {world: self._scored_world(world) for world in self.spaces}
        masks: dict[str, Tensor | None] = {"closed": self.dataset.eval_mask(self.split)}
        scored: dict[str, CompositionSpace] = dict(self.spaces.items())
        if self.open_world is not None:
            self.thresholds = Thresholds(self.open_world, self.spaces["open"], self.readouts)
            scored["feasible"] = self.spaces["open"]
        # Processes gather what these keep in file order; by themselves they would take it as it comes.
        self._scores = {
            (name, view): [
                CZSLScore(space, eval_mask=masks.get(view), protocol=protocol, sync_on_compute=False)
                for protocol in PROTOCOLS
            ]
            for name in self.readouts
            for view, space in scored.items()
        }
        if "closed" in self._worlds:
            names = ["cls", "pred", "true"] if self.condenser is None else ["cls", "pred", "true", "vac"]
            pairs = self._worlds["closed"].texts.pairs.float().cpu()
            gaps = {name: RelativeModalityGap(pairs, sync_on_compute=False) for name in names}
            self._gap = GapVectors(gaps, include_cls=self.method.seam.head.include_cls)

    def _scored_world(self, world: World) -> ScoredWorld:
        space, method = self.spaces[world], self.method
        size = 4 * len(space) * method.encoder.dim
        shared = world == "open" and method.scores_apart and size > self.share_over
        columns = columns_of(len(space), self._processes, shared=shared)
        return ScoredWorld(space, columns, method, self.options.bank, self.plans)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        images, columns = batch
        encoded = encoded_images(self.method, images)
        features = None if self.condenser is None else self.condenser(tokens_of(encoded))
        own = Batch(encoded, features, columns)
        part = [*self.parts][dataloader_idx]
        if batch_idx == 0:
            self._start(part)

        every: list[Batch] | None = None
        for name, world in self._worlds.items():
            if part == "search" and name != "open":
                continue
            if not world.columns.shared:
                self._look(part, batch_idx, name, own, self._in_turn(part, batch_idx), self._rank_in(part, batch_idx))
                continue
            every = self._everyones(part, batch_idx, own) if every is None else every
            for rank, each in enumerate(every):
                self._look(part, batch_idx, name, each, alone, rank)

    def _rank_in(self, part: str, turn: int) -> int | None:
        """Which batch of a round is that of this process; None if it repeats one that another process has."""
        shares = self._shares[part]
        return shares.processes.rank if shares.has_own(turn) else None

    def _in_turn(self, part: str, turn: int) -> Exchange:
        """Each process shows the others its batch of a round."""

        def exchange(seen: Seen) -> tuple[list[Seen], list[Seen]]:
            parts = self._shares[part].in_turn(turn, [seen.features, *seen.judged])
            return in_turn(self._rank_in(part, turn), parts)

        return exchange

    def _everyones(self, part: str, turn: int, own: Batch) -> list[Batch]:
        """All batches of a round, for processes that divide the pairs, and not the images, among themselves."""
        tensors: list[Tensor] = []
        map_tensors(tensors.append, own.encoded)
        vectors = [] if own.features is None else [own.features]
        batches = []
        for received in self._shares[part].in_turn(turn, [own.columns, *vectors, *tensors]):
            columns, *others = received
            features = others.pop(0) if vectors else None
            batches.append(Batch(with_tensors(own.encoded, others), features, columns))
        return batches

    def _start(self, part: str) -> None:
        if part == "fill":
            return
        for world in self._worlds.values():
            world.start_banks()
        if part == "score" and self.thresholds is not None:
            for search in self.thresholds.searches.values():
                self._join("search", [search])

    def _look(self, part: str, turn: int, name: World, batch: Batch, exchange: Exchange, rank: int | None) -> None:
        """Score a batch, the ``rank``-th of its round, or show it to the banks; what it gives is kept by that rank."""
        world = self._worlds[name]
        target = self.columns[name].to(batch.columns.device)[batch.columns]
        if part == "fill":
            if batch.features is not None:
                world.fill(batch, target, exchange)
            return

        compared = world.compare(batch)
        looked: list[tuple[list[GatheredMetric[Any]], Any]] = []
        for readout, rows in world.scored(self.readouts, batch, compared, exchange):
            for metrics, scores in self._views(part, name, readout, rows.cpu(), world.columns):
                looked.append((metrics, world.columns.look(metrics[0], scores, target.cpu())))
        settled = world.columns.settle([(metrics[0], found) for metrics, found in looked], target.cpu())
        if rank == self.global_rank:
            for (metrics, _), statistics in zip(looked, settled):
                for metric in metrics:
                    metric.add(statistics)
        if name == "closed" and self._gap is not None:
            candidates = compared.ranked.masked_fill(~self.get_buffer("_candidates"), -torch.inf)
            seen = (tokens_of(batch.encoded), batch.features, candidates.argmax(dim=1), batch.columns)
            for each in self._shares[part].in_turn(turn, self._gap.look(*seen, world.texts.pairs)):
                self._gap.add(each)

    def _views(
        self, part: str, name: World, readout: str, rows: Tensor, columns: Columns
    ) -> Iterator[tuple[list[GatheredMetric[Any]], Tensor]]:
        """Metrics that keep the same of scores, and these scores as they see them."""
        if part == "search" and self.thresholds is not None:
            yield [self.thresholds.searches[readout]], rows
            return
        yield [*self._scores[readout, name]], rows
        if name == "open" and self.thresholds is not None:
            # Behind every softmax, argmax and entropy.
            masked = self.thresholds.masked(readout, rows, columns.first)
            yield [*self._scores[readout, "feasible"]], masked

    def _join(self, part: str, metrics: Sequence[GatheredMetric[Any]]) -> None:
        """Give metrics that keep the same the images of all processes."""
        joined = ScoreStatistics(*self._shares[part].joined(metrics[0].kept()))
        for metric in metrics:
            metric.keep(joined)

    def on_test_epoch_end(self) -> None:
        self.results = {name: {} for name in self.readouts}
        for (name, view), scores in self._scores.items():
            self._join("score", scores)
            self.results[name][view] = {protocol: score.result() for protocol, score in zip(PROTOCOLS, scores)}
        worlds = self._worlds.values()
        for bank in [bank for world in worlds for bank in (*world.filled.values(), *world.banks.values())]:
            bank.check_updates()
        rejected = [int(bank.num_rejected) for world in worlds for bank in world.banks.values()]
        self.rejected = max(rejected, default=0)
        self.gap = {} if self._gap is None else self._gap.as_dict()

    def filled_bank(self, world: World, slots: int) -> DynamicMemoryBank:
        """The bank as the training images left it."""
        return self._worlds[world].filled[slots]

    def as_dicts(self) -> dict[str, Any]:
        """The results for a JSON file: by readout, world and protocol."""
        return {
            name: {
                world: {protocol: result.as_dict() for protocol, result in by_protocol.items()}
                for world, by_protocol in by_world.items()
            }
            for name, by_world in self.results.items()
        }
