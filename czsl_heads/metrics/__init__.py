"""torchmetrics classes over :mod:`czsl_heads.functional`."""

from czsl_heads.metrics.czsl_score import CZSLScore as CZSLScore
from czsl_heads.metrics.feasibility_search import FeasibilitySearch as FeasibilitySearch
from czsl_heads.metrics.gap_report import GapReport as GapReport
from czsl_heads.metrics.gap_report import ModalityGap as ModalityGap
from czsl_heads.metrics.gap_report import gap_report as gap_report
from czsl_heads.metrics.modality_gap import RelativeModalityGap as RelativeModalityGap
from czsl_heads.metrics.separability import linear_separability as linear_separability

__all__ = [
    "CZSLScore",
    "FeasibilitySearch",
    "GapReport",
    "ModalityGap",
    "RelativeModalityGap",
    "gap_report",
    "linear_separability",
]
