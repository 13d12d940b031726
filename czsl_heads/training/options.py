"""What decides a training run, and the published settings of each data set."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any, get_args

from czsl_heads._checks import check_choice, check_integer, check_positive, check_range
from czsl_heads.adapters.lora import Matrix
from czsl_heads.models.sac import Fusion


@dataclass(frozen=True)
class AlignOptions:
    """Stage I: soft prompts and LoRA on the vision tower, trained by the cross-entropies of Eq. 4.

    Args:
        epochs: Passes over the training images.
        batch_size: Images a step (on each device).
        learning_rate, weight_decay: Of Adam, whose decay is coupled, as in the field's code.
        decay_every, decay_factor: The rate is multiplied by ``decay_factor`` every ``decay_every`` epochs.
        context, prompt_dropout: Of the soft prompts.
        fusion: How scores combine pair and primitives: ``probs`` (the paper) or ``logits`` (Troika's code).
        lora_matrices, lora_rank, lora_alpha, lora_dropout, lora_layers: Of the vision tower's adapters; rank 0: none.
        eval_batch_size: Images at once in validation and test.
        workers: Processes that load images.
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
    eval_batch_size: int = 128
    workers: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_matrices", tuple(self.lora_matrices))
        for name in ("epochs", "batch_size", "decay_every", "eval_batch_size"):
            check_integer(name, getattr(self, name), 1)
        for name in ("lora_rank", "workers"):
            check_integer(name, getattr(self, name), 0)
        for name in ("prompt_dropout", "lora_dropout"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("weight_decay", self.weight_decay, 0)
        check_positive("learning_rate", self.learning_rate)
        check_positive("decay_factor", self.decay_factor)
        check_choice("fusion", self.fusion, get_args(Fusion))
        if not isinstance(self.context, str):
            raise TypeError(f"expected `context` to be a string, got {self.context!r}")


def preset_names() -> list[str]:
    """The presets that the package ships, one a data set."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load_options(preset: str, overrides: dict[str, Any] | None = None) -> AlignOptions:
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
    known = [field.name for field in fields(AlignOptions)]
    for name in settings:
        check_choice("options", name, known)
    return AlignOptions(**settings)


def _folder() -> Any:
    return files("czsl_heads.training") / "presets"
