"""What the choices of a baseline are worth on the shapes world: ``python -m benchmarks.baseline_choices --work DIR``.

There are three parts. ``seam`` has the ways in which Sparse Alignment can stand in Troika; defaults are chosen by the
AUC on validation images. ``quirks`` has what the released code does besides its method, and ``zero-shot`` those quirks
that need no training. Each variant of the first two is trained like the first of its method, of the same seeds, with
one option changed. Finished runs in DIR are kept.

The committed results also have options that version 0.1.0 had and that were removed after this study: ``align_tokens``,
``norm_rows``, ``dropout_mask`` and ``enable_pos_emb``. A part that is run again loses their rows.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from baselines.clip import CLIP
from benchmarks.variants import run_variants, variant
from czsl_heads import CompositionSpace, wrap
from czsl_heads._files import read_json, write_json
from czsl_heads.data.layout import CompositionDataset
from czsl_heads.data.shapes import ShapesSpec
from czsl_heads.functional import czsl_scores, mask_infeasible, search_threshold
from czsl_heads.functional.feasibility import Masking
from czsl_heads.training.config import configure
from czsl_heads.training.environment import environment
from czsl_heads.training.folder import open_folder
from czsl_heads.training.loaders import eval_loader
from czsl_heads.training.open_world import feasibility_table
from czsl_heads.training.rows import Row
from czsl_heads.training.summary import paired_difference, spread

RESULTS = Path(__file__).parent / "results" / "baseline_choices.json"
EACH = {"model.disentangle": "each"}
PRIMITIVES = {"model.align_branches": ["attributes", "objects"]}
SEAM = (
    variant("disentangle: each", "max", EACH),
    variant("disentangle: winner", "max", {"model.disentangle": "winner"}),
    variant("align_branches: pairs", "max", {"model.align_branches": ["pairs"]}),
    variant("align_branches: attributes, objects", "max", {**EACH, **PRIMITIVES}),
    variant("include_cls: False", "max", {**EACH, "head.include_cls": False}),
)
BY_LOSS = {"selection": "loss"}
FUSED_LOSS = {**BY_LOSS, "model.fused_validation_loss": True}
TROIKA_QUIRKS = (
    variant("default", "cls"),
    variant("patch_norm: cumulative", "cls", {"model.patch_norm": "cumulative"}),
    variant("fusion: logits", "cls", {"model.fusion": "logits"}),
    variant("text_chunk: 64", "cls", {"model.text_chunk": 64}),
    variant("stays_in_eval: True", "cls", {"model.stays_in_eval": True}),
    variant("official: True", "cls", {"model.official": True}),
    variant("default, epoch by loss", "cls", BY_LOSS),
    variant("fused_validation_loss: True, epoch by loss", "cls", FUSED_LOSS),
)
CSP_QUIRKS = (
    variant("default", "cls"),
    variant("half_logits: True", "cls", {"model.half_logits": True}),
    variant("dropout_at_evaluation: True", "cls", {"model.dropout_at_evaluation": True}),
)
TRAINED = {"seam": {"troika": SEAM}, "quirks": {"troika": TROIKA_QUIRKS, "csp": CSP_QUIRKS}}
# The variant that another is compared with, where it is not the first of its method.
AGAINST = {"fused_validation_loss: True, epoch by loss": "default, epoch by loss"}
Columns = dict[str, list[float | None]]


def study(work: Path, seeds: int, parts: list[str], imbalance: float) -> dict[str, Any]:
    """The variants of some parts, written to ``results/baseline_choices.json`` beside other parts that stand there."""
    work = work / f"imbalance-{imbalance}"
    done = read_json(RESULTS)["parts"] if RESULTS.exists() else {}
    if "zero-shot" in parts:
        done["zero-shot"] = {"imbalance": imbalance, "rows": zero_shot(work / "zero-shot", imbalance)}
    for part in [part for part in TRAINED if part in parts]:
        rows: list[dict[str, Any]] = []
        for method, variants in TRAINED[part].items():
            found = run_variants(work / part / method, variants, method=method, seeds=seeds, imbalance=imbalance)
            rows += compared(method, variants, found)
        done[part] = {"seeds": list(range(seeds)), "imbalance": imbalance, "rows": rows}
    results = {
        "command": "python -m benchmarks.baseline_choices",
        "environment": environment(),
        "shapes": {name: value for name, value in asdict(ShapesSpec()).items() if name != "imbalance"},
        "parts": done,
    }
    written: dict[str, Any] = write_json(RESULTS, results)
    return written


def compared(method: str, variants: tuple[Row, ...], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """AUC of each variant, and the difference from the one that it is compared with."""
    columns = {row["key"]: columns_of(row) for row in found}
    rows = []
    for row, own in zip(variants, columns.values()):
        other = AGAINST.get(row.key, variants[0].key)
        differences = {key: paired_difference(own[key], columns[other][key]) for key in own}
        spreads = {key: spread(column) for key, column in own.items()}
        known = {"method": method, "row": row.model.align, "name": row.key, "options": row.model.changes, "runs": own}
        against = None if other == row.key else other
        rows.append({**known, **spreads, "against": against, "difference": differences})
    return rows


def columns_of(row: dict[str, Any]) -> Columns:
    """AUC by seed, on validation images, where the epoch was chosen by it, and on test images."""
    selected = [run["selected"] for run in row["by_seed"]]
    tested = [run["test"]["closed"]["standard"]["auc"] for run in row["by_seed"]]
    return {"validation_auc": selected if min(selected) >= 0 else [None] * len(selected), "test_auc": tested}


@torch.no_grad()
def zero_shot(folder: Path, imbalance: float) -> list[dict[str, Any]]:
    """AUC of CLIP on test images, in the closed world and, where feasibility masks, in the open one."""
    config = configure("clip", imbalance=imbalance)
    dataset = open_folder(folder, config)
    space, opened = dataset.space, dataset.space.open_world()
    clip, rounded = (CLIP(wrap("tiny"), space, half_logits=half).eval() for half in (False, True))
    rows = []
    for name, model in (("default", clip), ("half_logits: True", rounded)):
        pairs = _labelled(dataset, "test", space)
        area = czsl_scores(_scores(model, dataset, "test", space), *pairs, dataset.eval_mask("test")).auc
        rows.append({"name": name, "test_auc": area})

    rated = feasibility_table(config, space)[opened.pairs[:, 0], opened.pairs[:, 1]]
    validation, scores = (_scores(clip, dataset, split, opened) for split in ("val", "test"))
    pairs = _labelled(dataset, "test", opened)
    rows.append({"name": "open world, not masked", "test_auc": czsl_scores(scores, *pairs).auc})
    for masking in get_args(Masking):
        labelled = _labelled(dataset, "val", opened)
        found = search_threshold(validation, *labelled, feasibility=rated, masking=masking)
        for name, threshold in (("searched", found.threshold), ("0", 0.0)):
            masked = mask_infeasible(scores, rated, opened.seen_mask, threshold, masking=masking)
            area = czsl_scores(masked, *pairs).auc
            rows.append({"name": f"masking: {masking}, threshold {name}", "threshold": threshold, "test_auc": area})
    return rows


def _scores(model: CLIP, dataset: CompositionDataset, split: str, space: CompositionSpace) -> Tensor:
    """Scores of all images of a split."""
    texts, images = model.texts(space.pairs), dataset.images(split, model.encoder.transform())
    return torch.cat([model.scores(batch, space.pairs, texts) for batch, _ in eval_loader(images, 128)])


def _labelled(dataset: CompositionDataset, split: str, space: CompositionSpace) -> tuple[Tensor, ...]:
    """The columns of the pairs of all images of a split, the primitives of all columns, and which were seen."""
    columns = space.index(dataset.space.pairs)[dataset.images(split).columns]
    return columns, *space.pairs.unbind(dim=1), space.seen_mask


if __name__ == "__main__":
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("choices"), help="folder of the runs; finished ones are kept")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", type=list[str], default=["zero-shot", *TRAINED])
    parser.add_argument("--imbalance", type=float, default=0.5)
    asked = parser.parse_args()
    study(asked.work, asked.seeds, asked.parts, asked.imbalance)
