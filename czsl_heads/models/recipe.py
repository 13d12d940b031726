"""What a trained model is made of, as plain values, and how it is built from them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_args

from czsl_heads._checks import check_choice, check_integer, check_kind, check_positive, check_range
from czsl_heads.adapters.lora import add_lora
from czsl_heads.adapters.lora_layers import Matrix
from czsl_heads.adapters.patch_drop import drop_patches
from czsl_heads.encoders.dense import Dense
from czsl_heads.encoders.digest import weights_digest
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.encoders.wrap import wrap
from czsl_heads.functional.distill import Direction
from czsl_heads.functional.retrieval import Empty
from czsl_heads.heads.condenser import VACondenser
from czsl_heads.heads.memory_bank import DynamicMemoryBank
from czsl_heads.heads.sparse_align import POOLS, Reduce, SparseAlignHead
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Align, Method
from czsl_heads.models.registry import find_method
from czsl_heads.space import CompositionSpace

# Of a method's constructor, but decided by the recipe itself.
DECIDED = ("encoder", "space", "align", "primitives", "checkpoint")
OF_WRAP = {"dense": "none", "image_size": None}  # arguments of wrap that a recipe has, and their defaults
OF_CONDENSED = ("alpha", "beta", "gamma", "direction", "joint")
Plain = TypeVar("Plain")


@dataclass(frozen=True)
class HeadOptions:
    """How tokens meet texts, beside the name of the reduction.

    Args:
        topk, temperature: Of the reductions ``topk`` and ``logsumexp``.
        include_cls: Let [CLS] take part in the reduction over tokens, as in the paper.
        cls_weight: Weight of [CLS] in the score, in [0, 1].
    """

    topk: int = 4
    temperature: float = 0.01
    include_cls: bool = True
    cls_weight: float = 0.0

    def __post_init__(self) -> None:
        check_integer("head.topk", self.topk, 1)
        check_positive("head.temperature", self.temperature)
        check_kind("head.include_cls", self.include_cls, bool)
        check_range("head.cls_weight", self.cls_weight, 0, 1)


@dataclass(frozen=True)
class LoRAOptions:
    """Low-rank adapters in the vision tower, as :func:`czsl_heads.add_lora` takes them; rank 0: none."""

    rank: int = 0
    alpha: float | None = None
    dropout: float = 0.0
    matrices: tuple[Matrix, ...] = ("q", "k", "v")
    layers: int | None = None

    def __post_init__(self) -> None:
        check_integer("lora.rank", self.rank, 0)
        check_range("lora.dropout", self.dropout, 0, 1)
        if not isinstance(self.matrices, (list, tuple)):
            raise TypeError(f"expected `lora.matrices` to be a list of names, got {self.matrices!r}")
        object.__setattr__(self, "matrices", tuple(self.matrices))


@dataclass(frozen=True)
class CondenserOptions:
    """The condenser: its number of blocks, and its dropout."""

    depth: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_integer("condenser.depth", self.depth, 1)
        check_range("condenser.dropout", self.dropout, 0, 1)


@dataclass(frozen=True)
class BankOptions:
    """The memory bank.

    Args:
        slots: Images that it remembers for each pair.
        temperature, empty, normalize: Of :class:`~czsl_heads.DynamicMemoryBank`.
        logit_scale: Of its logits; None: the encoder's.
        labels: Fill it by the training images' labels instead of the condenser's predictions.
    """

    slots: int = 16
    temperature: float = 0.1
    logit_scale: float | None = None
    empty: Empty = "mask"
    normalize: bool = False
    labels: bool = False

    def __post_init__(self) -> None:
        check_integer("bank.slots", self.slots, 1)
        check_positive("bank.temperature", self.temperature)
        if self.logit_scale is not None:
            check_positive("bank.logit_scale", self.logit_scale)
        check_choice("bank.empty", self.empty, get_args(Empty))
        for name in ("normalize", "labels"):
            check_kind(f"bank.{name}", getattr(self, name), bool)


@dataclass(frozen=True)
class Recipe:
    """All that :func:`build` needs beside the label space.

    Args:
        method: A name of :func:`~czsl_heads.models.registry.method_names`.
        encoder: A name that :func:`czsl_heads.wrap` takes.
        align: ``"cls"``, the comparison as published, or a reduction of :class:`~czsl_heads.SparseAlignHead`.
        head, lora, patch_drop: How tokens meet texts, and what is put into the vision tower.
        checkpoint: Keep no activations of the towers' blocks in training but run them again in the backward pass.
        model: Arguments of the method's constructor.
        condenser: The condenser behind the method; None: none.
        bank: The memory bank that may stand behind the condenser.
        alpha, beta, gamma, direction, joint: Of :class:`~czsl_heads.models.condensed.Condensed`.
        dense, image_size: As :func:`czsl_heads.wrap` takes them.
    """

    method: str
    encoder: str = "tiny"
    align: Reduce = "max"
    head: HeadOptions = field(default_factory=HeadOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    patch_drop: float = 0.0
    checkpoint: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    condenser: CondenserOptions | None = None
    bank: BankOptions = field(default_factory=BankOptions)
    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 0.5
    direction: Direction = "reverse"
    joint: bool = False
    dense: Dense = "none"
    image_size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_choice("align", self.align, get_args(Reduce))
        check_choice("dense", self.dense, get_args(Dense))
        if isinstance(self.image_size, list):  # as JSON has it
            object.__setattr__(self, "image_size", tuple(self.image_size))

    def as_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return asdict(self)


def build(recipe: Recipe, space: CompositionSpace, *, encoder: Any = None) -> Method:
    """A model, untrained: a frozen CLIP with its adapters, the method, and the condenser where there is one.

    Args:
        recipe: What it is made of.
        space: Its label space.
        encoder: The CLIP that the recipe names, wrapped, if it is loaded already; adapters are put into it.

    Returns:
        The method, or :class:`~czsl_heads.models.condensed.Condensed` around it; it knows its recipe, and can be saved.

    Raises:
        TypeError, ValueError: A name is unknown, or an option is wrong; ``encoder`` was wrapped otherwise than the
            recipe says.

    Example:
        >>> space = CompositionSpace(["red"], ["circle"], seen=[("red", "circle")])
        >>> type(build(Recipe("sac", condenser=CondenserOptions()), space)).__name__
        'Condensed'
    """
    if encoder is None:
        asked = {name: getattr(recipe, name) for name, default in OF_WRAP.items() if getattr(recipe, name) != default}
        encoder = wrap(recipe.encoder, **asked)
    check_wrapped(encoder, recipe)
    digest, given = weights_digest(encoder), {id(tensor) for tensor in encoder.state_dict(keep_vars=True).values()}
    put_in(encoder, recipe)
    method = _method(recipe, encoder, space)
    method.recipe, method.encoder_digest, method.learned = recipe, digest, _learned(method, given)
    if recipe.condenser is None:
        return method

    condenser = VACondenser(encoder.dim, depth=recipe.condenser.depth, dropout=recipe.condenser.dropout)
    weights: dict[str, Any] = {name: getattr(recipe, name) for name in OF_CONDENSED}
    model = Condensed(method, condenser, **weights)
    of_condenser = [f"condenser.{name}" for name in condenser.state_dict()]
    model.recipe, model.encoder_digest = recipe, digest
    model.learned = [*(f"method.{name}" for name in method.learned), *of_condenser]
    return model


def check_wrapped(encoder: Any, recipe: Recipe) -> None:
    """Raise ValueError if an encoder was wrapped otherwise than its recipe says: it would not come back so."""
    sizes = {"dense": getattr(encoder, "dense", "none"), "image_size": getattr(encoder, "resized_to", None)}
    wanted = {"dense": recipe.dense, "image_size": _pair(recipe.image_size)}
    for name, got in sizes.items():
        if got != wanted[name]:
            raise ValueError(f"expected `encoder` with {name}={wanted[name]!r}, as the recipe says, got {got!r}")


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


def put_in(encoder: Encoder, recipe: Recipe) -> None:
    """Put the adapters of a recipe into the vision tower."""
    lora = recipe.lora
    if lora.rank:
        add_lora(encoder, **vars(lora))
    if recipe.patch_drop:
        drop_patches(encoder, recipe.patch_drop)


def build_head(recipe: Recipe, dim: int) -> Align:
    """How a recipe compares images with texts; heads give cosines, which the method scales."""
    if recipe.align == "cls":
        return "cls"
    options = recipe.head
    return SparseAlignHead(
        recipe.align,
        k=options.topk if recipe.align == "topk" else None,
        temperature=options.temperature,
        dim=dim if recipe.align in POOLS else None,
        include_cls=options.include_cls,
        cls_weight=options.cls_weight,
        logit_scale=1.0,
    )


def new_bank(space: CompositionSpace, encoder: Encoder, options: BankOptions, slots: int | None = None) -> Any:
    """An empty memory bank over a label space, on the encoder's device."""
    scale = encoder.logit_scale.detach() if options.logit_scale is None else options.logit_scale
    bank = DynamicMemoryBank(
        len(space),
        encoder.dim,
        slots=options.slots if slots is None else slots,
        temperature=options.temperature,
        logit_scale=scale,
        empty=options.empty,
        normalize=options.normalize,
    )
    return bank.to(encoder.logit_scale.device)


def method_options(name: str) -> list[str]:
    """What a recipe's ``model`` may hold for a method: the arguments of its constructor that no other field decides."""
    return [option for option in inspect.signature(find_method(name)).parameters if option not in DECIDED]


def _method(recipe: Recipe, encoder: Encoder, space: CompositionSpace) -> Method:
    kind = find_method(recipe.method)
    for option in recipe.model:
        check_choice("model", option, method_options(recipe.method))
    options = dict(recipe.model)
    if "checkpoint" in inspect.signature(kind).parameters:
        options["checkpoint"] = recipe.checkpoint
    elif recipe.checkpoint:
        raise ValueError(f"expected `checkpoint` to be false for {recipe.method}, which has none, got true")
    return kind(encoder, space, align=build_head(recipe, encoder.dim), **options)


def _learned(method: Method, given: set[int]) -> list[str]:
    """Names of all tensors but those that the CLIP came with, unless they are trained.

    What stands still but is the method's own may have been drawn at random, and belongs to it.
    """
    own = method.state_dict(keep_vars=True)
    return [name for name, tensor in own.items() if tensor.requires_grad or id(tensor) not in given]


def from_plain(kind: type[Plain], values: Mapping[str, Any], name: str) -> Plain:
    """A data class from plain values, in which nested ones are mappings.

    Raises:
        ValueError: A name is unknown.
        TypeError: What should be a mapping is none.
    """
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise TypeError(f"expected `{name}` to hold {', '.join(known)}, got {values!r}")
    read: dict[str, Any] = {}
    for option, value in values.items():
        check_choice(name, option, known)
        nested = option in PARTS and value is not None and not is_dataclass(value)
        read[option] = from_plain(PARTS[option], value, f"{name}.{option}") if nested else value
    return kind(**read)


PARTS: dict[str, Any] = {  # fields that are data classes themselves, here and in the options of training
    "head": HeadOptions,
    "lora": LoRAOptions,
    "condenser": CondenserOptions,
    "bank": BankOptions,
}
