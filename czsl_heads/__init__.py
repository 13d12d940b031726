"""Heads for compositional zero-shot learning on any CLIP.

``import czsl_heads`` loads torch, einops and numpy at most; the rest is loaded when a name that needs it is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from czsl_heads import functional as functional
from czsl_heads.heads.condenser import VACondenser as VACondenser
from czsl_heads.heads.memory_bank import DynamicMemoryBank as DynamicMemoryBank
from czsl_heads.heads.semantic_variants import SemanticVariantHead as SemanticVariantHead
from czsl_heads.heads.sparse_align import SparseAlignHead as SparseAlignHead
from czsl_heads.space import CompositionSpace as CompositionSpace

if TYPE_CHECKING:
    from czsl_heads import data as data
    from czsl_heads import metrics as metrics
    from czsl_heads.adapters.experts import add_experts as add_experts
    from czsl_heads.adapters.lora import add_lora as add_lora
    from czsl_heads.adapters.lora import merge_lora as merge_lora
    from czsl_heads.adapters.lora import remove_lora as remove_lora
    from czsl_heads.adapters.lora import unmerge_lora as unmerge_lora
    from czsl_heads.encoders.wrap import wrap as wrap
    from czsl_heads.models.sac import SAC as SAC
    from czsl_heads.models.saved import load as load
    from czsl_heads.prompts.soft import SoftPrompts as SoftPrompts

_LAZY = {
    "SAC": "czsl_heads.models.sac",
    "SoftPrompts": "czsl_heads.prompts.soft",
    "add_experts": "czsl_heads.adapters.experts",
    "add_lora": "czsl_heads.adapters.lora",
    "load": "czsl_heads.models.saved",
    "merge_lora": "czsl_heads.adapters.lora",
    "remove_lora": "czsl_heads.adapters.lora",
    "unmerge_lora": "czsl_heads.adapters.lora",
    "wrap": "czsl_heads.encoders.wrap",
}
_LAZY_MODULES = ("data", "metrics")

__version__ = version("czsl-heads")
__all__ = [
    "SAC",
    "CompositionSpace",
    "DynamicMemoryBank",
    "SemanticVariantHead",
    "SoftPrompts",
    "SparseAlignHead",
    "VACondenser",
    "add_experts",
    "add_lora",
    "data",
    "functional",
    "load",
    "merge_lora",
    "metrics",
    "remove_lora",
    "unmerge_lora",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return import_module(f"czsl_heads.{name}")
    raise AttributeError(f"module 'czsl_heads' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
