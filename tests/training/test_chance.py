from dataclasses import replace

import pytest
import torch

from czsl_heads.metrics import CZSLScore
from czsl_heads.training.chance import at_chance, chance_of


def reference_chance(dataset, split):
    """Name each pair for every image, and keep the best share."""
    found = {}
    for kind, wanted in (("seen", True), ("unseen", False)):
        labels = [s.column for s in dataset.samples[split] if bool(dataset.space.seen_mask[s.column]) is wanted]
        shares = [labels.count(column) / len(labels) for column in range(len(dataset.space))]
        found[kind] = {"images": len(labels), "accuracy": max(shares)}
    return found


@pytest.mark.parametrize("split", ["val", "test"])
def test_chance_is_the_best_constant_answer(dataset, split):
    few = replace(dataset, samples={**dataset.samples, split: dataset.samples[split][:17]})
    few.samples[split].extend([few.samples[split][0]] * 3)
    assert chance_of(few, split) == reference_chance(few, split)


def row_of(seen, unseen, auc):
    values = {"seen": seen, "unseen": unseen, "auc": auc}
    return {"summary": {"closed": {"exact": {name: {"mean": value, "std": None} for name, value in values.items()}}}}


def test_a_row_at_chance_has_no_larger_area_than_one_pair_that_is_always_named():
    chance = {"seen": {"images": 100, "accuracy": 0.2}, "unseen": {"images": 100, "accuracy": 0.5}}
    most = (0.2 + 0.08) * (0.5 + 0.1) / 2  # two standard errors each
    assert at_chance(row_of(0.9, 0.9, most - 1e-9), chance)
    assert not at_chance(row_of(0.1, 0.1, most + 1e-9), chance)
    none = {"seen": {"images": 0, "accuracy": None}, "unseen": chance["unseen"]}
    assert at_chance(row_of(None, 0.6, None), none)
    assert not at_chance(row_of(None, 0.601, None), none)
    assert not at_chance(row_of(None, None, None), none)
    assert not at_chance({"summary": {"open": {}}}, chance)


def test_the_area_of_one_pair_that_is_always_named(dataset):
    space, columns = dataset.space, dataset.images("test").columns
    columns = torch.cat([columns, columns[:5], columns[-5:]])
    counts = columns.bincount(minlength=len(space))
    best = [int(counts.masked_fill(mask != space.seen_mask, -1).argmax()) for mask in (True, False)]
    scores = torch.zeros(len(columns), len(space))
    scores[:, best] = torch.rand(len(columns), 2, generator=torch.Generator().manual_seed(0)) + 1
    score = CZSLScore(space, protocol="exact")
    score.update(scores, columns)
    shares = [
        int(counts[column]) / int(counts[space.seen_mask == bool(space.seen_mask[column])].sum()) for column in best
    ]
    assert score.result().auc == pytest.approx(shares[0] * shares[1] / 2, rel=0.5)


def test_scores_that_know_nothing_are_at_chance_and_others_are_not(dataset):
    space, columns = dataset.space, dataset.images("test").columns
    chance = chance_of(dataset, "test")
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(columns), len(space), generator=generator)
    known = noise + torch.nn.functional.one_hot(columns, len(space))
    for scores, expected in ((noise, True), (known, False)):
        score = CZSLScore(space, eval_mask=dataset.eval_mask("test"), protocol="exact")
        score.update(scores, columns)
        result = score.result()
        assert at_chance(row_of(result.seen, result.unseen, result.auc), chance) is expected
