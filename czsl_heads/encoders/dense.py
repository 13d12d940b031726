r"""Patch tokens that keep to their place: another last block for the patches, without any training.

The last block of a CLIP was trained for what it gives to the image feature; its patches hold little that is local.
The recipes below let each patch read others by another attention in that one block. With normed tokens :math:`z`,
queries, keys and values :math:`q, k, v` of each head as the block compares them, :math:`s` one over the root of their
size, and the output projection :math:`W_o`:

* ``"value"``: :math:`W_o v`; each token reads itself alone. No residual, no MLP.
* ``"sclip"``: :math:`W_o (\mathrm{softmax}(s\,q q^T) + \mathrm{softmax}(s\,k k^T)) v`, a sum and no mean. Residual
  and MLP as the block has them.
* ``"clearclip"``: :math:`W_o\,\mathrm{softmax}(s\,q q^T) v`. No residual, no MLP.
* ``"naclip"``: :math:`W_o\,\mathrm{softmax}(s\,k k^T + G) v` with
  :math:`G_{ij} = \exp(-|i - j|^2 / 2\sigma^2)` over the grid, :math:`\sigma = 5`, and zero wherever a token of the
  prefix is concerned. No residual, no MLP.

What else the block has there stays: layer scale, normalised or turned queries and keys, gates, adapters in what is run.
Adapters beside the attention read the stream and go with the residual. Patches then teach nothing to what they do not
read: ``"value"`` leaves out queries and keys, ``"clearclip"`` keys, ``"naclip"`` queries, and all three the MLP. Where
there is no residual, stochastic depth is left out, which would leave nothing.

References:
    Zhou, Loy and Dai, Extract free dense labels from CLIP, ECCV 2022 (MaskCLIP: ``"value"``). Wang, Mei and Yuille,
    SCLIP, ECCV 2024. Lan et al., ClearCLIP, ECCV 2024. Hajimiri, Ben Ayed and Dolz, Pay attention to your neighbours
    (NACLIP), WACV 2025.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from czsl_heads.encoders.blocks import BlockParts, Heads, cannot_run_in_parts

Dense = Literal["none", "value", "sclip", "clearclip", "naclip"]
SIGMA = 5.0  # of NACLIP's neighbourhood, in patches


class BothWays:
    """The last block as it is and, beside it, as a recipe has it; called as the container calls the block.

    Args:
        block: The last block of a vision tower.
        dense: One of the recipes.
        grid: Rows and columns of patches.
        num_prefix: Tokens before the patches.

    Shape:
        [batch, tokens, width] to [2 batch, tokens, width]: first what the block gives, then what the recipe gives.

    Raises:
        TypeError: The block is of an unknown kind.
        ValueError: ``"naclip"``, and some patches have been dropped.
    """

    def __init__(self, block: nn.Module, dense: Dense, grid: tuple[int, int], num_prefix: int) -> None:
        check_block(block, dense)
        self.block, self.dense, self.grid, self.num_prefix = block, dense, grid, num_prefix

    def __call__(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        seen: list[Tensor] = []
        handle = None
        if self.block._forward_pre_hooks:  # which may change, or drop, what the block gets
            handle = self.block.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            out: Any = self.block(hidden, *arguments, **options)
        finally:
            if handle is not None:
                handle.remove()
        hidden = seen[0] if seen else hidden
        plain: Tensor = out[0] if isinstance(out, tuple) else out  # a tuple in transformers 4
        if BlockParts(self.block).batch_first:
            return torch.cat([plain, self._dense(hidden, options.get("rope"))])
        dense = self._dense(hidden.transpose(0, 1), None)
        return torch.cat([plain, dense.transpose(0, 1)], dim=1)

    def _dense(self, hidden: Tensor, rope: Tensor | None) -> Tensor:
        parts = BlockParts(self.block)
        normed = parts.norm("attention", hidden)
        heads = parts.heads(normed, rope)
        attended = parts.project_out(self._mix(heads, parts.dropout), normed)
        if self.dense == "sclip":
            return parts.add_mlp(parts.add("attention", hidden, attended))
        return parts.scale("attention", attended)

    def _mix(self, heads: Heads, dropout: float) -> Tensor:
        """What each token reads, ``[batch, tokens, heads, head_dim]``."""
        if self.dense == "value":
            return heads.value
        query, key, value = (part.transpose(1, 2) for part in heads)
        if self.dense == "sclip":
            mixed = _read(query, value, dropout) + _read(key, value, dropout)
        elif self.dense == "clearclip":
            mixed = _read(query, value, dropout)
        else:
            mixed = _read(key, value, dropout, self._neighbours(key))
        return mixed.transpose(1, 2)

    def _neighbours(self, key: Tensor) -> Tensor:
        """What is added to the logits of keys ``[batch, heads, tokens, head_dim]``: ``[tokens, tokens]``."""
        rows, columns = self.grid
        prefix, patches = self.num_prefix, key.shape[2] - self.num_prefix
        if patches != rows * columns:
            raise ValueError(
                f'expected all {rows * columns} patches with dense="naclip", whose shares follow their places, got '
                f"{patches}; drop none, or take another recipe"
            )
        return F.pad(neighbourhood(self.grid, device=key.device), (prefix, 0, prefix, 0)).to(key.dtype)


def neighbourhood(grid: tuple[int, int], sigma: float = SIGMA, *, device: torch.device | None = None) -> Tensor:
    """NACLIP's :math:`G`, how near patches are: ``[patches, patches]``, one on the diagonal."""
    rows, columns = (torch.arange(size, dtype=torch.float32, device=device) for size in grid)
    places = torch.cartesian_prod(rows, columns)  # [patches, 2]
    distances = (places[:, None] - places).square().sum(dim=2)
    return (-distances / (2 * sigma**2)).exp()


def check_block(block: nn.Module, dense: Dense) -> None:
    """Raise TypeError if the last block of a tower is not known well enough for a recipe."""
    if reason := cannot_run_in_parts(block):
        raise TypeError(f'expected a vision tower of known blocks with dense="{dense}", got {reason}')


def _read(compared: Tensor, value: Tensor, dropout: float, added: Tensor | None = None) -> Tensor:
    """Values, weighed by how alike tokens are in what is compared; all ``[batch, heads, tokens, head_dim]``."""
    return F.scaled_dot_product_attention(compared, compared, value, attn_mask=added, dropout_p=dropout)
