"""Is a data set on disk whole? Counts of each split, and every image decoded."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from czsl_heads.data.layout import (
    SPLIT_NAME,
    SPLITS,
    CompositionDataset,
    DataError,
    NamedPair,
    Sample,
    open_image,
    read_dataset,
)


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check` found: counts of each split, and every image that does not decode."""

    pairs: dict[str, int]
    images: dict[str, int]
    seen_images: dict[str, int]
    pairs_without_images: dict[str, list[NamedPair]]
    broken: list[str]

    @property
    def ok(self) -> bool:
        return not self.broken

    def __str__(self) -> str:
        lines = [
            f"{name:5}  {self.pairs[name]:5} pairs  "
            f"{self.images[name]:6} images ({self.seen_images[name]} of seen pairs)"
            + (f", {len(bare)} pairs without images" if (bare := self.pairs_without_images[name]) else "")
            for name in SPLITS
        ]
        return "\n".join([*lines, *self.broken])


def check(root: str | os.PathLike[str], *, split: str = SPLIT_NAME) -> CheckReport:
    """Read a data set and decode every image of it.

    Returns:
        A :class:`CheckReport`; print it. Broken images are listed, not raised.

    Raises:
        DataError: As :func:`czsl_heads.data.read_dataset`.
    """
    dataset = read_dataset(root, split=split)
    seen = dataset.space.seen_mask
    return CheckReport(
        pairs={name: len(group) for name, group in dataset.split_pairs.items()},
        images={name: len(group) for name, group in dataset.samples.items()},
        seen_images={name: sum(bool(seen[s.column]) for s in group) for name, group in dataset.samples.items()},
        pairs_without_images={name: _without_images(dataset, name) for name in SPLITS},
        broken=broken_images(dataset),
    )


def broken_images(dataset: CompositionDataset) -> list[str]:
    """What is wrong with each image that does not decode, in the order of the splits and files."""
    samples = [sample for name in SPLITS for sample in dataset.samples[name]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter's lock
        return [complaint for complaint in pool.map(_complaint, samples) if complaint is not None]


def _complaint(sample: Sample) -> str | None:
    try:
        open_image(sample.path)
    except DataError as error:
        return str(error)
    return None


def _without_images(dataset: CompositionDataset, name: str) -> list[NamedPair]:
    shown = {(sample.attribute, sample.object) for sample in dataset.samples[name]}
    return [pair for pair in dataset.split_pairs[name] if pair not in shown]
