"""From the predictions of several branches to one score a pair."""

from __future__ import annotations

import torch
from torch import Tensor

from czsl_heads._checks import check_index, check_range, check_shapes, check_tensor


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
        TypeError, ValueError: A dtype or shape does not fit, or an index is out of range; negative ones are.

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
    attributes, objects = pairs.to(pair_probs.device).unbind(dim=1)
    check_index("pairs[:, 0]", attributes, attr_probs.shape[1])
    check_index("pairs[:, 1]", objects, obj_probs.shape[1])
    return pair_probs + attr_probs[:, attributes] * obj_probs[:, objects]


def fuse(sa: Tensor, vac: Tensor, bank: Tensor | None, *, beta: float, gamma: float) -> Tensor:
    r"""Weigh the scores of the alignment branch, of the condenser and of the memory bank.

    .. math:: \hat p = \beta \, \bar p_{sa} + (1 - \beta) (\bar p_{vac} + \gamma \, p_{mb})

    Args:
        sa, vac: Scores of the two branches ``[batch, pairs]``, as :func:`combine` gives them.
        bank: Probabilities by the memory bank ``[batch, pairs]``; ``None`` if there is none, with ``gamma`` 0.
        beta: Weight of the alignment branch, in [0, 1].
        gamma: Weight of the bank, at least 0; with 0 the bank has no say, whatever it holds.

    Returns:
        Scores ``[batch, pairs]``.

    Raises:
        TypeError: An input is no float tensor, or a weight no number.
        ValueError: A shape does not fit, a weight is out of range, or ``gamma`` is not 0 without a bank.

    Example:
        >>> sa, vac, bank = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.4, 0.6]]), torch.tensor([[0.0, 1.0]])
        >>> fuse(sa, vac, bank, beta=0.5, gamma=0.5)
        tensor([[0.6000, 0.6500]])

    References:
        Zhang et al., SAM, CVPR 2026 (SAC), Eq. 12.
    """
    check_tensor("sa", sa)
    check_tensor("vac", vac)
    check_shapes(sa=(sa, "batch pairs"), vac=(vac, "batch pairs"))
    check_range("beta", beta, 0, 1)
    check_range("gamma", gamma, 0)
    if bank is None:
        if gamma:
            raise ValueError(f"expected `bank` with gamma above 0, got None with gamma={gamma}")
    else:
        check_tensor("bank", bank)
        check_shapes(sa=(sa, "batch pairs"), bank=(bank, "batch pairs"))
        if gamma:
            vac = vac + gamma * bank
    return beta * sa + (1 - beta) * vac
