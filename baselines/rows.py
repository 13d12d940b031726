"""The rows of a comparison: a method as published, with Sparse Alignment, and with what can be added behind it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

Addition = Literal["vac", "bank"]


class Row(NamedTuple):
    """A model that is trained, or one that was trained and is scored in another way.

    Args:
        title: What it has more than the row before.
        align: How images are compared with texts: ``"cls"``, or a reduction of the alignment head.
        base: The row whose trained model it takes over; None: it is trained from CLIP.
        added: What must be asked for, or the row is left out.
        probabilities: Whether pairs are ranked by probabilities, to which others' can be added, whatever the method
            itself ranks by; nothing is trained then.
        remembers: Whether there is a memory bank; nothing is trained then.
        transductive: Whether the bank holds texts of unseen pairs, and test images after they were predicted.
    """

    title: str
    align: str = "max"
    base: str | None = None
    added: Addition | None = None
    probabilities: bool = False
    remembers: bool = False
    transductive: bool = False


ROWS = {
    "cls": Row("as published", "cls"),
    "max": Row("+ Sparse Alignment"),
    "topk": Row("+ Sparse Alignment, mean of the {k} best", "topk"),
    "probs": Row("max, ranked by probabilities", base="max", added="vac", probabilities=True),
    "vac": Row("probs + condenser (VAC)", base="max", added="vac"),
    "bank": Row("vac + memory bank, frozen", base="vac", added="bank", remembers=True),
    "adapted": Row(
        "bank + unseen texts and test images *", base="vac", added="bank", remembers=True, transductive=True
    ),
}
# Each step, and the whole against the method as published.
COMPARISONS = (
    *(("max", "cls"), ("topk", "cls"), ("probs", "max"), ("vac", "probs"), ("vac", "cls")),
    *(("bank", "vac"), ("bank", "cls"), ("adapted", "bank"), ("adapted", "cls")),
)


def rows_with(added: Collection[str]) -> list[str]:
    """The names of the rows of a comparison, each behind those that it builds on."""
    return [name for name, row in ROWS.items() if row.added is None or row.added in added]
