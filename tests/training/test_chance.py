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


def row_of(seen, unseen):
    numbers = {"seen": {"mean": seen, "std": None}, "unseen": {"mean": unseen, "std": None}}
    return {"summary": {"closed": {"exact": numbers}}}


def test_a_row_at_chance_is_within_two_standard_errors_in_both():
    chance = {"seen": {"images": 100, "accuracy": 0.2}, "unseen": {"images": 100, "accuracy": 0.5}}
    assert at_chance(row_of(0.28, 0.6), chance)
    assert at_chance(row_of(0.0, 0.0), chance)
    assert not at_chance(row_of(0.281, 0.6), chance)
    assert not at_chance(row_of(0.28, 0.601), chance)
    none = {"seen": {"images": 0, "accuracy": None}, "unseen": chance["unseen"]}
    assert at_chance(row_of(None, 0.6), none)
    assert not at_chance(row_of(None, None), none)
    assert not at_chance({"summary": {"open": {}}}, chance)


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
        assert at_chance(row_of(result.seen, result.unseen), chance) is expected
