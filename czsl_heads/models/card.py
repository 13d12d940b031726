"""The card of a saved model: what it is, on what it was trained, what it scored, and what to make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from czsl_heads._numbers import markdown_table, percent

if TYPE_CHECKING:
    from czsl_heads.models.method import Method

_COLUMNS = {"S": "seen", "U": "unseen", "HM": "harmonic_mean", "AUC": "auc"}
NUMBERS = tuple(_COLUMNS.values())
_HEADER = """---
library_name: czsl-heads
tags:
- clip
- compositional-zero-shot-learning
---
"""


def model_card(model: Method) -> str:
    """The card as Markdown, from the model's recipe, label space and record.

    Raises:
        ValueError: The model was put together by hand, and has no recipe.
    """
    if model.recipe is None:
        raise ValueError("expected a model of a Recipe (czsl_heads.models.recipe.build), got one made by hand")
    recipe, space, record = model.recipe, model.space, model.record
    seen = int(space.seen_mask.sum())
    lines = [
        f"# {recipe.method} on {record.get('data', 'data of your own')}",
        "",
        f"The model names an image by one of {len(space):,} pairs of {len(space.attributes)} attributes and "
        f"{len(space.objects)} objects. It was trained on {seen:,} of the pairs.",
        "",
        *_scores(record),
        *_table(record),
        "## Made of",
        "",
        f"- method: `{recipe.method}`, images compared with texts by `{recipe.align}`",
        f"- encoder: `{recipe.encoder}`; SHA-256 of its weights `{model.encoder_digest}`",
        *(f"- {name}: {value}" for name, value in _known(record).items()),
        f"- recipe: `{recipe.as_dict()}`",
        "",
        "## Use",
        "",
        "```python",
        "import czsl_heads",
        "",
        'model = czsl_heads.load("this folder")',
        'model.predict("photo.jpg", topk=5)',
        "```",
        "",
        "The files hold what was trained. The CLIP around it is loaded by its name, and must have the digest above.",
        "",
    ]
    return _HEADER + "\n".join(lines)


def _known(record: dict[str, Any]) -> dict[str, Any]:
    """What the record says of the training, in words."""
    words = {
        "seed": "seed",
        "epoch": "epoch, of those that were tried",
        "selection": "epoch chosen by validation",
        "data_digest": "digest of the split and the labels",
        "preset": "preset",
    }
    return {text: f"`{record[name]}`" for name, text in words.items() if record.get(name) is not None}


def _scores(record: dict[str, Any]) -> list[str]:
    """A table of the test images, and whether they had a part in the model."""
    test = record.get("test")
    if not test:
        return ["It was not tested.", ""]
    rows = []
    for world, by_protocol in test.items():
        for protocol, numbers in by_protocol.items():
            cells = [percent({"mean": numbers[name], "std": None}) for name in NUMBERS]
            rows.append([f"{world} world, {protocol}", *cells])
    later = " Images were added to the memory bank after that." if record.get("adapted") else ""
    return [
        "## Test images, %",
        "",
        *markdown_table(["", *_COLUMNS], rows),
        "",
        f"Test images had no part in training or in the bank.{later} S and U are the best accuracies on seen and "
        "unseen pairs, HM their best harmonic mean, AUC the area under the curve of both.",
        "",
    ]


def _table(record: dict[str, Any]) -> list[str]:
    """The rows among which the model was trained, over all seeds; nothing for a model by itself."""
    rows = []
    for row in record.get("table", ()):
        numbers = row["summary"]["closed"]["standard"]
        rows.append([row["key"], row["title"], *(percent(numbers[name]) for name in NUMBERS)])
    if len(rows) < 2:
        return []
    seeds = ", ".join(map(str, record["seeds"]))
    return [
        f"## The table it stands in, row {record['row']}, %",
        "",
        *markdown_table(["row", "", *_COLUMNS], rows),
        "",
        f"Closed world, standard protocol, seeds {seeds}. Rows with * learn from test images, without their labels.",
        "",
    ]
