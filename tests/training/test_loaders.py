"""The order of batches, and the pixels in them, depend on (seed, epoch) alone."""

import os

import pytest
import torch

from czsl_heads import wrap
from czsl_heads.data import CompositionDataset
from czsl_heads.training.loaders import EpochSampler, count_workers, eval_loader, train_loader
from czsl_heads.training.options import load_options


def order(seed: int, epoch: int, **ranks: int) -> list[int]:
    sampler = EpochSampler(23, seed=seed, **ranks)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert {first for first, _ in drawn} == {epoch}
    return [number for _, number in drawn]


def test_order_is_a_permutation_fixed_by_seed_and_epoch() -> None:
    assert sorted(order(0, 3)) == list(range(23))
    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)


def test_ranks_share_an_epoch_without_overlap() -> None:
    shares = [order(0, 1, rank=rank, num_ranks=3) for rank in range(3)]
    assert [len(share) for share in shares] == [7, 7, 7]
    assert len(set().union(*shares)) == 21


def epochs(dataset: CompositionDataset, *numbers: int, workers: int = 0) -> list[list[torch.Tensor]]:
    """Everything that the training loader gives in epochs."""
    images = dataset.images("train", wrap("tiny").transform(train=True), seed=5)
    loader = train_loader(images, 40, 5, workers=workers)
    assert loader.num_workers == workers
    drawn = []
    for number in numbers:
        loader.sampler.set_epoch(number)
        drawn.append([part for batch in loader for part in batch])
    return drawn


def test_an_epoch_repeats_to_the_bit_whatever_ran_before(dataset: CompositionDataset) -> None:
    (first,) = epochs(dataset, 1)
    torch.rand(17)
    again, other = epochs(dataset, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


def test_workers_change_no_batch(dataset: CompositionDataset) -> None:
    for alone, helped in zip(epochs(dataset, 0, 1), epochs(dataset, 0, 1, workers=2)):
        assert len(alone) == len(helped) > 2
        assert all(torch.equal(one, other) for one, other in zip(alone, helped))


def test_evaluation_runs_in_file_order(dataset: CompositionDataset) -> None:
    loader = eval_loader(dataset.images("test", wrap("tiny").transform()), 40)
    columns = torch.cat([target for _, target in loader])
    assert columns.tolist() == [sample.column for sample in dataset.samples["test"]]


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (5, 5), (64, 8)])
def test_a_preset_of_real_images_has_a_worker_a_core_up_to_eight(
    cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    for method in ("sac", "troika"):
        assert count_workers(load_options(method, "cgqa")[0].workers) == workers
        assert count_workers(load_options(method, "shapes")[0].workers) == 0
