"""From the cosines of all tokens to one score a text: the reductions that need no parameters, and the [CLS] blend."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from czsl_heads._checks import check_choice, check_positive, check_range, check_shapes, check_tensor
from czsl_heads.functional.maxsim import maxsim
from czsl_heads.functional.precision import no_autocast, score_dtype
from czsl_heads.functional.unit import unit_vectors

Reduction = Literal["max", "topk", "logsumexp", "mean", "cls"]
REDUCTIONS: tuple[Reduction, ...] = ("max", "topk", "logsumexp", "mean", "cls")


def alignment(
    tokens: Tensor,
    texts: Tensor,
    *,
    reduce: Reduction = "max",
    k: int | None = None,
    temperature: float = 0.01,
    include_cls: bool = True,
    cls_weight: float = 0.0,
) -> Tensor:
    r"""Cosine score of each text with an image's tokens.

    With :math:`s_l` the cosine of the text and token :math:`l`, [CLS] being token 0:

    - ``"max"``: :math:`\max_l s_l`; ``"topk"``: the mean of the ``k`` largest;
    - ``"logsumexp"``: :math:`T \log \frac{1}{L} \sum_l e^{s_l / T}`, between mean (:math:`T \to \infty`) and max (0);
    - ``"mean"``: the mean of the cosines; ``"cls"``: :math:`s_0`.

    The result is ``(1 - cls_weight) * reduced + cls_weight * s_0``.

    Args:
        tokens: ``[batch, tokens, dim]``; any norm, [CLS] first.
        texts: ``[texts, dim]`` or ``[batch, texts, dim]``; any norm.
        reduce: One of the above.
        k: Tokens for ``"topk"``, in ``[1, tokens]``.
        temperature: :math:`T` of ``"logsumexp"``, positive and finite, in units of cosine.
        include_cls: Whether token 0 takes part in the reduction; ``"cls"`` uses it in any case.
        cls_weight: Weight of [CLS] in the blend, in [0, 1].

    Returns:
        Cosines ``[batch, texts]``, in [-1, 1] up to rounding; float64 if an input is, else float32. A zero vector
        scores 0.

    Raises:
        TypeError: An input is no float tensor, or an option no number.
        ValueError: A shape or an option does not fit; there is no token, or none besides [CLS] and it is excluded.

    Example:
        >>> tokens = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
        >>> alignment(tokens, torch.eye(2)), alignment(tokens, torch.eye(2), reduce="cls")
        (tensor([[1., 1.]]), tensor([[1., 0.]]))

    References:
        Zhang et al., SAM, CVPR 2026 (SAC): Eq. 2, Table 5 (reductions), Fig. 4 (blend).
    """
    _check(tokens, texts, reduce=reduce, cls_weight=cls_weight, k=k, include_cls=include_cls)
    dtype = score_dtype(tokens, texts)
    tokens, texts = unit_vectors(tokens, dtype), unit_vectors(texts, dtype)
    cls = maxsim(tokens[:, :1], texts) if reduce == "cls" or cls_weight > 0 else None
    if cls is not None and (reduce == "cls" or cls_weight == 1):
        return cls
    reduced = _reduce(tokens if include_cls else tokens[:, 1:], texts, reduce, k, temperature)
    return reduced if cls is None else (1 - cls_weight) * reduced + cls_weight * cls


def aligned_vectors(
    tokens: Tensor,
    texts: Tensor,
    *,
    reduce: Reduction = "max",
    k: int | None = None,
    temperature: float = 0.01,
    include_cls: bool = True,
    cls_weight: float = 0.0,
) -> Tensor:
    r"""The vector that stands for each image where :func:`alignment` compares it with a text of its own.

    It is the gradient of the score by the unit text: the winning token (``"max"``), the mean of the winners
    (``"topk"``), the mean of all tokens (``"mean"``), or the same weighed by their softmax (``"logsumexp"``), or [CLS].

    Args:
        tokens: ``[batch, tokens, dim]``; any norm, [CLS] first.
        texts: The text of each image, ``[batch, dim]``; any norm.
        reduce, k, temperature, include_cls, cls_weight: As in :func:`alignment`.

    Returns:
        ``[batch, dim]``, means of unit tokens; float64 if an input is, else float32.

    Raises:
        TypeError, ValueError: As :func:`alignment`.

    Example:
        >>> tokens = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
        >>> aligned_vectors(tokens, torch.tensor([[0.1, 1.0]]))
        tensor([[0., 1.]])
    """
    check_tensor("tokens", tokens)
    check_tensor("texts", texts)
    check_shapes(tokens=(tokens, "batch tokens dim"), texts=(texts, "batch dim"))
    _check(tokens, texts[:, None], reduce=reduce, cls_weight=cls_weight, k=k, include_cls=include_cls)
    dtype = score_dtype(tokens, texts)
    tokens, texts = unit_vectors(tokens, dtype), unit_vectors(texts, dtype)
    cls = tokens[:, 0]
    if reduce == "cls" or cls_weight == 1:
        return cls
    read = _read(tokens if include_cls else tokens[:, 1:], texts, reduce, k or 1, temperature)
    return (1 - cls_weight) * read + cls_weight * cls


def _read(tokens: Tensor, texts: Tensor, reduce: Reduction, k: int, temperature: float) -> Tensor:
    """What of the tokens ``[batch, tokens, dim]`` the text of each image ``[batch, dim]`` reads, ``[batch, dim]``."""
    if reduce == "mean":
        return tokens.mean(dim=1)
    if reduce == "logsumexp":
        check_positive("temperature", temperature)
        cosines = (tokens * texts[:, None]).sum(dim=-1)
        shares = (cosines / temperature).softmax(dim=1)
        return (shares[:, :, None] * tokens).sum(dim=1)
    with torch.no_grad():
        _, index = maxsim(tokens, texts[:, None], k=k, return_index=True)
    winners = tokens.take_along_dim(index.reshape(len(tokens), k, 1), dim=1)  # [batch, k, dim]
    return winners.mean(dim=1)


def _reduce(tokens: Tensor, texts: Tensor, reduce: Reduction, k: int | None, temperature: float) -> Tensor:
    if reduce == "mean":
        return maxsim(tokens.mean(dim=1, keepdim=True), texts)  # products are linear in the token
    if reduce == "logsumexp":
        check_positive("temperature", temperature)
        with no_autocast(tokens.device):
            cosines = tokens @ texts.mT
        # The count as a tensor: math.log would fix the number of tokens that torch.export leaves open.
        count = cosines.new_ones(tokens.shape[1]).sum()
        return temperature * ((cosines / temperature).logsumexp(dim=1) - count.log())
    return maxsim(tokens, texts, k=k if reduce == "topk" and k is not None else 1)


def _check(
    tokens: Tensor, texts: Tensor, *, reduce: Reduction, cls_weight: float, k: int | None, include_cls: bool
) -> None:
    check_tensor("tokens", tokens)
    check_tensor("texts", texts)
    text_axes = "batch texts dim" if texts.ndim == 3 else "texts dim"
    sizes = check_shapes(tokens=(tokens, "batch tokens dim"), texts=(texts, text_axes))
    check_choice("reduce", reduce, REDUCTIONS)
    check_range("cls_weight", cls_weight, 0, 1)
    if reduce == "topk" and k is None:
        raise ValueError('expected `k` with reduce="topk", got None')
    if sizes["tokens"] < 1:
        raise ValueError("expected `tokens` with at least one token, got 0")
    if sizes["tokens"] < 2 - include_cls and reduce != "cls":
        raise ValueError(
            f"expected `tokens` with patches beside [CLS] (include_cls=False), got {sizes['tokens']} token"
        )
