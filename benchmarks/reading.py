"""What does reading a large data set cost? ``python -m benchmarks.reading``.

A data set of 200,000 rows over 2,000 pairs, a file for each, is read. The unit is what nobody can do without:
``torch.load`` of its metadata and one plain loop over the rows. Seconds in turn, and memory at its peak.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import peak_memory, time_in_turn, write_results
from czsl_heads.data import read_dataset
from czsl_heads.data.layout import SPLIT_NAME, SPLITS

SEED = 0
ATTRIBUTES, OBJECTS, ROWS = 40, 50, 200_000


def main(rows: int = ROWS, rounds: int = 5) -> None:
    """Time the reader against a bare look at the same rows.

    Args:
        rows: Rows of the metadata.
        rounds: Rounds of timing.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_large(root, rows)
        metadata = root / f"metadata_{SPLIT_NAME}.t7"
        rivals = {"bare": lambda: look(metadata), "read_dataset": lambda: read_dataset(root)}
        seconds = time_in_turn(rivals, rounds=rounds)
        memory = {name: peak_memory(run) for name, run in rivals.items()}
    times = seconds["read_dataset"] / seconds["bare"]
    megabytes = {name: round(size / 1e6) for name, size in memory.items()}
    print(
        f"{rows:,} rows: read_dataset takes {times:.2f} times torch.load and one loop; peak memory in MB: {megabytes}"
    )
    content: dict[str, Any] = {"rows": rows, "pairs": ATTRIBUTES * OBJECTS, "times_bare": round(times, 2)}
    write_results("reading", "What does reading a large data set cost?", SEED, content | {"peak_megabytes": megabytes})


def look(metadata: Path) -> int:
    """All rows loaded, and each looked at once."""
    count = 0
    for row in torch.load(metadata, weights_only=True):
        count += row["set"] == "train" and row["attr"] != row["obj"]
    return count


def write_large(root: Path, count: int) -> None:
    """A data set of empty image files: the reader does not decode them."""
    split = root / SPLIT_NAME
    split.mkdir()
    pairs = [(f"attribute{i}", f"object{j}") for i in range(ATTRIBUTES) for j in range(OBJECTS)]
    lines = "\n".join(" ".join(pair) for pair in pairs)
    for name in SPLITS:
        (split / f"{name}_pairs.txt").write_text(lines, encoding="utf-8")
    for attribute, obj in pairs:
        (root / "images" / f"{attribute}_{obj}").mkdir(parents=True)

    rows = []
    for number in range(count):
        attribute, obj = pairs[number % len(pairs)]
        name = f"{attribute}_{obj}/{number}.jpg"
        os.close(os.open(root / "images" / name, os.O_CREAT))
        rows.append({"image": name, "attr": attribute, "obj": obj, "set": SPLITS[number % 3]})
    torch.save(rows, root / f"metadata_{SPLIT_NAME}.t7")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
