"""Dynamic Memory Bank: of every pair the image vectors that were predicted most surely, and texts until there are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from czsl_heads._checks import check_choice, check_integer, check_positive, check_shapes, check_tensor
from czsl_heads.functional.bank import (
    Empty,
    arrival_ranks,
    merge_best,
    prediction_entropy,
    retrieve,
    retrieve_prototypes,
    row_counts,
    unit_rows,
)
from czsl_heads.functional.precision import score_dtype


class DynamicMemoryBank(nn.Module):
    r"""Pair logits from remembered image vectors.

    Every pair has a row of ``slots`` entries. Of all that ever came to a row it holds the ``slots`` smallest by (image
    before text, entropy of the prediction, arrival): empty slots fill first, texts leave when the row is full of
    images, and of equal entropies the earlier stays. So what is stored at the end is equal to the last bit however the
    vectors were cut into batches, and in whichever order they came if no two entropies of a pair are equal. What is
    predicted on the way is not.

    Only what is stored takes memory: images in buffers whose length is a power of two, sorted by (pair, entropy,
    arrival), unused rows at the end; texts as they were given.

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
    one. Writing replaces buffers and changes none in place, so a ``state_dict`` stays what it was. A dtype move rounds
    the vectors, but not the entropies, which say who is better. Loading takes over the sizes of what is loaded.

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
    count: Tensor
    texts: Tensor
    text_pair: Tensor
    text_rank: Tensor
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
        self.reset()

    def reset(self) -> None:
        """Forget all entries, and how many vectors were rejected."""
        self.features = self.features.new_zeros(0, self.dim)
        self.texts = self.features.new_zeros(0, self.dim)
        self.entropy = self.features.new_zeros(0, dtype=torch.float32)
        for name, shape in (
            ("pair", (0,)),
            ("text_pair", (0,)),
            ("text_rank", (0,)),
            ("count", ()),
            ("num_rejected", ()),
        ):
            setattr(self, name, self.features.new_zeros(shape, dtype=torch.long))

    @property
    def counts(self) -> Tensor:
        """Entries of each row, images and those texts that are not displaced: long ``[pairs]``."""
        stored = torch.cat([pair_index for _, pair_index in self._sources()])
        return row_counts(stored, self.num_pairs)[: self.num_pairs]

    def forward(self, features: Tensor) -> Tensor:
        self._check_rows("features", features)
        return self.logit_scale * retrieve(features, self._sources(), **self._options())

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
        return retrieve_prototypes(features, self._sources(), pair_index, **self._options())

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
        # Outside of inference mode, or the bank could be part of no backward pass afterwards.
        with torch.inference_mode(False), torch.no_grad():
            pair_index = probs.argmax(dim=1) if pair_index is None else self._check_index(pair_index)
            vectors, directed = unit_rows(features)
            stored = directed & self._check_probs(probs)
            self._insert(vectors, pair_index.masked_fill(~stored, self.num_pairs), prediction_entropy(probs))
            self.num_rejected = self.num_rejected + (~stored).sum()

    def _insert(self, vectors: Tensor, pair_index: Tensor, entropy: Tensor) -> None:
        # Behind everything a blank row, which fills up what is not used.
        pair = torch.cat([self.pair, pair_index, self.pair.new_full((1,), self.num_pairs)])
        entropy = torch.cat([self.entropy, entropy, self.entropy.new_zeros(1)])
        features = torch.cat([self.features, vectors.to(self.features.dtype), self.features.new_zeros(1, self.dim)])
        best = merge_best(pair, entropy, num_pairs=self.num_pairs, slots=self.slots)
        capacity = 1 << (len(best) - 1).bit_length() if len(best) > 0 else 0
        self.count = torch.full_like(self.count, len(best))
        best = F.pad(best, (0, capacity - len(best)), value=len(pair) - 1)
        self.features, self.entropy, self.pair = features[best], entropy[best], pair[best]

    def _sources(self) -> list[tuple[Tensor, Tensor]]:
        images = row_counts(self.pair, self.num_pairs)
        displaced = images[self.text_pair] + self.text_rank >= self.slots
        return [(self.features, self.pair), (self.texts, self.text_pair.masked_fill(displaced, self.num_pairs))]

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

    @staticmethod
    def _check_probs(probs: Tensor) -> Tensor:
        """Raise unless finite rows are distributions; which rows are finite, bool ``[batch]``."""
        low, high = probs.aminmax(dim=1)
        total = probs.sum(dim=1, dtype=score_dtype(probs))
        finite = low.isfinite() & high.isfinite()
        wrong = finite & ((low < 0) | ((total - 1).abs() > 0.01))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"expected `probs` of rows that sum to 1 and have no negative value, "
                f"got a sum of {float(total[row]):.4g} and a smallest value of {float(low[row]):.4g} in row {row}"
            )
        return finite

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicMemoryBank:
        entropy = self.entropy
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.entropy.dtype != entropy.dtype:  # rounding would change who is better
            self.entropy = entropy.to(self.entropy.device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicMemoryBank:
        memo[id(self.texts)] = self.texts  # only ever replaced, never written to
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state = {name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict}
        if len(state) == len(self._buffers):
            self._check_state(state)
            for name in state:
                own: Tensor = getattr(self, name)
                dtype = torch.promote_types(state[name].dtype, torch.float32) if name == "entropy" else own.dtype
                # New memory even where the size fits: what is there may belong to others.
                setattr(self, name, torch.empty_like(state[name], dtype=dtype, device=own.device))
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            missing_keys = args[2]
            missing_keys.extend(prefix + name for name in self._buffers if name not in state)

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
