"""How evenly vectors spread over the sphere: within one modality, and of images against the texts of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from czsl_heads._checks import check_index, check_integer, check_shapes, check_tensor
from czsl_heads.functional.precision import no_autocast, score_dtype
from czsl_heads.functional.unit import unit_vectors

_SHARPNESS = 2.0  # t of the published losses
BLOCK_BYTES = 64 * 2**20  # of the similarities that are held at once


def uniformity_loss(vectors: Tensor) -> Tensor:
    r"""Logarithm of the mean potential between the vectors of one modality; lower is more uniform.

    .. math:: \log \frac{1}{n (n - 1)} \sum_{i \neq j} e^{-2 \lVert x_i - x_j \rVert^2}

    Similarities are computed a block of rows at a time, and anew in the backward pass: memory grows with the number of
    vectors, not with its square. Gradients are exact.

    Args:
        vectors: ``[vectors, dim]``; any norm, they are scaled to length one.

    Returns:
        Scalar in [-8, 0]; 0 if all vectors are equal. float64 if ``vectors`` are, else float32. NaN propagates.

    Raises:
        TypeError: ``vectors`` is no float tensor.
        ValueError: It has another shape, or fewer than two rows.

    Example:
        >>> round(uniformity_loss(torch.eye(3)).item(), 4)  # all squared distances are 2
        -4.0

    References:
        Wang and Isola, Understanding Contrastive Representation Learning, ICML 2020. Fahim, Murphy and Fyshe,
        arXiv:2405.18570 (half the sum of both modalities).
    """
    check_tensor("vectors", vectors)
    count = check_shapes(vectors=(vectors, "vectors dim"))["vectors"]
    check_integer("vectors.shape[0]", count, 2)
    unit = unit_vectors(vectors)

    total = unit.new_zeros((), dtype=torch.float64 if unit.device.type != "mps" else unit.dtype)
    for start, rows in row_blocks(unit, columns=count):
        # Of a block only what stands to the right of the diagonal: each pair once.
        total = total + in_block(_potential_above_diagonal, rows, unit[start:], again=len(rows) < count)
    pairs = count * (count - 1) / 2
    return (total / pairs).log().to(unit.dtype)


def cross_uniformity_loss(images: Tensor, texts: Tensor, *, labels: Tensor | None = None) -> Tensor:
    r"""Logarithm of the mean potential between images and the texts of others; lower is more uniform.

    .. math:: \log \frac{1}{n (n - 1)} \sum_{i \neq j} e^{-2 \lVert x_i - y_j \rVert^2}

    Blocks, memory and gradients as in :func:`uniformity_loss`.

    Args:
        images: ``[images, dim]``; any norm.
        texts: ``[texts, dim]``; any norm. Without ``labels`` row i is the text of image i.
        labels: Which text belongs to each image, long ``[images]``: the mean is then over all texts of another label.

    Returns:
        Scalar in [-8, 0]; float64 if an input is, else float32. NaN propagates.

    Raises:
        TypeError: An input is of another kind.
        ValueError: A shape does not fit, a label is out of range, or there is no text of another image.

    Example:
        >>> images, texts = torch.eye(3), torch.eye(3)
        >>> round(cross_uniformity_loss(images, texts).item(), 4)
        -4.0

    References:
        Fahim, Murphy and Fyshe, It's Not a Modality Gap, arXiv:2405.18570.
    """
    labels = check_matched(images, texts, labels)
    num_images, num_texts = len(images), len(texts)
    pairs = num_images * (num_texts - 1)
    if pairs < 1:
        raise ValueError(f"expected `texts` of other images too, got {num_texts} text of {num_images} images")
    dtype = score_dtype(images, texts)
    images, texts = unit_vectors(images, dtype), unit_vectors(texts, dtype)

    total = images.new_zeros((), dtype=torch.float64 if images.device.type != "mps" else dtype)
    for start, rows in row_blocks(images, columns=num_texts):
        own = labels[start : start + len(rows)]
        total = total + in_block(_potential_of_others, rows, texts, own, again=len(rows) < num_images)
    return (total / pairs).log().to(dtype)


def check_matched(images: Tensor, texts: Tensor, labels: Tensor | None) -> Tensor:
    """The row of ``texts`` that belongs to each image, long ``[images]``; TypeError or ValueError if there is none."""
    check_tensor("images", images)
    check_tensor("texts", texts)
    if labels is None:
        check_shapes(images=(images, "images dim"), texts=(texts, "images dim"))
        return torch.arange(len(images), device=images.device)
    check_tensor("labels", labels, dtypes=(torch.long,))
    check_shapes(images=(images, "images dim"), texts=(texts, "texts dim"), labels=(labels, "images"))
    check_index("labels", labels, len(texts))
    return labels


def row_blocks(vectors: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Rows of ``[n, dim]`` a block at a time, each with the number of its first row, for products with ``columns``."""
    at_once = max(1, BLOCK_BYTES // (max(1, columns) * vectors.element_size()))
    for start in range(0, len(vectors), at_once):
        yield start, vectors[start : start + at_once]


def in_block(function: Callable[..., Any], *inputs: Tensor, again: bool) -> Any:
    """What ``function`` gives; with ``again``, what it computes on the way is not kept for the backward pass."""
    with no_autocast(inputs[0].device):
        if again and torch.is_grad_enabled():
            return run_again_in_backward(function, *inputs, use_reentrant=False)
        return function(*inputs)


def _potential(rows: Tensor, columns: Tensor) -> Tensor:
    """``exp(-2 |x - y|^2)`` of unit vectors, ``[rows, columns]``; at most 1 up to rounding, so that sums are safe."""
    return (2 * _SHARPNESS * (rows @ columns.T - 1)).exp()


def _potential_above_diagonal(rows: Tensor, columns: Tensor) -> Tensor:
    return _summed(_potential(rows, columns).triu(1))


def _potential_of_others(rows: Tensor, columns: Tensor, own: Tensor) -> Tensor:
    # Not the whole less its own part: where few others are near, that would cancel.
    others = _potential(rows, columns).scatter(1, own[:, None], 0.0)
    return _summed(others)


def _summed(potential: Tensor) -> Tensor:
    # Within rows in the dtype of the vectors, over rows in double: as exact, and no copy of the block.
    rows = potential.sum(dim=1)
    return rows.sum(dtype=None if rows.device.type == "mps" else torch.float64)
