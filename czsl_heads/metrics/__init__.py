"""torchmetrics classes over :mod:`czsl_heads.functional`."""

from czsl_heads.metrics.czsl_score import CZSLScore as CZSLScore

__all__ = ["CZSLScore"]
