"""What is known of the published data sets: their counts, the digests of their pair lists, and where they are had."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedSet:
    """A data set as it was published.

    Attributes:
        title: Its name in papers.
        attributes, objects, closed_world: How many there are; pairs of all splits together.
        pairs: Of train, val and test.
        unseen: Pairs of val and test that are not trained.
        images: Of train, val and test.
        digests: SHA-256 of the sorted pairs of each split (:func:`pairs_digest`).
        version: Which release the counts are of.
        source: Where it was to be had.
        licence: What its source says of use.
    """

    title: str
    attributes: int
    objects: int
    closed_world: int
    pairs: dict[str, int]
    unseen: dict[str, int]
    images: dict[str, int]
    digests: dict[str, str]
    version: str
    source: str
    licence: str


def pairs_digest(pairs: Iterable[tuple[str, str]]) -> str:
    """SHA-256 of a list of pairs, sorted, one ``attribute object`` a line; as a hexadecimal string.

    Example:
        >>> pairs_digest([("wet", "dog"), ("old", "cat")]) == pairs_digest([("old", "cat"), ("wet", "dog")])
        True
    """
    lines = sorted(f"{attribute} {obj}" for attribute, obj in pairs)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def published_name(pairs: dict[str, list[Any]]) -> str | None:
    """Which published data set has these pairs of train, val and test; None if none has.

    Example:
        >>> published_name({"train": [("wet", "dog")], "val": [("wet", "dog")], "test": [("wet", "dog")]})
    """
    for name, known in PUBLISHED.items():
        if all(len(pairs[split]) == count for split, count in known.pairs.items()):
            found = {split: pairs_digest(group) for split, group in pairs.items()}
            if found == known.digests:
                return name
    return None


# The pair lists and image lists of MIT-States and UT-Zappos.
SPLITS_SOURCE = "https://senthilpurushwalkam.com/publications/compositional/compositional_split_natural.tar.gz"
PUBLISHED: dict[str, PublishedSet] = {
    "ut-zappos": PublishedSet(
        title="UT-Zappos",
        attributes=16,
        objects=12,
        closed_world=116,
        pairs={"train": 83, "val": 30, "test": 36},
        unseen={"val": 15, "test": 18},
        images={"train": 22998, "val": 3214, "test": 2914},
        digests={
            "train": "2f14873517400837eebeb1089cfd515be3e1bda865f23957071ddde3952740fb",
            "val": "bd0644a8bb9a6c0caaa7deeaedd02793361badbe21b1ced35c1fa089b05c7795",
            "test": "61437d3f6e74d75c83f80bd1ce5741dfa44c416bc589c16d051b231d70ea1e04",
        },
        version="the pictures of UT Zappos50K, re-ordered by the split's own script (metadata `_image` to `image`)",
        source="https://vision.cs.utexas.edu/projects/finegrained/utzap50k",
        licence="academic, non-commercial use only",
    ),
    "mit-states": PublishedSet(
        title="MIT-States",
        attributes=115,
        objects=245,
        closed_world=1962,
        pairs={"train": 1262, "val": 600, "test": 800},
        unseen={"val": 300, "test": 400},
        images={"train": 30338, "val": 10420, "test": 12995},
        digests={
            "train": "86fe0413b37ad609de578f8ffb8d8d6078df5f7118ccaf9c7ece2e8d15c21bbe",
            "val": "e0344f11620290f1b3396796864bb0c05fd94f6773c647c92eec38f2ae89cda5",
            "test": "e07f677f36c9ac7f6cd7f63a5a249b5eac5003f729ee12913e1bb94c73ce396e",
        },
        version="release_dataset.zip, blanks in folder names made underscores (both are found)",
        source="http://web.mit.edu/phillipi/Public/states_and_transformations",
        licence="none stated",
    ),
    "cgqa": PublishedSet(
        title="C-GQA",
        attributes=413,
        objects=674,
        closed_world=7767,
        pairs={"train": 5592, "val": 2292, "test": 1811},
        unseen={"val": 1252, "test": 923},
        images={"train": 26920, "val": 7280, "test": 5098},
        digests={
            "train": "7418085d991b72ef44eccf71c7902607dac754645ee3759953a375536ec39e44",
            "val": "dd52e16643c300d1f12e81d6ef9c3c9b07a7df44fb1b5f77ec500a3c69d9db76",
            "test": "573418e3627c099691cbbdb0a132b6db387f3d00a74138babbd824221caff51a",
        },
        version="the updated release; in the first one 133 training pairs had no images",
        source="https://huggingface.co/datasets/nihalnayak/cgqa",
        licence="pictures of Visual Genome and GQA, CC BY 4.0",
    ),
}
