"""Dynamic Memory Bank: of every pair the image vectors that were predicted most surely, and texts until there are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from czsl_heads._checks import check_choice, check_integer, check_positive, check_shapes, check_tensor
from czsl_heads.functional.bank import (
    arrival_ranks,
    first_argmax,
    first_true,
    merge_best,
    prediction_entropy,
    rank_best,
    row_counts,
    unit_rows,
)
from czsl_heads.functional.precision import score_dtype
from czsl_heads.functional.retrieval import Empty, PairTexts, retrieve, retrieve_prototypes

STATE = ("sizes", "features", "entropy", "pair", "count", "texts", "text_pair", "text_rank", "num_rejected")


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
            read once. 1.0 gives cosines, for code that scales itself.
        empty: What free slots are. ``"mask"``: nothing, and an empty row has logit -inf. ``"zero"``: zero vectors, as
            in the paper, which dilute the retrieval and draw the logit of a row with few entries towards 0; an empty
            row has 0. A bank without any entry gives zeros in both.
        normalize: Whether prototypes are scaled to unit length; zero vectors then dilute nothing.

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
            ``load_state_dict``, a bank of other slots, dim or number of pairs.
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
    ) -> None:
        super().__init__()
        for name, value in (("num_pairs", num_pairs), ("dim", dim), ("slots", slots)):
            check_integer(name, value, 1)
        check_positive("temperature", temperature)
        if isinstance(logit_scale, Tensor):
            check_shapes(logit_scale=(logit_scale, ""))
            logit_scale = float(logit_scale)
        check_positive("logit_scale", logit_scale)
        check_choice("empty", empty, ("mask", "zero"))
        self.num_pairs, self.dim, self.slots = num_pairs, dim, slots
        self.temperature, self.logit_scale, self.empty, self.normalize = temperature, logit_scale, empty, normalize
        self.register_buffer("sizes", torch.tensor([num_pairs, dim, slots]))
        self.register_buffer("features", torch.zeros(0, dim))
        for name in ("entropy", "pair", "count", "texts", "text_pair", "text_rank", "num_rejected"):
            self.register_buffer(name, None)
        for name in ("arrival", "text_row", "extra_text"):  # which can be told from the others
            self.register_buffer(name, None, persistent=False)
        self.reset()

    def reset(self) -> None:
        """Forget all entries, and how many vectors were rejected."""
        self.features = self.features.new_zeros(0, self.dim)
        self.texts = self.features.new_zeros(0, self.dim)
        self.entropy = self.features.new_zeros(0, dtype=torch.float32)
        for name in ("pair", "arrival", "text_pair", "text_rank", "text_row", "extra_text"):
            setattr(self, name, self.features.new_zeros(0, dtype=torch.long))
        for name in ("count", "num_rejected"):
            setattr(self, name, self.features.new_zeros((), dtype=torch.long))
        self._own_table(0)

    def _own_table(self, bound: int, *, owned: bool = True, arrivals: int = 0) -> None:
        # At most so many entries are stored; whether the table is nobody else's; how many vectors were offered so far.
        self._bound, self._owned, self._arrivals = bound, owned, arrivals
        self._fault: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """Entries of each row, images and those texts that are not displaced: long ``[pairs]``."""
        self._tell_fault()
        images = row_counts(self.pair, self.num_pairs)
        kept = images[self.text_pair] + self.text_rank < self.slots
        return images.index_add(0, self.text_pair, kept.long())[: self.num_pairs]

    def forward(self, features: Tensor) -> Tensor:
        self._check_rows("features", features)
        return retrieve(features, **self._entries(features), **self._options()).mul_(self.logit_scale)

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
        pair_index = self._check_index(pair_index)
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
            pair_index = self._check_index(pair_index)
            texts, directed = self._unit_texts(texts)
            pair_index = pair_index.masked_fill(~directed, self.num_pairs)
            if len(self.texts) > 0:
                texts, pair_index = torch.cat([self.texts, texts]), torch.cat([self.text_pair, pair_index])
            rank = arrival_ranks(pair_index)
            kept = (rank < self.slots) & (pair_index < self.num_pairs)
            if not kept.all():
                texts, pair_index, rank = texts[kept], pair_index[kept], rank[kept]
            self.texts, self.text_pair, self.text_rank = texts, pair_index, rank
            self._index_texts()
            self.num_rejected = self.num_rejected + (~directed).sum()

    def _index_texts(self) -> None:
        """Find each pair's first text; where one stands for each pair, in order, there is nothing to look up."""
        self.extra_text = self.text_row = self.text_pair.new_zeros(0)
        if self.text_pair.is_meta:  # has no values to look at
            return
        first = self.text_rank == 0
        self.extra_text = (~first).nonzero().squeeze(1)
        every = torch.arange(self.num_pairs, device=self.text_pair.device)
        if len(self.texts) > 0 and not torch.equal(self.text_pair, every):
            row = torch.arange(len(self.texts), device=every.device)
            self.text_row = torch.full_like(every, -1).scatter(0, self.text_pair[first], row[first])

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
        # Outside of inference mode, or the bank could be part of no backward pass afterwards.
        with torch.inference_mode(False), torch.no_grad():
            rows = first_argmax(probs) if pair_index is None else pair_index.to(probs.device)
            finite, fault = self._find_fault(probs, rows)
            self._note_fault(fault)
            vectors, directed = unit_rows(features)
            device, good = self.features.device, fault[0] == 0
            stored = (directed & finite & good).to(device)
            rows = rows.to(device).where(stored, self.num_pairs)
            waited = self._insert(vectors.to(self.features), rows, prediction_entropy(probs).to(device))
            self.num_rejected = self.num_rejected + (~stored).sum() * good.to(device)
            if waited:
                self._tell_fault()

    def _insert(self, vectors: Tensor, pair_index: Tensor, entropy: Tensor) -> bool:
        """Merge new entries into the rows that they come to; all shapes are known beforehand.

        Whether a GPU was waited for.
        """
        waited = self._make_room(len(vectors))
        size, nowhere = len(self.pair) - 1, self.num_pairs  # the last place stays blank: what goes nowhere goes there
        met = torch.zeros(nowhere + 1, dtype=torch.bool, device=self.pair.device).index_fill(0, pair_index, True)
        met[nowhere:] = False
        old = first_true(met[self.pair[:size]], min(size, len(vectors) * self.slots))
        arrival = self._arrivals + torch.arange(len(vectors), device=self.pair.device)
        self._arrivals += len(vectors)
        pair = torch.cat([self.pair[old], pair_index])
        in_time = torch.cat([self.arrival[old], arrival]).argsort()
        ranked, stays = rank_best(
            pair[in_time],
            torch.cat([self.entropy[old], entropy])[in_time],
            num_pairs=self.num_pairs,
            slots=self.slots,
        )
        stays = torch.empty_like(stays).scatter(0, in_time[ranked], stays)
        left = self.pair.scatter(0, old, pair.where(stays, nowhere)[: len(old)])
        new = first_true(stays[len(old) :], min(size, len(vectors)))
        place = first_true(left[:size] == nowhere, len(new)).where(new < len(vectors), size)
        self.pair = left.scatter(0, place, _grown(pair_index, len(vectors) + 1, nowhere)[new])
        self.arrival = self.arrival.scatter(0, place, _grown(arrival, len(vectors) + 1)[new])
        entropy = _grown(entropy, len(vectors) + 1)[new]
        dtype = torch.promote_types(entropy.dtype, self.entropy.dtype)
        self.entropy = self.entropy.to(dtype).scatter(0, place, entropy.to(dtype))
        self.features.index_copy_(0, place, _grown(vectors, len(vectors) + 1)[new])
        self.count = (self.pair < nowhere).sum()
        return waited

    def _make_room(self, batch: int) -> bool:
        """Let the table hold ``batch`` entries more and a blank one, and be nobody else's."""
        most, size = self.num_pairs * self.slots, len(self.pair)
        self._bound = min(self._bound + batch, most)
        waited = self._bound >= size
        if waited:
            self._bound = min(int(self.count) + batch, most)  # waits for a GPU, once in several batches
            spare = max(self._bound // 16, 4 * batch)
            if min(self._bound + spare, most) >= size:
                size = min(self._bound + 2 * spare, most) + 1
        if size == len(self.pair) and self._owned and not self.features.is_inference():
            return waited
        self.features = _grown(self.features, size)
        self.entropy, self.arrival = (_grown(each, size) for each in (self.entropy, self.arrival))
        self.pair = _grown(self.pair, size, self.num_pairs)
        self._owned = True
        return waited

    def _entries(self, features: Tensor) -> dict[str, Any]:
        """What :func:`retrieve` reads."""
        # A graph keeps the table, which updates write to.
        lent = torch.is_grad_enabled() and features.requires_grad
        sources = [(self.features.clone() if lent else self.features, self.pair)]
        if len(self.extra_text) > 0:
            pair_index, rank = self.text_pair[self.extra_text], self.text_rank[self.extra_text]
            displaced = row_counts(self.pair, self.num_pairs)[pair_index] + rank >= self.slots
            sources.append((self.texts[self.extra_text], pair_index.masked_fill(displaced, self.num_pairs)))
        row = self.text_row if len(self.text_row) > 0 else None
        return {"sources": sources, "texts": PairTexts(self.texts, row) if len(self.texts) > 0 else None}

    def _options(self) -> dict[str, Any]:
        names = ("num_pairs", "slots", "temperature", "empty", "normalize")
        return {name: getattr(self, name) for name in names}

    def _unit_texts(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        texts = texts.to(self.features.device)
        length = torch.linalg.vector_norm(texts, dim=1, dtype=score_dtype(texts))
        directed = (length > 0) & length.isfinite()
        unit = (length - 1).abs() <= 8 * torch.finfo(texts.dtype).eps
        if texts.dtype != self.features.dtype or not unit.all():
            texts = (texts / length[:, None]).to(self.features.dtype)
        # An inference tensor could be part of no backward pass.
        return (texts.clone() if texts.is_inference() else texts.detach()).contiguous(), directed

    def _check_rows(self, name: str, rows: Tensor, pair_index: Tensor | None = None, axis: str = "batch") -> None:
        check_tensor(name, rows)
        check_shapes(**{name: (rows, f"{axis} {self.dim}")})
        if pair_index is not None:
            check_tensor("pair_index", pair_index, dtypes=(torch.long,))
            check_shapes(**{name: (rows, f"{axis} dim"), "pair_index": (pair_index, axis)})

    def _check_index(self, pair_index: Tensor) -> Tensor:
        outside = (pair_index < 0) | (pair_index >= self.num_pairs)
        if outside.any():
            raise ValueError(
                f"expected `pair_index` to be in [0, {self.num_pairs - 1}], got {int(pair_index[outside][0])}"
            )
        return pair_index.to(self.features.device)

    def _find_fault(self, probs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which predictions are finite, and the first row with a fault: its kind (0: none), number and two values."""
        total, low = probs.sum(dim=1, dtype=score_dtype(probs)), probs.amin(dim=1)
        finite, outside = total.isfinite(), (rows < 0) | (rows >= self.num_pairs)
        wrong = finite & ((low < 0) | ((total - 1).abs() > 0.01))
        kind = torch.where(outside, 1, torch.where(wrong, 2, 0))
        number = torch.arange(len(rows), device=rows.device)
        each = torch.stack([kind.double(), number, torch.where(outside, rows, total), low], dim=1)
        return finite, each[(kind > 0).long().argmax(dim=0, keepdim=True)][0] if len(rows) > 0 else each.new_zeros(4)

    def _note_fault(self, fault: Tensor) -> None:
        """Tell a fault that can be seen without waiting, and keep another for later."""
        devices = fault.device.type, self.features.device.type
        fault = fault.to(self.features.device)
        self._fault = fault if self._fault is None else torch.where(self._fault[0] > 0, self._fault, fault)
        if "cpu" in devices:
            self._tell_fault()

    def check_updates(self) -> None:
        """Wait for a GPU, and raise the ValueError of an :meth:`update` since the last time, if there is one."""
        self._tell_fault()

    def _tell_fault(self) -> None:
        fault, self._fault = self._fault, None
        if fault is None:
            return
        kind, row, value, low = fault.tolist()
        before = "" if fault.device.type == "cpu" else " (in this or an earlier update)"
        if kind == 1:
            raise ValueError(f"expected `pair_index` to be in [0, {self.num_pairs - 1}], got {value:.0f}{before}")
        if kind == 2:
            raise ValueError(
                f"expected `probs` of rows that sum to 1 and have no negative value, "
                f"got a sum of {value:.4g} and a smallest value of {low:.4g} in row {row:.0f}{before}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicMemoryBank:
        entropy = self.entropy
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._fault = None if self._fault is None else self._fault.to(self.features.device)
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
        self._tell_fault()
        in_time = self.arrival.argsort()
        best = merge_best(self.pair[in_time], self.entropy[in_time], num_pairs=self.num_pairs, slots=self.slots)
        for name in ("features", "entropy", "pair"):
            destination[prefix + name] = getattr(self, name)[in_time[best]]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state = {name: state_dict[prefix + name] for name in STATE if prefix + name in state_dict}
        if len(state) < len(STATE):
            missing_keys = args[2]
            missing_keys.extend(prefix + name for name in STATE if name not in state)
            return
        self._check_state(state)
        with torch.inference_mode(False):
            for name in state:
                own: Tensor = getattr(self, name)
                dtype = torch.promote_types(state[name].dtype, torch.float32) if name == "entropy" else own.dtype
                # New memory even where the size fits: what is there may belong to others.
                setattr(self, name, torch.empty_like(state[name], dtype=dtype, device=own.device))
            super()._load_from_state_dict(state_dict, prefix, *args)
            size = len(self.pair)
            self.arrival = torch.arange(size, device=self.pair.device)
            self._index_texts()
        self._own_table(size, owned=False, arrivals=size)

    def _check_state(self, state: dict[str, Tensor]) -> None:
        check_shapes(sizes=(state["sizes"], "3"))
        for name, found in zip(("num_pairs", "dim", "slots"), state["sizes"].tolist()):
            if found != getattr(self, name):
                raise ValueError(f"expected the state of a bank of {name}={getattr(self, name)}, got {name}={found}")
        for vectors, *indices in (("features", "entropy", "pair"), ("texts", "text_pair", "text_rank")):
            rows = {name: (state[name], "rows") for name in indices}
            check_shapes(**{vectors: (state[vectors], f"rows {self.dim}"), **rows})

    def extra_repr(self) -> str:
        options = (f"{name}={value!r}" for name, value in self._options().items() if name not in ("num_pairs", "slots"))
        sizes = f"num_pairs={self.num_pairs}, dim={self.dim}, slots={self.slots}"
        return ", ".join([sizes, *options, f"logit_scale={self.logit_scale}"])


def _grown(rows: Tensor, size: int, value: float = 0) -> Tensor:
    """A copy with blank rows behind, until there are ``size``."""
    return torch.cat([rows, rows.new_full((size - len(rows), *rows.shape[1:]), value)])
