"""What does the search of a feasibility threshold cost? ``python -m benchmarks.open_world_search`` (under 4 minutes).

Ours, 50 thresholds, against one evaluation of ours, in the open worlds of the validation splits; and against the
literal search (each threshold masks the matrix and runs the literal protocol) where that ends in time. The areas must
be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.evaluator import (
    SCORES,
    SEED,
    SIZES,
    Problem,
    draw_problem,
    draw_scores,
    draw_streamed,
    significant,
)
from benchmarks.measure import peak_memory, time_in_turn, write_results
from czsl_heads.functional import (
    FeasibilityCurve,
    czsl_scores,
    feasibility_thresholds,
    mask_infeasible,
    search_threshold,
)
from czsl_heads.functional.feasibility import Masking
from tests.references import reference_czsl_scores, topk_columns

VALIDATION = {  # samples, seen and unseen pairs of the validation splits; of C-GQA's 7,280 samples a part
    "UT-Zappos": SIZES["UT-Zappos"]._replace(samples=3214, test_seen=15, test_unseen=15),
    "MIT-States": SIZES["MIT-States"]._replace(samples=10420, test_seen=300, test_unseen=300),
    "C-GQA": SIZES["C-GQA"]._replace(samples=512, test_seen=1040, test_unseen=1252),
}
RANGES = {"UT-Zappos": (0.33, 0.87), "MIT-States": (-0.04, 0.72), "C-GQA": (-0.13, 0.78)}  # of the shipped tensors
LITERAL = ("UT-Zappos",)
STREAMED = ("C-GQA",)


def draw_feasibility(name: str, problem: Problem) -> Tensor:
    """Gaussian within the range that the authors' tensors have, unseen pairs of the split further up."""
    low, high = RANGES[name]
    generator = torch.Generator().manual_seed(SEED)
    ratings = torch.empty(len(problem.space)).normal_(generator=generator).mul_((high - low) / 8).add_((low + high) / 2)
    ratings[problem.target.unique()] += (high - low) / 6
    return ratings.clamp(low, high).masked_fill(problem.space.seen_mask, 0.0)


def search(name: str) -> dict[str, Any]:
    """Seconds of one evaluation and of the searches, and what the search adds to the memory."""
    problem = draw_problem(VALIDATION[name], open_world=True)
    ratings = draw_feasibility(name, problem)
    streamed = draw_streamed(problem)
    held = None if name in STREAMED else draw_scores(problem)
    pairs = (problem.target, *problem.space.pairs.unbind(dim=1), problem.space.seen_mask)

    def scores() -> Any:
        return streamed.columns() if held is None else held

    def ours(masking: Masking) -> Any:
        return search_threshold(scores(), *pairs, feasibility=ratings, masking=masking)

    def literal() -> list[float]:
        assert held is not None
        seen = problem.space.seen_mask
        masked = (mask_infeasible(held, ratings, seen, float(t)) for t in feasibility_thresholds(ratings, seen))
        return [reference_czsl_scores(part, *pairs, columns=topk_columns)["auc"] for part in masked]

    found: dict[str, FeasibilityCurve] = {}

    def keep(masking: Masking) -> None:
        found[masking] = ours(masking)

    rivals: dict[str, Callable[[], object]] = {
        "evaluation": lambda: czsl_scores(scores(), *pairs),
        "clean": lambda: keep("clean"),
        "official": lambda: keep("official"),
    }
    memory = {rival: peak_memory(run) for rival, run in rivals.items()}
    if name in LITERAL:
        assert found["clean"].auc.tolist() == literal()
        rivals["literal"] = literal
    seconds = time_in_turn(rivals)
    return {
        "data_set": name,
        "shape": [len(problem.target), len(problem.space)],
        "scores": "streamed" if held is None else "held",
        "seconds": {rival: significant(value) for rival, value in seconds.items()},
        "search_over_evaluation": {name: significant(seconds[name] / seconds["evaluation"]) for name in found},
        **({"literal_over_ours": significant(seconds["literal"] / seconds["clean"])} if "literal" in seconds else {}),
        "megabytes": {rival: round(value / 1e6, 1) for rival, value in memory.items()},
        "found": {
            masking: {
                "threshold": significant(curve.threshold),
                "auc": round(float(curve.auc.max()), 4),
                "auc_unmasked": round(curve.auc_unmasked, 4),
            }
            for masking, curve in found.items()
        },
    }


def main() -> None:
    """Measure, print and write ``results/open_world_search.json``."""
    torch.set_num_threads(1)
    rows = []
    for name in VALIDATION:
        row = search(name)
        rows.append(row)
        ratios = ", ".join(f"{value} ({masking})" for masking, value in row["search_over_evaluation"].items())
        literal = f"; literal {row['literal_over_ours']} times as long" if "literal_over_ours" in row else ""
        print(f"{name:10} {row['shape'][0]} x {row['shape'][1]}: {ratios} times one evaluation{literal}", flush=True)
    content = {"scores_held": SCORES, "steps": 50, "threads": torch.get_num_threads(), "rows": rows}
    write_results("open_world_search", "What does the search of a feasibility threshold cost?", SEED, content)


if __name__ == "__main__":
    main()
