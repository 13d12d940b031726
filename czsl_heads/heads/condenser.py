"""Visual Adaptive Condensing: one vector an image, read from all its tokens by cross-attention."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from czsl_heads._checks import check_integer, check_positive, check_range, check_shapes, check_tensor
from czsl_heads.functional.precision import no_autocast, score_dtype
from czsl_heads.functional.unit import unit_vectors


class VACondenser(nn.Module):
    r"""Condense the tokens of an image into one unit vector, to be compared with texts as [CLS] is.

    A learned query attends to the layer-normed tokens. Each of ``depth`` blocks, with no norm on the query:

    .. math:: q \leftarrow q + \mathrm{Attn}(q, x, x), \qquad q \leftarrow q + \mathrm{MLP}(\mathrm{LN}(q))

    The block is Troika's: no biases on query, key and value, QuickGELU, dropout after both parts and inside the MLP,
    none on the attention.

    Args:
        dim: Size of the joint space.
        depth: Number of blocks.
        num_heads: Attention heads, a divisor of ``dim``; default ``max(1, dim // 64)``.
        mlp_ratio: Width of the MLP in units of ``dim``.
        dropout: Probability in [0, 1] that an element is dropped, in training.
        device, dtype: Where and in which dtype the parameters are made.

    Shape:
        ``tokens`` [batch, tokens, dim], not normalised, in any order, at least one an image; to unit rows [batch, dim].
        Inputs of any float dtype are computed in the dtype of the parameters, also under autocast, and the result is
        float64 if they are, else float32.

    Raises:
        ValueError: An option is out of range, or ``num_heads`` no divisor of ``dim``; in ``forward`` and
            ``attention``, shapes that do not fit.
        TypeError: An option is no number, or no integer where it must be; in ``forward`` and ``attention``, tokens
            that are no float tensor.

    Example:
        >>> condenser = VACondenser(512)
        >>> tokens = torch.randn(2, 50, 512)
        >>> condenser(tokens).shape, condenser.attention(tokens).shape
        (torch.Size([2, 512]), torch.Size([2, 50]))

    References:
        Zhang et al., SAM, CVPR 2026 (SAC). Huang et al., Troika, CVPR 2024 (the block).
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 1,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("dim", dim, 1)
        check_integer("depth", depth, 1)
        num_heads = max(1, dim // 64) if num_heads is None else num_heads
        check_integer("num_heads", num_heads, 1)
        if dim % num_heads:
            raise ValueError(f"expected `num_heads` to divide dim={dim}, got {num_heads}")
        check_positive("mlp_ratio", mlp_ratio)
        check_range("mlp_ratio * dim", mlp_ratio * dim, 1)
        check_range("dropout", dropout, 0, 1)
        self.dim, self.depth, self.num_heads, self.mlp_ratio, self.dropout = dim, depth, num_heads, mlp_ratio, dropout
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Parameter(torch.empty(dim, **made))
        self.token_norm = nn.LayerNorm(dim, **made)
        hidden = int(mlp_ratio * dim)
        self.blocks = nn.ModuleList(_CrossAttentionBlock(dim, num_heads, hidden, dropout, made) for _ in range(depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.query, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """One unit vector for each image ``[batch, dim]``, from its tokens ``[batch, tokens, dim]``."""
        self._check(tokens)
        with no_autocast(tokens.device):
            query, tokens = self._start(tokens)
            for block in self.blocks:
                query = block(query, tokens)
        return unit_vectors(query)

    def attention(self, tokens: Tensor) -> Tensor:
        """How much of each token the last block reads, averaged over heads: ``[batch, tokens]``, rows sum to one."""
        self._check(tokens)
        with no_autocast(tokens.device):
            query, tokens = self._start(tokens)
            for block in self.blocks[:-1]:
                query = block(query, tokens)
            last = cast(_CrossAttentionBlock, self.blocks[-1])
            return last.weights(query, tokens).mean(dim=1)

    def _check(self, tokens: Tensor) -> None:
        check_tensor("tokens", tokens)
        sizes = check_shapes(tokens=(tokens, f"batch tokens {self.dim}"))
        check_range("tokens.shape[1]", sizes["tokens"], 1)

    def _start(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.query.expand(tokens.shape[0], -1), self.token_norm(tokens.to(self.query.dtype))

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, depth={self.depth}, num_heads={self.num_heads}, mlp_ratio={self.mlp_ratio}, "
            f"dropout={self.dropout}"
        )


class _CrossAttentionBlock(nn.Module):
    """One query of each image attends to its tokens, then passes an MLP: ``[batch, dim]`` to ``[batch, dim]``."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float, made: dict[str, Any]) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.query_proj = nn.Linear(dim, dim, bias=False, **made)
        self.key_proj = nn.Linear(dim, dim, bias=False, **made)
        self.value_proj = nn.Linear(dim, dim, bias=False, **made)
        self.out_proj = nn.Linear(dim, dim, **made)
        self.mlp_norm = nn.LayerNorm(dim, **made)
        self.mlp_in = nn.Linear(dim, hidden, **made)
        self.mlp_out = nn.Linear(hidden, dim, **made)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        asked = rearrange(self._asked(query), "batch heads dim -> batch 1 heads dim")
        tokens = rearrange(tokens, "batch tokens dim -> batch 1 tokens dim")
        read = F.scaled_dot_product_attention(asked, tokens, tokens, scale=self.scale)[:, 0]  # [batch, heads, dim]
        values = einsum(read, self._per_head(self.value_proj), "batch heads dim, heads k dim -> batch heads k")
        query = query + self.dropout(self.out_proj(rearrange(values, "batch heads k -> batch (heads k)")))
        hidden = self.mlp_in(self.mlp_norm(query))
        hidden = self.dropout(hidden * torch.sigmoid(1.702 * hidden))  # QuickGELU
        output: Tensor = query + self.dropout(self.mlp_out(hidden))
        return output

    def weights(self, query: Tensor, tokens: Tensor) -> Tensor:
        """What ``forward`` reads of each token, ``[batch, heads, tokens]``."""
        logits: Tensor = self.scale * self._asked(query) @ tokens.mT
        return logits.softmax(dim=-1, dtype=score_dtype(logits))

    def _asked(self, query: Tensor) -> Tensor:
        # There is one query and many tokens, so keys and values are projected on the query's side of the products:
        # the same numbers for dim / heads times less work, and no projected copy of the tokens.
        asked = rearrange(self.query_proj(query), "batch (heads k) -> batch heads k", heads=self.num_heads)
        on_keys: Tensor = einsum(asked, self._per_head(self.key_proj), "batch heads k, heads k dim -> batch heads dim")
        return on_keys

    def _per_head(self, projection: nn.Linear) -> Tensor:
        weights: Tensor = rearrange(projection.weight, "(heads k) dim -> heads k dim", heads=self.num_heads)
        return weights
