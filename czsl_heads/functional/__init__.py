"""Pure tensor functions: all the arithmetic of the package, one file a concept."""

from czsl_heads.functional.alignment import alignment as alignment
from czsl_heads.functional.fusion import combine as combine
from czsl_heads.functional.maxsim import maxsim as maxsim
from czsl_heads.functional.protocol import CZSLResult as CZSLResult
from czsl_heads.functional.protocol import czsl_scores as czsl_scores

__all__ = ["CZSLResult", "alignment", "combine", "czsl_scores", "maxsim"]
