"""Studies beside the table: one choice is varied, everything else stays as in the ablation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from czsl_heads._files import write_json
from czsl_heads.data.layout import CompositionDataset
from czsl_heads.heads.sparse_align import Reduce
from czsl_heads.training.config import AblationConfig
from czsl_heads.training.evaluate import BankPlan, Readout
from czsl_heads.training.options import SACOptions
from czsl_heads.training.plans import CLS, MAX, VAC, VAC_KL, RunPlan, carry_out
from czsl_heads.training.run import as_dicts, evaluate_model
from czsl_heads.training.summary import numbers_of, spread, summary_of
from czsl_heads.training.trainer import is_main_process

Value = float | str


class Point(NamedTuple):
    """One measurement: where it stands on the axis, of which line it is, and the readout of the model to report."""

    value: Value
    series: str
    plan: RunPlan
    readout: str


@dataclass(frozen=True)
class Study:
    """What is varied. ``readouts`` are ways to score a trained model anew, where no training is needed."""

    title: str
    axis: str
    points: list[Point]
    readouts: dict[str, Readout] = field(default_factory=dict)


def _reductions(options: SACOptions) -> Study:
    plans = {"cls": CLS, "max": MAX}
    names: tuple[Reduce, ...] = ("cls", "mean", "attention", "linear", "max", "topk", "logsumexp")
    points = [
        Point(name, "alignment", plans.get(name, RunPlan(f"reduce-{name}", reduce=name)), "aligned") for name in names
    ]
    return Study("Reductions over tokens (Table 5)", "reduction", points)


def _pilot(options: SACOptions) -> Study:
    rates = (0.0, 0.1, 0.3, 0.5, 0.7)
    plans = {
        rate: RunPlan(f"drop-{rate}", reduce="cls", changes={"patch_drop": rate}) if rate else CLS for rate in rates
    }
    points = [Point(rate, "[CLS]", plan, "aligned") for rate, plan in plans.items()]
    return Study("Patches hidden in training (Fig. 2)", "share of patches dropped", points)


def _blend(options: SACOptions) -> Study:
    plans = {weight: RunPlan(f"blend-{weight}", changes={"cls_weight": weight}) for weight in (0.25, 0.5, 0.75)}
    points = [Point(weight, "alignment", plan, "aligned") for weight, plan in {0.0: MAX, **plans, 1.0: CLS}.items()]
    return Study("Weight of [CLS] in the alignment score (Fig. 4)", "weight of [CLS]", points)


def _alpha(options: SACOptions) -> Study:
    plans = {
        alpha: replace(VAC_KL, folder=f"alpha-{alpha}", changes={"alpha": alpha}) for alpha in (0.1, 0.3, 0.5, 0.7, 0.9)
    }
    plans[options.alpha] = VAC_KL
    points = [Point(alpha, "row 4", plan, "fused") for alpha, plan in sorted({0.0: VAC, **plans}.items())]
    return Study("Weight of the distillation", "alpha", points)


def _depth(options: SACOptions) -> Study:
    plans = {depth: replace(VAC_KL, folder=f"depth-{depth}", changes={"depth": depth}) for depth in (1, 2, 3, 4)}
    plans[options.depth] = VAC_KL
    points = [Point(depth, "row 4", plan, "fused") for depth, plan in sorted(plans.items())]
    return Study("Blocks of the condenser", "K", points)


def _rescored(title: str, axis: str, variants: dict[float, dict[str, Readout]]) -> Study:
    points, readouts = [], {}
    for value, by_series in variants.items():
        for series, readout in by_series.items():
            readouts[f"{series}, {axis} {value}"] = readout
            points.append(Point(value, series, VAC_KL, f"{series}, {axis} {value}"))
    return Study(title, axis, points, readouts)


def _with_bank(beta: float, gamma: float, slots: int) -> dict[str, Readout]:
    plan = BankPlan(slots)
    return {
        "row 5": Readout(beta, gamma, plan),
        "row 6": Readout(beta, gamma, plan._replace(texts=True, updates=True)),
    }


def _beta(options: SACOptions) -> Study:
    variants = {
        beta: {"row 4": Readout(beta), **_with_bank(beta, options.gamma, options.slots)}
        for beta in (step / 10 for step in range(11))
    }
    return _rescored("Weight of the alignment branch", "beta", variants)


def _gamma(options: SACOptions) -> Study:
    weights = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 2.0)
    variants = {gamma: _with_bank(options.beta, gamma, options.slots) for gamma in weights}
    return _rescored("Weight of the memory bank", "gamma", variants)


def _slots(options: SACOptions) -> Study:
    variants: dict[float, dict[str, Readout]] = {
        slots: _with_bank(options.beta, options.gamma, slots) for slots in (1, 2, 4, 8, 16, 24, 32)
    }
    return _rescored("Slots of the memory bank a pair", "N", variants)


_STUDIES = {
    "reductions": _reductions,
    "pilot": _pilot,
    "blend": _blend,
    "alpha": _alpha,
    "beta": _beta,
    "gamma": _gamma,
    "depth": _depth,
    "slots": _slots,
}


def run_study(name: str, out: Path, dataset: CompositionDataset, config: AblationConfig) -> dict[str, Any]:
    """Carry out a study over all seeds of an ablation; what was trained before is read."""
    study = _STUDIES[name](config.options)
    points: list[dict[str, Any]] = [
        {"value": point.value, "series": point.series, "folder": point.plan.folder, "runs": []}
        for point in study.points
    ]
    for seed in config.seeds:
        anew = _rescore(name, study, out, dataset, config, seed) if study.readouts else None
        for point, result in zip(study.points, points):
            best = anew or carry_out(point.plan, out, dataset, config, seed)["budgets"]["best"]
            numbers = numbers_of(best["test"][point.readout])
            result["runs"].append({"seed": seed, "test": numbers, "gap": best["gap"]})
    for result in points:
        result["summary"] = summary_of([run["test"] for run in result["runs"]])
        gaps = [run["gap"]["relative_modality_gap"] for run in result["runs"]]
        result["gap"] = {name: spread([gap[name] for gap in gaps]) for name in gaps[0]}
    return {"title": study.title, "axis": study.axis, "points": points}


def _rescore(
    name: str, study: Study, out: Path, dataset: CompositionDataset, config: AblationConfig, seed: int
) -> dict[str, Any]:
    carry_out(VAC_KL, out, dataset, config, seed)
    folder = out / f"seed{seed}" / VAC_KL.folder
    path = folder / f"{name}.json"
    if path.exists():
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    evaluation = evaluate_model(folder, dataset, study.readouts, trainer=config.trainer)
    content = {
        "test": {name: numbers_of(worlds) for name, worlds in as_dicts(evaluation).items()},
        "gap": evaluation.gap,
    }
    return write_json(path, content) if is_main_process() else content
