"""Low-rank adaptation of the blocks of a tower, computed beside the frozen weights and never through them.

``in_proj_weight`` of ``nn.MultiheadAttention`` is one fused matrix. Adding to it before the product would give a
gradient of its full shape, so the attention is replaced by one of the same parameter names that computes
``x W + s (dropout(x) A) B`` for each of its matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from czsl_heads._checks import check_choice, check_integer, check_positive, check_range
from czsl_heads.encoders.protocol import Encoder, Tower, check_encoder

Matrix = Literal["q", "k", "v", "o", "fc", "proj"]
ATTENTION: tuple[Matrix, ...] = ("q", "k", "v", "o")
MLP: dict[str, str] = {"fc": "c_fc", "proj": "c_proj"}


def add_lora(
    encoder: Encoder,
    *,
    matrices: Sequence[Matrix] = ("q", "k", "v"),
    rank: int = 4,
    alpha: float | None = None,
    dropout: float = 0.0,
    layers: int | Sequence[int] | None = None,
    tower: Tower = "vision",
) -> list[LoRAAttention | LoRALinear]:
    """Put low-rank adapters into the blocks of a tower, in place; the model is unchanged until they are trained.

    Args:
        encoder: A wrapped CLIP with open_clip's residual blocks.
        matrices: Which weights: ``q k v o`` of the attention, ``fc proj`` of the MLP.
        rank: Of each update, at least 1.
        alpha: The update is scaled by ``alpha / rank``, positive; default: ``rank``, which scales by 1.
        dropout: On the input of the update, in training.
        layers: The last so many blocks, or their indices (negative ones count from the end); default: all.
        tower: ``"vision"`` or ``"text"``.

    Returns:
        The new modules. Their weights of the base model keep names and ``requires_grad``; the low-rank ones train.

    Raises:
        ValueError: An option is unknown, empty or out of range, or a block is adapted already.
        TypeError: ``encoder`` is no Encoder, an option has another type, or a block is of another kind than
            open_clip's ``ResidualAttentionBlock``.

    Example:
        >>> from czsl_heads import wrap
        >>> encoder = wrap("tiny")
        >>> adapted = add_lora(encoder, matrices=("q", "v"), rank=2, layers=1)
        >>> sum(p.numel() for p in encoder.parameters() if p.requires_grad)
        1024

    References:
        Hu et al., LoRA, ICLR 2022. Zanella and Ben Ayed, CLIP-LoRA, CVPR workshops 2024 (q, k, v; rank 2). SAC tunes
        the vision tower with it; the paper states neither rank nor matrices.
    """
    check_encoder("encoder", encoder)
    if isinstance(matrices, str):
        raise TypeError(f"expected `matrices` to be a sequence of names, got the string {matrices!r}")
    matrices = tuple(matrices)
    if not matrices:
        raise ValueError("expected `matrices` to name at least one, got none")
    for matrix in matrices:
        check_choice("matrices", matrix, (*ATTENTION, *MLP))
    check_integer("rank", rank, 1)
    if alpha is not None:
        check_positive("alpha", alpha)
    check_range("dropout", dropout, 0, 1)
    blocks = encoder.blocks(tower)
    chosen: list[Any] = [blocks[index] for index in _layer_indices(layers, len(blocks))]
    for block in chosen:
        _check_block(block, tower)

    delta: dict[str, Any] = {"rank": rank, "scale": (rank if alpha is None else alpha) / rank, "dropout": dropout}
    added: list[LoRAAttention | LoRALinear] = []
    for block in chosen:
        attention = [matrix for matrix in ATTENTION if matrix in matrices]
        if attention:
            block.attn = LoRAAttention(block.attn, attention, **delta)
            added.append(block.attn)
        for matrix in (matrix for matrix in MLP if matrix in matrices):
            adapted = LoRALinear(getattr(block.mlp, MLP[matrix]), **delta)
            setattr(block.mlp, MLP[matrix], adapted)
            added.append(adapted)
    return added


def _layer_indices(layers: int | Sequence[int] | None, depth: int) -> list[int]:
    if layers is None:
        return list(range(depth))
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        check_integer("layers", layers, 1, depth)
        return list(range(depth - layers, depth))
    layers = list(layers)
    for index in layers:
        check_integer("layers", index, -depth, depth - 1)
    indices = sorted({index % depth for index in layers})
    if not indices:
        raise ValueError("expected `layers` to name at least one block, got none")
    return indices


def _check_block(block: Any, tower: str) -> None:
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    parts = [getattr(mlp, name, None) for name in MLP.values()]
    if isinstance(attention, LoRAAttention) or any(isinstance(part, LoRALinear) for part in parts):
        raise ValueError(f"expected a {tower} tower without LoRA, got one that is adapted already")
    if not isinstance(attention, nn.MultiheadAttention) or None in parts:
        raise TypeError(
            f"expected blocks with nn.MultiheadAttention and an MLP of c_fc, c_proj, got {type(block).__name__}"
        )
    if attention.in_proj_weight is None or attention.bias_k is not None:
        raise TypeError("expected an attention with one fused in_proj_weight and no bias_k, got another layout")


class _Delta(nn.Module):
    """``x`` to ``scale * (dropout(x) A) B``; ``B`` starts at zero."""

    def __init__(self, weight: Tensor, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.empty(rank, columns, dtype=weight.dtype, device=weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype, device=weight.device))
        self.scale, self.dropout = scale, dropout
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = F.dropout(inputs, self.dropout, self.training)
        return self.scale * F.linear(F.linear(inputs, self.a), self.b)

    def matrix(self) -> Tensor:
        return self.scale * (self.b @ self.a)


class _Mergeable(nn.Module):
    """Weights that the updates can be folded into, for inference, and taken out of again to the bit.

    Merged updates would get no gradient: a forward pass in training mode then raises ValueError. While merged, a state
    dict still holds the weights before merging, so that checkpoints mean one thing.
    """

    deltas: nn.ModuleDict
    _unmerged: dict[str, Tensor]

    def _targets(self) -> dict[str, tuple[str, Tensor, Tensor]]:
        """For each update: the name of its weight, the weight, and the rows of it that the update changes."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        return bool(self._unmerged)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the updates into the weights: the forward pass then costs what the base model's does."""
        if not self.merged:
            targets = self._targets()
            self._unmerged = {name: weight.detach().clone() for name, weight, _ in targets.values()}
            for matrix, (_, _, rows) in targets.items():
                rows += self._delta(matrix).matrix()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weights as they were before :meth:`merge`, bit for bit."""
        for name, weight, _ in self._targets().values():
            if name in self._unmerged:
                weight.copy_(self._unmerged[name])
        self._unmerged = {}

    def _delta(self, matrix: str) -> _Delta:
        delta = self.deltas[matrix]
        assert isinstance(delta, _Delta)
        return delta

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


class LoRALinear(_Mergeable):
    """A linear layer with a low-rank update beside it; ``weight`` and ``bias`` are the base layer's own."""

    def __init__(self, base: nn.Linear, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.weight, self.bias, self._unmerged = base.weight, base.bias, {}
        self.deltas = nn.ModuleDict({"w": _Delta(base.weight, rank=rank, scale=scale, dropout=dropout)})
        self.train(base.training)

    def _targets(self) -> dict[str, tuple[str, Tensor, Tensor]]:
        return {"w": ("weight", self.weight, self.weight)}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.add_delta("w", inputs, F.linear(inputs, self.weight, self.bias))


class LoRAAttention(_Mergeable):
    """``nn.MultiheadAttention`` with low-rank updates beside q, k, v or the output projection.

    Takes over the parameters of the base module under their own names, and its call as open_clip makes it. With
    ``need_weights`` it also returns how much each position reads of each other one: ``[batch, length, length]``, the
    mean over heads, or ``[batch, heads, length, length]`` without ``average_attn_weights``; before dropout.
    """

    def __init__(
        self, base: nn.MultiheadAttention, matrices: Sequence[Matrix], *, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias, self.out_proj = base.in_proj_weight, base.in_proj_bias, base.out_proj
        self.embed_dim, self.num_heads, self.batch_first = base.embed_dim, base.num_heads, base.batch_first
        self.attention_dropout, self._unmerged = base.dropout, {}
        square = base.out_proj.weight
        self.deltas = nn.ModuleDict(
            {matrix: _Delta(square, rank=rank, scale=scale, dropout=dropout) for matrix in matrices}
        )
        self.train(base.training)

    def _targets(self) -> dict[str, tuple[str, Tensor, Tensor]]:
        dim = self.embed_dim
        fused = {matrix: self.in_proj_weight[i * dim : (i + 1) * dim] for i, matrix in enumerate(("q", "k", "v"))}
        targets: dict[str, tuple[str, Tensor, Tensor]] = {
            matrix: ("in_proj_weight", self.in_proj_weight, rows) for matrix, rows in fused.items()
        }
        targets["o"] = ("out_proj.weight", self.out_proj.weight, self.out_proj.weight)
        return {matrix: target for matrix, target in targets.items() if matrix in self.deltas}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        same = key is query and value is query  # which the views below would hide
        if not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        if same:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights, biases = self.in_proj_weight.chunk(3), self._bias_chunks()
            projected = tuple(map(F.linear, (query, key, value), weights, biases))
        q, k, v = (
            self.add_delta(matrix, inputs, outputs).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for matrix, inputs, outputs in zip(("q", "k", "v"), (query, key, value), projected)
        )  # each [batch, heads, length, dim / heads]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # nn.MultiheadAttention hides where it is true, this function where it is false
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        mixed = mixed.transpose(1, 2).flatten(2)
        out = self.add_delta("o", mixed, self.out_proj(mixed))
        out = out if self.batch_first else out.transpose(0, 1)
        if not need_weights:
            return out, None
        shares = _attention_weights(q, k, attn_mask)
        return out, shares.mean(dim=1) if average_attn_weights else shares

    def _bias_chunks(self) -> tuple[Tensor | None, ...]:
        return (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)


def _attention_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """What the fused attention weighs its values by, before dropout: ``[batch, heads, length, length]``."""
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1)
