"""Is a data set on disk whole, and is it read as its owner means it? Rows, words, pairs, and every picture."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from czsl_heads._checks import check_choice
from czsl_heads.data.images import DataError, as_rgb, depth, open_raw, orientation, quiet_pillow
from czsl_heads.data.layout import (
    ABSENT,
    SPLIT_NAME,
    SPLITS,
    CompositionDataset,
    NamedPair,
    Sample,
    read_leniently,
    read_metadata,
    untrained_words,
)
from czsl_heads.data.names import same_prompts
from czsl_heads.data.published import PUBLISHED, pairs_digest, published_name

FEW = 256  # pictures that are looked at without other processes, whose start takes longer
_SHOWN = 5  # names of a kind that are printed; JSON has all

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


class Look(NamedTuple):
    """What was found in one picture: an error, or its content, size, depth and whether it is turned."""

    error: str | None
    content: str = ""
    size: tuple[int, int] = (0, 0)
    bits: int = 8
    turned: bool = False


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check` found.

    Attributes:
        pairs, images, seen_images: Counts of each split.
        pairs_without_images: Of each split, by name.
        broken: What is wrong with each picture that does not decode.
        problems: Why the data set cannot be trained on, or is not what it should be; with ``broken``, all errors.
        warnings: What its owner should look at.
        facts: Sizes, bit depths, turned pictures, and the published set that it is.
    """

    pairs: dict[str, int]
    images: dict[str, int]
    seen_images: dict[str, int]
    pairs_without_images: dict[str, list[NamedPair]]
    broken: list[str]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings may be."""
        return not self.broken and not self.problems

    @property
    def verdict(self) -> str:
        """The last line of the report."""
        errors, warnings = len(self.broken) + len(self.problems), len(self.warnings)
        if errors:
            return f"not fit to train on: {_counted(errors, 'error')}, {_counted(warnings, 'warning')}"
        if warnings:
            return f"fit to train on, but look at {_counted(warnings, 'warning')}"
        return "fit to train on"

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return {"ok": self.ok, "verdict": self.verdict, **asdict(self)}

    def __str__(self) -> str:
        lines = [self._split_line(name) for name in SPLITS]
        lines += [f"{name}: {_said(value)}" for name, value in self.facts.items()]
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [f"error: {text}" for text in [*self.problems, *self.broken]]
        return "\n".join([*lines, self.verdict])

    def _split_line(self, name: str) -> str:
        counts = f"{self.pairs[name]:5} pairs  {self.images[name]:6} images ({self.seen_images[name]} of seen pairs)"
        bare = len(self.pairs_without_images[name])
        return f"{name:5}  {counts}" + (f", {_counted(bare, 'pair')} without images" if bare else "")


def check(
    root: str | os.PathLike[str],
    *,
    split: str = SPLIT_NAME,
    dataset: str | None = None,
    allow_untrained_primitives: bool = False,
    allow_outside: bool = False,
    upright: bool | None = None,
    names: str = "published",
    workers: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Read a data set, decode every image of it, and say what is wrong and what is odd.

    Args:
        root: Folder of the data set.
        split: Name of the split.
        dataset: The published set that it should be: ``"ut-zappos"``, ``"mit-states"`` or ``"cgqa"``.
        allow_untrained_primitives, allow_outside, upright, names: As in :func:`czsl_heads.data.read_dataset`.
        workers: Processes that decode; None: one for each core, and none for a few hundred images.
        progress: Wraps an iterable and its length, and shows how far it is.

    Returns:
        A :class:`CheckReport`; print it. What is wrong with rows and images is listed, not raised.

    Raises:
        DataError: The folder is no data set, or one of its files cannot be read at all.

    Example:
        >>> from tempfile import mkdtemp
        >>> from czsl_heads.data import make_shapes
        >>> root = make_shapes(f"{mkdtemp()}/world", train_per_pair=1, val_per_pair=1, test_per_pair=1)
        >>> check(root).verdict
        'fit to train on'
    """
    if dataset is not None:
        check_choice("dataset", dataset, PUBLISHED)
    found, wrong = read_leniently(root, split=split, allow_outside=allow_outside, upright=upright, names=names)
    looks = look_at_images(found, workers=workers, progress=progress)
    untrained = untrained_words(found.split_pairs)
    problems: list[str] = [*wrong]
    remarks: list[str] = []
    if untrained and not allow_untrained_primitives:
        problems.append(untrained)
    for text, near in _left_out(found, split):
        (problems if near else remarks).append(text)
    problems += _against_published(found, dataset)
    remarks += [*_bare_pairs(found), *_respelled(found), *_same_prompts(found), *_same_pictures(found, looks)]
    seen = found.space.seen_mask.tolist()
    return CheckReport(
        pairs={name: len(group) for name, group in found.split_pairs.items()},
        images={name: len(group) for name, group in found.samples.items()},
        seen_images={name: sum(seen[s.column] for s in group) for name, group in found.samples.items()},
        pairs_without_images={name: _without_images(found, name) for name in SPLITS},
        broken=[look.error for look in looks.values() if look.error],
        problems=problems,
        warnings=remarks,
        facts=_facts(found, looks, dataset),
    )


def broken_images(dataset: CompositionDataset) -> list[str]:
    """What is wrong with each image that does not decode, in the order of the splits and files."""
    return [look.error for look in look_at_images(dataset).values() if look.error]


def look_at_images(
    dataset: CompositionDataset, *, workers: int | None = None, progress: Progress | None = None
) -> dict[str, Look]:
    """Decode every picture once, on all cores; by the path of its file."""
    samples = [sample for name in SPLITS for sample in dataset.samples[name]]
    paths = list(dict.fromkeys(os.path.join(sample.folder, sample.name) for sample in samples))
    if workers is None:
        workers = 0 if len(paths) <= FEW else _cores()
    pictures = _Pictures(paths, dataset.upright)
    loader = DataLoader(pictures, 32, num_workers=workers, collate_fn=list, worker_init_fn=quiet_pillow)
    batches: Iterable[list[Look]] = loader if progress is None else progress(loader, len(loader))
    looks = [look for batch in batches for look in batch]
    return dict(zip(paths, looks))


class _Pictures(Dataset[Look]):
    """What is found in the picture of each path."""

    def __init__(self, paths: list[str], upright: bool) -> None:
        self.paths, self.upright = paths, upright

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Look:
        try:
            with open_raw(self.paths[number]) as image:
                size, bits, turned = image.size, depth(image), orientation(image) != 1
                shown = as_rgb(image, upright=self.upright)
        except DataError as error:
            return Look(str(error))
        pixels = hashlib.blake2b(repr(shown.size).encode(), digest_size=16)
        pixels.update(shown.tobytes())
        return Look(None, pixels.hexdigest(), size, bits, turned)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _left_out(dataset: CompositionDataset, split: str) -> Iterator[tuple[str, bool]]:
    """Rows that are in no split, in sentences; and whether one looks like a slip of spelling."""
    left, space = dataset.left_out, dataset.space
    if left.absent:
        yield f"{_counted(left.absent, 'row')} left out: {ABSENT} in place of an attribute or a split", False
    if not left.unlisted:
        return
    rows = read_metadata(dataset.root / f"metadata_{split}.t7")
    strays = [(entry, f"{rows[entry]['attr']} {rows[entry]['obj']}") for entry in left.unlisted]
    known = {_plainly(" ".join(pair)): " ".join(pair) for pair in space.pair_names}
    entry, stray = strays[0]
    text = f"{_counted(len(strays), 'row')} left out: their pair is in no split file (first: entry {entry}, {stray!r})"
    slips = [(entry, pair) for entry, pair in strays if _plainly(pair) in known]
    if slips:
        entry, pair = slips[0]
        text += (
            f"; {len(slips)} of them differ from a pair by a capital, a blank or an accent only "
            f"(entry {entry}: {pair!r} is not {known[_plainly(pair)]!r})"
        )
    elif close := get_close_matches(stray, known.values(), n=1, cutoff=0.8):
        text += f"; did it mean {close[0]!r}?"
    yield text, bool(slips)


def _plainly(name: str) -> str:
    """A name without what the eye overlooks: case, accents, blanks, underscores and hyphens."""
    letters = unicodedata.normalize("NFKD", name).casefold()
    return "".join(letter for letter in letters if letter.isalnum())


def _against_published(dataset: CompositionDataset, name: str | None) -> Iterator[str]:
    """Where a data set differs from the published one that it should be."""
    if name is None:
        return
    known = PUBLISHED[name]
    for split in SPLITS:
        pairs, images = dataset.split_pairs[split], len(dataset.samples[split])
        if len(pairs) != known.pairs[split]:
            yield f"{split}: expected the {known.pairs[split]} pairs of {known.title}, got {len(pairs)}"
        elif (digest := pairs_digest(pairs)) != known.digests[split]:
            yield (
                f"{split}: expected the pairs of {known.title}, got others (SHA-256 of the sorted list {digest}, "
                f"published {known.digests[split]})"
            )
        if images != known.images[split]:
            yield (
                f"{split}: expected the {known.images[split]} images of {known.title} ({known.version}), got {images}"
            )


def _without_images(dataset: CompositionDataset, name: str) -> list[NamedPair]:
    shown = {(sample.attribute, sample.object) for sample in dataset.samples[name]}
    return [pair for pair in dataset.split_pairs[name] if pair not in shown]


def _bare_pairs(dataset: CompositionDataset) -> Iterator[str]:
    for name in SPLITS:
        if bare := [" ".join(pair) for pair in _without_images(dataset, name)]:
            yield f"{name}: {_counted(len(bare), 'pair')} without images: {_listed(bare)}"


def _respelled(dataset: CompositionDataset) -> Iterator[str]:
    found = dataset.left_out.respelled
    if found:
        name, near = next(iter(found.items()))
        yield f"{_counted(len(found), 'image')} found under another spelling: {name!r} is {near!r}"


def _same_prompts(dataset: CompositionDataset) -> Iterator[str]:
    for names in same_prompts(dataset.space):
        yield f"names that make one prompt: {_listed([repr(name) for name in names])}"


def _same_pictures(dataset: CompositionDataset, looks: dict[str, Look]) -> Iterator[str]:
    """Pictures that stand in two splits, twice in one, or under two labels."""
    places: dict[str, list[tuple[str, Sample]]] = {}
    for name in SPLITS:
        for sample in dataset.samples[name]:
            look = looks[os.path.join(sample.folder, sample.name)]
            if look.error is None:
                places.setdefault(look.content, []).append((name, sample))
    shared = [group for group in places.values() if len(group) > 1]

    across = [group for group in shared if len({name for name, _ in group}) > 1]
    yield from _told(across, "in two splits")
    twice = [group for group in shared if len({(name, sample.column) for name, sample in group}) < len(group)]
    yield from _told(twice, "twice in one split under one label")
    labelled = [group for group in shared if len({sample.column for _, sample in group}) > 1]
    yield from _told(labelled, "under two labels")


def _told(groups: list[list[tuple[str, Sample]]], how: str) -> Iterator[str]:
    if groups:
        first = [f"{sample.name} ({name}: {sample.attribute} {sample.object})" for name, sample in groups[0]]
        yield f"{_counted(len(groups), 'picture')} {how}: {_listed(first)}"


def _facts(dataset: CompositionDataset, looks: dict[str, Look], name: str | None) -> dict[str, Any]:
    """What is good to know, and neither right nor wrong."""
    whole = [look for look in looks.values() if look.error is None]
    facts: dict[str, Any] = {}
    if whole:
        sides = sorted(min(look.size) for look in whole)
        facts["shorter side"] = f"{sides[0]} to {sides[-1]} pixels, median {sides[len(sides) // 2]}"
    depths = Counter(look.bits for look in whole)
    if set(depths) - {8}:
        facts["bits a channel"] = ", ".join(f"{bits}: {count} images" for bits, count in sorted(depths.items()))
    if turned := sum(look.turned for look in whole):
        how = "and shown upright" if dataset.upright else "but read as they are stored (upright turns them)"
        facts["turned by EXIF"] = f"{_counted(turned, 'image')}, {how}"
    known = PUBLISHED.get(name or published_name(dataset.split_pairs) or "")
    if known is not None:
        facts["published set"] = f"{known.title}, {known.version}; from {known.source} ({known.licence})"
    facts["SHA-256 of sorted pairs"] = {split: pairs_digest(pairs) for split, pairs in dataset.split_pairs.items()}
    if known is not None:
        facts["published SHA-256"] = known.digests
    return facts


def _said(fact: Any) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{name} {value}" for name, value in fact.items())
    return str(fact)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"
