"""Torch's attention with the products of its projections in one piece each, which its backward pass is slow without."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Projections(Protocol):
    """What :func:`attend` asks of an attention: projections of tokens ``[..., dim]``, in any order of dimensions."""

    num_heads: int
    batch_first: bool

    def project_in(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def project_apart(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def project_out(self, mixed: Tensor) -> Tensor: ...


def attend(
    layer: Projections,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What each position of ``query`` reads, and, if ``need_weights``, how much of it from where.

    Args:
        layer: The projections, and whether the batch comes first.
        query: ``[batch, length, dim]``, or length first.
        key, value: ``[batch, other, dim]``, likewise. The same tensor as ``query`` costs one product for the three.
        mask: ``[length, other]``: True where nothing is read, or numbers to add to the logits.
        dropout: On the shares by which values are weighed.
        need_weights: Return the shares, before dropout.

    Returns:
        ``[batch, length, dim]``, or length first; and None or the shares, ``[batch, heads, length, other]``.
    """
    same = key is query and value is query
    projected = layer.project_in(query) if same else layer.project_apart(query, key, value)
    pattern = "batch length (heads dim)" if layer.batch_first else "length batch (heads dim)"
    # Projected in the order in which tokens come: transposed ones would make many products of one.
    q, k, v = (rearrange(part, f"{pattern} -> batch heads length dim", heads=layer.num_heads) for part in projected)
    if mask is not None and mask.dtype == torch.bool:
        mask = ~mask  # nn.MultiheadAttention hides where it is true, this function where it is false
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    out = layer.project_out(rearrange(mixed, f"batch heads length dim -> {pattern}"))
    return out, _shares(q, k, mask) if need_weights else None


def project_by_thirds(
    inputs: tuple[Tensor, Tensor, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of different tokens, each by its third of a fused projection."""
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    query, key, value = map(F.linear, inputs, weight.chunk(3), biases)
    return query, key, value


def _shares(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """What the fused attention weighs its values by, before dropout: ``[batch, heads, length, other]``."""
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1)


class FusedAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention``, whose gradients cost one product where the original computes one per image.

    The original transposes a batch that comes first, and projects what is no longer in one piece; the backward pass
    then multiplies matrix by matrix. Parameters, their names and results are the original's, the last but for rounding.
    What is seldom asked for (padding, masks per head, unbatched tokens) is left to the original.

    Example:
        >>> attention = FusedAttention(6, 2, batch_first=True)
        >>> tokens = torch.ones(3, 5, 6)
        >>> attention(tokens, tokens, tokens, need_weights=False)[0].shape
        torch.Size([3, 5, 6])
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention`` has it."""
        seldom = key_padding_mask is not None or need_weights or query.is_nested or query.ndim != 3
        if seldom or not (attn_mask is None or attn_mask.ndim == 2):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        dropout = self.dropout if self.training else 0.0
        return attend(self, query, key, value, mask=attn_mask, dropout=dropout)

    def project_in(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[..., dim]`` to queries, keys and values, ``[..., dim]`` each."""
        query, key, value = F.linear(tokens, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return query, key, value

    def project_apart(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`project_in` where query, key and value come from different tokens."""
        return project_by_thirds((query, key, value), self.in_proj_weight, self.in_proj_bias)

    def project_out(self, mixed: Tensor) -> Tensor:
        """What was read, heads side by side, ``[..., dim]``, to ``[..., dim]``."""
        out: Tensor = self.out_proj(mixed)
        return out


def fuse_attention(model: nn.Module) -> None:
    """Make torch's own attention a :class:`FusedAttention` all over a model, in place: weights, names, hooks stay."""
    for layer in model.modules():
        if is_plain_attention(layer):
            layer.__class__ = FusedAttention


def is_plain_attention(layer: Any) -> bool:
    """True of torch's own attention with one fused ``in_proj_weight`` and nothing added to keys and values."""
    if type(layer) not in (nn.MultiheadAttention, FusedAttention) or layer.in_proj_weight is None:
        return False
    return layer.bias_k is None and not layer.add_zero_attn
