"""Numbers over seeds: mean and deviation, and paired differences with their intervals."""

from __future__ import annotations

import statistics
from typing import Any

from czsl_heads.training.evaluate import PROTOCOLS

SUMMARY = ("seen", "unseen", "harmonic_mean", "auc", "attr_accuracy", "obj_accuracy")
CONFIDENCE = 0.95


def numbers_of(test: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a result by world and protocol, without curves."""
    return {
        world: {protocol: {name: result[name] for name in SUMMARY} for protocol, result in by_protocol.items()}
        for world, by_protocol in test.items()
    }


def summary_of(tests: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds of each number, by world and protocol."""
    return {
        world: {
            protocol: {name: spread([test[world][protocol][name] for test in tests]) for name in SUMMARY}
            for protocol in PROTOCOLS
        }
        for world in tests[0]
    }


def differences_of(tests: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any]:
    """Paired differences over seeds of each number, by world and protocol; of the worlds that both have."""

    def paired(world: str, protocol: str, name: str) -> dict[str, float | None]:
        values, against = ([test[world][protocol][name] for test in each] for each in (tests, others))
        return paired_difference(values, against)

    return {
        world: {protocol: {name: paired(world, protocol, name) for name in SUMMARY} for protocol in PROTOCOLS}
        for world in tests[0]
        if world in others[0]
    }


def spread(values: list[float | None]) -> dict[str, float | None]:
    """The deviation is None for one seed; both are None where a number does not exist (no unseen test images, say)."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return {"mean": None, "std": None}
    return {"mean": statistics.fmean(numbers), "std": statistics.stdev(numbers) if len(numbers) > 1 else None}


def paired_difference(values: list[float | None], others: list[float | None]) -> dict[str, float | None]:
    """Mean over seeds of value less other, and the half-width of its interval by Student's t.

    The half-width is None for one seed, both are None where a number does not exist.
    """
    from scipy.stats import t

    differences = [value - other for value, other in zip(values, others) if value is not None and other is not None]
    if len(differences) < len(values):
        return {"mean": None, "half_width": None}
    count = len(differences)
    half = None
    if count > 1:
        error = statistics.stdev(differences) / count**0.5
        half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return {"mean": statistics.fmean(differences), "half_width": half}
