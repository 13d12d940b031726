"""How a memory of vectors is read: every pair's prototype, a softmax over its entries, against the feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from einops import einsum
from torch import Tensor

from czsl_heads._checks import check_choice, check_integer, check_positive, check_shapes, check_tensor
from czsl_heads.functional.precision import no_autocast, score_dtype
from czsl_heads.functional.retrieval_op import retrieved, rows_of, safe_root
from czsl_heads.functional.unit import unit_vectors

Empty = Literal["mask", "zero"]
Sources = Sequence[tuple[Tensor, Tensor]]


class PairTexts(NamedTuple):
    """At most one text of each pair: entries that stand behind all others of their rows.

    Attributes:
        vectors: Of unit length ``[texts, dim]``.
        row: Which of them is a pair's, long ``[num_pairs]``, -1 for none; None where they are in the order of the
            pairs, one each.
    """

    vectors: Tensor
    row: Tensor | None = None


def retrieve(
    features: Tensor,
    sources: Sources,
    *,
    num_pairs: int,
    slots: int,
    temperature: float = 0.1,
    empty: Empty = "mask",
    normalize: bool = False,
    texts: PairTexts | None = None,
) -> Tensor:
    r"""Inner product of each feature with the prototype that it retrieves from the entries of each pair.

    With :math:`s_j = \langle f, B_{ij} \rangle` for the entries of pair :math:`i`,

    .. math:: w = \mathrm{softmax}_j(s_j / T), \qquad \langle f, \textstyle\sum_j w_j B_{ij} \rangle = \sum_j w_j s_j

    so that no prototype is built. A row whose one entry is a text has a closed form: its cosine :math:`s`, or
    :math:`s \, \sigma(s / T - \log(\mathrm{slots} - 1))` among zero vectors. So beside the product of features and
    texts, which is dense, the work is that of the rows that ``sources`` have entries in. Only first derivatives exist.

    Args:
        features: ``[batch, dim]``; any norm.
        sources: Where entries lie: blocks ``(vectors [entries, dim], pair_index [entries])``, the vectors of unit
            length, in any order, together at most ``slots`` a pair; index ``num_pairs`` marks an entry as unused.
        num_pairs: How many pairs there are.
        slots: Entries that a pair can have.
        temperature: :math:`T`, in units of cosine.
        empty: What free slots are. ``"mask"``: nothing, and a pair without entries scores -inf, unless all are without:
            then all score 0. ``"zero"``: zero vectors, which take part in the softmax and draw the score towards 0.
        normalize: Divide by the length of the prototype, taken as at least the root of the machine's precision. Zero
            vectors do not turn a prototype, so ``empty`` then matters to pairs without entries only.
        texts: One more entry of each pair, or of some, where ``sources`` leave a slot free.

    Returns:
        Scores ``[batch, num_pairs]``, cosines if ``normalize``; float64 if ``features`` or vectors are, else float32.

    Raises:
        TypeError: A tensor or option is of the wrong kind.
        ValueError: The shapes do not fit, or an option is out of range.

    Example:
        Three pairs: two images stand in the row of pair 0, none in that of pair 1, and one in that of pair 2.

        >>> entries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0, 2])
        >>> feature = torch.tensor([[0.6, 0.8]])
        >>> retrieve(feature, [entries], num_pairs=3, slots=2)
        tensor([[0.7762,   -inf, 0.8000]])

        The cosines of pair 0 are 0.6 and 0.8. They weigh each other, and their weighted mean is the score:

        >>> cosines = torch.tensor([0.6, 0.8])
        >>> (cosines / 0.1).softmax(0), (cosines / 0.1).softmax(0) @ cosines
        (tensor([0.1192, 0.8808]), tensor(0.7762))

        With a text for each pair, pair 0 has no slot left for its text, pair 1 has the text alone, pair 2 has both.

        >>> texts = PairTexts(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]))
        >>> retrieve(feature, [entries], num_pairs=3, slots=2, texts=texts)
        tensor([[0.7762, 0.9600, 0.8000]])

    References:
        Zhang et al., SAM, CVPR 2026 (SAC), Eq. 10; free slots as zero vectors are the paper's.
    """
    _check_retrieval(features, sources, num_pairs, slots, temperature, empty, texts)
    with no_autocast(features.device):
        return retrieved(
            unit_vectors(features, _dtype(features, sources, texts)),
            sources,
            texts,
            num_pairs=num_pairs,
            slots=slots,
            temperature=temperature,
            empty=empty,
            normalize=normalize,
        )


def retrieve_prototypes(
    features: Tensor,
    sources: Sources,
    pair_index: Tensor,
    *,
    num_pairs: int,
    slots: int,
    temperature: float = 0.1,
    empty: Empty = "mask",
    normalize: bool = False,
    texts: PairTexts | None = None,
) -> Tensor:
    """Build the prototypes whose products with the features are the scores of :func:`retrieve`.

    Args:
        features: ``[batch, dim]``; any norm.
        sources: As in :func:`retrieve`.
        pair_index: Which pairs' prototypes to build, long ``[pairs]``, each in ``[0, num_pairs)``.
        num_pairs, slots, temperature, empty, normalize, texts: As in :func:`retrieve`.

    Returns:
        ``[batch, pairs, dim]``; zeros for pairs without entries.

    Raises:
        TypeError, ValueError: As :func:`retrieve`.

    Example:
        >>> entries = torch.eye(2), torch.tensor([0, 2])
        >>> retrieve_prototypes(torch.ones(1, 2), [entries], torch.tensor([2, 1]), num_pairs=3, slots=1)
        tensor([[[0., 1.],
                 [0., 0.]]])
    """
    _check_retrieval(features, sources, num_pairs, slots, temperature, empty, texts)
    check_tensor("pair_index", pair_index, dtypes=(torch.long,))
    check_shapes(pair_index=(pair_index, "pairs"))
    with no_autocast(features.device):
        dtype = _dtype(features, sources, texts)
        features = unit_vectors(features, dtype)
        rows, filled = _dense_rows(sources, texts, pair_index, slots, dtype, features)
        cosines = einsum(features, rows, "batch dim, pairs slots dim -> batch pairs slots")
        logits = cosines / temperature
        # Zero vectors take part in the softmax, but do not turn a prototype whose length is divided out.
        if empty == "mask" or normalize:
            logits = logits.masked_fill(~filled & filled.any(dim=1, keepdim=True), -torch.inf)
        weights = logits.softmax(dim=-1)
        prototypes: Tensor = einsum(weights, rows, "batch pairs slots, pairs slots dim -> batch pairs dim")
        if normalize:
            prototypes = prototypes / safe_root(prototypes.square().sum(dim=-1, keepdim=True))
        return prototypes


def _dense_rows(
    sources: Sources,
    texts: PairTexts | None,
    pair_index: Tensor,
    slots: int,
    dtype: torch.dtype,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """The rows of some pairs with all slots, zeros in free ones ``[pairs, slots, dim]``, and which are filled."""
    blocks = [(like.new_zeros(0, like.shape[1]), pair_index[:0]), *sources]
    vectors = torch.cat([block.to(dtype) for block, _ in blocks])
    pair_of, order = torch.cat([index for _, index in blocks]).sort(stable=True)
    start, stop = (torch.searchsorted(pair_of, pair_index, right=right)[:, None] for right in (False, True))
    rank = torch.arange(slots, device=pair_index.device)
    filled = start + rank < stop
    rows = like.new_zeros(len(pair_index), slots, like.shape[1])
    if len(vectors) > 0:
        found = vectors[order[(start + rank).clamp(max=len(vectors) - 1)]]
        rows = torch.where(filled[..., None], found, rows)
    if texts is not None and len(texts.vectors) > 0:
        row = rows_of(texts, pair_index)[:, None]
        free = (rank == stop - start) & (row >= 0)
        rows = torch.where(free[..., None], texts.vectors[row.clamp(min=0)].to(dtype), rows)
        filled = filled | free
    return rows, filled


def _check_retrieval(
    features: Tensor,
    sources: Sources,
    num_pairs: int,
    slots: int,
    temperature: float,
    empty: Empty,
    texts: PairTexts | None,
) -> None:
    check_tensor("features", features)
    for vectors, pair_index in sources:
        check_tensor("vectors", vectors)
        check_tensor("pair_index", pair_index, dtypes=(torch.long,))
        check_shapes(
            features=(features, "batch dim"), vectors=(vectors, "entries dim"), pair_index=(pair_index, "entries")
        )
    check_integer("num_pairs", num_pairs, 1)
    check_integer("slots", slots, 1)
    check_positive("temperature", temperature)
    check_choice("empty", empty, ("mask", "zero"))
    if texts is None and not sources:
        raise ValueError("expected `sources` to be at least one block of entries where there are no `texts`, got none")
    if texts is not None:
        check_tensor("texts.vectors", texts.vectors)
        axes = "texts" if texts.row is not None else str(num_pairs)
        check_shapes(**{"features": (features, "batch dim"), "texts.vectors": (texts.vectors, f"{axes} dim")})
        if texts.row is not None:
            check_tensor("texts.row", texts.row, dtypes=(torch.long,))
            check_shapes(**{"texts.row": (texts.row, str(num_pairs))})


def _dtype(features: Tensor, sources: Sources, texts: PairTexts | None) -> torch.dtype:
    others = [] if texts is None else [texts.vectors]
    return score_dtype(features, *(vectors for vectors, _ in sources), *others)
