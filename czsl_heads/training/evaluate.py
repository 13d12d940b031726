"""One pass over the images of a split, scored in as many ways as are asked for, in the closed and the open world.

Stage III is here: a memory bank is filled from the training images, and the split is streamed, each batch being
predicted before a bank that adapts may see it. Every pass fills its banks anew and leaves the model as it was. Where
feasibility masks the open world, the validation images go before, for the thresholds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from czsl_heads.data.layout import CompositionDataset
from czsl_heads.functional.fusion import fuse
from czsl_heads.functional.protocol import CZSLResult
from czsl_heads.functional.unit import unit_vectors
from czsl_heads.heads.memory_bank import DynamicMemoryBank
from czsl_heads.metrics.czsl_score import CZSLScore
from czsl_heads.metrics.modality_gap import RelativeModalityGap
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.gap import winning_tokens
from czsl_heads.models.method import Logits, Method, tokens_of
from czsl_heads.models.recipe import new_bank
from czsl_heads.prompts.soft import TextFeatures
from czsl_heads.space import CompositionSpace
from czsl_heads.training.feature_cache import encoded as encoded_images
from czsl_heads.training.feature_cache import evaluation_images
from czsl_heads.training.loaders import eval_loader
from czsl_heads.training.open_world import OpenWorld, Thresholds
from czsl_heads.training.options import Options
from czsl_heads.training.rows import BankPlan, Readout

World = Literal["closed", "open"]
WORLDS: tuple[World, ...] = ("closed", "open")
PROTOCOLS: tuple[Literal["standard", "exact"], ...] = ("standard", "exact")


@dataclass
class GapVectors:
    """The modality gap of the closed world, by which vector stands for an image, and how often that is a patch.

    ``cls``: token 0; ``pred``: the token that wins the pair that the method predicts; ``true``: the one that wins the
    labelled pair, an oracle; ``vac``: the condenser's vector. Texts are those before anything draws them to an image.
    """

    gaps: dict[str, RelativeModalityGap]
    include_cls: bool = True
    counts: dict[str, float] = field(default_factory=lambda: {"images": 0, "pred": 0, "true": 0, "strong": 0})

    def update(self, tokens: Tensor, features: Tensor | None, predicted: Tensor, true: Tensor, texts: Tensor) -> None:
        tokens, texts = unit_vectors(tokens, torch.float32), texts.float()
        vectors = {"cls": tokens[:, 0]}
        for name, columns in (("pred", predicted), ("true", true)):
            vectors[name], winner = winning_tokens(tokens, texts[columns], include_cls=self.include_cls)
            self.counts[name] += int((winner > 0).sum())
        if features is not None:
            vectors["vac"] = features
        for name, images in vectors.items():
            self.gaps[name].update(images.cpu(), true.cpu())
        cosines = (tokens[:, 1:] @ texts[predicted][:, :, None]).squeeze(2)  # [batch, patches]
        middle = (cosines.amax(dim=1, keepdim=True) + cosines.amin(dim=1, keepdim=True)) / 2
        self.counts["strong"] += float((cosines > middle).float().mean(dim=1).sum())
        self.counts["images"] += len(tokens)

    def as_dict(self) -> dict[str, dict[str, float]]:
        shares = {name: count / self.counts["images"] for name, count in self.counts.items() if name != "images"}
        return {
            "relative_modality_gap": {name: gap.compute().item() for name, gap in self.gaps.items()},
            "winners_that_are_patches": {name: shares[name] for name in ("pred", "true")},
            "patches_above_the_middle": {"pred": shares["strong"]},
        }


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
        self.open_world = open_world
        self.thresholds: Thresholds | None = None
        self.results: dict[str, dict[str, dict[str, CZSLResult]]] = {}
        self.gap: dict[str, dict[str, float]] = {}
        self.rejected = 0  # vectors that were not finite, and so did not enter a bank
        self._texts: dict[World, TextFeatures] = {}
        self._filled: dict[tuple[World, int], DynamicMemoryBank] = {}
        self._banks: dict[tuple[World, BankPlan], DynamicMemoryBank] = {}
        self._scores: dict[tuple[str, str, str], CZSLScore] = {}
        self._gap: GapVectors | None = None
        self.register_buffer("_candidates", dataset.eval_mask(split), persistent=False)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        options, precision = self.options, self.trainer.precision_plugin
        loaders = []
        for split in self.parts.values():
            images = evaluation_images(
                self.dataset,
                split,
                self.model,
                precision.forward_context,
                precision=str(precision.precision),
                batch_size=options.eval_batch_size,
                workers=options.workers,
            )
            loaders.append(eval_loader(images, options.eval_batch_size, workers=options.workers))
        return loaders

    def on_test_epoch_start(self) -> None:
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            self._texts = {
                world: self.method.texts(space.pairs_on(self.device)) for world, space in self.spaces.items()
            }
        slots = {plan.slots for plan in self.plans if plan.slots is not None}
        self._filled = {
            (world, count): new_bank(space, self.method.encoder, self.options.bank, count).to(self.device)
            for world, space in self.spaces.items()
            for count in slots
        }
        self._banks = {}
        masks: dict[str, Tensor | None] = {"closed": self.dataset.eval_mask(self.split)}
        scored: dict[str, CompositionSpace] = dict(self.spaces.items())
        if self.open_world is not None:
            self.thresholds = Thresholds(self.open_world, self.spaces["open"], self.readouts)
            scored["feasible"] = self.spaces["open"]
        # Every process evaluates all images, in file order: there is nothing to gather.
        self._scores = {
            (name, world, protocol): CZSLScore(
                space, eval_mask=masks.get(world), protocol=protocol, sync_on_compute=False
            )
            for name in self.readouts
            for world, space in scored.items()
            for protocol in PROTOCOLS
        }
        if "closed" in self._texts:
            names = ["cls", "pred", "true"] if self.condenser is None else ["cls", "pred", "true", "vac"]
            pairs = self._texts["closed"].pairs.float().cpu()
            gaps = {name: RelativeModalityGap(pairs, sync_on_compute=False) for name in names}
            self._gap = GapVectors(gaps, include_cls=self.method.seam.head.include_cls)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        images, columns = batch
        encoded = encoded_images(self.method, images)
        features = None if self.condenser is None else self.condenser(tokens_of(encoded))
        part = [*self.parts][dataloader_idx]
        if features is not None and part == "fill":
            self._fill(encoded, features, columns)
            return
        if batch_idx == 0:
            self._start_banks()
        worlds: Iterable[World] = ("open",) if part == "search" else self._texts
        for world in worlds:
            self._predict(world, part, encoded, features, columns)

    def _fill(self, encoded: Any, features: Tensor, columns: Tensor) -> None:
        """Show training images to all banks, which are not read meanwhile."""
        for world, texts in self._texts.items():
            (condensed,) = self.method.classify(encoded, texts, features)
            probs = condensed.pairs.softmax(dim=1)
            labels = self.columns[world].to(columns.device)[columns] if self.options.bank.labels else None
            for (other, _), bank in self._filled.items():
                if other == world:
                    bank.update(features, probs, pair_index=labels)

    def _start_banks(self) -> None:
        for world, texts in self._texts.items():
            unseen = (~self.spaces[world].seen_mask).nonzero().squeeze(1).to(self.device)
            for plan in self.plans:
                assert plan.slots is not None
                bank = deepcopy(self._filled[world, plan.slots])
                if plan.texts:
                    bank.fill_texts(texts.pairs[unseen], unseen)
                self._banks[world, plan] = bank

    def _predict(self, world: World, part: str, encoded: Any, features: Tensor | None, columns: Tensor) -> None:
        texts, vectors = self._texts[world], () if features is None else (features,)
        aligned, *condensed = self.method.compare(encoded, texts, *vectors)
        ranked = self.method.fuse(aligned, self.spaces[world].pairs_on(self.device))
        target = self.columns[world][columns.cpu()]
        for name, rows in self._scored(world, ranked, aligned, features, *condensed):
            if part == "search" and self.thresholds is not None:
                self.thresholds.update(name, rows.cpu(), target)
            else:
                self._score(name, world, rows.cpu(), target)
        if world == "closed" and self._gap is not None:
            candidates = ranked.masked_fill(~self.get_buffer("_candidates"), -torch.inf)
            self._gap.update(tokens_of(encoded), features, candidates.argmax(dim=1), columns, texts.pairs)

    def _score(self, name: str, world: World, rows: Tensor, target: Tensor) -> None:
        views: dict[str, Tensor] = {world: rows}
        if world == "open" and self.thresholds is not None:
            views["feasible"] = self.thresholds.masked(name, rows)  # behind every softmax, argmax and entropy
        for view, scores in views.items():
            for protocol in PROTOCOLS:
                self._scores[name, view, protocol].update(scores, target)

    def _scored(
        self,
        world: World,
        ranked: Tensor,
        aligned: Logits,
        features: Tensor | None,
        condensed: Logits | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Scores by every readout, one at a time; then the banks that adapt see the batch."""
        pairs = self.spaces[world].pairs_on(self.device)
        for name, readout in self.readouts.items():
            if readout.alone and not readout.probabilities:
                yield name, ranked
        if all(readout.alone and not readout.probabilities for readout in self.readouts.values()):
            return

        probs = self.method.probabilities(aligned, pairs)
        for name, readout in self.readouts.items():
            if readout.alone and readout.probabilities:
                yield name, probs
        if features is None or condensed is None:
            return

        behind = self.method.probabilities(condensed, pairs)
        banks = {plan: self._banks[world, plan] for plan in self.plans}
        memories = {plan: bank(features).softmax(dim=1) for plan, bank in banks.items()}
        for name, readout in self.readouts.items():
            if not readout.alone:
                assert readout.beta is not None
                assert readout.gamma is not None
                memory = None if readout.bank is None else memories[readout.bank]
                yield name, fuse(probs, behind, memory, beta=readout.beta, gamma=readout.gamma)
        for plan, bank in banks.items():
            if plan.updates:
                bank.update(features, condensed.pairs.softmax(dim=1))

    def on_test_epoch_end(self) -> None:
        self.results = {name: {} for name in self.readouts}
        for (name, world, protocol), score in self._scores.items():
            self.results[name].setdefault(world, {})[protocol] = score.result()
        for bank in self._banks.values():
            bank.check_updates()
        self.rejected = max((int(bank.num_rejected) for bank in self._banks.values()), default=0)
        self.gap = {} if self._gap is None else self._gap.as_dict()

    def filled_bank(self, world: World, slots: int) -> DynamicMemoryBank:
        """The bank as the training images left it."""
        return self._filled[world, slots]

    def as_dicts(self) -> dict[str, Any]:
        """The results for a JSON file: by readout, world and protocol."""
        return {
            name: {
                world: {protocol: result.as_dict() for protocol, result in by_protocol.items()}
                for world, by_protocol in by_world.items()
            }
            for name, by_world in self.results.items()
        }
