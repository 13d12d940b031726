"""The rows of every table and study, as data: which model is trained, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from czsl_heads._checks import check_choice
from czsl_heads.functional.gap_losses import GAP_LOSSES
from czsl_heads.heads.sparse_align import Reduce
from czsl_heads.training.options import Options

Addition = Literal["vac", "bank"]
TableName = Literal["steps", "alignment", "own", "one"]


class BankPlan(NamedTuple):
    """A memory bank filled from the training images; what it holds besides, and whether it learns on the way.

    ``slots`` are the option's where it is None. ``texts`` puts the texts of unseen pairs into their empty rows;
    ``updates`` stores images of the split after they were predicted, which makes the scores transductive.
    """

    slots: int | None = None
    texts: bool = False
    updates: bool = False


@dataclass(frozen=True)
class Readout:
    """One way to score a trained model: Eq. 12 with these weights, which are the options' where they are None.

    The default is the method alone, by what it ranks with; ``probabilities`` ranks by those instead.
    """

    beta: float | None = 1.0
    gamma: float | None = 0.0
    bank: BankPlan | None = None
    probabilities: bool = False

    def resolved(self, options: Options) -> Readout:
        """The same with all numbers known."""
        plan = self.bank
        if plan is not None and plan.slots is None:
            plan = plan._replace(slots=options.bank.slots)
        beta = options.beta if self.beta is None else self.beta
        gamma = options.gamma if self.gamma is None else self.gamma
        resolved = Readout(beta, gamma, plan)
        return replace(resolved, probabilities=self.probabilities and resolved.alone)

    @property
    def alone(self) -> bool:
        """Whether the method has the whole say, and condenser and bank none."""
        return self.beta == 1.0 and self.bank is None

    @property
    def key(self) -> str:
        """Its name in records of results; equal for equal readouts."""
        if self.alone:
            return "method, by probabilities" if self.probabilities else "method"
        words = [f"beta {self.beta}"]
        if self.bank is not None:
            words += [f"gamma {self.gamma}", f"slots {self.bank.slots}"]
            words += [word for word in ("texts", "updates") if getattr(self.bank, word)]
        return ", ".join(words)


@dataclass(frozen=True)
class Trained:
    """One model that is trained for each seed.

    Args:
        folder: Its name within the folder of a seed.
        align: How it compares images with texts.
        stage: What is trained; ``"condense"`` starts from the finished model of ``base``.
        base: That model.
        changes: Options that differ from those of the command.
        longer: Train on for as many epochs as stage II has, for a second result.
    """

    folder: str
    align: Reduce = "max"
    stage: Literal["align", "condense"] = "align"
    base: Trained | None = None
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    longer: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table, or a point of a study.

    Args:
        key: Its number or name.
        title: What it has more than the row before; for a point, its line.
        model: The trained model that it scores by.
        readout: How.
        budget: Of which budget of that model: ``"best"``, or ``"longer"``.
        needs: What must be asked for, or the row is left out.
        transductive: Whether test images, without their labels, change what is tested.
        value: Where a point stands on the axis of its study.
    """

    key: str
    title: str
    model: Trained
    readout: Readout = Readout()
    budget: str = "best"
    needs: Addition | None = None
    transductive: bool = False
    value: float | str | None = None


@dataclass(frozen=True)
class Table:
    """Rows, and what is said of them.

    Args:
        rows: In the order of the table.
        comparisons: Which rows are compared, of the same seed.
        shown: The rows whose model a report looks at and ``load`` gives; the first that the table has.
        baseline: The row that a report shows beside it.
    """

    rows: tuple[Row, ...]
    comparisons: tuple[tuple[str, str], ...]
    shown: tuple[str, ...]
    baseline: str

    def asked(self, added: Collection[str]) -> list[Row]:
        """The rows that belong to what was asked for."""
        return [row for row in self.rows if row.needs is None or row.needs in added]


CLS = Trained("cls", align="cls")
MAX = Trained("max")
TOPK = Trained("topk", align="topk")
VAC_LABELS = Trained("vac-labels", stage="condense", base=MAX, changes={"alpha": 0.0})
VAC = Trained("vac", stage="condense", base=MAX)
CLS_LONGER, MAX_LONGER = Trained("cls", align="cls", longer=True), Trained("max", longer=True)

_FUSED = Readout(beta=None, probabilities=True)
_BANK = Readout(None, None, BankPlan())
_ADAPTED = Readout(None, None, BankPlan(texts=True, updates=True))
# By the names that a method's own table has for them.
READOUTS = {"alone": Readout(), "fused": _FUSED, "bank": _BANK}

TABLES: dict[TableName, Table] = {
    # Table 4 of the SAC paper, and rows with the budget of both stages beside those with the budget of one.
    "steps": Table(
        (
            Row("1", "[CLS] baseline", CLS_LONGER),
            Row("1+", "[CLS] baseline, trained longer", CLS_LONGER, budget="longer"),
            Row("2", "+ Sparse Alignment", MAX_LONGER),
            Row("2+", "+ Sparse Alignment, trained longer", MAX_LONGER, budget="longer"),
            Row("3", "2 + condenser (VAC), by labels", VAC_LABELS, _FUSED),
            Row("4", "2 + condenser, by labels and alignment", VAC, _FUSED),
            Row("5", "4 + memory bank, frozen", VAC, _BANK),
            Row("6", "5 + unseen texts and test images *", VAC, _ADAPTED, transductive=True),
        ),
        # Each step, and the whole against the baselines of its budget.
        (
            *(("2", "1"), ("2+", "1+"), ("3", "2"), ("3", "2+"), ("4", "3"), ("4", "2+")),
            *(("5", "4"), ("6", "5"), ("5", "1+"), ("6", "1+")),
        ),
        shown=("5",),
        baseline="1",
    ),
    # Table 6 of the SAC paper for one method: as published, with Sparse Alignment, and with what is added behind it.
    "alignment": Table(
        (
            Row("cls", "as published", CLS),
            Row("max", "+ Sparse Alignment", MAX),
            Row("topk", "+ Sparse Alignment, mean of the {topk} best", TOPK),
            Row("probs", "max, ranked by probabilities", MAX, Readout(probabilities=True), needs="vac"),
            Row("vac", "probs + condenser (VAC)", VAC, _FUSED, needs="vac"),
            Row("bank", "vac + memory bank, frozen", VAC, _BANK, needs="bank"),
            Row("adapted", "bank + unseen texts and test images *", VAC, _ADAPTED, needs="bank", transductive=True),
        ),
        # Each step, and the whole against the method as published.
        (
            *(("max", "cls"), ("topk", "cls"), ("probs", "max"), ("vac", "probs"), ("vac", "cls")),
            *(("bank", "vac"), ("bank", "cls"), ("adapted", "bank"), ("adapted", "cls")),
        ),
        shown=("bank", "vac", "max"),
        baseline="cls",
    ),
}


def one_model(align: Reduce, added: Collection[str]) -> Table:
    """The table of ``czsl train``: one row, of the whole that was asked for."""
    trained = {"cls": CLS, "max": MAX, "topk": TOPK}.get(align, Trained(align, align=align))
    if "vac" not in added:
        row = Row("model", f"images compared by {align}", trained)
    else:
        behind = Trained("vac", stage="condense", base=trained, align=align)
        bank = "bank" in added
        title = f"images compared by {align}, condenser{' and memory bank' if bank else ''}"
        row = Row("model", title, behind, _BANK if bank else _FUSED)
    return Table((row,), (), shown=("model",), baseline="model")


@dataclass(frozen=True)
class Study:
    """What is varied, beside the table: one choice, everything else as there."""

    title: str
    axis: str
    points: tuple[Row, ...]


def _points(title: str, variants: dict[Any, Trained], readout: Readout = Readout()) -> tuple[Row, ...]:
    return tuple(Row(str(value), title, model, readout, value=value) for value, model in variants.items())


def _reductions(options: Options) -> Study:
    own = {"cls": CLS, "max": MAX, "topk": TOPK}
    names: tuple[Reduce, ...] = ("cls", "mean", "attention", "linear", "max", "topk", "logsumexp")
    variants = {name: own.get(name, Trained(name, align=name)) for name in names}
    return Study("Reductions over tokens (Table 5)", "reduction", _points("alignment", variants))


def _pilot(options: Options) -> Study:
    rates = (0.1, 0.3, 0.5, 0.7)
    dropped = {rate: Trained(f"drop-{rate}", align="cls", changes={"patch_drop": rate}) for rate in rates}
    return Study(
        "Patches hidden in training (Fig. 2)", "share of patches dropped", _points("[CLS]", {0.0: CLS, **dropped})
    )


def _blend(options: Options) -> Study:
    weights = (0.25, 0.5, 0.75)
    blended = {weight: Trained(f"blend-{weight}", changes={"head.cls_weight": weight}) for weight in weights}
    variants = {0.0: MAX, **blended, 1.0: CLS}
    return Study("Weight of [CLS] in the alignment score (Fig. 4)", "weight of [CLS]", _points("alignment", variants))


def _gap(options: Options) -> Study:
    aligned = {"cls": CLS, "max": MAX, "topk": TOPK, "logsumexp": Trained("logsumexp", align="logsumexp")}
    by_condenser = Readout(beta=0.0, probabilities=True)
    points: list[Row] = []
    for loss in (None, *GAP_LOSSES):
        title = "no loss for the gap" if loss is None else loss.upper()
        for name, plain in {**aligned, "vac": VAC}.items():
            changed = replace(plain, folder=f"{name}-{loss}", changes={"gap_loss": loss})
            readout = by_condenser if name == "vac" else Readout()
            points.append(Row(f"{name} {loss}", title, plain if loss is None else changed, readout, value=name))
    return Study("Losses that close the gap, by what is compared with texts", "compared", tuple(points))


def _condensers(name: str, option: str, values: tuple[float, ...]) -> dict[Any, Trained]:
    return {value: Trained(f"{name}-{value}", stage="condense", base=MAX, changes={option: value}) for value in values}


def _alpha(options: Options) -> Study:
    varied = _condensers("alpha", "alpha", (0.1, 0.3, 0.5, 0.7, 0.9))
    variants = {0.0: VAC_LABELS, **varied, options.alpha: VAC}
    return Study("Weight of the distillation", "alpha", _points("condenser", dict(sorted(variants.items())), _FUSED))


def _depth(options: Options) -> Study:
    variants = {**_condensers("depth", "condenser.depth", (1, 2, 3, 4)), options.condenser.depth: VAC}
    return Study("Blocks of the condenser", "K", _points("condenser", dict(sorted(variants.items())), _FUSED))


def _with_bank(value: float, beta: float | None, gamma: float | None, slots: int | None = None) -> list[Row]:
    plan = BankPlan(slots)
    adapting = plan._replace(texts=True, updates=True)
    return [
        Row(str(value), "+ memory bank", VAC, Readout(beta, gamma, plan), value=value),
        Row(str(value), "+ updates *", VAC, Readout(beta, gamma, adapting), value=value, transductive=True),
    ]


def _beta(options: Options) -> Study:
    points: list[Row] = []
    for beta in (step / 10 for step in range(11)):
        alone = Row(str(beta), "condenser", VAC, Readout(beta, probabilities=True), value=beta)
        points += [alone, *_with_bank(beta, beta, None)]
    return Study("Weight of the alignment branch", "beta", tuple(points))


def _gamma(options: Options) -> Study:
    weights = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 2.0)
    points = [row for gamma in weights for row in _with_bank(gamma, None, gamma)]
    return Study("Weight of the memory bank", "gamma", tuple(points))


def _slots(options: Options) -> Study:
    points = [row for slots in (1, 2, 4, 8, 16, 24, 32) for row in _with_bank(slots, None, None, slots)]
    return Study("Slots of the memory bank for each pair", "N", tuple(points))


STUDIES: dict[str, Callable[[Options], Study]] = {
    "reductions": _reductions,
    "pilot": _pilot,
    "blend": _blend,
    "gap": _gap,
    "alpha": _alpha,
    "beta": _beta,
    "gamma": _gamma,
    "depth": _depth,
    "slots": _slots,
}


def check_added(added: Any) -> tuple[Addition, ...]:
    """The additions that were asked for; TypeError or ValueError unless they are "vac", or "vac" and "bank"."""
    if isinstance(added, str) or not isinstance(added, (list, tuple)):
        raise TypeError(f"expected `add` to be a list of vac and bank, got {added!r}")
    for name in added:
        check_choice("add", name, get_args(Addition))
    if "bank" in added and "vac" not in added:
        raise ValueError("expected `add` with vac where there is a bank, which remembers its vectors, got bank alone")
    return tuple(added)
