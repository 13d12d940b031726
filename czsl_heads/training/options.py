"""What decides a training run, and the published settings of each data set."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any, get_args

from czsl_heads._checks import check_choice, check_integer, check_kind, check_positive, check_range
from czsl_heads.adapters.lora import Matrix
from czsl_heads.functional.distill import Direction
from czsl_heads.functional.retrieval import Empty
from czsl_heads.models.sac import Fusion


@dataclass(frozen=True)
class SACOptions:
    """What decides the training of :class:`~czsl_heads.SAC` and how it scores.

    Stage I trains soft prompts and LoRA on the vision tower by the cross-entropies of Eq. 4; stage II the condenser,
    with all else frozen; stage III fills a memory bank, and trains nothing.

    Args:
        epochs: Passes over the training images in stage I.
        batch_size: Images a step (on each device).
        learning_rate, weight_decay: Of Adam, whose decay is coupled, as in the field's code; in both stages.
        decay_every, decay_factor: The rate is multiplied by ``decay_factor`` every ``decay_every`` epochs of a stage.
        context, prompt_dropout: Of the soft prompts.
        fusion: How scores combine pair and primitives: ``probs`` (the paper) or ``logits`` (Troika's code).
        lora_matrices, lora_rank, lora_alpha, lora_dropout, lora_layers: Of the vision tower's adapters; rank 0: none.
        topk, temperature: Of the alignment heads ``topk`` and ``logsumexp``.
        include_cls: Let [CLS] take part in the reduction over tokens, as in the paper.
        cls_weight: Weight of [CLS] in the score of the alignment head, in [0, 1].
        patch_drop: Share of the patches that the vision tower does not see in training (never in a test), in [0, 1).
        condense_epochs: Passes in stage II; None: as many as in stage I.
        condense_learning_rate: Of stage II; None: that of stage I.
        condense_augment: Augment the training images in stage II. Without, nothing random stands before the condenser,
            and the encoder runs once for each image instead of once an epoch.
        cache: Keep encoded images in memory in stage II: None, if they fit into 2 GB; True, in any case; False, never.
        depth, condenser_dropout: Of the condenser: its number of blocks, and dropout.
        alpha: Weight of the distillation in stage II, in [0, 1].
        direction: Of the distillation: ``reverse`` is KL(condenser || alignment), ``forward`` the other way round.
        joint: Train both stages at once instead (Eq. 11), from the start.
        beta: Weight of the alignment branch in the fused scores, in [0, 1].
        gamma: Weight of the memory bank in the fused scores, at least 0.
        slots: Images that the bank remembers a pair.
        bank_temperature, bank_empty, bank_normalize: Of :class:`~czsl_heads.DynamicMemoryBank`.
        bank_labels: Fill the bank by the training images' labels instead of the condenser's predictions.
        eval_batch_size: Images at once in validation and test. Decides what the adapting bank has seen when.
        workers: Processes that load images; None: one a core, at most 8. They change no number.
        checkpoint: Keep no activations of both towers' blocks but run them again in the backward pass: less memory,
            one forward pass more, the same numbers.
        micro_batch: Images at once in a training step; None: ``batch_size``. Texts are encoded once a step and run
            backward once, images a few at a time: less memory, the same gradients. What is drawn at random for images
            (dropout, dropped patches) is drawn part by part, and so differs from what is drawn for the whole.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    decay_every: int = 5
    decay_factor: float = 0.5
    context: str = "a photo of"
    prompt_dropout: float = 0.0
    fusion: Fusion = "probs"
    lora_matrices: tuple[Matrix, ...] = ("q", "k", "v")
    lora_rank: int = 4
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_layers: int | None = None
    topk: int = 4
    temperature: float = 0.01
    include_cls: bool = True
    cls_weight: float = 0.0
    patch_drop: float = 0.0
    condense_epochs: int | None = None
    condense_learning_rate: float | None = None
    condense_augment: bool = True
    cache: bool | None = None
    depth: int = 1
    condenser_dropout: float = 0.0
    alpha: float = 0.5
    direction: Direction = "reverse"
    joint: bool = False
    beta: float = 0.5
    gamma: float = 0.5
    slots: int = 16
    bank_temperature: float = 0.1
    bank_empty: Empty = "mask"
    bank_normalize: bool = False
    bank_labels: bool = False
    eval_batch_size: int = 128
    workers: int | None = 0
    checkpoint: bool = False
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.lora_matrices, (list, tuple)):
            raise TypeError(f"expected `lora_matrices` to be a list of names, got {self.lora_matrices!r}")
        object.__setattr__(self, "lora_matrices", tuple(self.lora_matrices))
        for name in ("epochs", "batch_size", "decay_every", "eval_batch_size", "topk", "depth", "slots"):
            check_integer(name, getattr(self, name), 1)
        check_integer("lora_rank", self.lora_rank, 0)
        if self.workers is not None:
            check_integer("workers", self.workers, 0)
        for name in ("prompt_dropout", "lora_dropout", "condenser_dropout", "cls_weight", "alpha", "beta"):
            check_range(name, getattr(self, name), 0, 1)
        for name in ("weight_decay", "gamma"):
            check_range(name, getattr(self, name), 0)
        for name in ("learning_rate", "decay_factor", "temperature", "bank_temperature"):
            check_positive(name, getattr(self, name))
        for name in ("include_cls", "condense_augment", "joint", "bank_normalize", "bank_labels", "checkpoint"):
            check_kind(name, getattr(self, name), bool)
        for name, values in (("fusion", Fusion), ("direction", Direction), ("bank_empty", Empty)):
            check_choice(name, getattr(self, name), get_args(values))
        check_kind("context", self.context, str)
        check_range("patch_drop", self.patch_drop, 0, 0.99)
        if self.cache is not None:
            check_kind("cache", self.cache, bool)
        for name in ("condense_epochs", "micro_batch"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if self.condense_learning_rate is not None:
            check_positive("condense_learning_rate", self.condense_learning_rate)
        if self.fusion == "logits" and self.bank_empty == "mask":
            raise ValueError('expected `bank_empty` to be zero where fusion="logits" adds logits, got mask')

    @property
    def extra_epochs(self) -> int:
        """Epochs of stage II, which rows of stage I get too where they are compared with it."""
        return self.epochs if self.condense_epochs is None else self.condense_epochs


def preset_names() -> list[str]:
    """The presets that the package ships, one a data set."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load_options(preset: str, overrides: dict[str, Any] | None = None) -> SACOptions:
    """The options of a preset, some of them replaced.

    Raises:
        ValueError: There is no such preset, or an override names no option.

    Example:
        >>> load_options("mit-states", {"epochs": 1}).batch_size
        64
    """
    import yaml

    check_choice("preset", preset, preset_names())
    settings = {**yaml.safe_load((_folder() / f"{preset}.yaml").read_text()), **(overrides or {})}
    known = [field.name for field in fields(SACOptions)]
    for name in settings:
        check_choice("options", name, known)
    return SACOptions(**settings)


def _folder() -> Any:
    return files("czsl_heads.training") / "presets"
