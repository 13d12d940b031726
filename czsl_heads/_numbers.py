"""How numbers are written for people: fractions in per cent, with their deviation or interval."""

from __future__ import annotations

Spread = dict[str, "float | None"]


def percent(spread: Spread) -> str:
    """Mean, and deviation if there is one, of a fraction, in per cent."""
    mean, std = spread["mean"], spread["std"]
    if mean is None:
        return "none"
    return f"{100 * mean:.1f}" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f}"


def fraction(spread: Spread | None) -> str:
    """Mean, and deviation if there is one, as it is; a dash for what a row does not have."""
    if spread is None or spread["mean"] is None:
        return "-"
    return f"{spread['mean']:.3f}" if spread["std"] is None else f"{spread['mean']:.3f} ± {spread['std']:.3f}"


def interval(difference: Spread) -> str:
    """A paired difference of fractions in points, with the half-width of its interval."""
    mean, half = difference["mean"], difference["half_width"]
    if mean is None:
        return "none"
    return f"{100 * mean:+.1f}" if half is None else f"{100 * mean:+.1f} ± {100 * half:.1f}"


def markdown_table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; a heading of "" is over words, any other over numbers."""
    lines = [headings, ["--:" if heading else ":--" for heading in headings], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
