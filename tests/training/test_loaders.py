"""The order of batches, and the pixels in them, depend on (seed, epoch) alone."""

import os

import pytest
import torch

from czsl_heads import wrap
from czsl_heads.data import CompositionDataset
from czsl_heads.training.loaders import EpochSampler, count_workers, eval_loader, train_loader
from czsl_heads.training.options import SACOptions, load_options


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


def test_an_epoch_repeats_to_the_bit_whatever_ran_before(dataset: CompositionDataset) -> None:
    encoder, options = wrap("tiny"), SACOptions(batch_size=40)

    def epoch(number: int) -> list[torch.Tensor]:
        loader = train_loader(dataset.images("train", encoder.transform(train=True), seed=5), options, 5)
        loader.sampler.set_epoch(number)
        return [part for batch in loader for part in batch]

    first = epoch(1)
    torch.rand(17)
    again, other = epoch(1), epoch(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


def test_evaluation_runs_in_file_order(dataset: CompositionDataset) -> None:
    columns = torch.cat(
        [target for _, target in eval_loader(dataset.images("test", wrap("tiny").transform()), SACOptions())]
    )
    assert columns.tolist() == [sample.column for sample in dataset.samples["test"]]


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (5, 5), (64, 8)])
def test_a_preset_of_real_images_has_a_worker_a_core_up_to_eight(
    cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    assert count_workers(load_options("cgqa").workers) == workers
    assert count_workers(load_options("shapes").workers) == 0


def test_workers_change_no_batch(dataset: CompositionDataset) -> None:
    encoder = wrap("tiny")
    batches = []
    for workers in (0, 2):
        images = dataset.images("train", encoder.transform(train=True), seed=5)
        loader = train_loader(images, SACOptions(batch_size=40, workers=workers), 5)
        assert loader.num_workers == workers
        epochs = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            epochs.append([part for batch in loader for part in batch])
        batches.append(epochs)
    for alone, helped in zip(*batches):
        assert len(alone) == len(helped) > 2
        assert all(torch.equal(one, other) for one, other in zip(alone, helped))
