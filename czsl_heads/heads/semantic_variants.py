"""Alignment of words with images in both directions: the best pair of each word, and the variant that suits it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from czsl_heads._checks import check_positive, check_range
from czsl_heads.functional.semantic_variants import choose_variants, primitive_scores


class SemanticVariantHead(nn.Module):
    r"""Logits of single words from probabilities of pairs; in training also from the variants of an image.

    .. math:: \ell_a = \tau_a \max_{(a, o) \in C} p_{ao}, \qquad \ell_o = \tau_o \max_{(a, o) \in C} p_{ao}

    Probabilities are at most one, and a softmax of them alone would be next to uniform: the two scales are learned, as
    logarithms, so that they stay positive.

    Args:
        alpha: Weight of the affinity to the image feature, beside that to the text, where a variant is chosen.
        init_scale: What both scales start from; CLIP's start is 1 / 0.07.
        device, dtype: Of the parameters, as torch's own layers take them.

    Shape:
        probabilities [batch, pairs], pairs long [pairs, 2] to logits of attributes [batch, attributes] and of objects
        [batch, objects]; -inf where no pair has the word.

    Raises:
        TypeError, ValueError: An option is no number or out of range; in ``forward``, inputs that do not fit.

    Example:
        >>> head, pairs = SemanticVariantHead(), torch.tensor([[0, 0], [0, 1], [1, 1]])
        >>> attributes, objects = head(torch.tensor([[0.1, 0.7, 0.2]]), pairs, 2, 2)
        >>> attributes.argmax(dim=1).item(), objects.argmax(dim=1).item()
        (0, 1)

    References:
        Zhang et al., EVA (Decoupling Primitive with Experts), ICLR 2026.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        init_scale: float = 1 / 0.07,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_range("alpha", alpha, 0)
        check_positive("init_scale", init_scale)
        self.alpha, self.init_scale = alpha, init_scale
        self.log_scale_attributes = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.log_scale_objects = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set both scales to what they start from."""
        for log_scale in (self.log_scale_attributes, self.log_scale_objects):
            nn.init.constant_(log_scale, math.log(self.init_scale))

    def forward(
        self, probabilities: Tensor, pairs: Tensor, num_attributes: int, num_objects: int
    ) -> tuple[Tensor, Tensor]:
        """Logits of attributes ``[batch, attributes]`` and objects ``[batch, objects]``."""
        attributes, objects = primitive_scores(probabilities, pairs, num_attributes, num_objects)
        return _scaled(attributes, self.log_scale_attributes), _scaled(objects, self.log_scale_objects)

    def choose(self, variants: Tensor, texts: Tensor, image: Tensor) -> Tensor:
        """The variant of each image ``[batch, dim]`` for its own text, see
        :func:`czsl_heads.functional.choose_variants`.
        """
        return choose_variants(variants, texts, image, alpha=self.alpha)[0]

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, init_scale={self.init_scale:g}"


def _scaled(scores: Tensor, log_scale: Tensor) -> Tensor:
    """Scores times a scale; -inf, of words without a pair, stays, and gives the scale no gradient of 0 times -inf."""
    missing = scores == -torch.inf
    return (log_scale.exp() * scores.masked_fill(missing, 0.0)).masked_fill(missing, -torch.inf)
