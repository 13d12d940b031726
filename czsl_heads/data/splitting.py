"""Draws seen and unseen pairs for a data set that has no split, as the published sets have them."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from czsl_heads._checks import check_integer, check_kind, check_positive, check_range
from czsl_heads._files import native, write_json, write_text
from czsl_heads.data.images import DataError
from czsl_heads.data.layout import (
    ABSENT,
    SPLIT_NAME,
    SPLITS,
    NamedPair,
    layout_files,
    read_metadata,
    untrained_words,
    write_metadata,
)

DRAW = "split.json"
_SHOWN = 5  # words named in an error


@dataclass(frozen=True)
class Split:
    """What :func:`split_dataset` drew.

    Attributes:
        seed, unseen, held_out: As they were asked for.
        seen_pairs, unseen_pairs, images: Counts of each split.
        dropped: Rows that are in no split now, since their picture went to a split without their pair.
    """

    seed: int
    unseen: float
    held_out: float
    seen_pairs: dict[str, int]
    unseen_pairs: dict[str, int]
    images: dict[str, int]
    dropped: int = 0

    def __str__(self) -> str:
        lines = ["split   seen pairs  unseen pairs  images"]
        for name in SPLITS:
            lines.append(f"{name:5}  {self.seen_pairs[name]:11}  {self.unseen_pairs[name]:12}  {self.images[name]:6}")
        if self.dropped:
            lines.append(f"{self.dropped} rows are in no split: their picture went to one that lacks their pair")
        lines.append(f"drawn by seed {self.seed}: say so when you report a number")
        return "\n".join(lines)


def split_dataset(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    unseen: float = 0.3,
    held_out: float = 0.2,
    overwrite: bool = False,
) -> Split:
    """Draw seen and unseen pairs, and write the split into the data set.

    Every attribute and every object keeps a seen pair. Unseen pairs are halved between validation and test. Each of
    both also holds as many seen pairs, as far as there are pictures, of which a part of the pictures is held out. All
    other pictures of seen pairs are for training.

    Args:
        root: Folder of the data set: its metadata, of which every row with an attribute is taken.
        seed: Decides the draw.
        unseen: The share of pairs that are not trained, in (0, 1).
        held_out: The share of pictures that a seen pair gives to validation, and to test, in (0, 0.5].
        overwrite: Replace an earlier draw. Split files of another origin are never replaced.

    Returns:
        A :class:`Split`; print it.

    Raises:
        DataError: There is no metadata, there is a split already, or these pairs cannot be split so; the message says
            why.
        ValueError: A share or the seed is out of range.

    Example:
        >>> from tempfile import mkdtemp
        >>> root = Path(mkdtemp())
        >>> pairs = [(attribute, obj) for attribute in ("ripe", "raw", "red") for obj in ("apple", "pear", "plum")]
        >>> rows = [
        ...     {"image": f"{attribute} {obj} {number}.png", "attr": attribute, "obj": obj, "set": "NA"}
        ...     for attribute, obj in pairs
        ...     for number in range(5)
        ... ]
        >>> write_metadata(root, rows)
        >>> split_dataset(root).unseen_pairs
        {'train': 0, 'val': 1, 'test': 2}
    """
    check_integer("seed", seed, 0)
    for name, share, most in (("unseen", unseen, 1), ("held_out", held_out, 0.5)):
        check_positive(name, share)
        check_range(name, share, 0, most)
    check_kind("overwrite", overwrite, bool)
    root = Path(native(os.fspath(root)))
    _check_free(root, overwrite)
    rows = read_metadata(layout_files(root)[0])
    labelled = [row for row in rows if row["attr"] != ABSENT]
    pictures = Counter((row["attr"], row["obj"]) for row in labelled)
    pairs = sorted(pictures)
    rng = np.random.default_rng(seed)

    hidden = _unseen_pairs(pairs, unseen, rng)
    shares = _shared_out(hidden, pairs, pictures, rng)
    dropped = _place_rows(rows, shares, hidden, held_out, rng)
    shown = _shown_pairs(rows)
    _check_drawn(shown, set(hidden))
    drawn = _summary(rows, shown, set(hidden), Split(seed, unseen, held_out, {}, {}, {}, dropped))
    _write(root, rows, shown, drawn)
    return drawn


def write_pairs(root: Path, pairs: Mapping[str, Iterable[NamedPair]]) -> None:
    """Write the pair files of a data set; with ``+`` between the names where one of them holds a blank.

    Raises:
        DataError: Names hold blanks, and one holds ``+``.
    """
    names = {name for group in pairs.values() for pair in group for name in pair}
    blank = next((name for name in sorted(names) if " " in name), None)
    plus = next((name for name in sorted(names) if "+" in name), None)
    if blank and plus:
        raise DataError(
            f"expected names with blanks or with +, got {blank!r} and {plus!r}, which no pair file can hold"
        )
    between = "+" if blank else " "
    for name, group in pairs.items():
        lines = [between.join(pair) for pair in sorted(group)]
        write_text(root / SPLIT_NAME / f"{name}_pairs.txt", "\n".join(lines) + "\n")


def _check_free(root: Path, overwrite: bool) -> None:
    metadata, *lists = layout_files(root)
    if not metadata.is_file():
        raise DataError(f"{root}: expected a data set with {metadata.name}, got none; czsl import makes one")
    if not any(path.exists() for path in lists):
        return
    if not (root / DRAW).exists():
        raise DataError(f"{root}: expected a data set without a split, got one that czsl split has not drawn")
    if not overwrite:
        raise DataError(f"{root}: expected a data set without a split, got one; overwrite draws another")


def _unseen_pairs(pairs: list[NamedPair], share: float, rng: np.random.Generator) -> list[NamedPair]:
    """Pairs that are not trained, in random order; every word keeps another one."""
    wanted = max(2, round(share * len(pairs)))
    most = len(pairs) - len(_fewest_seen(pairs, rng))
    if wanted > most:
        counts = [Counter(pair[kind] for pair in pairs) for kind in (0, 1)]
        alone = [word for count in counts for word, times in sorted(count.items()) if times == 1]
        stand = f"; words of one pair only: {', '.join(alone[:_SHOWN])}" if alone else ""
        more = f" and {len(alone) - _SHOWN} more" if len(alone) > _SHOWN else ""
        raise DataError(
            f"expected {wanted} of {len(pairs)} pairs that can be unseen while every word is trained in another one, "
            f"got {most}{stand}{more}"
        )
    found = _greedy(pairs, wanted, rng)
    if len(found) < wanted:  # a bad order of choice; from the fewest seen pairs there is room for all
        kept = set(_fewest_seen(pairs, rng))
        rest = [pair for pair in pairs if pair not in kept]
        found = [rest[place] for place in rng.permutation(len(rest))[:wanted]]
    return found


def _greedy(pairs: list[NamedPair], wanted: int, rng: np.random.Generator) -> list[NamedPair]:
    left = [Counter(pair[kind] for pair in pairs) for kind in (0, 1)]
    found: list[NamedPair] = []
    for place in rng.permutation(len(pairs)):
        pair = pairs[place]
        if len(found) < wanted and all(left[kind][pair[kind]] > 1 for kind in (0, 1)):
            found.append(pair)
            left[0][pair[0]] -= 1
            left[1][pair[1]] -= 1
    return found


def _fewest_seen(pairs: list[NamedPair], rng: np.random.Generator) -> list[NamedPair]:
    """As few pairs as can hold every word: a minimum edge cover of the graph of attributes and objects."""
    from networkx import Graph
    from networkx.algorithms.bipartite import hopcroft_karp_matching

    shuffled = [pairs[place] for place in rng.permutation(len(pairs))]
    # Numbers for nodes: the order of a set of strings differs from process to process.
    attributes = {name: number for number, name in enumerate(dict.fromkeys(pair[0] for pair in shuffled))}
    objects = {name: -1 - number for number, name in enumerate(dict.fromkeys(pair[1] for pair in shuffled))}
    graph = Graph([(attributes[attribute], objects[obj]) for attribute, obj in shuffled])
    partner = hopcroft_karp_matching(graph, top_nodes=list(attributes.values()))

    cover = [pair for pair in shuffled if partner.get(attributes[pair[0]]) == objects[pair[1]]]
    held = [{pair[kind] for pair in cover} for kind in (0, 1)]
    for pair in shuffled:
        if any(pair[kind] not in held[kind] for kind in (0, 1)):
            cover.append(pair)
            held[0].add(pair[0])
            held[1].add(pair[1])
    return cover


def _shared_out(
    hidden: list[NamedPair], pairs: list[NamedPair], pictures: Counter[NamedPair], rng: np.random.Generator
) -> dict[str, list[NamedPair]]:
    """The pairs of each split."""
    seen = [pair for pair in pairs if pair not in set(hidden)]
    half = len(hidden) // 2
    unseen = {"val": hidden[:half], "test": hidden[half:]}
    shares = {"train": seen}
    taken: Counter[NamedPair] = Counter()
    for name, group in unseen.items():
        # One picture stays for training, and one for the other split where the pair stands there too.
        able = [pair for pair in seen if pictures[pair] >= 2 + taken[pair]]
        order = [able[place] for place in rng.permutation(len(able))]
        chosen = order[: len(group)]
        if not chosen:
            raise DataError("expected a seen pair of two pictures, of which one can be held out, got none")
        taken.update(chosen)
        shares[name] = [*group, *chosen]
    return shares


def _place_rows(
    rows: list[dict[str, str]],
    shares: dict[str, list[NamedPair]],
    hidden: Sequence[NamedPair],
    held_out: float,
    rng: np.random.Generator,
) -> int:
    """Write into each row which split its picture is of; how many rows fit into none."""
    split_of = _pictures_of_unseen(rows, shares, set(hidden))
    of_pair: dict[NamedPair, list[str]] = defaultdict(list)
    for row in rows:
        if row["image"] not in split_of and row["attr"] != ABSENT:
            of_pair[row["attr"], row["obj"]].append(row["image"])
    for name in ("val", "test"):
        for pair in shares[name]:
            free = [image for image in dict.fromkeys(of_pair[pair]) if image not in split_of]
            count = max(1, round(held_out * len(free)))
            for place in rng.permutation(len(free))[: min(count, len(free) - 1)]:
                split_of[free[place]] = name

    members = {name: set(group) for name, group in shares.items()}
    dropped = 0
    for row in rows:
        name = split_of.get(row["image"], "train")
        if row["attr"] == ABSENT:
            name = ABSENT
        elif (row["attr"], row["obj"]) not in members[name]:
            dropped, name = dropped + 1, ABSENT
        row["set"] = name
    return dropped


def _pictures_of_unseen(
    rows: list[dict[str, str]], shares: dict[str, list[NamedPair]], hidden: set[NamedPair]
) -> dict[str, str]:
    """The split of every picture that shows an unseen pair."""
    home = {pair: name for name in ("val", "test") for pair in shares[name] if pair in hidden}
    found: dict[str, str] = {}
    for row in rows:
        name = home.get((row["attr"], row["obj"]))
        if name is not None:
            found.setdefault(row["image"], name)
    return found


def _shown_pairs(rows: list[dict[str, str]]) -> dict[str, set[NamedPair]]:
    """The pairs that the pictures of each split show."""
    shown: dict[str, set[NamedPair]] = {name: set() for name in SPLITS}
    for row in rows:
        if row["set"] in shown:
            shown[row["set"]].add((row["attr"], row["obj"]))
    return shown


def _check_drawn(shown: dict[str, set[NamedPair]], hidden: set[NamedPair]) -> None:
    """Pictures of several pairs may have left a split without what it needs."""
    untrained = untrained_words({name: sorted(pairs) for name, pairs in shown.items()})
    if untrained:
        raise DataError(f"{untrained}: their pictures show unseen pairs, too; try another seed")
    for name in ("val", "test"):
        for word, pairs in (("seen", shown[name] - hidden), ("unseen", shown[name] & hidden)):
            if not pairs:
                raise DataError(f"expected pictures of {word} pairs for {name}, got none; try another seed")


def _summary(
    rows: list[dict[str, str]], shown: dict[str, set[NamedPair]], hidden: set[NamedPair], asked: Split
) -> Split:
    images = Counter(row["set"] for row in rows)
    return replace(
        asked,
        seen_pairs={name: len(pairs - hidden) for name, pairs in shown.items()},
        unseen_pairs={name: len(pairs & hidden) for name, pairs in shown.items()},
        images={name: images[name] for name in SPLITS},
    )


def _write(root: Path, rows: list[dict[str, str]], shown: dict[str, set[NamedPair]], drawn: Split) -> None:
    """The pair files come last: without them nobody takes the new metadata for a whole data set."""
    for path in layout_files(root)[1:]:
        path.unlink(missing_ok=True)
    write_metadata(root, rows)
    write_json(root / DRAW, asdict(drawn))
    write_pairs(root, shown)
