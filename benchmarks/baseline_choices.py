"""What the choices of a baseline are worth on the shapes world: ``python -m benchmarks.baseline_choices --work DIR``.

Three parts: ``seam``, the ways in which Sparse Alignment can stand in Troika, whose defaults are chosen by the AUC on
validation images; ``quirks``, what the released code does besides its method; and ``zero-shot``, those quirks that need
no training. Each variant of the first two is trained like the first of its method, of the same seeds, with one option
changed.
Finished runs in DIR are kept.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from baselines.clip import CLIP
from baselines.options import configure
from baselines.train import train_row
from czsl_heads import CompositionSpace, wrap
from czsl_heads._files import write_json
from czsl_heads.data.layout import CompositionDataset, read_dataset
from czsl_heads.data.shapes import ShapesSpec, make_shapes
from czsl_heads.functional.feasibility import Masking, feasibility, mask_infeasible
from czsl_heads.metrics.czsl_score import CZSLScore
from czsl_heads.metrics.feasibility_search import FeasibilitySearch
from czsl_heads.prompts.primitives import encode_primitives
from czsl_heads.training.ablate import environment
from czsl_heads.training.loaders import eval_loader
from czsl_heads.training.options import SACOptions
from czsl_heads.training.summary import paired_difference, spread

RESULTS = Path(__file__).parent / "results" / "baseline_choices.json"
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
# The options of each part that are compared: name of the variant, method, row, changed options.
Variant = tuple[str, str, str, dict[str, Any]]
EACH = {"disentangle": "each"}
SEAM: tuple[Variant, ...] = (
    ("disentangle: each", "troika", "max", EACH),
    ("disentangle: winner", "troika", "max", {"disentangle": "winner"}),
    ("align_branches: pairs", "troika", "max", {"align_branches": ["pairs"]}),
    ("align_branches: attributes, objects", "troika", "max", {**EACH, "align_branches": ["attributes", "objects"]}),
    ("include_cls: False", "troika", "max", {**EACH, "include_cls": False}),
    ("align_tokens: normed", "troika", "max", {**EACH, "align_tokens": "normed"}),
    ("norm_rows: cls", "troika", "max", {**EACH, "norm_rows": "cls"}),
    ("dropout_mask: image", "troika", "max", {**EACH, "dropout_mask": "image"}),
)
BY_LOSS = {"selection": "loss"}
QUIRKS: tuple[Variant, ...] = (
    ("default", "troika", "cls", {}),
    ("patch_norm: cumulative", "troika", "cls", {"patch_norm": "cumulative"}),
    ("fusion: logits", "troika", "cls", {"fusion": "logits"}),
    ("text_chunk: 64", "troika", "cls", {"text_chunk": 64}),
    ("stays_in_eval: True", "troika", "cls", {"stays_in_eval": True}),
    ("official: True", "troika", "cls", {"official": True}),
    ("default, epoch by loss", "troika", "cls", BY_LOSS),
    ("fused_validation_loss: True, epoch by loss", "troika", "cls", {**BY_LOSS, "fused_validation_loss": True}),
    ("default", "csp", "cls", {}),
    ("half_logits: True", "csp", "cls", {"half_logits": True}),
    ("dropout_at_evaluation: True", "csp", "cls", {"dropout_at_evaluation": True}),
)
TRAINED = {"seam": SEAM, "quirks": QUIRKS}
# The variant that another is compared with, where it is not the first of its method.
AGAINST = {"fused_validation_loss: True, epoch by loss": "default, epoch by loss"}


def run_variant(work: Path, dataset: CompositionDataset, variant: Variant, seed: int) -> dict[str, Any]:
    """Train and test one variant, or read what was done before."""
    name, method, row, options = variant
    config = configure(method, data=str(dataset.root), preset="shapes", options=options, trainer=QUIET)
    folder = work / re.sub(r"\W+", "-", f"{method}-{row}-{name}")
    settings = {key: value for key, value in config.as_dict().items() if key not in ("data", "seeds")}
    kept = folder / "config.json"
    if kept.exists() and json.loads(kept.read_text()) != json.loads(json.dumps(settings)):
        raise ValueError(f"expected `work` to be new or of the same settings, got {kept} of others")
    write_json(kept, settings)
    return train_row(folder / f"seed{seed}", dataset, config, row, seed)


def numbers(record: dict[str, Any]) -> dict[str, float | None]:
    """AUC on validation images, where the epoch was chosen by it, and on test images."""
    selected = record["selected"]  # a loss is negative
    return {
        "validation_auc": selected if selected >= 0 else None,
        "test_auc": record["test"]["closed"]["standard"]["auc"],
    }


def study(work: Path, seeds: list[int], parts: list[str], imbalance: float) -> dict[str, Any]:
    """The variants of some parts, written to ``results/baseline_choices.json`` beside other parts that stand there."""
    work = work / f"imbalance-{imbalance}"
    root = work / "shapes"
    spec = replace(ShapesSpec(), imbalance=imbalance)
    if not root.exists():
        make_shapes(root, **asdict(spec))
    dataset = read_dataset(root)
    done = json.loads(RESULTS.read_text())["parts"] if RESULTS.exists() else {}
    if "zero-shot" in parts:
        done["zero-shot"] = {"imbalance": imbalance, "rows": zero_shot(dataset)}
    for part in [part for part in TRAINED if part in parts]:
        found: dict[tuple[str, str], list[dict[str, float | None]]] = {}
        for seed in seeds:
            for variant in TRAINED[part]:
                record = numbers(run_variant(work, dataset, variant, seed))
                found.setdefault((variant[1], variant[0]), []).append(record)
                print(part, seed, variant[1], variant[0], record, flush=True)
        done[part] = {"seeds": seeds, "imbalance": imbalance, "rows": _rows(TRAINED[part], found)}
    results = {
        "command": "python -m benchmarks.baseline_choices",
        "environment": environment(),
        "shapes": {name: value for name, value in asdict(spec).items() if name != "imbalance"},
        "parts": done,
    }
    written: dict[str, Any] = write_json(RESULTS, results)
    return written


def _rows(
    variants: tuple[Variant, ...], found: dict[tuple[str, str], list[dict[str, float | None]]]
) -> list[dict[str, Any]]:
    rows = []
    for name, method, row, options in variants:
        first = next(variant[0] for variant in variants if variant[1] == method)
        other = AGAINST.get(name, first)
        columns, others = (
            {key: [record[key] for record in found[method, which]] for key in ("validation_auc", "test_auc")}
            for which in (name, other)
        )
        rows.append(
            {
                "method": method,
                "row": row,
                "name": name,
                "options": options,
                "runs": columns,
                **{key: spread(column) for key, column in columns.items()},
                "against": None if name == other else other,
                "difference": {key: paired_difference(column, others[key]) for key, column in columns.items()},
            }
        )
    return rows


@torch.no_grad()
def zero_shot(dataset: CompositionDataset) -> list[dict[str, Any]]:
    """AUC of CLIP on test images, in the closed world and, where feasibility masks, in the open one."""
    clip, rounded, blind = (CLIP(wrap("tiny"), dataset.space, half_logits=half).eval() for half in (False, True, False))
    torch.nn.init.zeros_(blind.encoder.get_parameter("model.positional_embedding"))  # type: ignore[attr-defined]
    rows = [
        {"name": name, "test_auc": _auc(dataset, _scores(model, dataset, "test"))}
        for name, model in (("default", clip), ("half_logits: True", rounded), ("enable_pos_emb: False", blind))
    ]
    opened = dataset.space.open_world()
    seen = torch.zeros(len(opened.attributes), len(opened.objects), dtype=torch.bool)
    seen[tuple(opened.pairs[opened.seen_mask].T)] = True
    table = feasibility(*encode_primitives(clip.encoder, opened), seen)
    rated = table[opened.pairs[:, 0], opened.pairs[:, 1]]
    scores, targets = _scores(clip, dataset, "test", opened)
    rows.append({"name": "open world, not masked", "test_auc": _auc(dataset, (scores, targets), opened)})
    for masking in get_args(Masking):
        search = FeasibilitySearch(opened, rated, masking=masking)
        search.update(*_scores(clip, dataset, "val", opened))
        for name, threshold in (("searched", search.compute().threshold), ("0", 0.0)):
            masked = mask_infeasible(scores, rated, opened.seen_mask, threshold, masking=masking)
            area = _auc(dataset, (masked, targets), opened)
            rows.append({"name": f"masking: {masking}, threshold {name}", "threshold": threshold, "test_auc": area})
    return rows


def _scores(
    model: CLIP, dataset: CompositionDataset, split: str, space: CompositionSpace | None = None
) -> tuple[Tensor, Tensor]:
    """Scores of all images of a split, and the columns of their pairs."""
    space = dataset.space if space is None else space
    texts, parts, columns = model.texts(space.pairs), [], []
    loader = eval_loader(dataset.images(split, model.encoder.transform()), SACOptions(eval_batch_size=128))
    for images, found in loader:
        parts.append(model.scores(images, space.pairs, texts))
        columns.append(space.index(dataset.space.pairs)[found])
    return torch.cat(parts), torch.cat(columns)


def _auc(dataset: CompositionDataset, scored: tuple[Tensor, Tensor], space: CompositionSpace | None = None) -> float:
    mask = dataset.eval_mask("test") if space is None else None
    score = CZSLScore(dataset.space if space is None else space, eval_mask=mask)
    score.update(*scored)
    return float(score.compute().auc)


if __name__ == "__main__":
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("choices"), help="folder of the runs; finished ones are kept")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", type=list[str], default=["zero-shot", *TRAINED])
    parser.add_argument("--imbalance", type=float, default=0.5)
    asked = parser.parse_args()
    study(asked.work, list(range(asked.seeds)), asked.parts, asked.imbalance)
