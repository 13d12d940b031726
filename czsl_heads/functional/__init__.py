"""Pure tensor functions: all the arithmetic of the package, one file a concept."""

from czsl_heads.functional.alignment import aligned_vectors as aligned_vectors
from czsl_heads.functional.alignment import alignment as alignment
from czsl_heads.functional.distill import distillation as distillation
from czsl_heads.functional.experts import mix_experts as mix_experts
from czsl_heads.functional.experts import route as route
from czsl_heads.functional.feasibility import FeasibilityCurve as FeasibilityCurve
from czsl_heads.functional.feasibility import feasibility as feasibility
from czsl_heads.functional.feasibility import feasibility_thresholds as feasibility_thresholds
from czsl_heads.functional.feasibility import mask_infeasible as mask_infeasible
from czsl_heads.functional.feasibility import search_threshold as search_threshold
from czsl_heads.functional.fusion import combine as combine
from czsl_heads.functional.fusion import fuse as fuse
from czsl_heads.functional.gap import instance_distance as instance_distance
from czsl_heads.functional.gap import modality_distance as modality_distance
from czsl_heads.functional.gap import relative_modality_gap as relative_modality_gap
from czsl_heads.functional.gap_losses import alignment_loss as alignment_loss
from czsl_heads.functional.gap_losses import contrastive_loss as contrastive_loss
from czsl_heads.functional.gap_losses import cua_loss as cua_loss
from czsl_heads.functional.gap_losses import cuaxu_loss as cuaxu_loss
from czsl_heads.functional.maxsim import maxsim as maxsim
from czsl_heads.functional.protocol import CZSLResult as CZSLResult
from czsl_heads.functional.protocol import czsl_scores as czsl_scores
from czsl_heads.functional.semantic_variants import choose_variants as choose_variants
from czsl_heads.functional.semantic_variants import primitive_scores as primitive_scores
from czsl_heads.functional.spectrum import effective_rank as effective_rank
from czsl_heads.functional.spectrum import explained_variance as explained_variance
from czsl_heads.functional.uniformity import cross_uniformity_loss as cross_uniformity_loss
from czsl_heads.functional.uniformity import uniformity_loss as uniformity_loss

__all__ = [
    "CZSLResult",
    "FeasibilityCurve",
    "aligned_vectors",
    "alignment",
    "alignment_loss",
    "choose_variants",
    "combine",
    "contrastive_loss",
    "cross_uniformity_loss",
    "cua_loss",
    "cuaxu_loss",
    "czsl_scores",
    "distillation",
    "effective_rank",
    "explained_variance",
    "feasibility",
    "feasibility_thresholds",
    "fuse",
    "instance_distance",
    "mask_infeasible",
    "maxsim",
    "mix_experts",
    "modality_distance",
    "primitive_scores",
    "relative_modality_gap",
    "route",
    "search_threshold",
    "uniformity_loss",
]
