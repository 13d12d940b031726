"""Bottleneck adapters beside both halves of every block of a tower, fed with the residual stream itself."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from czsl_heads._checks import check_integer, check_positive, check_range
from czsl_heads.encoders.blocks import has_hooks
from czsl_heads.encoders.protocol import Encoder, Tower, check_encoder
from czsl_heads.functional.precision import score_dtype

_PARTS = ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2")


class Bottleneck(nn.Module):
    r"""What an adapter adds to a residual stream: :math:`s \, W_{up} \, \mathrm{dropout}(\mathrm{relu}(W_{down} x))`.

    Args:
        width: Of the stream.
        dim: Of the bottleneck.
        scale: The fixed factor :math:`s`.
        dropout: Inside the bottleneck, in training.
        device, dtype: Of the parameters, as torch's own layers take them.

    Shape:
        [..., width] to [..., width]; zeros at the start, since ``up_proj`` starts at zero.

    Raises:
        TypeError, ValueError: A size is no positive integer, the scale not positive, or the dropout not in [0, 1].

    Example:
        >>> adapter = Bottleneck(96, 8)
        >>> tuple(adapter(torch.ones(2, 5, 96)).shape), adapter(torch.ones(96)).any().item()
        ((2, 5, 96), False)

    References:
        Chen et al., AdaptFormer, NeurIPS 2022.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        *,
        scale: float = 0.1,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("width", width, 1)
        check_integer("dim", dim, 1)
        check_positive("scale", scale)
        check_range("dropout", dropout, 0, 1)
        self.scale, self.dropout = scale, dropout
        self.down_proj = nn.Linear(width, dim, device=device, dtype=dtype)
        self.up_proj = nn.Linear(dim, width, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the lower half anew, and set all else to zero."""
        nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
        for zero in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(zero)

    def forward(self, stream: Tensor) -> Tensor:
        """Stream ``[..., width]`` to what is added to it, ``[..., width]``."""
        wide = stream.to(self.down_proj.weight.dtype)
        hidden = F.dropout(F.relu(self.down_proj(wide)), self.dropout, self.training)
        added: Tensor = self.up_proj(hidden) * self.scale
        return added.to(stream.dtype)


class AdaptedBlock(nn.Module):
    """A residual block of open_clip, its parts under their own names, with an adapter beside attention and MLP."""

    ln_1: nn.Module
    attn: nn.Module
    ls_1: nn.Module
    ln_2: nn.Module
    mlp: Any
    ls_2: nn.Module

    def __init__(self, block: Any, attn_adapter: Bottleneck, mlp_adapter: Bottleneck) -> None:
        super().__init__()
        for name in _PARTS:
            setattr(self, name, getattr(block, name))
        self.attn_adapter = attn_adapter.train(block.training)
        self.mlp_adapter = mlp_adapter.train(block.training)
        self.training = block.training

    def get_weight_dtype(self) -> torch.dtype:
        """Of the block's weights; open_clip's towers ask for it."""
        dtype: torch.dtype = self.mlp.c_fc.weight.dtype
        return dtype

    def forward(self, q_x: Tensor, k_x: None = None, v_x: None = None, attn_mask: Tensor | None = None) -> Tensor:
        """Stream ``[batch, length, width]`` to ``[batch, length, width]``, called as open_clip calls its blocks."""
        normed = self.ln_1(q_x)
        mask = None if attn_mask is None else attn_mask.to(normed.dtype)
        attended = self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        stream = q_x + self.ls_1(attended) + self.attn_adapter(q_x)
        out: Tensor = stream + self.ls_2(self.mlp(self.ln_2(stream))) + self.mlp_adapter(stream)
        return out


def add_bottlenecks(
    encoder: Encoder, *, dim: int = 64, scale: float = 0.1, dropout: float = 0.0, tower: Tower = "vision"
) -> list[AdaptedBlock]:
    r"""Put two adapters into every block of a tower, in place; the model is unchanged until they are trained.

    With :math:`A` and :math:`B` the adapters of a block, which read the stream without its layer norm:

    .. math:: x \leftarrow x + \mathrm{attn}(\mathrm{ln}_1 x) + A(x), \quad
              x \leftarrow x + \mathrm{mlp}(\mathrm{ln}_2 x) + B(x)

    Args:
        encoder: A wrapped CLIP with open_clip's residual blocks.
        dim: Width of the bottleneck.
        scale: Fixed factor on what an adapter adds.
        dropout: Inside the bottleneck, in training.
        tower: ``"vision"`` or ``"text"``.

    Returns:
        The new blocks, first to last. Their weights of the base model keep names and ``requires_grad``; those of
        ``attn_adapter`` and ``mlp_adapter`` train.

    Raises:
        ValueError: An option is out of range, or the tower has such adapters already, or hooks, which would be lost.
        TypeError: ``encoder`` is no Encoder, or a block is of another kind than open_clip's ``ResidualAttentionBlock``.

    Example:
        >>> from czsl_heads import wrap
        >>> encoder = wrap("tiny")
        >>> blocks = add_bottlenecks(encoder, dim=8)
        >>> len(blocks), sum(p.numel() for p in encoder.parameters() if p.requires_grad)
        (4, 17472)

    References:
        Chen et al., AdaptFormer, NeurIPS 2022; beside both halves of a block in Huang et al., Troika, CVPR 2024.
    """
    check_encoder("encoder", encoder)
    blocks = encoder.blocks(tower)
    for block in blocks:
        _check_block(block, tower)
    for index, block in enumerate(blocks):
        weight: Tensor = block.ln_1.weight  # type: ignore[union-attr, assignment]
        options: dict[str, Any] = {"scale": scale, "dropout": dropout, "device": weight.device}
        options["dtype"] = score_dtype(weight)  # float32 beside half precision
        beside_attn = Bottleneck(len(weight), dim, **options)
        beside_mlp = Bottleneck(len(weight), dim, **options)
        blocks[index] = AdaptedBlock(block, beside_attn, beside_mlp)
    return list(blocks)  # type: ignore[arg-type]


def _check_block(block: Any, tower: Tower) -> None:
    from open_clip.transformer import ResidualAttentionBlock

    if isinstance(block, AdaptedBlock):
        raise ValueError(f"expected a {tower} tower without bottleneck adapters, got one that has them already")
    if type(block) is not ResidualAttentionBlock:
        raise TypeError(f"expected blocks of open_clip's ResidualAttentionBlock, got {type(block).__name__}")
    if has_hooks(block):
        raise ValueError(
            f"expected a {tower} tower without hooks on its blocks, which are replaced; add them afterwards"
        )
