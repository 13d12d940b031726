"""How far apart images and texts lie, measured against how far apart each of them lie among themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from czsl_heads._checks import check_index, check_shapes, check_tensor
from czsl_heads.functional.unit import wide_unit_rows

FLOOR = 1e-3  # stands in for the gap of modalities that coincide, as in the released code


class GapSums(NamedTuple):
    """All that the gap needs of the samples; those of two sets of samples add up to those of their union."""

    image_sum: Tensor  # [dim], of unit vectors
    text_sum: Tensor  # [dim], of unit vectors
    matched_sum: Tensor  # scalar, of the dissimilarities of matched pairs
    num_images: int | Tensor
    num_texts: int | Tensor


def relative_modality_gap(
    images: Tensor, texts: Tensor, *, labels: Tensor | None = None, include_self: bool = False
) -> Tensor:
    r"""Mean dissimilarity of matched images and texts, relative to that within images and within texts (RMG).

    .. math::
        \mathrm{RMG} = \frac{m}{m + (a + b) / 2}, \qquad d(u, v) = \frac{1 - \cos(u, v)}{2}

    with :math:`m` the mean of :math:`d` over matched pairs, :math:`a` over pairs of two images and :math:`b` over pairs
    of two texts. All pairs count, also two images of one class. Linear in the number of samples, because the mean
    cosine of all pairs follows from the mean vector.

    Args:
        images: ``[images, dim]``; any norm but zero.
        texts: ``[texts, dim]``; any norm but zero. Without ``labels``, row i is the text of image i.
        labels: Which text belongs to each image, long ``[images]``: texts are then one a class, used or not. The
            formula is symmetric: for images with several captions each, give captions, images, and the image of each
            caption.
        include_self: Whether a vector also makes a pair with itself, as in a variant of the released code; the
            difference fades as 1 / samples.

    Returns:
        Scalar in (0, 1], smaller for a smaller gap; computed and returned in float64 (float32 on devices without it).
        If matched vectors coincide throughout, :math:`m = 0` is replaced by 0.001. NaN propagates.

    Raises:
        TypeError: ``images`` or ``texts`` is no float tensor, or ``labels`` no long tensor.
        ValueError: The shapes do not fit, a label is out of range, a vector is zero, or there are fewer than two images
            or texts (one, with ``include_self``).

    Example:
        >>> images, texts = torch.eye(3), torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
        >>> relative_modality_gap(images, texts, labels=torch.tensor([0, 0, 1]))
        tensor(0.2808, dtype=torch.float64)

    References:
        Schrodi et al., Two Effects, One Trigger, ICLR 2025. Zhang et al., SAM, CVPR 2026 (SAC), Fig. 2.
    """
    sums = gather_sums(images, texts, labels)
    if labels is not None:  # each class text counts once, not once an image
        sums = sums._replace(text_sum=wide_unit_rows("texts", texts).sum(dim=0), num_texts=len(texts))
    return gap_of_sums(sums, include_self=include_self)


def gather_sums(
    images: Tensor,
    texts: Tensor,
    labels: Tensor | None = None,
    *,
    texts_name: str = "texts",
    labels_name: str = "labels",
) -> GapSums:
    """The sums of the images and, row by row, of the text of each; errors call texts and labels by the names given."""
    check_tensor("images", images)
    check_tensor(texts_name, texts)
    if labels is None:
        check_shapes(**{"images": (images, "images dim"), texts_name: (texts, "images dim")})
    else:
        check_tensor(labels_name, labels, dtypes=(torch.long,))
        shapes = {"images": (images, "images dim"), texts_name: (texts, "texts dim"), labels_name: (labels, "images")}
        check_shapes(**shapes)
        check_index(labels_name, labels, len(texts), wait=True)
        texts = texts[labels]
    images, texts = wide_unit_rows("images", images), wide_unit_rows(texts_name, texts)
    # Of unit vectors |u - v|^2 / 4 = (1 - cos) / 2, but this does not cancel where they nearly coincide.
    matched = (images - texts).square().sum() / 4
    return GapSums(images.sum(dim=0), texts.sum(dim=0), matched, len(images), len(texts))


def gap_of_sums(sums: GapSums, *, include_self: bool = False) -> Tensor:
    """The gap from the sums over all samples."""
    num_images, num_texts = int(sums.num_images), int(sums.num_texts)
    least = 1 if include_self else 2
    if min(num_images, num_texts) < least:
        raise ValueError(
            f"expected at least {least} images and {least} texts with include_self={include_self}, "
            f"got {num_images} and {num_texts}"
        )
    matched = sums.matched_sum / num_images
    matched = matched.where(~(matched <= torch.finfo(matched.dtype).eps), FLOOR)  # the cosine rounds to 1; NaN stays
    within_images = _mean_within(sums.image_sum, num_images, include_self)
    within_texts = _mean_within(sums.text_sum, num_texts, include_self)
    return matched / (matched + (within_images + within_texts) / 2)


def _mean_within(vector_sum: Tensor, count: int, include_self: bool) -> Tensor:
    """Mean dissimilarity of all ordered pairs of ``count`` unit vectors, from their sum."""
    own = 0 if include_self else count  # cosines of the vectors with themselves
    cosine: Tensor = (vector_sum.square().sum() - own) / (count * (count - (not include_self)))
    return ((1 - cosine) / 2).clamp(min=0)  # rounding must not make equal vectors closer than equal


def modality_distance(images: Tensor, texts: Tensor, *, labels: Tensor | None = None) -> Tensor:
    r"""Distance of the mean image from the mean text, of unit vectors (L2M): :math:`\lVert \bar x - \bar y \rVert`.

    Args:
        images: ``[images, dim]``; any norm but zero.
        texts: ``[texts, dim]``; any norm but zero. Without ``labels``, row i is the text of image i: the distance is
            then the *centroid distance* of matched pairs.
        labels: Which text belongs to each image, long ``[images]``: each text then counts once, whatever its images.

    Returns:
        Scalar in [0, 2]; computed and returned in float64 (float32 on devices without it). NaN propagates.

    Raises:
        TypeError, ValueError: As :func:`relative_modality_gap`, but that one image and one text are enough.

    Example:
        >>> modality_distance(torch.eye(2), torch.eye(2).flip(0)).item()
        0.0

    References:
        Liang et al., Mind the Gap, NeurIPS 2022. Schrodi et al., Two Effects, One Trigger, ICLR 2025.
    """
    sums = gather_sums(images, texts, labels)
    if labels is not None:
        sums = sums._replace(text_sum=wide_unit_rows("texts", texts).sum(dim=0), num_texts=len(texts))
    _check_any(sums)
    distance: Tensor = torch.linalg.vector_norm(sums.image_sum / sums.num_images - sums.text_sum / sums.num_texts)
    return distance


def instance_distance(images: Tensor, texts: Tensor, *, labels: Tensor | None = None) -> Tensor:
    r"""Mean distance of matched images and texts, of unit vectors (L2I): the mean of :math:`\lVert x_i - y_i \rVert`.

    Args:
        images: ``[images, dim]``; any norm but zero.
        texts: ``[texts, dim]``; any norm but zero. Without ``labels``, row i is the text of image i.
        labels: Which text belongs to each image, long ``[images]``.

    Returns:
        Scalar in [0, 2]; computed and returned in float64 (float32 on devices without it). NaN propagates.

    Raises:
        TypeError, ValueError: As :func:`relative_modality_gap`, but that one image and one text are enough.

    Example:
        >>> round(instance_distance(torch.eye(2), torch.eye(2).flip(0)).item(), 4)
        1.4142

    References:
        Schrodi et al., Two Effects, One Trigger, ICLR 2025.
    """
    _check_any(gather_sums(images, texts, labels))
    images, texts = wide_unit_rows("images", images), wide_unit_rows("texts", texts)
    matched = texts if labels is None else texts[labels]
    distances: Tensor = torch.linalg.vector_norm(images - matched, dim=1)
    return distances.mean()


def _check_any(sums: GapSums) -> None:
    if min(int(sums.num_images), int(sums.num_texts)) < 1:
        raise ValueError(f"expected at least one image and one text, got {sums.num_images} and {sums.num_texts}")
