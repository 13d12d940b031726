"""From the predictions of several branches to one score a pair."""

from __future__ import annotations

import torch
from torch import Tensor

from czsl_heads._checks import check_shapes, check_tensor


def combine(pair_probs: Tensor, attr_probs: Tensor, obj_probs: Tensor, pairs: Tensor) -> Tensor:
    r"""Add to each pair's probability the product of its primitives'.

    .. math:: \bar p(a, o) = p(a, o) + p(a) \, p(o)

    Args:
        pair_probs: ``[batch, pairs]``. Troika's released code puts logits here; the paper's equation has probabilities.
        attr_probs: ``[batch, attrs]``.
        obj_probs: ``[batch, objs]``.
        pairs: (attribute index, object index) of each pair, long, ``[pairs, 2]``.

    Returns:
        Scores ``[batch, pairs]``.

    Raises:
        TypeError, ValueError: A dtype or shape does not fit.

    Example:
        >>> combine(torch.tensor([[0.5]]), torch.tensor([[0.2, 0.8]]), torch.tensor([[1.0]]), torch.tensor([[1, 0]]))
        tensor([[1.3000]])

    References:
        Zhang et al., SAM, CVPR 2026 (SAC), Eq. 13; Huang et al., Troika, CVPR 2024.
    """
    for name, probs in (("pair_probs", pair_probs), ("attr_probs", attr_probs), ("obj_probs", obj_probs)):
        check_tensor(name, probs)
    check_tensor("pairs", pairs, dtypes=(torch.long,))
    check_shapes(
        pair_probs=(pair_probs, "batch pairs"),
        attr_probs=(attr_probs, "batch attrs"),
        obj_probs=(obj_probs, "batch objs"),
        pairs=(pairs, "pairs 2"),
    )
    pairs = pairs.to(pair_probs.device)
    return pair_probs + attr_probs[:, pairs[:, 0]] * obj_probs[:, pairs[:, 1]]
