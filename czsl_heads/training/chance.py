"""Is a result better than what a model scores that does not look at the images?"""

from __future__ import annotations

import math
from typing import Any

from czsl_heads.data.layout import CompositionDataset


def chance_of(dataset: CompositionDataset, split: str) -> dict[str, dict[str, Any]]:
    """What always naming the same pair scores at best, on the images of seen and of unseen pairs.

    Returns:
        By ``"seen"`` and ``"unseen"``: ``images``, their number, and ``accuracy``, the share of the most frequent pair
        among them; None where there are no images.
    """
    columns = dataset.images(split).columns
    seen = dataset.space.seen_mask[columns]
    found: dict[str, dict[str, Any]] = {}
    for kind, mask in (("seen", seen), ("unseen", ~seen)):
        counts = columns[mask].bincount()
        count = int(mask.sum())
        found[kind] = {"images": count, "accuracy": int(counts.max()) / count if count else None}
    return found


def at_chance(row: dict[str, Any], chance: dict[str, dict[str, Any]]) -> bool:
    """Whether a row of the closed world is no better than always naming the same pair.

    A model that names one seen and one unseen pair has an area under its exact curve of half the product of their
    shares. A row is at chance if its area is not above that, with two standard errors added to each share. Where there
    are images of one kind only, their accuracy is compared alone.

    Args:
        row: Of a results file.
        chance: Of :func:`chance_of`.
    """
    summary = row["summary"].get("closed")
    if summary is None:
        return False
    levels = {kind: _upper(level) for kind, level in chance.items() if level["accuracy"] is not None}
    exact = summary["exact"]
    if len(levels) == len(chance):
        area = exact["auc"]["mean"]
        return area is not None and bool(area <= math.prod(levels.values()) / 2)
    found = {kind: exact[kind]["mean"] for kind in levels}
    return bool(found) and all(found[kind] is not None and found[kind] <= level for kind, level in levels.items())


def _upper(level: dict[str, Any]) -> float:
    """A share, and two binomial standard errors."""
    share: float = level["accuracy"]
    error: float = (share * (1 - share) / level["images"]) ** 0.5
    return share + 2 * error
