"""Soft prompts for pairs, attributes and objects, over one shared table of primitives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from czsl_heads._checks import check_choice, check_kind, check_range, check_shapes, check_tensor
from czsl_heads.encoders.protocol import Encoder, check_encoder
from czsl_heads.functional.precision import score_dtype
from czsl_heads.functional.unit import unit_vectors
from czsl_heads.prompts.prefix import encode_fronts, obstacle, prefix_encoding
from czsl_heads.space import CompositionSpace

Encode = Literal["auto", "prefix", "plain"]
Span = Literal["pairs", "all"]
_ROWS = 4096  # prompts encoded at once where nothing is kept for a backward pass
_CHECKPOINTED_ROWS = 1024  # and where their activations are there for a moment only


class TextFeatures(NamedTuple):
    """Unit text features: ``pairs`` [K, dim], ``attributes`` [A, dim], ``objects`` [O, dim].

    Where a method has no prompts of single primitives, the last two have no rows.
    """

    pairs: Tensor
    attributes: Tensor
    objects: Tensor


class SoftPrompts(nn.Module):
    """Learnable prompts "[context] attribute object", "[context] attribute" and "[context] object".

    Three contexts are learned apart, all starting from the words of ``context``; the primitives share one table, which
    starts from the mean of the token embeddings of each (cleaned) name. Positions behind [EOS] are not run. Contexts
    and table are float32 whatever the dtype of the text tower, into which they are cast.

    Args:
        encoder: A wrapped CLIP; it is used, not owned: its weights are no part of this module.
        space: Gives the primitives; the pairs to encode are chosen at each call.
        context: The words that all three contexts start from; may be empty.
        dropout: On the whole table, one mask for all prompts of a step, in training.
        encode: ``"prefix"`` runs what prompts begin with alike once: [SOS] and context, and in pair prompts each
            attribute; only object and [EOS] are run for each pair. It equals ``"plain"``, which runs every prompt by
            itself, up to rounding. ``"auto"`` is ``"prefix"`` where the text tower allows it, else ``"plain"``.
            Dropout inside the tower, in training, is then drawn once for what is shared: each prompt follows the same
            distribution, but prompts are no longer independent.
        checkpoint: Keep no activations of single prompts but run them again in the backward pass, part by part; with
            ``"prefix"`` also where the encoder's text tower is set to checkpoint.
        primitives: The table to start from ``[A + O, text_dim]``, attributes first; names then need not fit the
            context.
        span: ``"all"``, or ``"pairs"``: no prompts of single attributes and objects, and no contexts for them.
        dropout_at_evaluation: Drop out in eval mode too, as code that encodes before it switches modes.

    Shape:
        ``prompts(space)``, any space over the same primitives, or ``prompts.texts(pairs)``, long ``[K, 2]`` in any
        order and with repeats, to :class:`TextFeatures`, unit rows.

    Where a prefix is shared, all features have one graph: add their losses before ``backward()``.

    Raises:
        ValueError: An option is unknown or out of range, a prompt is longer than the tower's context, a cleaned name
            has no token, a space has other primitives, pairs name none of them, or ``encode="prefix"`` and the text
            tower is not causal, has blocks or layers that are not known (:mod:`czsl_heads.encoders.blocks`), or hooks
            on its blocks.
        TypeError: ``encoder`` is no Encoder, or a space no :class:`~czsl_heads.CompositionSpace`.

    Example:
        >>> from czsl_heads import CompositionSpace, wrap
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")])
        >>> prompts = SoftPrompts(wrap("tiny"), space)
        >>> prompts(space.open_world()).pairs.shape, prompts.texts(torch.tensor([[1, 0]])).pairs.shape
        (torch.Size([2, 96]), torch.Size([1, 96]))

    References:
        Nayak et al., CSP, ICLR 2023 (a learned table of primitives); Huang et al., Troika, CVPR 2024 (three contexts);
        Zhang et al., SAM, CVPR 2026 (SAC).
    """

    def __init__(
        self,
        encoder: Encoder,
        space: CompositionSpace,
        *,
        context: str = "a photo of",
        dropout: float = 0.0,
        encode: Encode = "auto",
        checkpoint: bool = False,
        primitives: Tensor | None = None,
        span: Span = "all",
        dropout_at_evaluation: bool = False,
    ) -> None:
        super().__init__()
        check_encoder("encoder", encoder)
        check_kind("space", space, CompositionSpace)
        check_kind("context", context, str)
        check_range("dropout", dropout, 0, 1)
        check_choice("encode", encode, ("auto", "prefix", "plain"))
        check_choice("span", span, ("pairs", "all"))
        for name, switch in (("checkpoint", checkpoint), ("dropout_at_evaluation", dropout_at_evaluation)):
            check_kind(name, switch, bool)
        self.dropout, self.encode, self.checkpoint = dropout, encode, checkpoint
        self.span, self.dropout_at_evaluation = span, dropout_at_evaluation
        self.attributes, self.objects = space.attributes, space.objects
        self._words = (*space.attribute_words, *space.object_words)
        self._encoder = (encoder,)  # in a tuple, or its weights would be registered here
        self._shares_prefix()
        with torch.no_grad():
            sentence, eos = encoder.embed_texts([context])
            if encoder.embed_texts([f"{context} x x"])[1] == eos:  # which needs room for a pair, too
                raise ValueError("expected `encoder` with a text tower pooled at [EOS], got one pooled elsewhere")
            table = self._first_table(encoder) if primitives is None else self._checked_table(primitives, encoder)
        start = _text_start(encoder)
        words = sentence[0, start : int(eos)].to(score_dtype(sentence))
        self.pair_context = nn.Parameter(words.clone())
        if span == "all":
            self.attribute_context = nn.Parameter(words.clone())
            self.object_context = nn.Parameter(words.clone())
        self.primitives = nn.Parameter(table.to(score_dtype(table)))
        # [SOS], if there is one; and [EOS] with the padding behind it, which a tower that is not causal sees too.
        self.register_buffer("_start", sentence[0, :start].clone(), persistent=False)
        self.register_buffer("_end", sentence[0, int(eos) :].clone(), persistent=False)

    def _first_table(self, encoder: Encoder) -> Tensor:
        return _mean_embeddings(encoder, list(self._words))

    def _checked_table(self, primitives: Tensor, encoder: Encoder) -> Tensor:
        rows = len(self.attributes) + len(self.objects)
        check_tensor("primitives", primitives)
        check_shapes(primitives=(primitives, f"{rows} {encoder.text_dim}"))
        return primitives.detach().clone()

    def forward(self, space: CompositionSpace) -> TextFeatures:
        """Encode the pairs of ``space`` and all its primitives."""
        self._check_space(space)
        return self.texts(space.pairs_on(self.primitives.device))

    def texts(self, pairs: Tensor) -> TextFeatures:
        """Encode these pairs ``[K, 2]`` and all primitives; one dropout mask on the table for all prompts of the call.

        Values of pairs are looked at on the CPU only: a GPU would be waited for.
        """
        check_pairs(pairs, len(self.attributes), len(self.objects))
        table = F.dropout(self.primitives, self.dropout, self.training or self.dropout_at_evaluation)
        attributes, objects = table.split([len(self.attributes), len(self.objects)])
        pairs = pairs.to(table.device)

        if self.span == "pairs":
            (of_pairs,) = self.encode_kinds([self.pair_context], [(attributes, objects)], [pairs])
            return TextFeatures(of_pairs, of_pairs[:0], of_pairs[:0])

        contexts = self.pair_context, self.attribute_context, self.object_context
        tables = (attributes, objects), (attributes,), (objects,)
        every = (torch.arange(len(rows), device=rows.device)[:, None] for rows in (attributes, objects))
        return TextFeatures(*self.encode_kinds(contexts, tables, [pairs, *every]))

    def _check_space(self, space: CompositionSpace) -> None:
        check_kind("space", space, CompositionSpace)
        if (space.attributes, space.objects) != (self.attributes, self.objects):
            raise ValueError("expected `space` over the primitives that these prompts were made for, got others")

    def encode_kinds(
        self, contexts: Sequence[Tensor], tables: Sequence[tuple[Tensor, ...]], prompts: Iterable[Tensor]
    ) -> list[Tensor]:
        """Encode prompts of several kinds, whose fronts share a run of the tower; what :meth:`forward` is made of.

        Args:
            contexts: Of each kind: the embeddings behind [SOS] ``[length, text_dim]``.
            tables: Of each kind: embeddings of the words ``[n, text_dim]`` behind it, in their order.
            prompts: Of each kind: rows of its tables, long ``[prompts, tables]``.

        Returns:
            Of each kind: unit rows ``[prompts, dim]``.
        """
        return [*map(self._features, self._encodings(contexts, tables), prompts)]

    def _features(self, encode: Callable[[Tensor], Tensor], prompts: Tensor) -> Tensor:
        """Prompts, as rows of their tables ``[prompts, tables]``, to unit rows ``[prompts, dim]``."""
        if not torch.is_grad_enabled():
            return _in_parts(lambda part: _unit(encode(part)), prompts)
        chunks = [prompts]
        if self._checkpoints():
            chunks = [*prompts.split(_CHECKPOINTED_ROWS)]
            encode = partial(run_again_in_backward, encode, use_reentrant=False)
        return _unit(torch.cat([*map(encode, chunks)]))  # [prompts, dim]

    def _encodings(
        self, contexts: Sequence[Tensor], kinds: Sequence[tuple[Tensor, ...]]
    ) -> list[Callable[[Tensor], Tensor]]:
        start = self.get_buffer("_start")
        fronts = [torch.cat([start, context.to(start.dtype)]) for context in contexts]
        kinds = [tuple(table.to(start.dtype) for table in tables) for tables in kinds]
        if not self._shares_prefix():
            return [partial(self._encode_plain, front, tables) for front, tables in zip(fronts, kinds)]
        (encoder,), end = self._encoder, self.get_buffer("_end")[:1]
        roots = encode_fronts(encoder, fronts)
        return [prefix_encoding(encoder, root, tables, end) for root, tables in zip(roots, kinds)]

    def _shares_prefix(self) -> bool:
        """Asked at each call: adapters and hooks may have come to the tower meanwhile."""
        if self.encode == "plain":
            return False
        reason = obstacle(self._encoder[0])
        if reason and self.encode == "prefix":
            raise ValueError(f'expected `encoder` whose prompts can share a prefix (encode="prefix"), got {reason}')
        return not reason

    def _checkpoints(self) -> bool:
        (encoder,) = self._encoder
        return self.checkpoint or (self._shares_prefix() and getattr(encoder, "checkpoints_text", False))

    def _encode_plain(self, front: Tensor, tables: tuple[Tensor, ...], prompts: Tensor) -> Tensor:
        (encoder,) = self._encoder
        words = [table[rows] for table, rows in zip(tables, prompts.unbind(dim=1))]
        # A causal tower may stop at [EOS]; another one wants its whole context, whose padding the words shorten.
        end = self.get_buffer("_end")
        end = end[:1] if encoder.causal_text else end[: len(end) - len(words)]
        count = len(prompts)
        parts = [front.expand(count, -1, -1), torch.stack(words, dim=1), end.expand(count, -1, -1)]
        eos = torch.full((count,), len(front) + len(words), dtype=torch.long, device=front.device)
        return encoder.encode_embeddings(torch.cat(parts, dim=1), eos)

    def extra_repr(self) -> str:
        return f"attributes={len(self.attributes)}, objects={len(self.objects)}, context={len(self.pair_context)}"


def check_pairs(pairs: Tensor, num_attributes: int, num_objects: int) -> None:
    """Raise TypeError or ValueError unless ``pairs`` is ``[K, 2]``, long, of indices of primitives, and not empty.

    Values are looked at on the CPU only: a GPU would be waited for.
    """
    check_tensor("pairs", pairs, dtypes=(torch.long,))
    if not check_shapes(pairs=(pairs, "pairs 2"))["pairs"]:
        raise ValueError("expected `pairs` with at least one row, got none")
    if pairs.device.type != "cpu" or torch.compiler.is_compiling():
        return
    limits = torch.tensor([num_attributes, num_objects])
    wrong = ((pairs < 0) | (pairs >= limits)).any(dim=1)
    if wrong.any():
        first = tuple(pairs[wrong][0].tolist())
        raise ValueError(f"expected `pairs` of indices below {num_attributes, num_objects}, got {first}")


def _mean_embeddings(encoder: Encoder, names: list[str]) -> Tensor:
    """The mean of the token embeddings of each name, [SOS] and [EOS] left out."""
    embeddings, eos = encoder.embed_texts(names)
    embeddings = embeddings.to(score_dtype(embeddings))
    positions = torch.arange(embeddings.shape[1], device=embeddings.device)
    inside = ((positions >= _text_start(encoder)) & (positions < eos[:, None])).unsqueeze(-1)
    empty = [name for name, count in zip(names, inside.sum(dim=1)) if not count]
    if empty:
        raise ValueError(f"expected `space` with names of at least one token, got none in {empty[0]!r}")
    return (embeddings * inside).sum(dim=1) / inside.sum(dim=1)


def _text_start(encoder: Encoder) -> int:
    """Tokens before the first word of a text; an encoder that does not say has an [SOS]."""
    return int(getattr(encoder, "text_start", 1))


def _unit(features: Tensor) -> Tensor:
    return unit_vectors(features).to(features.dtype)


def _in_parts(encode: Callable[[Tensor], Tensor], prompts: Tensor) -> Tensor:
    """Rows ``[prompts, dim]``, encoded part by part, of which one is held beside the result: there may be many."""
    first, *others = prompts.split(_ROWS)
    rows = encode(first)
    if not others:
        return rows
    features = rows.new_empty(len(prompts), rows.shape[1])
    features[: len(rows)] = rows
    start = len(rows)
    for part in others:
        features[start : start + len(part)] = encode(part)
        start += len(part)
    return features
