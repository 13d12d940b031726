"""Prompts that begin alike, encoded together: under a causal mask, what stands in front is computed once.

The prompts form a tree. Its root is the front, [SOS] and the context; pair prompts branch into attributes, and all end
in leaves of a word and its [EOS]. Layer norms, projections, the MLP and adapters act on each token by itself, so a
branch runs through the tower alone; only attention also reads the keys and values of the branches that lead to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from czsl_heads.encoders.protocol import Encoder, OpenTextTower
from czsl_heads.functional.precision import score_dtype


class _Read(NamedTuple):
    """What attention reads of one branch each: ``[n, length, heads, dim]``; ``n=1`` serves all queries."""

    key: Tensor
    value: Tensor

    def at(self, index: Tensor) -> _Read:
        return _Read(self.key.index_select(0, index), self.value.index_select(0, index))


class _Parts(NamedTuple):
    """What attention projects of a branch, each ``[n, length, heads, dim]``."""

    query: Tensor
    key: Tensor
    value: Tensor


class Root(NamedTuple):
    """The front of prompts, as all that stands behind it reads it in each block, and its length."""

    reads: list[_Read]
    length: int


def encode_fronts(encoder: Any, fronts: list[Tensor]) -> list[Root]:
    """Run fronts ``[length, text_dim]`` of prompts, [SOS] and context; those of one length together.

    Args:
        encoder: One without :func:`obstacle`.
        fronts: Embeddings of each kind of prompts.
    """
    if len({len(front) for front in fronts}) > 1:
        return [root for front in fronts for root in encode_fronts(encoder, [front])]
    blocks = encoder.blocks("text")
    reads = _branch(blocks, encoder.enter_text_blocks(torch.stack(fronts)), [[] for _ in blocks])
    alone = (slice(place, place + 1) for place in range(len(fronts)))
    return [
        Root([_Read(*(part[own] for part in read)) for read in reads], len(front)) for own, front in zip(alone, fronts)
    ]


def prefix_encoding(encoder: Any, root: Root, tables: tuple[Tensor, ...], end: Tensor) -> Callable[[Tensor], Tensor]:
    """Run what the prompts "front word [EOS]" or "front stem word [EOS]" share, and return how to encode the rest.

    Args:
        encoder: One without :func:`obstacle`.
        root: Of :func:`encode_fronts`.
        tables: Embeddings of the words ``[n, text_dim]``; those of the stems before them, if there are any.
        end: Embedding of [EOS] ``[1, text_dim]``.

    Returns:
        A function from prompts, as rows of the tables ``[prompts, tables]``, to ``[prompts, dim]``; not normalised.
    """
    blocks = encoder.blocks("text")
    *stems, words = tables
    inner = [[read] for read in root.reads]
    branches = [_branch(blocks, encoder.enter_text_blocks(stem[:, None], root.length), inner) for stem in stems]
    past = [*zip(root.reads, *branches)]
    start = root.length + len(stems)
    # What attention projects in the first block depends on a word alone, and not on the stem before it.
    word_inputs = encoder.enter_text_blocks(words[:, None], start)
    end_inputs = encoder.enter_text_blocks(end[None], start + 1)
    word_parts, end_parts = (_project(blocks[0], inputs) for inputs in (word_inputs, end_inputs))

    def encode(prompts: Tensor) -> Tensor:
        *stem, word = prompts.unbind(dim=1)

        def leaves(of_words: Tensor, of_end: Tensor) -> Tensor:
            rest = of_end.expand(len(prompts), *of_end.shape[1:])
            return torch.cat([of_words.index_select(0, word), rest], dim=1)

        hidden = leaves(word_inputs, end_inputs)
        parts = _Parts(*map(leaves, word_parts, end_parts))
        for layer, (block, (first, *reads)) in enumerate(zip(blocks, past), start=1):
            before = [first, *(read.at(rows) for read, rows in zip(reads, stem))]
            parts = _project(block, hidden) if layer > 1 else parts
            hidden = _step(block, hidden, parts, before, positions=1 if layer == len(past) else 2)
        features: Tensor = encoder.leave_text_blocks(hidden[:, -1])
        return features

    return encode


def obstacle(encoder: Encoder) -> str | None:
    """Why the prompts of an encoder must each be run whole; None if they can be run from a shared prefix."""
    if not encoder.causal_text:
        return "a text tower that is not causal"
    if not isinstance(encoder, OpenTextTower):
        return f"{type(encoder).__name__}, whose text blocks cannot be run from outside"
    return next(filter(None, map(_block_obstacle, encoder.blocks("text"))), None)


def _block_obstacle(block: Any) -> str | None:
    from open_clip.transformer import ResidualAttentionBlock

    if type(block) is not ResidualAttentionBlock:
        return f"text blocks of kind {type(block).__name__}"
    if not (_is_plain(block.attn) or _is_adapted(block.attn)):
        return f"text blocks with an attention of another layout ({type(block.attn).__name__})"
    if any(_has_hooks(part) for part in (block, block.attn)):
        return "hooks on a text block or its attention, which would not run"
    return None


def _is_plain(attention: Any) -> bool:
    if type(attention) is not nn.MultiheadAttention or attention.in_proj_weight is None:
        return False
    return attention.bias_k is None and not attention.add_zero_attn


def _is_adapted(attention: Any) -> bool:
    """True of ``LoRAAttention``, which stands a layer above and is known by its parts."""
    return isinstance(getattr(attention, "deltas", None), nn.ModuleDict) and hasattr(attention, "attention_dropout")


def _has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, name) for name in names)


def _branch(blocks: nn.ModuleList, hidden: Tensor, past: list[list[_Read]]) -> list[_Read]:
    """Run branches ``[n, length, text_dim]`` and return what others may read of them in each block."""
    reads = []
    for layer, (block, before) in enumerate(zip(blocks, past), start=1):
        parts = _project(block, hidden)
        reads.append(_Read(parts.key, parts.value))
        if layer < len(blocks):  # what comes out of the last block is read by nobody
            hidden = _step(block, hidden, parts, before, positions=hidden.shape[1])
    return reads


def _step(block: Any, hidden: Tensor, parts: _Parts, before: list[_Read], *, positions: int) -> Tensor:
    """One block; only the last ``positions`` come out, of which alone more than the keys and values is computed."""
    first = hidden.shape[1] - positions
    hidden = hidden[:, first:]
    own = _Read(parts.key, parts.value)
    hidden = hidden + block.ls_1(_attend(block.attn, parts.query[:, first:], [*before, own]))
    hidden = hidden + block.ls_2(block.mlp(block.ln_2(hidden)))
    return hidden


def _project(block: Any, hidden: Tensor) -> _Parts:
    attention, hidden = block.attn, block.ln_1(hidden)
    parts = F.linear(hidden, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    return _Parts(
        *(
            _adapt(attention, name, hidden, part).unflatten(-1, (attention.num_heads, -1))
            for name, part in zip("qkv", parts)
        )
    )


def _adapt(attention: Any, matrix: str, inputs: Tensor, outputs: Tensor) -> Tensor:
    adapted: Tensor = attention.add_delta(matrix, inputs, outputs) if _is_adapted(attention) else outputs
    return adapted


def _attend(attention: Any, query: Tensor, reads: list[_Read]) -> Tensor:
    """Each query of the last positions reads all branches before its own, and its own up to itself."""
    *before, own = (_products(query, read.key) for read in reads)
    length = own.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=own.device).triu(1)[length - query.shape[1] :, None]
    logits = torch.cat([*before, own.masked_fill(later, -torch.inf)], dim=-1) * query.shape[-1] ** -0.5
    shares = logits.softmax(dim=-1, dtype=score_dtype(logits)).to(query.dtype)
    dropout = attention.attention_dropout if _is_adapted(attention) else attention.dropout
    shares = F.dropout(shares, dropout, attention.training)
    parts = shares.split([read.key.shape[1] for read in reads], dim=-1)
    mixed = reduce(torch.add, map(_weighted, parts, (read.value for read in reads))).flatten(2)
    return _adapt(attention, "o", mixed, attention.out_proj(mixed))


def _products(query: Tensor, key: Tensor) -> Tensor:
    """``[n, queries, heads, dim]`` and ``[n or 1, keys, heads, dim]`` to ``[n, queries, heads, keys]``."""
    if len(key) == 1:
        return torch.einsum("nqhd,khd->nqhk", query, key[0])
    return (query.unsqueeze(3) * key.transpose(1, 2).unsqueeze(1)).sum(dim=-1)


def _weighted(shares: Tensor, value: Tensor) -> Tensor:
    """``[n, queries, heads, keys]`` and ``[n or 1, keys, heads, dim]`` to ``[n, queries, heads, dim]``."""
    if len(value) == 1:
        return torch.einsum("nqhk,khd->nqhd", shares, value[0])
    return (shares.unsqueeze(-1) * value.transpose(1, 2).unsqueeze(1)).sum(dim=3)
