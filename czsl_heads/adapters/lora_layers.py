"""Layers with a low-rank update beside frozen weights, which the gradient never passes through.

``in_proj_weight`` of ``nn.MultiheadAttention`` is one fused matrix. Adding to it before the product would give a
gradient of its full shape, so the attention is replaced by one of the same parameter names that computes
``x W + s (dropout(x) A) B`` for each of its matrices. The same holds of the fused ``qkv`` layer of timm's attention.

The updates are float32 whatever the dtype of the weights (float64 beside float64), and computed in the dtype of the
tokens: an optimiser's steps in float16 would not be finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from czsl_heads.encoders.attention import attend, project_by_thirds
from czsl_heads.functional.precision import score_dtype

Matrix = Literal["q", "k", "v", "o", "fc", "proj"]
ATTENTION: tuple[Matrix, ...] = ("q", "k", "v", "o")


class _Delta(nn.Module):
    """``x`` to ``scale * (dropout(x) A) B``; ``B`` starts at zero, and both train in float32."""

    def __init__(self, weight: Tensor, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        made: dict[str, Any] = {"dtype": score_dtype(weight), "device": weight.device}
        self.a = nn.Parameter(torch.empty(rank, columns, **made))
        self.b = nn.Parameter(torch.zeros(rows, rank, **made))
        self.scale, self.dropout = scale, dropout
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., columns]`` of the weight to ``[..., rows]``: what is added to its product."""
        inputs = F.dropout(inputs, self.dropout, self.training)
        down, up = self.a.to(inputs.dtype), self.b.to(inputs.dtype)
        return self.scale * F.linear(F.linear(inputs, down), up)

    def matrix(self) -> Tensor:
        """The same as one matrix of the shape of the weight, without dropout."""
        return self.scale * (self.b @ self.a)

    def extra_repr(self) -> str:
        return f"rank={len(self.a)}, scale={self.scale:g}, dropout={self.dropout:g}"


class Mergeable(nn.Module):
    """Weights that the updates can be folded into, for inference, and taken out of again to the bit.

    Merged updates would get no gradient: a forward pass in training mode then raises ValueError. While merged, a state
    dict still holds the weights before merging, so that checkpoints mean one thing. Loading a state dict unmerges: what
    is loaded is such weights and updates.
    """

    per_token = True
    deltas: nn.ModuleDict
    _unmerged: dict[str, Tensor]

    def _targets(self) -> dict[str, tuple[str, Tensor, Tensor]]:
        """For each update: the name of its weight, the weight, and the rows of it that the update changes."""
        raise NotImplementedError

    def plain(self) -> nn.Module:
        """The layer of the base model as it was, in the mode of now, with the parameters of now and not copies."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        return len(self._unmerged) > 0  # torch.compile puts no guard on bool(...), and would go on with the old branch

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the updates into the weights: the forward pass then costs what the base model's does."""
        if not self.merged:
            targets = self._targets()
            self._unmerged = {name: weight.detach().clone() for name, weight, _ in targets.values()}
            for matrix, (_, _, rows) in targets.items():
                rows.copy_(rows + self._delta(matrix).matrix())  # rounded once where the weights are half

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weights as they were before :meth:`merge`, bit for bit."""
        for name, weight, _ in self._targets().values():
            if name in self._unmerged:
                weight.copy_(self._unmerged[name])
        self._unmerged = {}

    def _delta(self, matrix: str) -> _Delta:
        return cast(_Delta, self.deltas[matrix])

    def add_delta(self, matrix: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        """``outputs`` of the weights for ``inputs``, with what the update of a matrix adds, if it has one."""
        if self.merged and self.training:
            raise ValueError("expected updates unmerged in training mode, got merged ones, which would not train")
        if matrix not in self.deltas or self.merged:
            return outputs
        added: Tensor = self.deltas[matrix](inputs)
        return outputs + added

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for name, weight in self._unmerged.items():
            state[prefix + name] = weight
        return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # what unmerging restores goes along to another dtype or device
        self._unmerged = {name: fn(weight) for name, weight in self._unmerged.items()}
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _repr_of_updates(self) -> str:
        first = self._delta(next(iter(self.deltas)))
        return f"{first.extra_repr()}, merged={self.merged}"


class LoRALinear(Mergeable):
    """A linear layer with a low-rank update beside it; ``weight`` and ``bias`` are the base layer's own.

    Args:
        base: The layer, whose mode is taken over.
        rank, scale, dropout: Of the update.

    Shape:
        [..., in_features] to [..., out_features].

    Example:
        >>> layer = LoRALinear(nn.Linear(6, 8), rank=2, scale=1.0, dropout=0.0)
        >>> layer(torch.ones(3, 6)).shape
        torch.Size([3, 8])

    References:
        Hu et al., LoRA, ICLR 2022.
    """

    def __init__(self, base: nn.Linear, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.weight, self.bias, self._unmerged = base.weight, base.bias, {}
        self.deltas = nn.ModuleDict({"w": _Delta(base.weight, rank=rank, scale=scale, dropout=dropout)})
        self.train(base.training)

    def _targets(self) -> dict[str, tuple[str, Tensor, Tensor]]:
        return {"w": ("weight", self.weight, self.weight)}

    def plain(self) -> nn.Linear:
        return _linear(self.weight, self.bias).train(self.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``; ValueError if merged in training mode."""
        return self.add_delta("w", inputs, F.linear(inputs, self.weight, self.bias))

    def extra_repr(self) -> str:
        return f"{_sizes(self.weight, self.bias)}, {self._repr_of_updates()}"


class LoRAFusedLinear(Mergeable):
    """A linear layer whose rows are those of queries, keys and values, with low-rank updates beside some of the three.

    Args:
        base: The layer, as timm's attention has it under ``qkv``; its mode is taken over.
        matrices: Some of ``q k v``.
        rank, scale, dropout: Of each update.

    Shape:
        [..., in_features] to [..., out_features].

    Example:
        >>> layer = LoRAFusedLinear(nn.Linear(6, 18), ("q", "v"), rank=2, scale=1.0, dropout=0.0)
        >>> layer(torch.ones(3, 6)).shape
        torch.Size([3, 18])

    References:
        Hu et al., LoRA, ICLR 2022.
    """

    bias_was_separate: bool | None = None  # what the attention that holds it was told before, if anything

    def __init__(self, base: nn.Linear, matrices: Sequence[Matrix], *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.weight, self.bias, self._unmerged = base.weight, base.bias, {}
        third = base.weight.chunk(3)[0]
        self.deltas = nn.ModuleDict(
            {matrix: _Delta(third, rank=rank, scale=scale, dropout=dropout) for matrix in matrices}
        )
        self.train(base.training)

    def _targets(self) -> dict[str, tuple[str, Tensor, Tensor]]:
        thirds = dict(zip(("q", "k", "v"), self.weight.chunk(3)))
        return {matrix: ("weight", self.weight, thirds[matrix]) for matrix in self.deltas}

    def plain(self) -> nn.Linear:
        return _linear(self.weight, self.bias).train(self.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``; ValueError if merged in training mode."""
        fused = F.linear(inputs, self.weight, self.bias)
        if self.merged and not self.training:
            return fused
        thirds = fused.chunk(3, dim=-1)
        return torch.cat([*map(self.add_delta, ("q", "k", "v"), (inputs,) * 3, thirds)], dim=-1)

    def extra_repr(self) -> str:
        sizes = f"{_sizes(self.weight, self.bias)}, matrices={''.join(self.deltas)}"
        return f"{sizes}, {self._repr_of_updates()}"


class LoRAAttention(Mergeable):
    """``nn.MultiheadAttention`` with low-rank updates beside q, k, v or the output projection.

    Takes over the parameters of the base module under their own names, and its call as open_clip makes it. It is an
    :class:`~czsl_heads.encoders.blocks.AdaptedAttention`.

    Args:
        base: The attention, whose mode is taken over.
        matrices: Some of ``q k v o``.
        rank, scale, dropout: Of each update.

    Shape:
        query [batch, length, dim], key and value [batch, other, dim] to [batch, length, dim]; or length first, as the
        base module has it.

    Example:
        >>> base = nn.MultiheadAttention(6, 2, batch_first=True)
        >>> attention = LoRAAttention(base, ("q", "v"), rank=2, scale=1.0, dropout=0.0)
        >>> tokens = torch.ones(3, 5, 6)
        >>> attention(tokens, tokens, tokens)[0].shape
        torch.Size([3, 5, 6])

    References:
        Hu et al., LoRA, ICLR 2022.
    """

    def __init__(
        self, base: nn.MultiheadAttention, matrices: Sequence[Matrix], *, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias, self.out_proj = base.in_proj_weight, base.in_proj_bias, base.out_proj
        self.embed_dim, self.num_heads, self.batch_first = base.embed_dim, base.num_heads, base.batch_first
        self.attention_dropout, self._unmerged = base.dropout, {}
        self._base_kind = type(base)
        square = base.out_proj.weight
        self.deltas = nn.ModuleDict(
            {matrix: _Delta(square, rank=rank, scale=scale, dropout=dropout) for matrix in matrices}
        )
        self.train(base.training)

    def _targets(self) -> dict[str, tuple[str, Tensor, Tensor]]:
        targets: dict[str, tuple[str, Tensor, Tensor]] = {}
        for matrix, rows in zip(("q", "k", "v"), self.in_proj_weight.split(self.embed_dim)):
            targets[matrix] = ("in_proj_weight", self.in_proj_weight, rows)
        targets["o"] = ("out_proj.weight", self.out_proj.weight, self.out_proj.weight)
        return {matrix: targets[matrix] for matrix in self.deltas}

    def plain(self) -> nn.MultiheadAttention:
        base = self._base_kind(
            self.embed_dim,
            self.num_heads,
            dropout=self.attention_dropout,
            bias=self.in_proj_bias is not None,
            batch_first=self.batch_first,
            device="meta",  # where nothing is drawn
        )
        base.in_proj_weight, base.in_proj_bias, base.out_proj = self.in_proj_weight, self.in_proj_bias, self.out_proj
        return base.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """What each position of ``query`` reads, and, if ``need_weights``, how much of it from where.

        Args:
            query: ``[batch, length, dim]``, or length first, as the base module has it.
            key, value: ``[batch, other, dim]``, likewise.
            need_weights: Return the shares, before dropout.
            attn_mask: ``[length, other]``: True where nothing is read, or numbers to add to the logits.
            average_attn_weights: The mean of the shares over heads.

        Returns:
            ``[batch, length, dim]``, or length first; and None or the shares, ``[batch, length, other]``, of single
            heads ``[batch, heads, length, other]``.

        Raises:
            ValueError: Updates are merged in training mode.
        """
        dropout = self.attention_dropout if self.training else 0.0
        out, shares = attend(self, query, key, value, mask=attn_mask, dropout=dropout, need_weights=need_weights)
        if shares is not None and average_attn_weights:
            shares = shares.mean(dim=1)
        return out, shares

    def project_in(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[..., dim]`` to queries, keys and values, ``[..., dim]`` each, with their updates."""
        fused = F.linear(tokens, self.in_proj_weight, self.in_proj_bias)
        q, k, v = map(self.add_delta, ("q", "k", "v"), (tokens,) * 3, fused.chunk(3, dim=-1))
        return q, k, v

    def project_out(self, mixed: Tensor) -> Tensor:
        """What was read, heads side by side, ``[..., dim]``, to ``[..., dim]``, with its update."""
        return self.add_delta("o", mixed, self.out_proj(mixed))

    def project_apart(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`project_in` where query, key and value come from different tokens."""
        inputs, weights = (query, key, value), (self.in_proj_weight, self.in_proj_bias)
        q, k, v = map(self.add_delta, ("q", "k", "v"), inputs, project_by_thirds(inputs, *weights))
        return q, k, v

    def extra_repr(self) -> str:
        sizes = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, matrices={''.join(self.deltas)}"
        return f"{sizes}, {self._repr_of_updates()}"


def _linear(weight: Any, bias: Any) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")  # where nothing is drawn
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


def _sizes(weight: Tensor, bias: Tensor | None) -> str:
    rows, columns = weight.shape
    return f"in_features={columns}, out_features={rows}, bias={bias is not None}"
