"""Is the evaluator fast, small and exact? ``python -m benchmarks.evaluator`` (under 4 minutes on two CPU cores).

Ours against the literal protocol, ``reference_czsl_scores`` of the tests: a copy of the whole matrix, a bias added,
other pairs masked and a top-k, once for each of 20 to 39 biases and thrice more. Both must give the same numbers here.
The open world of C-GQA, of which the literal protocol would hold copies of 5.7 GB, is streamed from a generator. All
run on one thread: where other work shares the cores, more threads wait for each other and measure little else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import peak_memory, time_in_turn, write_results
from czsl_heads import CompositionSpace
from czsl_heads.functional import czsl_scores
from czsl_heads.metrics import CZSLScore
from tests.references import reference_czsl_scores, topk_columns

SEED = 0
BATCH = 64


class Size(NamedTuple):
    """A data set's numbers: primitives, pairs trained on and all, and its test split's samples and pairs."""

    attrs: int
    objs: int
    seen: int
    pairs: int
    samples: int
    test_seen: int
    test_unseen: int


SIZES = {
    "UT-Zappos": Size(16, 12, 83, 116, 2914, 18, 18),
    "MIT-States": Size(115, 245, 1262, 1962, 12995, 400, 400),
    "C-GQA": Size(413, 674, 5592, 7767, 5098, 888, 923),
}
SCORES = (
    "Gaussian logits of deviation 2.5 around 20, plus 2 for seen pairs and 8 for the true one, rounded to float16 as "
    "CSP's are, which gives many ties"
)


class Problem(NamedTuple):
    """Which columns there are, and samples whose true pairs are evenly spread over the split's."""

    space: CompositionSpace
    eval_mask: Tensor
    target: Tensor


def draw_problem(size: Size, *, open_world: bool = False) -> Problem:
    """Pairs at random, in the order of their attributes and objects."""
    generator = torch.Generator().manual_seed(SEED)
    number = torch.randperm(size.attrs * size.objs, generator=generator)[: size.pairs]
    pairs = [(f"a{index // size.objs}", f"o{index % size.objs}") for index in number.tolist()]
    attributes, objects = ([f"{letter}{i}" for i in range(count)] for letter, count in zip("ao", size[:2]))
    space = CompositionSpace(attributes, objects, seen=pairs[: size.seen], unseen=pairs[size.seen :])
    tested = space.index(pairs[size.seen - size.test_seen : size.seen + size.test_unseen])
    candidates = space.seen_mask.clone()
    candidates[tested] = True
    chosen = tested[torch.randint(len(tested), (size.samples,), generator=generator)]
    if open_world:
        chosen, space = space.open_world().index(space.pairs)[chosen], space.open_world()
        candidates = torch.ones(len(space), dtype=torch.bool)
    return Problem(space, candidates, chosen)


def draw_scores(problem: Problem) -> Tensor:
    """See ``SCORES``."""
    generator = torch.Generator().manual_seed(SEED)
    shape = len(problem.target), len(problem.space)
    scores = torch.empty(shape).normal_(20.0, 2.5, generator=generator)
    scores[:, problem.space.seen_mask] += 2
    scores[torch.arange(shape[0]), problem.target] += 8
    return scores.half().float()


def closed_world(name: str) -> dict[str, Any]:
    """Seconds and memory on a whole matrix, ours in one call and in batches, and the literal protocol's."""
    problem = draw_problem(SIZES[name])
    scores = draw_scores(problem)
    pairs = (problem.target, *problem.space.pairs.unbind(dim=1), problem.space.seen_mask, problem.eval_mask)

    def in_batches() -> Any:
        metric = CZSLScore(problem.space, eval_mask=problem.eval_mask)
        for rows, target in zip(scores.split(BATCH), problem.target.split(BATCH)):
            metric.update(rows, target)
        return metric.result()

    rivals = {
        "literal": lambda: reference_czsl_scores(scores, *pairs, columns=topk_columns),
        "whole": lambda: czsl_scores(scores, *pairs),
        "batches": in_batches,
        "bare_amax": lambda: scores.amax(dim=1),
    }
    result = rivals["whole"]()
    assert in_batches().as_dict() == result.as_dict()
    check_equal(result, rivals["literal"]())
    seconds = time_in_turn(rivals)
    memory = {rival: peak_memory(run) for rival, run in rivals.items() if rival != "bare_amax"}
    return {
        "data_set": name,
        "shape": list(scores.shape),
        "auc": round(result.auc, 4),
        "biases": len(result.curve) - 1,
        "seconds": {rival: significant(value) for rival, value in seconds.items()},
        "literal_over_ours": {
            rival: significant(seconds["literal"] / seconds[rival]) for rival in ("whole", "batches")
        },
        "megabytes_beyond_scores": {rival: round(value / 1e6, 1) for rival, value in memory.items()},
        "megabytes_of_scores": round(scores.numel() * 4 / 1e6, 1),
    }


def check_equal(result: Any, literal: dict[str, Any]) -> None:
    """Every number of the literal protocol is ours."""
    for name, value in result.as_dict().items():
        expected = literal[name]
        if isinstance(expected, dict):
            assert all(math.isclose(value[key], expected[key], abs_tol=1e-12) for key in expected), name
        elif isinstance(expected, list):
            assert torch.allclose(torch.tensor(value), torch.tensor(expected), rtol=0, atol=1e-12), name
        else:
            assert math.isclose(value, expected, abs_tol=1e-12), name


def significant(value: float) -> float:
    """Three digits: all that a shared machine gives."""
    return float(f"{value:.3g}")


class Streamed(NamedTuple):
    """Scores made on demand: 100 x the cosine of a sample's vector with a pair's, the sum of its primitives'."""

    samples: Tensor
    pairs: Tensor
    seen_bonus: Tensor

    def columns(self, width: int = 4096) -> Iterator[tuple[int, Tensor]]:
        """Blocks of columns, all samples."""
        for first in range(0, len(self.pairs), width):
            part = slice(first, first + width)
            yield first, torch.addmm(self.seen_bonus[part], self.samples, self.pairs[part].T, alpha=100.0)


def draw_streamed(problem: Problem, *, dim: int = 32) -> Streamed:
    """Samples are their true pairs plus noise."""
    generator = torch.Generator().manual_seed(SEED)
    attr, obj = problem.space.pairs.unbind(dim=1)
    attrs, objs = (torch.randn(int(index.max()) + 1, dim, generator=generator) for index in (attr, obj))
    pairs = torch.nn.functional.normalize(attrs[attr] + objs[obj], dim=1)
    noise = 0.2 * torch.randn(len(problem.target), dim, generator=generator)
    samples = torch.nn.functional.normalize(pairs[problem.target] + noise, dim=1)
    return Streamed(samples, pairs, 2.0 * problem.space.seen_mask)


def open_world(name: str) -> dict[str, Any]:
    """Seconds and memory of streamed scores, against one bare maximum over the same generator."""
    problem = draw_problem(SIZES[name], open_world=True)
    streamed = draw_streamed(problem)

    def evaluate() -> Any:
        metric = CZSLScore(problem.space)
        metric.update(streamed.columns(), problem.target)
        return metric.result()

    rivals = {
        "generator": lambda: [block[0, 0] for _, block in streamed.columns()],
        "generator_and_amax": lambda: [block.amax(dim=1) for _, block in streamed.columns()],
        "generator_and_ours": evaluate,
    }
    seconds = time_in_turn(rivals)
    results: list[Any] = []
    memory = peak_memory(lambda: results.append(evaluate()))
    millions = len(problem.target) * len(problem.space) / 1e6
    return {
        "data_set": name,
        "shape": [len(problem.target), len(problem.space)],
        "auc": round(results[0].auc, 4),
        "seconds": {rival: significant(value) for rival, value in seconds.items()},
        "seconds_per_million_scores": {rival: significant(value / millions) for rival, value in seconds.items()},
        "ours_over_amax": significant(seconds["generator_and_ours"] / seconds["generator_and_amax"]),
        "megabytes": round(memory / 1e6, 1),
        "megabytes_of_scores_if_held": round(4 * millions, 1),
    }


def main() -> None:
    """Measure, print and write ``results/evaluator.json``."""
    torch.set_num_threads(1)
    closed = []
    for name in SIZES:
        row = closed_world(name)
        closed.append(row)
        ratios, memory = row["literal_over_ours"], row["megabytes_beyond_scores"]
        print(
            f"{name:10} {row['shape'][0]} x {row['shape'][1]}: AUC {row['auc']}, {ratios['whole']} times faster than "
            f"literal, {ratios['batches']} in batches of {BATCH}; {memory['whole']} MB beside {memory['literal']}",
            flush=True,
        )
    streamed = open_world("C-GQA")
    print(
        f"{'C-GQA':10} open world: {streamed['seconds']['generator_and_ours']} s, {streamed['ours_over_amax']} times a "
        f"bare maximum; {streamed['megabytes']} MB"
    )
    content = {"scores": SCORES, "batch": BATCH, "closed_world": closed, "open_world_streamed": streamed}
    content["threads"] = torch.get_num_threads()
    write_results("evaluator", "Is the evaluator fast, small and exact?", SEED, content)


if __name__ == "__main__":
    main()
