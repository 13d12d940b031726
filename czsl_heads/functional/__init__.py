"""Pure tensor functions: all the arithmetic of the package, one file a concept."""

from czsl_heads.functional.alignment import alignment as alignment
from czsl_heads.functional.distill import distillation as distillation
from czsl_heads.functional.fusion import combine as combine
from czsl_heads.functional.fusion import fuse as fuse
from czsl_heads.functional.gap import relative_modality_gap as relative_modality_gap
from czsl_heads.functional.maxsim import maxsim as maxsim
from czsl_heads.functional.protocol import CZSLResult as CZSLResult
from czsl_heads.functional.protocol import czsl_scores as czsl_scores

__all__ = [
    "CZSLResult",
    "alignment",
    "combine",
    "czsl_scores",
    "distillation",
    "fuse",
    "maxsim",
    "relative_modality_gap",
]
