"""What many CLIPs know of a data set before any training: one table, one protocol."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from czsl_heads._checks import check_choice
from czsl_heads._complaints import in_one_line
from czsl_heads._files import save_figure, write_table
from czsl_heads.data.layout import SPLITS, CompositionDataset, DataError
from czsl_heads.data.shapes import beyond_shapes
from czsl_heads.encoders.digest import weights_digest
from czsl_heads.encoders.wrap import wrap
from czsl_heads.heads.sparse_align import Reduce
from czsl_heads.models.recipe import HeadOptions, Recipe, build
from czsl_heads.training.evaluate import Evaluation
from czsl_heads.training.options import Options
from czsl_heads.training.rows import Readout
from czsl_heads.training.trainer import quiet, testing_trainer

World = Literal["closed", "open"]
COLUMNS = (
    "encoder",
    "align",
    "auc",
    "harmonic_mean",
    "seen",
    "unseen",
    "attr_accuracy",
    "obj_accuracy",
    "auc_standard",
    "split",
    "world",
    "images",
    "pairs",
    "seconds",
    "parameters",
    "dim",
    "image_size",
    "patches",
    "digest",
    "error",
)
_NUMBERS = ("auc", "harmonic_mean", "seen", "unseen", "attr_accuracy", "obj_accuracy")


def bench(
    encoders: Sequence[str],
    dataset: CompositionDataset,
    out: Path,
    *,
    aligns: Sequence[Reduce] = ("cls", "max"),
    context: str = "a photo of",
    topk: int = 4,
    split: str = "test",
    world: World = "closed",
    batch_size: int = 64,
    trainer: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Score CLIPs zero-shot on a split: their image feature, or all tokens, against a sentence of each pair.

    ``bench.csv`` in ``out`` is written anew after each encoder, so that a later one that fails loses nothing.

    Args:
        encoders: Names that :func:`czsl_heads.wrap` takes.
        dataset: Whose split is scored.
        out: Folder for ``bench.csv``.
        aligns: How images meet texts: ``"cls"``, the image feature, or a reduction over all tokens without parameters.
        context: What stands before each pair.
        topk: Tokens of ``"topk"``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        world: The candidates: the data set's pairs, or every attribute with every object.
        batch_size: Images at once.
        trainer: Flags of Lightning's Trainer.

    Returns:
        A row for each encoder and way, by :data:`COLUMNS`: the exact protocol's numbers, ``auc_standard`` the field's.
        An encoder that could not be loaded or scored has a row with the reason as its ``error``.

    Raises:
        ValueError: No encoder, an option is unknown, or the split has no images of seen or of unseen pairs.
        OSError: ``out`` cannot be made, or an image is broken.
    """
    if not encoders:
        raise ValueError("expected `encoders` to name at least one, got none")
    if not all(encoders):
        raise ValueError(f"expected `encoders` to be names, got an empty one in {', '.join(map(repr, encoders))}")
    check_choice("split", split, SPLITS)
    check_choice("world", world, ("closed", "open"))
    for align in aligns:
        check_choice("aligns", align, ("cls", "max", "topk", "logsumexp", "mean"))

    _check_split(dataset, split)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(encoders):
        shared = {"encoder": name, "split": split, "world": world}
        if told := beyond_shapes(name, dataset.space):
            print(told, file=sys.stderr)
        try:
            encoder = wrap(name)
            facts = shared | _facts(encoder)
            for align in aligns:
                recipe = Recipe("clip", name, align, HeadOptions(topk=topk), model={"context": context})
                method = build(recipe, dataset.space, encoder=encoder)
                options = Options(eval_batch_size=batch_size, workers=0)
                readouts = {"zero-shot": Readout()}
                evaluation = Evaluation(method, dataset, options, readouts, split=split, worlds=(world,))
                start = time.perf_counter()
                with quiet():
                    testing_trainer(trainer or {}).test(evaluation, verbose=False)
                seconds = time.perf_counter() - start
                rows.append({**facts, "align": align, "seconds": round(seconds, 2), **_scores(evaluation, world)})
        except DataError:
            raise  # of no CLIP: the next one would meet it, too
        except Exception as error:  # of any package, and no reason to lose the others
            rows.append({**shared, "error": in_one_line(error) or type(error).__name__})
        write_table(rows, COLUMNS, out / "bench.csv")
    return rows


def _check_split(dataset: CompositionDataset, split: str) -> None:
    """Raise ValueError unless a split has images of seen and of unseen pairs, between which the AUC goes."""
    seen = dataset.space.seen_mask[dataset.images(split).columns]
    for word, count in (("seen", int(seen.sum())), ("unseen", int((~seen).sum()))):
        if not count:
            raise ValueError(f"expected `split` with images of seen and of unseen pairs, got {split!r} without {word}")


def _facts(encoder: Any) -> dict[str, Any]:
    rows, columns = encoder.grid
    size = encoder.image_size
    return {
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "dim": encoder.dim,
        "image_size": size if isinstance(size, int) else "x".join(map(str, size)),
        "patches": rows * columns,
        "digest": weights_digest(encoder)[:12],
    }


def _scores(evaluation: Evaluation, world: World) -> dict[str, Any]:
    results = evaluation.results["zero-shot"][world]
    exact, standard = results["exact"], results["standard"]
    found = {name: round(getattr(exact, name), 6) for name in _NUMBERS}
    images = len(evaluation.dataset.images(evaluation.split, evaluation.model.encoder.transform()))
    counts = {"images": images, "pairs": len(evaluation.spaces[world])}
    return {**found, "auc_standard": round(standard.auc, 6), **counts}


def plot_bench(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the exact AUC of each encoder, a bar for each way."""
    from matplotlib.figure import Figure

    scored = [row for row in rows if not row.get("error")]
    names = list(dict.fromkeys(row["encoder"] for row in scored))
    aligns = list(dict.fromkeys(row["align"] for row in scored))
    height = 0.8 / max(1, len(aligns))

    figure = Figure(figsize=(7, 1.2 + 0.35 * len(names) * max(1, len(aligns))), layout="constrained")
    axis = figure.subplots()
    for number, align in enumerate(aligns):
        areas = {row["encoder"]: 100 * row["auc"] for row in scored if row["align"] == align}
        places = [names.index(name) + (number - (len(aligns) - 1) / 2) * height for name in areas]
        bars = axis.barh(places, list(areas.values()), height, label=align)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    world = scored[0]["world"] if scored else "closed"
    axis.set(xlabel=f"AUC by the exact protocol, {world} world (%)", title="zero-shot, no training")
    axis.grid(axis="x", alpha=0.3)
    if len(aligns) > 1:
        figure.legend(frameon=False, loc="outside right upper")
    save_figure(figure, path, dpi=130)
