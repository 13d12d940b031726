"""Texts that stand in the rows of a memory behind its images, and leave as these fill the rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from czsl_heads.functional.bank import arrival_ranks
from czsl_heads.functional.precision import score_dtype
from czsl_heads.functional.retrieval import PairTexts
from czsl_heads.functional.unit import unit_rows


class TextRows(NamedTuple):
    """Texts of rows, one row for each pair. Most often there is one each, in order: then nothing is looked up.

    Attributes:
        vectors: Of unit length ``[texts, dim]``.
        pair: Row of each, long ``[texts]``.
        rank: Which text of its row it is, counted from 0, long ``[texts]``.
        first: The first text of each row, long ``[num_pairs]``, -1 for none; empty if that is the order they are in.
        extra: The texts that are not the first of their rows, long.

    Example:
        >>> texts = TextRows.of(torch.eye(2), torch.tensor([1, 1]), torch.tensor([0, 1]), num_pairs=2)
        >>> texts.first, texts.extra
        (tensor([-1,  0]), tensor([1]))
        >>> texts.stay(images=torch.tensor([0, 1]), slots=2)  # an image in row 1 leaves room for one text
        tensor([ True, False])
    """

    vectors: Tensor
    pair: Tensor
    rank: Tensor
    first: Tensor
    extra: Tensor

    @classmethod
    def of(cls, vectors: Tensor, pair: Tensor, rank: Tensor, *, num_pairs: int) -> TextRows:
        """Find each row's first text."""
        none = pair.new_zeros(0)
        if pair.is_meta:  # has no values to look at
            return cls(vectors, pair, rank, none, none)

        is_first = rank == 0
        extra = (~is_first).nonzero().squeeze(1)
        every = torch.arange(num_pairs, device=pair.device)
        if len(vectors) == 0 or torch.equal(pair, every):
            return cls(vectors, pair, rank, none, extra)
        place = torch.arange(len(vectors), device=pair.device)
        first = torch.full_like(every, -1).scatter(0, pair[is_first], place[is_first])
        return cls(vectors, pair, rank, first, extra)

    def add(self, vectors: Tensor, pair: Tensor, *, num_pairs: int, slots: int) -> TextRows:
        """With more texts ``[n, dim]`` behind those of the same rows; ``num_pairs`` marks what is not to be stored."""
        if len(self.vectors) > 0:
            vectors, pair = torch.cat([self.vectors, vectors]), torch.cat([self.pair, pair])
        rank = arrival_ranks(pair)

        kept = (rank < slots) & (pair < num_pairs)
        if not kept.all():
            vectors, pair, rank = vectors[kept], pair[kept], rank[kept]
        return TextRows.of(vectors, pair, rank, num_pairs=num_pairs)

    def stay(self, images: Tensor, slots: int) -> Tensor:
        """Which have room in rows with so many ``images`` [num_pairs]: bool ``[texts]``."""
        return images[self.pair] + self.rank < slots

    def entries(self, images: Tensor, *, num_pairs: int, slots: int) -> tuple[list[tuple[Tensor, Tensor]], PairTexts]:
        """As :func:`~czsl_heads.functional.retrieval.retrieve` takes them: the extra ones, and the first of each row.

        Args:
            images: How many images stand in each row ``[num_pairs]``, and in any case ``[num_pairs + 1]``.
            num_pairs: How many rows there are.
            slots: How many entries a row holds.
        """
        firsts = PairTexts(self.vectors, self.first if len(self.first) > 0 else None)
        if len(self.extra) == 0:
            return [], firsts
        pair, rank = self.pair[self.extra], self.rank[self.extra]
        displaced = images[pair] + rank >= slots
        return [(self.vectors[self.extra], pair.masked_fill(displaced, num_pairs))], firsts


def unit_texts(texts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of length one, and which have a direction; rows that are so already are not copied.

    Args:
        texts: ``[n, dim]``.
        dtype: Of the result.
    """
    length = torch.linalg.vector_norm(texts, dim=1, dtype=score_dtype(texts))
    directed = (length - 1).abs() <= 8 * torch.finfo(texts.dtype).eps
    if texts.dtype != dtype or not directed.all():
        rows, directed = unit_rows(texts)
        texts = rows.to(dtype)
    # An inference tensor could be part of no backward pass.
    return (texts.clone() if texts.is_inference() else texts.detach()).contiguous(), directed
