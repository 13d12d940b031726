"""Why does Sparse Alignment not beat [CLS] on the shapes world? ``python -m benchmarks.sparse_alignment --work DIR``.

Trains stage I in many ways, which differ from [CLS] or from Sparse Alignment in what their names say (a run that starts
from another has trained twice as long in all), over towers that were pretrained differently, and prints the AUC of
each, how often a patch wins the labelled pair, and the modality gap. Towers that are not in DIR yet are
pretrained first (10 to 40 minutes each on a CPU core); finished runs are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.variants import run_variants, variant
from czsl_heads._files import read_json, write_json
from czsl_heads.encoders.tiny import RECORD
from czsl_heads.training.environment import environment
from czsl_heads.training.options import load_options
from czsl_heads.training.pretrain_tiny import PretrainSpec, pretrain
from czsl_heads.training.rows import Row
from czsl_heads.training.summary import spread

RESULTS = Path(__file__).parent / "results" / "sparse_alignment.json"
SHORT = {"images": 30_000, "steps": 600, "test_per_pair": 10}
TOWERS: dict[str, dict[str, Any]] = {
    "short": SHORT,  # a quarter of the steps of the shipped tower, half its images: stage I has something left to learn
    "parts": {**SHORT, "pair_weight": 0.0, "part_weight": 1.0},  # captions never name a whole pair
    "deep": {**SHORT, "layers": 8},
}
MLP = {"lora.matrices": ["q", "k", "v", "o", "fc", "proj"], "lora.rank": 64}
PATCHES = {"head.include_cls": False}
SHORT_CLS = variant("short, [CLS]", "cls")
SHORT_BEST = variant("short, mean of the best 9", "topk", {"head.topk": 9})
# By tower, each behind the one whose weights it starts from.
VARIANTS: dict[str, tuple[Row, ...]] = {
    "tiny": (
        variant("shipped, [CLS]", "cls"),
        variant("shipped, max", "max"),
        variant("shipped, max over patches", "max", PATCHES),
    ),
    "short": (
        SHORT_CLS,
        variant("short, max", "max"),
        variant("short, max over patches", "max", PATCHES),
        SHORT_BEST,
        variant("short, logsumexp (0.02)", "logsumexp", {"head.temperature": 0.02}),
        variant("short, max, from [CLS]", "max", base=SHORT_CLS),
        variant("short, max over patches, from the best 9", "max", PATCHES, base=SHORT_BEST),
        variant("short, [CLS], LoRA on MLP too", "cls", MLP),
        variant("short, max, LoRA on MLP too", "max", MLP),
        variant("short, max over patches, LoRA on MLP too", "max", {**MLP, **PATCHES}),
    ),
    "parts": (variant("parts, [CLS]", "cls"), variant("parts, max", "max")),
    "deep": (
        variant("deep, [CLS]", "cls"),
        variant("deep, max", "max"),
        variant("deep, max over patches", "max", PATCHES),
    ),
}
OPTIONS = {"epochs": 8, "learning_rate": 3e-4}


def study(work: Path, seeds: int, towers: list[str]) -> dict[str, Any]:
    """All variants of some towers, written to ``results/sparse_alignment.json``."""
    rows, pretrained = [], {}
    for tower in towers:
        encoder = "tiny"
        if tower in TOWERS:
            pretrained[tower] = {"pretraining": TOWERS[tower], "zero_shot": zero_shot(work / tower, tower)}
            encoder = f"tiny:{work / tower}"
        variants = VARIANTS[tower]
        found = run_variants(work / "runs" / tower, variants, encoder=encoder, seeds=seeds, options=OPTIONS)
        rows += [described(*each, tower) for each in zip(variants, found)]
    content = {
        "question": "Why does Sparse Alignment not beat [CLS] on the shapes world?",
        "environment": environment(),
        "seeds": list(range(seeds)),
        "options": load_options("sac", "shapes", OPTIONS)[0].as_dict(),
        "towers": pretrained,
        "rows": rows,
    }
    written: dict[str, Any] = write_json(RESULTS, content)
    return written


def zero_shot(folder: Path, tower: str) -> dict[str, float]:
    """What a tower knows after its pretraining, which is done first if need be."""
    if not (folder / RECORD).exists():
        pretrain(folder, PretrainSpec(**TOWERS[tower]))
    known: dict[str, float] = read_json(folder / RECORD)["zero_shot"]["0.5"]
    return known


def described(asked: Row, found: dict[str, Any], tower: str) -> dict[str, Any]:
    """A variant and its numbers over all seeds."""
    model, summary = asked.model, found["summary"]
    names = {each.model: each.key for each in VARIANTS[tower]}
    patches = [run["gap"]["winners_that_are_patches"]["true"] for run in found["by_seed"]]
    row = {
        "name": asked.key,
        "tower": tower,
        "reduce": model.align,
        "changes": model.changes,
        "starts_from": model.base and names[model.base],
        "numbers": {world: summary[world]["standard"] for world in summary},
        "gap": found["gap"],
        "winners_that_are_patches": spread(patches),
    }
    print(_line(row), flush=True)
    return row


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
    study(chosen.work, chosen.seeds, chosen.towers)
