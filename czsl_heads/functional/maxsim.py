"""The score of a text is that of the token that matches it best (late interaction with one token a text)."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from czsl_heads._checks import check_choice, check_integer, check_shapes, check_tensor
from czsl_heads.functional.precision import no_autocast, score_dtype

Select = Literal["exact"]
Backend = Literal["auto", "dense"]


@overload
def maxsim(
    tokens: Tensor,
    texts: Tensor,
    *,
    k: int = 1,
    select: Select = "exact",
    backend: Backend = "auto",
    return_index: Literal[False] = False,
) -> Tensor: ...
@overload
def maxsim(
    tokens: Tensor,
    texts: Tensor,
    *,
    k: int = 1,
    select: Select = "exact",
    backend: Backend = "auto",
    return_index: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def maxsim(
    tokens: Tensor,
    texts: Tensor,
    *,
    k: int = 1,
    select: Select = "exact",
    backend: Backend = "auto",
    return_index: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Inner product of each text with the ``k`` tokens that match it best, averaged over them.

    .. math:: s_{bc} = \frac{1}{k} \sum_{l \in \mathrm{top}_k} \langle v_{bl}, t_{c} \rangle

    The gradient flows to the chosen tokens only; among equals the lowest index is chosen.

    Args:
        tokens: Image tokens ``[batch, tokens, dim]``; any norm (:class:`~czsl_heads.SparseAlignHead` normalises).
        texts: Text vectors ``[texts, dim]``, shared by the batch, or ``[batch, texts, dim]``, of each image its own.
        k: Tokens that each text may use, in ``[1, tokens]``.
        select: How winners are picked; ``"exact"`` in the precision of the scores.
        backend: ``"dense"`` holds all ``batch x tokens x texts`` products; ``"auto"`` picks the fastest there is.
        return_index: Also return which tokens were chosen.

    Returns:
        Scores ``[batch, texts]``: float64 if an input is, else float32, also for half inputs and under autocast. With
        ``return_index`` also the long indices of the chosen tokens, ``[batch, texts]``, or ``[batch, texts, k]``, best
        first, if ``k > 1``.

    Raises:
        TypeError: An input is no float tensor, or ``k`` no integer.
        ValueError: The shapes do not fit, ``k`` is out of range, or an option is unknown.

    Example:
        >>> tokens = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])  # one image of two tokens
        >>> maxsim(tokens, torch.eye(2), return_index=True)
        (tensor([[1.0000, 0.8000]]), tensor([[0, 1]]))

    References:
        Khattab and Zaharia, ColBERT, SIGIR 2020 (the maximum over tokens). Zhang et al., SAM, CVPR 2026, Eq. 2 (over
        the tokens of an image, for compositional texts; also circulated as SAC).
    """
    check_tensor("tokens", tokens)
    check_tensor("texts", texts)
    text_axes = "batch texts dim" if texts.ndim == 3 else "texts dim"
    sizes = check_shapes(tokens=(tokens, "batch tokens dim"), texts=(texts, text_axes))
    check_integer("k", k, 1, sizes["tokens"])
    check_choice("select", select, ("exact",))
    check_choice("backend", backend, ("auto", "dense"))

    dtype = score_dtype(tokens, texts)
    with no_autocast(tokens.device):
        products = tokens.to(dtype) @ texts.to(dtype).mT  # [batch, tokens, texts]
    if k == 1:
        scores, index = products.max(dim=1)
    else:
        # A stable sort, because topk promises no order among equals.
        values, order = products.sort(dim=1, descending=True, stable=True)
        scores, index = values[:, :k].mean(dim=1), order[:, :k].mT
    return (scores, index) if return_index else scores
