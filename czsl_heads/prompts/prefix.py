"""Prompts that begin alike, encoded together: under a causal mask, what stands in front is computed once.

The prompts form a tree. Its root is the front, [SOS] and the context. Pair prompts branch into attributes, and all end
in leaves of a word and its [EOS]. Layer norms, projections and the MLP act on each token by itself, and an adapter says
whether it does, too. So a branch runs through the tower alone. Only attention also reads the keys and values of the
branches that lead to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from czsl_heads.encoders.blocks import BlockParts, Heads, cannot_run_in_parts, has_hooks, mixing_layer
from czsl_heads.encoders.protocol import Encoder, OpenTextTower
from czsl_heads.functional.precision import score_dtype


class _Read(NamedTuple):
    """What attention reads of one branch each: ``[n, length, heads, dim]``; ``n=1`` serves all queries."""

    key: Tensor
    value: Tensor

    def at(self, index: Tensor) -> _Read:
        return _Read(self.key.index_select(0, index), self.value.index_select(0, index))


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
    roots = []
    for place, front in enumerate(fronts):
        own = slice(place, place + 1)  # one row, which all prompts of the kind will read
        roots.append(Root([_Read(read.key[own], read.value[own]) for read in reads], len(front)))
    return roots


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
    past = [*zip(root.reads, *branches)]  # of each block, what leaves read there
    start = root.length + len(stems)

    # What attention projects in the first block depends on a word alone, and not on the stem before it.
    word_inputs = encoder.enter_text_blocks(words[:, None], start)
    end_inputs = encoder.enter_text_blocks(end[None], start + 1)
    word_heads, end_heads = (_project(blocks[0], inputs) for inputs in (word_inputs, end_inputs))

    def encode(prompts: Tensor) -> Tensor:
        *stem, word = prompts.unbind(dim=1)
        hidden = _leaves(word_inputs, end_inputs, word)
        heads = Heads(*(_leaves(*pair, word) for pair in zip(word_heads, end_heads)))
        for layer, (block, (first, *reads)) in enumerate(zip(blocks, past), start=1):
            if layer > 1:
                heads = _project(block, hidden)
            before = [first, *(read.at(rows) for read, rows in zip(reads, stem))]
            hidden = _step(block, hidden, heads, before, positions=1 if layer == len(past) else 2)
        features: Tensor = encoder.leave_text_blocks(hidden[:, -1])
        return features

    return encode


def _leaves(of_words: Tensor, of_end: Tensor, word: Tensor) -> Tensor:
    """The word of each prompt and then [EOS]: ``[words, 1, ...]`` and ``[1, 1, ...]`` to ``[prompts, 2, ...]``."""
    end = of_end.expand(len(word), *of_end.shape[1:])
    return torch.cat([of_words.index_select(0, word), end], dim=1)


def obstacle(encoder: Encoder) -> str | None:
    """Why the prompts of an encoder must each be run whole; None if they can be run from a shared prefix."""
    if not encoder.causal_text:
        return "a text tower that is not causal"
    if not isinstance(encoder, OpenTextTower):
        return f"{type(encoder).__name__}, whose text blocks cannot be run from outside"
    return next(filter(None, map(_block_obstacle, encoder.blocks("text"))), None)


def _block_obstacle(block: Any) -> str | None:
    if reason := cannot_run_in_parts(block):
        return f"text {reason}"
    if layer := mixing_layer(block):
        return f"text blocks with a layer that may read several tokens at once ({type(layer).__name__})"
    if has_hooks(block) or has_hooks(BlockParts(block).attention):
        return "hooks on a text block or its attention, which would not run"
    return None


def _branch(blocks: nn.ModuleList, hidden: Tensor, past: list[list[_Read]]) -> list[_Read]:
    """Run branches ``[n, length, text_dim]`` and return what others may read of them in each block."""
    reads = []
    for layer, (block, before) in enumerate(zip(blocks, past), start=1):
        heads = _project(block, hidden)
        reads.append(_Read(heads.key, heads.value))
        if layer < len(blocks):  # what comes out of the last block is read by nobody
            hidden = _step(block, hidden, heads, before, positions=hidden.shape[1])
    return reads


def _step(block: Any, hidden: Tensor, heads: Heads, before: list[_Read], *, positions: int) -> Tensor:
    """One block; only the last ``positions`` come out, of which alone more than the keys and values is computed."""
    parts, first = BlockParts(block), hidden.shape[1] - positions
    query, own = heads.query[:, first:], _Read(heads.key, heads.value)
    hidden = hidden[:, first:]
    attended = parts.project_out(_attend(parts, query, [*before, own]))
    return parts.add_mlp(parts.add("attention", hidden, attended))


def _project(block: Any, hidden: Tensor) -> Heads:
    parts = BlockParts(block)
    return parts.heads(parts.norm("attention", hidden))


def _attend(parts: BlockParts, query: Tensor, reads: list[_Read]) -> Tensor:
    """Each query of the last positions reads all branches before its own, and its own up to itself.

    Returns:
        ``[n, queries, heads, dim]``.
    """
    *before, own = (_products(query, read.key) for read in reads)
    length = own.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=own.device).triu(1)
    own = own.masked_fill(later[length - query.shape[1] :, None], -torch.inf)

    # [n, queries, heads, keys]
    logits = torch.cat([*before, own], dim=-1) * query.shape[-1] ** -0.5
    shares = logits.softmax(dim=-1, dtype=score_dtype(logits)).to(query.dtype)
    shares = F.dropout(shares, parts.dropout)

    of_each = shares.split([read.key.shape[1] for read in reads], dim=-1)
    return reduce(torch.add, map(_weighted, of_each, (read.value for read in reads)))


def _products(query: Tensor, key: Tensor) -> Tensor:
    """``[n, queries, heads, dim]`` and ``[n or 1, keys, heads, dim]`` to ``[n, queries, heads, keys]``."""
    if len(key) == 1:
        logits: Tensor = einsum(query, key[0], "n queries heads dim, keys heads dim -> n queries heads keys")
        return logits
    return (query.unsqueeze(3) * key.transpose(1, 2).unsqueeze(1)).sum(dim=-1)


def _weighted(shares: Tensor, value: Tensor) -> Tensor:
    """``[n, queries, heads, keys]`` and ``[n or 1, keys, heads, dim]`` to ``[n, queries, heads, dim]``."""
    if len(value) == 1:
        mixed: Tensor = einsum(shares, value[0], "n queries heads keys, keys heads dim -> n queries heads dim")
        return mixed
    return (shares.unsqueeze(-1) * value.transpose(1, 2).unsqueeze(1)).sum(dim=3)
