"""Sparse Alignment: score each text by the image tokens that match it, not by [CLS] alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from czsl_heads._checks import (
    check_choice,
    check_integer,
    check_positive,
    check_range,
    check_scalar,
    check_scale,
    check_shapes,
    check_tensor,
)
from czsl_heads.functional.alignment import REDUCTIONS, aligned_vectors, alignment
from czsl_heads.functional.precision import no_autocast, score_dtype

Reduce = Literal["max", "topk", "logsumexp", "mean", "cls", "linear", "attention"]
POOLS = ("linear", "attention")


class SparseAlignHead(nn.Module):
    r"""Text logits from the projected output tokens of a CLIP's vision tower.

    Put it where a method compares one image vector with texts. It normalises its inputs itself; all reductions but
    ``"linear"`` and ``"attention"`` have no parameters.

    Args:
        reduce: How the cosines of all tokens become one score a text.

            - ``"max"``: the best token (Sparse Alignment); ``"topk"``: the mean of the ``k`` best;
            - ``"logsumexp"``: :math:`T \log \frac{1}{L} \sum_l e^{s_l / T}`;
            - ``"mean"``: of all cosines; ``"cls"``: token 0 alone, CLIP's own score;
            - ``"linear"``: tokens pooled to one vector by a softmax over tokens of ``Linear(dim, 1)``;
            - ``"attention"``: pooled by multi-head attention from one learned query, whose value and output
              projections start as the identity, so that the pooled vector starts in CLIP's space.
        k: Tokens that each text may use, for ``"topk"`` only; at least 1, and at most the tokens of the input.
        temperature: :math:`T` of ``"logsumexp"``, in units of cosine.
        dim: Size of the joint space, for ``"linear"`` and ``"attention"`` only.
        include_cls: Whether token 0 takes part in the reduction.
        cls_weight: Weight in [0, 1] of the [CLS] score, blended in after the reduction.
        logit_scale: Factor from cosine to logit, positive: CLIP's 100. A scalar tensor, ``encoder.logit_scale`` say, is
            read once. One that is trained is refused: pass it to each call. 1.0 gives cosines.
        device, dtype: Where and in which dtype the parameters of ``"linear"`` and ``"attention"`` are made; the other
            reductions have none.

    Shape:
        ``tokens`` [batch, tokens, dim], [CLS] first; ``texts`` [texts, dim] or, of each image its own,
        [batch, texts, dim]; to logits [batch, texts]. Inputs float32, bfloat16, float16 (computed in float32) or
        float64 (as such); any norm.

    Raises:
        ValueError: An option is unknown, missing, out of range or without meaning for ``reduce``; in ``forward``,
            shapes that do not fit.
        TypeError: An option is no number, or ``k`` or ``dim`` no integer; in ``forward``, inputs that are no float
            tensors.

    Example:
        >>> head = SparseAlignHead()
        >>> tokens, texts = torch.randn(2, 50, 512), torch.randn(10, 512)
        >>> head(tokens, texts).shape
        torch.Size([2, 10])
        >>> torch.equal(head(tokens, texts), head(tokens.flip(1), texts))  # the order of tokens is nothing to it
        True

    References:
        Zhang et al., SAM, CVPR 2026 (SAC): Eqs. 1-3; Table 5 for the reductions; Fig. 4 for the blend.
    """

    def __init__(
        self,
        reduce: Reduce = "max",
        *,
        k: int | None = None,
        temperature: float = 0.01,
        dim: int | None = None,
        include_cls: bool = True,
        cls_weight: float = 0.0,
        logit_scale: float | Tensor = 100.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("reduce", reduce, (*REDUCTIONS, *POOLS))
        if (k is not None) != (reduce == "topk"):
            raise ValueError(f'expected `k` with reduce="topk" and no other, got k={k} with reduce="{reduce}"')
        if k is not None:
            check_integer("k", k, 1)
        check_positive("temperature", temperature)
        if (dim is not None) != (reduce in POOLS):
            raise ValueError(
                f'expected `dim` with reduce="linear" or "attention", got dim={dim} with reduce="{reduce}"'
            )
        check_range("cls_weight", cls_weight, 0, 1)
        self.logit_scale = check_scale("logit_scale", logit_scale)
        self.reduce, self.k, self.temperature, self.dim = reduce, k, temperature, dim
        self.include_cls, self.cls_weight = include_cls, cls_weight
        if dim is not None:
            check_integer("dim", dim, 1)
            pool = _LinearPool if reduce == "linear" else _AttentionPool
            self.pool = pool(dim, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, texts: Tensor, *, logit_scale: Tensor | None = None) -> Tensor:
        """Logits ``[batch, texts]`` of tokens ``[batch, tokens, dim]`` and texts: the cosines, scaled.

        A scalar tensor ``logit_scale`` takes the place of the head's own, and keeps its gradient.
        """
        if logit_scale is None:
            return self.logit_scale * self._cosines(tokens, texts)
        check_scalar("logit_scale", logit_scale)
        return logit_scale * self._cosines(tokens, texts)

    def vectors(self, tokens: Tensor, texts: Tensor) -> Tensor:
        """What stands for each image ``[batch, dim]`` where its tokens meet its own text ``[batch, dim]``.

        See :func:`czsl_heads.functional.aligned_vectors`; of ``"linear"`` and ``"attention"`` it is the pooled vector.
        """
        if self.reduce in POOLS:
            both = self._pooled(tokens)
            return aligned_vectors(both, texts, include_cls=False, cls_weight=self.cls_weight)
        return aligned_vectors(tokens, texts, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        names = ("reduce", "k", "temperature", "include_cls", "cls_weight")
        return {name: getattr(self, name) for name in names}

    def _cosines(self, tokens: Tensor, texts: Tensor) -> Tensor:
        if self.reduce in POOLS:
            both = self._pooled(tokens)
            return alignment(both, texts, include_cls=False, cls_weight=self.cls_weight)
        return alignment(tokens, texts, **self._options)

    def _pooled(self, tokens: Tensor) -> Tensor:
        """[CLS] in front of the one pooled vector, ``[batch, 2, dim]``: the blend is the parameter-free head's."""
        check_tensor("tokens", tokens)
        sizes = check_shapes(tokens=(tokens, f"batch tokens {self.dim}"))
        check_range("tokens.shape[1]", sizes["tokens"], 2 - self.include_cls)
        weight: Tensor = next(self.pool.parameters())
        with no_autocast(tokens.device):
            pooled = self.pool((tokens if self.include_cls else tokens[:, 1:]).to(weight.dtype))
        dtype = score_dtype(tokens, pooled)
        return torch.cat([tokens[:, :1].to(dtype), pooled[:, None].to(dtype)], dim=1)

    def extra_repr(self) -> str:
        named = {"k": self.k, "dim": self.dim, "cls_weight": self.cls_weight or None}
        parts = [f"reduce={self.reduce!r}", *(f"{name}={value}" for name, value in named.items() if value is not None)]
        return ", ".join([*parts, f"include_cls={self.include_cls}", f"logit_scale={self.logit_scale}"])


class _LinearPool(nn.Module):
    """Softmax over tokens of one linear score: ``[batch, tokens, dim]`` to ``[batch, dim]``."""

    def __init__(self, dim: int, **made: Any) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1, **made)

    def forward(self, tokens: Tensor) -> Tensor:
        weights: Tensor = self.score(tokens).softmax(dim=1)
        return (weights * tokens).sum(dim=1)


class _AttentionPool(nn.Module):
    """Multi-head attention from one learned query: ``[batch, tokens, dim]`` to ``[batch, dim]``."""

    def __init__(self, dim: int, **made: Any) -> None:
        super().__init__()
        heads = max(1, dim // 64)
        if dim % heads:
            heads = 1
        self.query = nn.Parameter(torch.empty(1, 1, dim, **made))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        dim = self.query.shape[-1]
        nn.init.normal_(self.query, std=0.02)
        with torch.no_grad():
            for identity in (self.attention.in_proj_weight[2 * dim :], self.attention.out_proj.weight):
                nn.init.eye_(identity)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query.expand(tokens.shape[0], -1, -1)
        pooled: Tensor = self.attention(query, tokens, tokens, need_weights=False)[0]
        return pooled[:, 0]
