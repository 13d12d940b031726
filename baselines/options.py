"""What decides a comparison with and without Sparse Alignment, and the presets, each value with where it is from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from baselines import BASELINES
from baselines.rows import Addition
from czsl_heads._checks import check_choice, check_integer, check_kind, check_positive, check_range
from czsl_heads.training import config as training
from czsl_heads.training import options as training_options
from czsl_heads.training.options import SACOptions

Selection = Literal["auc", "loss", "last"]
# Of a value of a preset: the released configuration or command, the paper, the authors in an issue, nobody but us; and
# of condenser and bank: our SAC pipeline's preset for that data set.
SOURCES = ("released", "paper", "issue", "guess", "sac")
ADDED = (
    *("condense_epochs", "condense_learning_rate", "alpha", "beta", "gamma"),
    *("depth", "slots", "bank_temperature"),
)
PRESETS = Path(__file__).parent / "presets"
QUICK_EPOCHS = 2
_DECIDED = ("encoder", "space", "align", "primitives")  # of a method's constructor, by the comparison itself


@dataclass(frozen=True)
class Options:
    """Training of a baseline, by Adam on its loss over the seen pairs.

    Args:
        epochs: Passes over the training images; 0: nothing is trained, and one seed is as good as any.
        batch_size: Images a batch (on each device).
        accumulate: Batches a step of the optimiser.
        incomplete_group: Of an epoch's last step, which may have fewer batches: ``"mean"`` of their losses, or
            ``"full"``, their sum divided by ``accumulate``, as CSP's loop.
        learning_rate, weight_decay: Of Adam, whose decay is coupled, as in the field's code.
        decay_every, decay_factor: The rate is multiplied by ``decay_factor`` every ``decay_every`` epochs; None: never.
        selection: The epoch that is tested: best AUC or least loss on validation, or the last.
        selection_digits: Decimals to which AUC or loss are rounded before epochs are compared, of which the first of
            equals is kept; Troika's loop has 4. None: not rounded.
        topk, include_cls: Of the alignment heads.
        eval_batch_size: Images at once in validation and test.
        workers: Processes that load images; None: one a core, at most 8.
        condense_epochs, condense_learning_rate: Of the condenser, with the method frozen; all else as above.
        alpha, beta, gamma: Of :class:`~baselines.condensed.Condensed`.
        depth: Blocks of the condenser.
        slots, bank_temperature: Of the memory bank.
        model: Arguments of the method's constructor.
    """

    epochs: int = 20
    batch_size: int = 64
    accumulate: int = 1
    incomplete_group: Literal["mean", "full"] = "mean"
    learning_rate: float = 5e-5
    weight_decay: float = 1e-5
    decay_every: int | None = None
    decay_factor: float = 0.5
    selection: Selection = "auc"
    selection_digits: int | None = None
    topk: int = 4
    include_cls: bool = True
    eval_batch_size: int = 64
    workers: int | None = 0
    condense_epochs: int = 10
    condense_learning_rate: float = 5e-5
    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 0.5
    depth: int = 1
    slots: int = 16
    bank_temperature: float = 0.1
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, 0)
        for name in ("accumulate", "topk") if self.decay_every is None else ("accumulate", "topk", "decay_every"):
            check_integer(name, getattr(self, name), 1)
        for name in ("learning_rate", "decay_factor"):
            check_positive(name, getattr(self, name))
        check_range("weight_decay", self.weight_decay, 0)
        check_choice("selection", self.selection, get_args(Selection))
        check_choice("incomplete_group", self.incomplete_group, ("mean", "full"))
        if self.selection_digits is not None:
            check_integer("selection_digits", self.selection_digits, 0)
        check_kind("include_cls", self.include_cls, bool)
        _ = self.loading  # which checks the rest

    @property
    def loading(self) -> SACOptions:
        """What loaders and trainer read."""
        names = ("batch_size", "eval_batch_size", "workers", *ADDED)
        return SACOptions(**{name: getattr(self, name) for name in names}, lora_rank=0)

    @property
    def condensing(self) -> Options:
        """The same for the condenser, which is trained behind the method."""
        return replace(self, epochs=self.condense_epochs, learning_rate=self.condense_learning_rate)


@dataclass(frozen=True)
class Config(training.AblationConfig):
    """Everything that decides the numbers of a comparison; a folder holds one of these.

    Its ``options`` are those that loaders and trainer read; ``baseline`` are the method's.
    """

    method: str = "csp"
    baseline: Options = field(default_factory=Options)
    add: tuple[Addition, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All of it for a JSON file."""
        left_out = ("options", "baseline", "studies", "sources", "add")
        found = {name: value for name, value in super().as_dict().items() if name not in left_out}
        return {"method": self.method, **found, "options": asdict(self.baseline)}


def preset_names(method: str) -> list[str]:
    """The data sets that a method has a preset for."""
    return sorted(_read(method))


def load_options(
    method: str, preset: str, overrides: Mapping[str, Any] | None = None
) -> tuple[Options, dict[str, str]]:
    """The options of a preset, some of them replaced, and where each is from; names are checked.

    Raises:
        ValueError: There is no such method or preset, or something names no option.

    Example:
        >>> options, sources = load_options("troika", "mit-states", {"epochs": 1})
        >>> options.epochs, options.model["layers"], sources["epochs"], sources["layers"]
        (1, 3, 'given', 'released')
    """
    check_choice("method", method, tuple(BASELINES))
    check_choice("preset", preset, preset_names(method))
    by_source = {"sac": _added(preset), **_read(method)[preset], "given": dict(overrides or {})}
    settings = {name: value for values in by_source.values() for name, value in values.items()}
    sources = {name: source for source, values in by_source.items() for name in values}
    trained = [field.name for field in fields(Options) if field.name != "model"]
    built = [name for name in inspect.signature(BASELINES[method]).parameters if name not in _DECIDED]
    for name in settings:
        check_choice("options", name, (*trained, *built))
    model = {name: value for name, value in settings.items() if name not in trained}
    return Options(**{name: settings[name] for name in settings if name in trained}, model=model), sources


def configure(
    method: str,
    data: str = "shapes",
    encoder: str = "tiny",
    preset: str | None = None,
    seeds: int = 1,
    first_seed: int = 0,
    imbalance: float | None = None,
    add: Sequence[Addition] = (),
    quick: bool = False,
    options: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
) -> Config:
    """The configuration of a comparison, from the arguments of ``python -m baselines ablate``.

    Args:
        method: clip, coop, csp or troika.
        data: "shapes", drawn into the output folder, or the path of a data set in the field's layout.
        encoder: "tiny", or open_clip's ARCHITECTURE[:TAG], such as ViT-L-14:openai.
        preset: Options of a data set (shapes, ut-zappos, mit-states, cgqa); default: shapes with the tiny encoder, else
            mit-states.
        seeds: How many seeds; from two on, there are deviations and intervals. One is taken where nothing is trained.
        first_seed: The first of them.
        imbalance: Information imbalance of the shapes world, in [0, 1].
        add: "vac": a condenser behind the method with Sparse Alignment; "vac" and "bank": a memory bank of its vectors
            too.
        quick: Fewer images and epochs: a check that everything runs.
        options: Replace the preset's, such as --options.epochs 5 or --options.layers 1; docs/baselines.md lists them.
        trainer: Flags of Lightning's Trainer, such as --trainer.precision bf16-mixed.

    Raises:
        ValueError: An argument is out of range, unknown, or has no meaning for this data.
    """
    preset = preset or ("shapes" if encoder == "tiny" else "mit-states")
    chosen, sources = load_options(method, preset, options)
    if quick:
        fewer = {"condense_epochs": QUICK_EPOCHS} | ({"epochs": QUICK_EPOCHS} if chosen.epochs else {})
        chosen, sources = load_options(method, preset, {**fewer, **(options or {})})
    if isinstance(add, str) or not isinstance(add, Sequence):
        raise TypeError(f"expected `add` to be a list of vac and bank, got {add!r}")
    for name in add:
        check_choice("add", name, get_args(Addition))
    if "bank" in add and "vac" not in add:
        raise ValueError("expected `add` with vac where there is a bank, which remembers its vectors, got bank alone")
    if "accumulate_grad_batches" in (trainer or {}):
        raise ValueError("expected `trainer` without accumulate_grad_batches, got it; see `options.accumulate`")
    common = training.configure(
        data, encoder, seeds=seeds, first_seed=first_seed, imbalance=imbalance, quick=quick, trainer=trainer
    )
    return Config(
        data=common.data,
        encoder=encoder,
        preset=preset,
        options=chosen.loading,
        seeds=common.seeds if chosen.epochs or add else common.seeds[:1],
        shapes=common.shapes,
        trainer=common.trainer,
        method=method,
        baseline=chosen,
        add=tuple(add),
        sources=sources,
    )


def _added(preset: str) -> dict[str, Any]:
    sac = training_options.load_options(preset)
    rate = sac.condense_learning_rate or sac.learning_rate
    settings = {name: getattr(sac, name) for name in ADDED}
    return {**settings, "condense_epochs": sac.extra_epochs, "condense_learning_rate": rate}


def _read(method: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Settings by data set and source."""
    content: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load((PRESETS / f"{method}.yaml").read_text())
    return content
