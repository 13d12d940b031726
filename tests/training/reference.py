"""Scores by hand: image by image, a bank that is fed by hand, and Eq. 12 written out."""

from copy import deepcopy
from functools import cache

import pytest
import torch

from czsl_heads import DynamicMemoryBank
from czsl_heads.functional import czsl_scores

NUMBERS = ("auc", "seen", "unseen", "harmonic_mean", "attr_accuracy", "obj_accuracy")


class Reference:
    """A model over a data set; ``batch_size`` is how many images an adapting bank predicts before it sees them."""

    def __init__(self, model, dataset, batch_size):
        self.model, self.dataset, self.batch_size = model, dataset, batch_size
        self.method = getattr(model, "method", model)
        self.look = cache(self._look)
        self.encode = cache(self._encode)
        self.filled = cache(self._filled)
        self.texts = cache(lambda world: model.texts(self.space(world).pairs))

    def space(self, world):
        return self.dataset.space if world == "closed" else self.dataset.space.open_world()

    def _encode(self, split):
        images = self.dataset.images(split, self.model.encoder.transform())
        return [self.model.encode(image[None]) for image, _ in images]

    def _look(self, world, split):
        return [self.model.compare(encoded, self.texts(world))[0] for encoded in self.encode(split)]

    @torch.no_grad()
    def scores(self, readout, world="closed", split="test"):
        """Fill a bank one training image at a time, then predict a batch of the split and feed it, image by image."""
        pairs = self.space(world).pairs
        seen = self.look(world, split)
        if readout.alone:
            rank = self.method.probabilities if readout.probabilities else self.method.fuse
            return torch.cat([rank(getattr(logits, "aligned", logits), pairs) for logits in seen])

        bank = None if readout.bank is None else deepcopy(self.filled(readout.bank._replace(updates=False), world))
        rows = []
        for start in range(0, len(seen), self.batch_size):
            batch = seen[start : start + self.batch_size]
            for logits in batch:
                memory = 0.0 if bank is None else readout.gamma * bank(logits.features).softmax(1)
                aligned, condensed = (self.method.probabilities(part, pairs) for part in logits[:2])
                rows.append(readout.beta * aligned + (1 - readout.beta) * (condensed + memory))
            if bank is not None and readout.bank.updates:
                self.feed(bank, batch)
        return torch.cat(rows)

    def _filled(self, plan, world):
        space, encoder = self.space(world), self.model.encoder
        scale = self.model.recipe.bank.logit_scale or float(encoder.logit_scale)
        bank = DynamicMemoryBank(len(space), encoder.dim, slots=plan.slots, logit_scale=scale)
        self.feed(bank, self.look(world, "train"))
        if plan.texts:
            for column in (~space.seen_mask).nonzero().flatten():
                bank.fill_texts(self.texts(world).pairs[column][None], column[None])
        return bank

    @staticmethod
    def feed(bank, seen):
        for logits in seen:
            bank.update(logits.features, logits.condensed.pairs.softmax(1))


def reference_result(scores, dataset, world="closed", split="test", protocol="standard"):
    """What the field's evaluation makes of scores."""
    space = dataset.space if world == "closed" else dataset.space.open_world()
    target = space.index(dataset.space.pairs[dataset.images(split).columns])
    mask = dataset.eval_mask(split) if world == "closed" else None
    return czsl_scores(scores, target, *space.pairs.unbind(1), space.seen_mask, mask, protocol=protocol)


def assert_same_numbers(found, expected):
    """Of two results, the first as plain values."""
    for name in NUMBERS:
        assert found[name] == pytest.approx(getattr(expected, name), abs=1e-6), name
