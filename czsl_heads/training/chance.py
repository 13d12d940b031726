"""Is a result better than what a model scores that does not look at the images?"""

from __future__ import annotations

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
    """Whether a row's accuracies in the closed world are within two standard errors of chance, or below.

    Args:
        row: Of a results file.
        chance: Of :func:`chance_of`.
    """
    summary = row["summary"].get("closed")
    if summary is None:
        return False
    compared = 0
    for kind, level in chance.items():
        accuracy = summary["exact"][kind]["mean"]
        if level["accuracy"] is None or accuracy is None:
            continue
        compared += 1
        error = (level["accuracy"] * (1 - level["accuracy"]) / level["images"]) ** 0.5
        if accuracy > level["accuracy"] + 2 * error:
            return False
    return compared > 0
