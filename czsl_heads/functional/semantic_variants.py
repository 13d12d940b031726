"""Scores of single words from scores of pairs, and variants of an image of which each text takes one."""

from __future__ import annotations

import torch
from torch import Tensor

from czsl_heads._checks import check_index, check_integer, check_range, check_shapes, check_tensor


def primitive_scores(scores: Tensor, pairs: Tensor, num_attributes: int, num_objects: int) -> tuple[Tensor, Tensor]:
    r"""The score of each attribute and object: that of the best pair that has it.

    .. math:: s_a = \max_{(a, o) \in C} s_{ao}, \qquad s_o = \max_{(a, o) \in C} s_{ao}

    Args:
        scores: Of pairs, ``[batch, pairs]``.
        pairs: (attribute, object) of each column, long ``[pairs, 2]``.
        num_attributes, num_objects: How many there are.

    Returns:
        Of attributes ``[batch, attributes]`` and of objects ``[batch, objects]``; -inf where no pair has the word. The
        gradient reaches one pair for each score, the first of equals. NaN propagates.

    Raises:
        TypeError, ValueError: An input is of another kind or shape, or a pair is out of range.

    Example:
        >>> scores, pairs = torch.tensor([[0.1, 0.7, 0.2]]), torch.tensor([[0, 0], [0, 1], [2, 1]])
        >>> primitive_scores(scores, pairs, 3, 2)
        (tensor([[0.7000,   -inf, 0.2000]]), tensor([[0.1000, 0.7000]]))

    References:
        Zhang et al., EVA, ICLR 2026: text-to-image alignment.
    """
    check_tensor("scores", scores)
    check_tensor("pairs", pairs, dtypes=(torch.long,))
    check_shapes(scores=(scores, "batch pairs"), pairs=(pairs, "pairs 2"))
    pairs = pairs.to(scores.device)
    found = []
    for name, count, words in zip(("attributes", "objects"), (num_attributes, num_objects), pairs.unbind(dim=1)):
        check_integer(f"num_{name}", count, 1)
        check_index("pairs", words, count)
        found.append(_segment_max(scores, words, count))
    return found[0], found[1]


def choose_variants(variants: Tensor, texts: Tensor, image: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    r"""The variant of each image that is nearest to its text, and, with weight alpha, to the image feature itself.

    .. math:: e = \mathrm{argmax}_i \; v_i \cdot t + \alpha \, v_i \cdot f

    Args:
        variants: ``[batch, variants, dim]``, of length one.
        texts: Of each image its own, ``[batch, dim]``, of length one.
        image: The image feature, ``[batch, dim]``, of length one.
        alpha: Weight of the affinity within images, at least 0; 0: the texts alone decide.

    Returns:
        The chosen variants ``[batch, dim]``, through which alone gradients go, and their numbers ``[batch]``, the first
        of equals.

    Raises:
        TypeError, ValueError: An input is of another kind or shape, or ``alpha`` is negative.

    Example:
        >>> variants = torch.eye(2)[None]
        >>> choose_variants(variants, torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]]), alpha=0.5)[1]
        tensor([0])

    References:
        Zhang et al., EVA, ICLR 2026: image-to-text alignment.
    """
    check_tensor("variants", variants)
    check_tensor("texts", texts)
    check_tensor("image", image)
    check_shapes(variants=(variants, "batch variants dim"), texts=(texts, "batch dim"), image=(image, "batch dim"))
    with torch.no_grad():
        cross_modal = (variants * texts[:, None]).sum(dim=2)
        within_images = (variants * image[:, None]).sum(dim=2)
        index = chosen_variant(cross_modal, within_images, alpha)
    return variants.take_along_dim(index[:, None, None], dim=1)[:, 0], index


def chosen_variant(cross_modal: Tensor, within_images: Tensor, alpha: float) -> Tensor:
    """From both affinities ``[batch, variants]`` the number of the best ``[batch]``, the first of equals."""
    check_range("alpha", alpha, 0)
    affinity = cross_modal + alpha * within_images
    best = affinity.amax(dim=1, keepdim=True)
    return (affinity == best).int().argmax(dim=1)  # argmax of the affinity itself leaves open which of equals it takes


def _segment_max(scores: Tensor, words: Tensor, count: int) -> Tensor:
    """``[batch, pairs]`` to ``[batch, count]``: the maximum over the pairs of each word."""
    batch, num_pairs = scores.shape
    if not num_pairs:
        return scores.new_full((batch, count), -torch.inf)
    segments = words.expand(batch, num_pairs)
    with torch.no_grad():
        lowest = scores.new_full((batch, count), -torch.inf)
        best = lowest.scatter_reduce(1, segments, scores, "amax")
        # The first column that has it; NaN equals nothing, and is taken for what it is.
        hits = (scores == best.gather(1, segments)) | scores.isnan()
        columns = torch.arange(num_pairs, device=scores.device).expand(batch, num_pairs)
        first = torch.full_like(best, num_pairs, dtype=torch.long)
        first = first.scatter_reduce(1, segments, columns.masked_fill(~hits, num_pairs), "amin")
    taken = scores.gather(1, first.clamp(max=num_pairs - 1))
    return taken.masked_fill(first == num_pairs, -torch.inf)
