"""Soft prompts for whatever pairs are asked for."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from czsl_heads import CompositionSpace
from czsl_heads._checks import check_choice, check_kind, check_shapes, check_tensor
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.prompts.soft import Encode, SoftPrompts, TextFeatures

Span = Literal["pairs", "all"]


class PairPrompts(SoftPrompts):
    """:class:`~czsl_heads.prompts.soft.SoftPrompts` for pairs given as indices, in any number and order, with repeats.

    Args:
        encoder, space, context, dropout, encode, checkpoint: As there.
        primitives: The table to start from ``[A + O, text_dim]``, attributes first; default: of each cleaned name, the
            mean of its token embeddings. With a table, names need not fit the context.
        span: ``"pairs"``: prompts of pairs alone; ``"all"``: of single attributes and objects too.
        dropout_at_evaluation: Drop out in eval mode too, as code that encodes before it switches modes.

    Shape:
        ``prompts.texts(pairs)``, pairs [K, 2] long, to :class:`~czsl_heads.prompts.soft.TextFeatures`, unit rows; with
        ``span="pairs"`` the features of primitives are empty.

    Raises:
        TypeError, ValueError: An argument is of another kind or shape, or pairs name no primitives of ``space``.

    Example:
        >>> from czsl_heads import wrap
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")])
        >>> PairPrompts(wrap("tiny"), space).texts(torch.tensor([[1, 0], [1, 0]])).pairs.shape
        torch.Size([2, 96])
    """

    def __init__(
        self,
        encoder: Encoder,
        space: CompositionSpace,
        *,
        context: str = "a photo of",
        primitives: Tensor | None = None,
        dropout: float = 0.0,
        encode: Encode = "auto",
        checkpoint: bool = False,
        span: Span = "pairs",
        dropout_at_evaluation: bool = False,
    ) -> None:
        check_kind("space", space, CompositionSpace)
        check_choice("span", span, ("pairs", "all"))
        check_kind("dropout_at_evaluation", dropout_at_evaluation, bool)
        named = space if primitives is None else CompositionSpace(["x"], ["x"], seen=[(0, 0)])
        super().__init__(encoder, named, context=context, dropout=dropout, encode=encode, checkpoint=checkpoint)
        self.attributes, self.objects = space.attributes, space.objects
        if primitives is not None:
            check_tensor("primitives", primitives)
            rows = len(self.attributes) + len(self.objects)
            check_shapes(primitives=(primitives, f"{rows} {encoder.text_dim}"))
            self.primitives = nn.Parameter(primitives.detach().clone())
        self.span, self.dropout_at_evaluation = span, dropout_at_evaluation
        if span == "pairs":
            del self.attribute_context, self.object_context

    def forward(self, space: CompositionSpace) -> TextFeatures:
        """:meth:`texts` of the pairs of a space with the same primitives."""
        self._check_space(space)
        return self.texts(space.pairs)

    def texts(self, pairs: Tensor) -> TextFeatures:
        """Encode these pairs; one dropout mask on the table for all prompts of the call."""
        check_pairs(pairs, len(self.attributes), len(self.objects))
        table = F.dropout(self.primitives, self.dropout, self.training or self.dropout_at_evaluation)
        attributes, objects = table.split([len(self.attributes), len(self.objects)])
        if self.span == "pairs":
            (of_pairs,) = self.encode_kinds([self.pair_context], [(attributes, objects)], [pairs.to(table.device)])
            return TextFeatures(of_pairs, of_pairs[:0], of_pairs[:0])
        contexts = self.pair_context, self.attribute_context, self.object_context
        every = (torch.arange(len(rows), device=rows.device)[:, None] for rows in (attributes, objects))
        tables = (attributes, objects), (attributes,), (objects,)
        return TextFeatures(*self.encode_kinds(contexts, tables, [pairs.to(table.device), *every]))


def check_pairs(pairs: Tensor, num_attributes: int, num_objects: int) -> None:
    """Raise TypeError or ValueError unless ``pairs`` is ``[K, 2]``, long, of indices of primitives, and not empty."""
    check_tensor("pairs", pairs, dtypes=(torch.long,))
    if not check_shapes(pairs=(pairs, "pairs 2"))["pairs"]:
        raise ValueError("expected `pairs` with at least one row, got none")
    limits = torch.tensor([num_attributes, num_objects], device=pairs.device)
    wrong = ((pairs < 0) | (pairs >= limits)).any(dim=1)
    if wrong.any():
        first = tuple(pairs[wrong][0].tolist())
        raise ValueError(f"expected `pairs` of indices below {num_attributes, num_objects}, got {first}")
