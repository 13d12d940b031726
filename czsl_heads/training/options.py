"""What decides a training, and the presets of each method, each value with where it is from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import yaml

from czsl_heads._checks import check_choice, check_integer, check_kind, check_positive, check_range
from czsl_heads._files import flatten
from czsl_heads.encoders.dense import Dense
from czsl_heads.functional.distill import Direction
from czsl_heads.functional.gap_losses import GAP_LOSSES, GapLoss
from czsl_heads.heads.sparse_align import Reduce
from czsl_heads.models.condensed import check_weights
from czsl_heads.models.recipe import (
    PARTS,
    BankOptions,
    CondenserOptions,
    HeadOptions,
    LoRAOptions,
    Recipe,
    from_plain,
    method_options,
)
from czsl_heads.models.registry import presets_path

Selection = Literal["auc", "loss", "last"]
# Where a value of a preset is from: the released configuration or command, the paper, the authors in an issue, the
# released code of Troika, CLIP-LoRA or RAPR, nobody but us; and of condenser and bank: SAC's preset for that data set.
SOURCES = ("released", "paper", "issue", "troika", "clip-lora", "rapr", "guess", "sac")
# What a method takes from SAC's preset, since nobody has published it with a condenser.
_FROM_SAC = ("condense_epochs", "condense_learning_rate", "alpha", "beta", "gamma", "condenser.depth", "bank.slots")


@dataclass(frozen=True)
class Options:
    """Training of any method by Adam on its loss over the seen pairs, and of a condenser and a bank behind it.

    Stage I trains the method; stage II a condenser behind it, with all else frozen; stage III fills a memory bank, and
    trains nothing.

    Args:
        epochs: Passes over the training images in stage I; 0: nothing is trained, and one seed is as good as any.
        batch_size: Images in a batch (on each device).
        micro_batch: Images at once in a training step; None: ``batch_size``. Texts are encoded once for each step and
            run backward once, images a few at a time: less memory, the same gradients. What is drawn at random for
            images (dropout, dropped patches) is drawn part by part, and so differs from what is drawn for the whole;
            batch norm (Troika's) sees each part by itself.
        accumulate: Batches in a step of the optimiser.
        incomplete_group: What an epoch's last step weighs, which may have fewer batches: ``"mean"`` of their losses, or
            ``"full"``, their sum divided by ``accumulate``, as CSP's loop.
        learning_rate, weight_decay: Of Adam, whose decay is coupled, as in the field's code; in both stages.
        decay_every, decay_factor: The rate is multiplied by ``decay_factor`` every ``decay_every`` epochs of a stage;
            None: never.
        selection: The epoch that is tested: best AUC or least loss on validation, or the last.
        selection_digits: Decimals to which AUC or loss are rounded before epochs are compared, of which the first of
            equals is kept; Troika's loop has 4. None: not rounded.
        checkpoint: Keep no activations of both towers' blocks but run them again in the backward pass: less memory,
            one forward pass more, the same numbers.
        condense_epochs: Passes in stage II; None: as many as in stage I.
        condense_learning_rate: Rate of stage II; None: that of stage I.
        condense_augment: Augment the training images in stage II. Without, nothing random stands before the condenser,
            and the encoder runs once for each image instead of once for each epoch.
        cache: Keep encoded images in memory in stage II: None, if they fit into 2 GB; True, in any case; False, never.
        joint: Train both stages at once instead (Eq. 11), from the start.
        alpha: Weight of the distillation in stage II, in [0, 1].
        direction: Direction of the distillation: ``reverse`` is KL(condenser || alignment), ``forward`` the other way.
        gap_loss: ``cua`` or ``cuaxu``: also close the gap between images and texts, in each stage that is trained; see
            :mod:`czsl_heads.training.gap_loss`.
        gap_weight: Weight of that loss.
        beta: Weight of the method itself in the fused scores, in [0, 1].
        gamma: Weight of the memory bank in the fused scores, at least 0.
        dense: What the last block does to the patch tokens, none of it trained: ``none``, ``value``, ``sclip``,
            ``clearclip`` or ``naclip``, see :mod:`czsl_heads.encoders.dense`.
        patch_drop: Share of the patches that the vision tower does not see in training (never in a test), in [0, 1).
        head, lora, condenser, bank: Parts of the model, with options of their own
            (:class:`~czsl_heads.models.recipe.HeadOptions` and so on).
        eval_batch_size: Images at once in validation and test. It decides what an adapting bank has seen when.
        workers: Processes that load images; None: one for each core, at most 8. They change no number.
        model: Arguments of the method's constructor.
    """

    epochs: int = 10
    batch_size: int = 64
    micro_batch: int | None = None
    accumulate: int = 1
    incomplete_group: Literal["mean", "full"] = "mean"
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    decay_every: int | None = None
    decay_factor: float = 0.5
    selection: Selection = "auc"
    selection_digits: int | None = None
    checkpoint: bool = False
    condense_epochs: int | None = None
    condense_learning_rate: float | None = None
    condense_augment: bool = True
    cache: bool | None = None
    joint: bool = False
    alpha: float = 0.5
    direction: Direction = "reverse"
    gap_loss: GapLoss | None = None
    gap_weight: float = 0.1
    beta: float = 0.5
    gamma: float = 0.5
    dense: Dense = "none"
    patch_drop: float = 0.0
    head: HeadOptions = field(default_factory=HeadOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    condenser: CondenserOptions = field(default_factory=CondenserOptions)
    bank: BankOptions = field(default_factory=BankOptions)
    eval_batch_size: int = 128
    workers: int | None = 0
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, 0)
        for name in ("batch_size", "accumulate", "eval_batch_size"):
            check_integer(name, getattr(self, name), 1)
        for name in ("micro_batch", "decay_every", "condense_epochs"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        for name in ("selection_digits", "workers"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0)
        for name in ("learning_rate", "decay_factor"):
            check_positive(name, getattr(self, name))
        if self.condense_learning_rate is not None:
            check_positive("condense_learning_rate", self.condense_learning_rate)
        for name in ("weight_decay", "gap_weight"):
            check_range(name, getattr(self, name), 0)
        check_range("patch_drop", self.patch_drop, 0, 0.99)
        check_weights(alpha=self.alpha, beta=self.beta, gamma=self.gamma, direction=self.direction)
        check_choice("dense", self.dense, get_args(Dense))
        check_choice("selection", self.selection, get_args(Selection))
        check_choice("incomplete_group", self.incomplete_group, ("mean", "full"))
        if self.gap_loss is not None:
            check_choice("gap_loss", self.gap_loss, GAP_LOSSES)
            if self.micro_batch is not None and self.micro_batch < self.batch_size:
                raise ValueError(
                    f"expected `micro_batch` to be None with gap_loss={self.gap_loss!r}, which compares all images of "
                    f"a batch, got {self.micro_batch} of {self.batch_size}"
                )
        for name in ("checkpoint", "condense_augment", "joint"):
            check_kind(name, getattr(self, name), bool)
        if self.cache is not None:
            check_kind("cache", self.cache, bool)
        for name, kind in PARTS.items():
            check_kind(name, getattr(self, name), kind)
        check_kind("model", self.model, dict)

    @property
    def extra_epochs(self) -> int:
        """Epochs of stage II, which rows of stage I get too where they are compared with it."""
        return self.epochs if self.condense_epochs is None else self.condense_epochs

    def recipe(self, method: str, encoder: str, align: Reduce, *, condenser: bool = False) -> Recipe:
        """What the model of these options is made of."""
        shared = ("dense", "head", "lora", "patch_drop", "checkpoint", "model", "bank")
        weights = ("alpha", "beta", "gamma", "direction")
        return Recipe(
            method,
            encoder,
            align,
            condenser=self.condenser if condenser else None,
            joint=self.joint and condenser,
            **{name: getattr(self, name) for name in (*shared, *weights)},
        )

    def as_dict(self) -> dict[str, Any]:
        """All of them, as plain values."""
        return asdict(self)


def change(options: Options, changes: Mapping[str, Any]) -> Options:
    """Options of which some are replaced; ``"head.cls_weight"`` names one of a part.

    Example:
        >>> change(Options(), {"epochs": 3, "bank.slots": 2}).bank.slots
        2
    """
    nested = nest(changes)
    parts = {name: replace(getattr(options, name), **nested.pop(name)) for name in PARTS if name in nested}
    model = {**options.model, **nested.pop("model", {})}
    return replace(options, **nested, **parts, model=model)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Names with dots become mappings in mappings: ``{"bank.slots": 2}`` is ``{"bank": {"slots": 2}}``."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(".")
        place = nested
        for part in outer:
            place = place.setdefault(part, {})
        if isinstance(value, Mapping) and isinstance(place.get(last), dict):
            place[last].update(value)
        else:
            place[last] = dict(value) if isinstance(value, Mapping) else value
    return nested


def preset_names(method: str) -> list[str]:
    """The data sets that a method has a preset for."""
    return sorted(_read(method))


def load_options(
    method: str, preset: str, overrides: Mapping[str, Any] | None = None
) -> tuple[Options, dict[str, str]]:
    """The options of a preset, some of them replaced, and where each is from.

    A method without any preset of its own has the default options; condenser and bank are SAC's everywhere.

    Args:
        method: Its name.
        preset: Name of the data set.
        overrides: Options that replace the preset's, nested or with dots.

    Returns:
        The options, and the source of each that is no default, by its name with dots.

    Raises:
        ValueError: There is no such method or preset, or something names no option.

    Example:
        >>> options, sources = load_options("sac", "mit-states", {"epochs": 1, "bank.slots": 3})
        >>> options.epochs, options.bank.slots, sources["epochs"], sources["alpha"]
        (1, 3, 'given', 'paper')
    """
    of_method = _read(method)
    check_choice("preset", preset, sorted(of_method or _read("sac")))
    taken = {} if method == "sac" else {"sac": _from_sac(preset)}
    by_source = {**taken, **of_method.get(preset, {}), "given": dict(overrides or {})}
    settings: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, values in by_source.items():
        flat = flatten(nest(values))
        _check_names(method, flat)
        settings |= flat
        sources |= dict.fromkeys(flat, source)
    return from_plain(Options, nest(settings), "options"), sources


def _check_names(method: str, flat: Mapping[str, Any]) -> None:
    known = [each.name for each in fields(Options)]
    of_method = method_options(method)
    for name in flat:
        first, _, rest = name.partition(".")
        if first in of_method and first not in known:
            raise ValueError(f"expected `options` with model.{first}, which is of {method} itself, got {first}")
        check_choice("options", first, known)
        if first == "model" and rest:
            check_choice("options.model", rest.partition(".")[0], of_method)


def _from_sac(preset: str) -> dict[str, Any]:
    """What SAC's preset of a data set says of condenser and bank."""
    by_source = _read("sac").get(preset, {})
    flat: dict[str, Any] = {}
    for values in by_source.values():
        flat |= flatten(values)
    named = {name: flat[name] for name in _FROM_SAC if name in flat}
    if not flat:
        return {}
    return {"condense_epochs": flat["epochs"], "condense_learning_rate": flat["learning_rate"], **named}


def _read(method: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Settings by data set and source; none for a method without presets."""
    path = presets_path(method)
    if not path.is_file():
        return {}
    content: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content
