"""Why does Sparse Alignment not beat [CLS] on the shapes world? ``python benchmarks/sparse_alignment.py --work DIR``.

Trains stage I in many ways, which differ from [CLS] or from Sparse Alignment in what their names say (a run that starts
from another has trained twice as long in all), over towers that were pretrained differently, and prints the AUC of
each, how often a patch wins the labelled pair, and the modality gap. Towers that are not in DIR yet are
pretrained first (10 to 40 minutes each on a CPU core); finished runs are kept.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from czsl_heads._files import write_json
from czsl_heads.data import make_shapes, read_dataset
from czsl_heads.encoders.tiny import RECORD
from czsl_heads.training.ablate import environment
from czsl_heads.training.evaluate import Readout
from czsl_heads.training.options import load_options
from czsl_heads.training.pretrain_tiny import PretrainSpec, pretrain
from czsl_heads.training.run import train_model
from czsl_heads.training.summary import SUMMARY, spread

RESULTS = Path(__file__).parent / "results" / "sparse_alignment.json"
SHORT = {"images": 30_000, "steps": 600, "test_per_pair": 10}
TOWERS: dict[str, dict[str, Any]] = {
    "short": SHORT,  # a quarter of the steps of the shipped tower, half its images: stage I has something left to learn
    "parts": {**SHORT, "pair_weight": 0.0, "part_weight": 1.0},  # captions never name a whole pair
    "deep": {**SHORT, "layers": 8},
}
MLP = {"lora_matrices": ["q", "k", "v", "o", "fc", "proj"], "lora_rank": 64}
PATCHES = {"include_cls": False}
# Name: tower, reduction, options that differ, and the run whose weights it starts from.
VARIANTS: dict[str, tuple[str, str, dict[str, Any], str | None]] = {
    "shipped, [CLS]": ("tiny", "cls", {}, None),
    "shipped, max": ("tiny", "max", {}, None),
    "shipped, max over patches": ("tiny", "max", PATCHES, None),
    "short, [CLS]": ("short", "cls", {}, None),
    "short, max": ("short", "max", {}, None),
    "short, max over patches": ("short", "max", PATCHES, None),
    "short, mean of the best 9": ("short", "topk", {"topk": 9}, None),
    "short, logsumexp (0.02)": ("short", "logsumexp", {"temperature": 0.02}, None),
    "short, max, from [CLS]": ("short", "max", {}, "short, [CLS]"),
    "short, max over patches, from the best 9": ("short", "max", PATCHES, "short, mean of the best 9"),
    "short, [CLS], LoRA on MLP too": ("short", "cls", MLP, None),
    "short, max, LoRA on MLP too": ("short", "max", MLP, None),
    "short, max over patches, LoRA on MLP too": ("short", "max", {**MLP, **PATCHES}, None),
    "parts, [CLS]": ("parts", "cls", {}, None),
    "parts, max": ("parts", "max", {}, None),
    "deep, [CLS]": ("deep", "cls", {}, None),
    "deep, max": ("deep", "max", {}, None),
    "deep, max over patches": ("deep", "max", PATCHES, None),
}
OPTIONS = {"epochs": 8, "learning_rate": 3e-4}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def run_variant(work: Path, name: str, seed: int) -> dict[str, Any]:
    """Train and test one variant, or read what was done before."""
    tower, reduce, changes, base = VARIANTS[name]
    folder = work / "runs" / f"seed{seed}"
    record = train_model(
        folder / name.replace(" ", "-").replace("[", "").replace("]", ""),
        read_dataset(work / "shapes"),
        load_options("shapes", {**OPTIONS, **changes}),
        {"aligned": Readout()},
        encoder=tower if tower == "tiny" else f"tiny:{work / tower}",
        reduce=reduce,  # type: ignore[arg-type]
        base=None if base is None else folder / base.replace(" ", "-").replace("[", "").replace("]", ""),
        seed=seed,
        trainer=QUIET,
    )
    best: dict[str, Any] = record["budgets"]["best"]
    return best


def study(work: Path, seeds: list[int], towers: list[str]) -> dict[str, Any]:
    """All variants of some towers, written to ``results/sparse_alignment.json``."""
    if not (work / "shapes").exists():
        make_shapes(work / "shapes")
    for tower in towers:
        if tower != "tiny" and not (work / tower / RECORD).exists():
            pretrain(work / tower, PretrainSpec(**TOWERS[tower]))
    rows = []
    for name, (tower, reduce, changes, base) in VARIANTS.items():
        if tower not in towers:
            continue
        runs = [run_variant(work, name, seed) for seed in seeds]
        numbers = {
            world: {
                number: spread([run["test"]["aligned"][world]["standard"][number] for run in runs])
                for number in SUMMARY
            }
            for world in ("closed", "open")
        }
        gaps = {
            kind: spread([run["gap"]["relative_modality_gap"][kind] for run in runs])
            for kind in ("cls", "pred", "true")
        }
        patches = spread([run["gap"]["winners_that_are_patches"]["true"] for run in runs])
        rows.append(
            {"name": name, "tower": tower, "reduce": reduce, "changes": changes, "starts_from": base}
            | {"numbers": numbers, "gap": gaps, "winners_that_are_patches": patches}
        )
        print(_line(rows[-1]), flush=True)
    zero_shot = {
        tower: json.loads((work / tower / RECORD).read_text())["zero_shot"]["0.5"]
        for tower in towers
        if tower != "tiny"
    }
    content: dict[str, Any] = {
        "question": "Why does Sparse Alignment not beat [CLS] on the shapes world?",
        "environment": environment(),
        "seeds": seeds,
        "options": asdict(load_options("shapes", OPTIONS)),
        "towers": {name: {"pretraining": TOWERS[name], "zero_shot": zero_shot[name]} for name in zero_shot},
        "rows": rows,
    }
    written: dict[str, Any] = write_json(RESULTS, content)
    return written


def _line(row: dict[str, Any]) -> str:
    closed, opened = (100 * row["numbers"][world]["auc"]["mean"] for world in ("closed", "open"))
    patches, gap = 100 * row["winners_that_are_patches"]["mean"], row["gap"]["cls"]["mean"]
    return f"{row['name']:45} AUC {closed:5.1f} {opened:5.1f}  patches win {patches:5.1f} %  RMG {gap:.3f}"


if __name__ == "__main__":
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for towers, data and runs")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--towers", type=list[str], default=["tiny", *TOWERS])
    chosen = parser.parse_args()
    study(chosen.work, list(range(chosen.seeds)), chosen.towers)
