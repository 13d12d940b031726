"""Dynamic Memory Bank: of every pair the image vectors that were predicted most surely, and texts until there are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from czsl_heads._checks import (
    FLOATS,
    check_choice,
    check_index,
    check_integer,
    check_positive,
    check_scalar,
    check_scale,
    check_shapes,
    check_tensor,
)
from czsl_heads.functional.bank import Judged, first_argmax, prediction_entropy, row_counts
from czsl_heads.functional.retrieval import Empty, retrieve, retrieve_prototypes
from czsl_heads.functional.slot_table import SlotTable
from czsl_heads.functional.text_rows import TextRows, unit_texts
from czsl_heads.functional.unit import unit_rows
from czsl_heads.heads.bank_state import STATE, check_state
from czsl_heads.heads.update_check import UpdateCheck


class DynamicMemoryBank(nn.Module):
    r"""Pair logits from remembered image vectors.

    Every pair has a row of ``slots`` entries. Of all that ever came to a row it holds the ``slots`` smallest by (image
    before text, entropy of the prediction, arrival): empty slots fill first, texts leave when the row is full of
    images, and of equal entropies the earlier stays. So what is stored at the end is equal to the last bit however the
    vectors were cut into batches, and in whichever order they came if no two entropies of a pair are equal. What is
    predicted on the way is not.

    Only what is stored takes memory: images in a table that grows by a few batches, or an eighth; texts as they were
    given. Beside the product of features and texts, reading costs what the rows with images cost. An update writes new
    vectors into free places of the table, and moves no others.

    Args:
        num_pairs: How many pairs there are.
        dim: Size of the joint space.
        slots: Entries a row.
        temperature: Of the softmax over the entries of a row, in units of cosine.
        logit_scale: Factor from cosine to logit, positive: CLIP's 100. A scalar tensor, ``encoder.logit_scale`` say, is
            read once. One that is trained is refused: pass it to each call. 1.0 gives cosines.
        empty: What free slots are. ``"mask"``: nothing, and an empty row has logit -inf. ``"zero"``: zero vectors, as
            in the paper, which dilute the retrieval and draw the logit of a row with few entries towards 0; an empty
            row has 0. A bank without any entry gives zeros in both.
        normalize: Whether prototypes are scaled to unit length; zero vectors then dilute nothing.
        device, dtype: Where entries are stored, and in which dtype.

    Shape:
        ``features`` [batch, dim] to logits [batch, pairs]. Inputs float32, bfloat16, float16 (computed in float32) or
        float64 (as such); any norm.

    Reading never writes; :meth:`update`, :meth:`fill_texts` and :meth:`reset` do, eagerly: an exported bank is a frozen
    one. Writing spoils no backward pass. A ``state_dict`` is a copy, sorted by (pair, entropy, arrival), and equal for
    banks that hold the same. A dtype move rounds the vectors, but not the entropies, which say who is better. Loading
    takes over the sizes of what is loaded.

    On a GPU an update waits for nothing but now and then for the number of entries, when it might have to grow. A wrong
    value in its arguments is therefore told then, or when something else asks for it (:meth:`check_updates`,
    ``counts``, the state); its batch is not stored.

    Raises:
        ValueError: An option is unknown or out of range; in ``forward``, shapes that do not fit; in
            ``load_state_dict``, a bank of other slots, dim or number of pairs, or entries that no bank can hold.
        TypeError: An option is no number, or a count no integer; in ``forward``, ``features`` is no float tensor.

    Example:
        >>> bank = DynamicMemoryBank(num_pairs=3, dim=2)
        >>> bank.update(torch.eye(2), torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.2, 0.8]]))
        >>> bank(torch.tensor([[0.6, 0.8]]))
        tensor([[60.0000,    -inf, 80.0000]])
        >>> bank.fill_texts(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
        >>> bank(torch.tensor([[0.6, 0.8]]))
        tensor([[60.0000, 80.0000, 80.0000]])

    References:
        Zhang et al., SAM, CVPR 2026 (SAC): Eqs. 9-10, Algorithm 1. The paper has zero vectors in free slots
        (``empty="zero"``), one image at a time, and does not say when a text leaves.
    """

    sizes: Tensor
    features: Tensor
    entropy: Tensor
    pair: Tensor
    arrival: Tensor
    count: Tensor
    texts: Tensor
    text_pair: Tensor
    text_rank: Tensor
    text_row: Tensor
    extra_text: Tensor
    num_rejected: Tensor

    def __init__(
        self,
        num_pairs: int,
        dim: int,
        *,
        slots: int = 16,
        temperature: float = 0.1,
        logit_scale: float | Tensor = 100.0,
        empty: Empty = "mask",
        normalize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_pairs", num_pairs), ("dim", dim), ("slots", slots)):
            check_integer(name, value, 1)
        check_positive("temperature", temperature)
        check_choice("empty", empty, ("mask", "zero"))
        self.num_pairs, self.dim, self.slots = num_pairs, dim, slots
        self.temperature, self.empty, self.normalize = temperature, empty, normalize
        self.logit_scale = check_scale("logit_scale", logit_scale)

        self.register_buffer("sizes", torch.tensor([num_pairs, dim, slots], device=device))
        self.register_buffer("features", torch.zeros(0, dim, device=device, dtype=dtype))
        if self.features.dtype not in FLOATS:
            raise TypeError(f"expected `dtype` to be one of floats, got {dtype}")
        for name in ("entropy", "pair", "count", "texts", "text_pair", "text_rank", "num_rejected"):
            self.register_buffer(name, None)
        for name in ("arrival", "text_row", "extra_text"):  # which can be told from the others
            self.register_buffer(name, None, persistent=False)
        self._check = UpdateCheck(num_pairs)
        self.reset()

    def reset(self) -> None:
        """Forget all entries, and how many vectors were rejected."""
        like = self.features.new_zeros(0, self.dim)
        none = like.new_zeros(0, dtype=torch.long)
        self._table = SlotTable.empty(like)
        self._texts = TextRows(like, none, none, none, none)
        for name in ("count", "num_rejected"):
            setattr(self, name, like.new_zeros((), dtype=torch.long))
        self._own_table(0)

    def _own_table(self, bound: int, *, owned: bool = True, arrivals: int = 0) -> None:
        # At most so many entries are stored; whether the table is nobody else's; how many vectors were offered so far.
        self._bound, self._owned, self._arrivals = bound, owned, arrivals
        self._check.forget()

    @property
    def _table(self) -> SlotTable:
        return SlotTable(self.features, self.entropy, self.pair, self.arrival)

    @_table.setter
    def _table(self, table: SlotTable) -> None:
        self.features, self.entropy, self.pair, self.arrival = table

    @property
    def _texts(self) -> TextRows:
        return TextRows(self.texts, self.text_pair, self.text_rank, self.text_row, self.extra_text)

    @_texts.setter
    def _texts(self, texts: TextRows) -> None:
        self.texts, self.text_pair, self.text_rank, self.text_row, self.extra_text = texts

    @property
    def counts(self) -> Tensor:
        """Entries of each row, images and those texts that are not displaced: long ``[pairs]``."""
        self.check_updates()
        images = row_counts(self.pair, self.num_pairs)
        stays = self._texts.stay(images, self.slots)
        return images.index_add(0, self.text_pair, stays.long())[: self.num_pairs]

    def forward(self, features: Tensor, *, logit_scale: Tensor | None = None) -> Tensor:
        """Logits ``[batch, pairs]`` of features ``[batch, dim]``; nothing is written.

        A scalar tensor ``logit_scale`` takes the place of the bank's own, and keeps its gradient.
        """
        self._check_rows("features", features)
        scores = retrieve(features, **self._entries(features), **self._options())
        if logit_scale is None:
            return scores.mul_(self.logit_scale)
        check_scalar("logit_scale", logit_scale)
        if not (torch.is_grad_enabled() and logit_scale.requires_grad):
            return scores.mul_(logit_scale)
        empty = scores.isneginf()  # whose product would have no gradient: 0 times an infinity
        return (logit_scale * scores.masked_fill(empty, 0)).masked_fill(empty, -torch.inf)

    def prototypes(self, features: Tensor, pair_index: Tensor) -> Tensor:
        """What ``features`` retrieve from the rows of some pairs; their product is the logit, but for the scale.

        Args:
            features: ``[batch, dim]``; any norm.
            pair_index: Which rows, long ``[pairs]``.

        Returns:
            ``[batch, pairs, dim]``; zeros for empty rows.

        Raises:
            TypeError, ValueError: A dtype, a shape or an index does not fit.
        """
        self._check_rows("features", features)
        check_tensor("pair_index", pair_index, dtypes=(torch.long,))
        check_shapes(pair_index=(pair_index, "pairs"))
        check_index("pair_index", pair_index, self.num_pairs, wait=True)
        pair_index = pair_index.to(self.features.device)
        return retrieve_prototypes(features, pair_index=pair_index, **self._entries(features), **self._options())

    def fill_texts(self, texts: Tensor, pair_index: Tensor) -> None:
        """Add text vectors to rows, behind their images and earlier texts; where there is no room, they stay out.

        Contiguous rows of unit length in the bank's dtype, on its device, are kept by reference, also by deep copies:
        they must not be written to. Others are copied, and so are all when there are texts already, or when some stay
        out for good.

        Args:
            texts: ``[n, dim]``; any norm. Rows that are zero or not finite are not stored, and counted.
            pair_index: Row of each, long ``[n]``; one may stand several times.

        Raises:
            TypeError, ValueError: A dtype, a shape or an index does not fit.
        """
        self._check_rows("texts", texts, pair_index, "n")
        with torch.inference_mode(False), torch.no_grad():
            check_index("pair_index", pair_index, self.num_pairs, wait=True)
            texts, directed = unit_texts(texts.to(self.features.device), self.features.dtype)
            pair_index = pair_index.to(self.features.device).where(directed, self.num_pairs)
            self._texts = self._texts.add(texts, pair_index, num_pairs=self.num_pairs, slots=self.slots)
            self.num_rejected = self.num_rejected + (~directed).sum()

    def update(self, features: Tensor, probs: Tensor, *, pair_index: Tensor | None = None) -> None:
        """Offer image vectors to the rows of the pairs that they are predicted to be.

        Vectors that are zero or not finite, or come with a prediction that is not finite, are not stored, and counted
        in ``num_rejected``.

        Args:
            features: ``[batch, dim]``; any norm.
            probs: Predictions over the pairs ``[batch, pairs]``. Their entropy (in float32, or float64 if they are)
                ranks the vectors, their largest value, the first among equals, names the row.
            pair_index: Labels, long ``[batch]``, which name the row instead.

        Raises:
            TypeError: A tensor has another dtype.
            ValueError: A shape does not fit, a finite row of ``probs`` has a negative value or a sum that is not 1
                (within 0.01), or a label is out of range. Nothing is stored then.
        """
        self._check_rows("features", features, pair_index)
        check_tensor("probs", probs)
        check_shapes(features=(features, "batch dim"), probs=(probs, f"batch {self.num_pairs}"))
        self.take(features, self.judge(probs, pair_index=pair_index))

    def judge(self, probs: Tensor, *, pair_index: Tensor | None = None) -> Judged:
        """The first half of :meth:`update`, which changes nothing: several processes may show its result to theirs.

        Args:
            probs, pair_index: As in :meth:`update`.

        Raises:
            TypeError, ValueError: As :meth:`update`.
        """
        check_tensor("probs", probs)
        check_shapes(probs=(probs, f"batch {self.num_pairs}"))
        with torch.inference_mode(False), torch.no_grad():
            rows = first_argmax(probs) if pair_index is None else pair_index.to(probs.device)
            finite, good = self._check.look(probs, rows, self.features.device)
            return Judged(rows, prediction_entropy(probs), finite, good.expand(len(rows)))

    def take(self, features: Tensor, judged: Judged) -> None:
        """The second half of :meth:`update`: offer vectors ``[batch, dim]`` of predictions that were looked at."""
        self._check_rows("features", features, judged.rows)
        # Outside of inference mode, or the bank could be part of no backward pass afterwards.
        with torch.inference_mode(False), torch.no_grad():
            rows, entropy, finite, good = (part.to(self.features.device) for part in judged)
            vectors, directed = unit_rows(features)
            stored = directed.to(rows.device) & finite & good
            waited = self._insert(vectors.to(self.features), rows.where(stored, self.num_pairs), entropy)
            self.num_rejected = self.num_rejected + (~stored & good).sum()
            if waited:
                self.check_updates()

    def check_updates(self) -> None:
        """Wait for a GPU, and raise the ValueError of an :meth:`update` since the last time, if there is one."""
        self._check.tell()

    def _insert(self, vectors: Tensor, pair_index: Tensor, entropy: Tensor) -> bool:
        """Merge new entries into the rows that they come to; whether a GPU was waited for."""
        waited = self._make_room(len(vectors))
        arrival = self._arrivals + torch.arange(len(vectors), device=self.pair.device)
        self._arrivals += len(vectors)
        sizes = {"num_pairs": self.num_pairs, "slots": self.slots}
        self._table = self._table.place(vectors, pair_index, entropy, arrival, **sizes)
        self.count = (self.pair < self.num_pairs).sum()
        return waited

    def _make_room(self, batch: int) -> bool:
        """Let the table hold ``batch`` entries more and a free place, and be nobody else's."""
        most, size = self.num_pairs * self.slots, len(self.pair)
        self._bound = min(self._bound + batch, most)
        waited = self._bound >= size
        if waited:
            self._bound = min(int(self.count) + batch, most)  # waits for a GPU, once in several batches
            spare = max(self._bound // 16, 4 * batch)
            if min(self._bound + spare, most) >= size:
                size = min(self._bound + 2 * spare, most) + 1
        if size > len(self.pair) or not self._owned or self.features.is_inference():
            self._table = self._table.grow(size, num_pairs=self.num_pairs)
            self._owned = True
        return waited

    def _entries(self, features: Tensor) -> dict[str, Any]:
        """What :func:`retrieve` reads."""
        # A graph keeps the table, which updates write to.
        lent = torch.is_grad_enabled() and features.requires_grad
        sources = [(self.features.clone() if lent else self.features, self.pair)]
        if len(self.texts) == 0:
            return {"sources": sources, "texts": None}

        images = self.pair.new_empty(0)
        if len(self.extra_text) > 0:
            images = row_counts(self.pair, self.num_pairs)
        extra, firsts = self._texts.entries(images, num_pairs=self.num_pairs, slots=self.slots)
        return {"sources": [*sources, *extra], "texts": firsts}

    def _options(self) -> dict[str, Any]:
        names = ("num_pairs", "slots", "temperature", "empty", "normalize")
        return {name: getattr(self, name) for name in names}

    def _check_rows(self, name: str, rows: Tensor, pair_index: Tensor | None = None, axis: str = "batch") -> None:
        check_tensor(name, rows)
        check_shapes(**{name: (rows, f"{axis} {self.dim}")})
        if pair_index is not None:
            check_tensor("pair_index", pair_index, dtypes=(torch.long,))
            check_shapes(**{name: (rows, f"{axis} dim"), "pair_index": (pair_index, axis)})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicMemoryBank:
        entropy = self.entropy
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._check.to(self.features.device)
        if self.entropy.dtype != entropy.dtype:  # rounding would change who is better
            self.entropy = entropy.to(self.entropy.device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicMemoryBank:
        memo[id(self.texts)] = self.texts  # only ever replaced, never written to
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.pair.is_meta:  # has no values to sort by
            return
        self.check_updates()
        table = self._table.sort(num_pairs=self.num_pairs, slots=self.slots)
        for name in ("features", "entropy", "pair"):
            destination[prefix + name] = getattr(table, name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state = {name: state_dict[prefix + name] for name in STATE if prefix + name in state_dict}
        if len(state) < len(STATE):
            missing_keys = args[2]
            missing_keys.extend(prefix + name for name in STATE if name not in state)
            return
        check_state(state, prefix, num_pairs=self.num_pairs, dim=self.dim, slots=self.slots)
        with torch.inference_mode(False):
            for name in state:
                own: Tensor = getattr(self, name)
                dtype = torch.promote_types(state[name].dtype, torch.float32) if name == "entropy" else own.dtype
                # New memory even where the size fits: what is there may belong to others.
                setattr(self, name, torch.empty_like(state[name], dtype=dtype, device=own.device))
            super()._load_from_state_dict(state_dict, prefix, *args)
            size = len(self.pair)
            self.arrival = torch.arange(size, device=self.pair.device)
            self._texts = TextRows.of(self.texts, self.text_pair, self.text_rank, num_pairs=self.num_pairs)
        self._own_table(size, owned=False, arrivals=size)

    def extra_repr(self) -> str:
        options = (f"{name}={value!r}" for name, value in self._options().items() if name not in ("num_pairs", "slots"))
        sizes = f"num_pairs={self.num_pairs}, dim={self.dim}, slots={self.slots}"
        return ", ".join([sizes, *options, f"logit_scale={self.logit_scale}"])
