"""Losses that close the gap between images and texts: alignment and uniformity beside the contrastive loss."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from czsl_heads._checks import check_positive, check_scale
from czsl_heads.functional.precision import score_dtype
from czsl_heads.functional.uniformity import (
    check_matched,
    cross_uniformity_loss,
    in_block,
    row_blocks,
    uniformity_loss,
)
from czsl_heads.functional.unit import unit_vectors

GapLoss = Literal["cua", "cuaxu"]
GAP_LOSSES: tuple[GapLoss, ...] = ("cua", "cuaxu")


def alignment_loss(images: Tensor, texts: Tensor, *, labels: Tensor | None = None) -> Tensor:
    r"""Mean squared distance of matched images and texts, :math:`\frac{1}{n} \sum_i \lVert x_i - y_i \rVert^2`.

    Args:
        images: ``[images, dim]``; any norm, they are scaled to length one.
        texts: ``[texts, dim]``; any norm. Without ``labels`` row i is the text of image i.
        labels: Which text belongs to each image, long ``[images]``.

    Returns:
        Scalar in [0, 4]; float64 if an input is, else float32. NaN propagates.

    Raises:
        TypeError: An input is of another kind.
        ValueError: A shape does not fit, a label is out of range, or there is no image.

    Example:
        >>> alignment_loss(torch.eye(2), torch.eye(2).flip(0)).item()
        2.0

    References:
        Wang and Isola, ICML 2020 (with exponent 2). It is four times the matched dissimilarity of the relative
        modality gap.
    """
    labels = check_matched(images, texts, labels)
    _check_some(images)
    dtype = score_dtype(images, texts)
    difference = unit_vectors(images, dtype) - unit_vectors(texts, dtype)[labels]
    return difference.square().sum(dim=1).mean()


def contrastive_loss(
    images: Tensor, texts: Tensor, *, labels: Tensor | None = None, temperature: float | Tensor = 0.01
) -> Tensor:
    r"""CLIP's loss: the mean of the cross-entropies from images to texts and from texts to images.

    .. math:: \tfrac12 \mathrm{CE}(X Y^\top / T) + \tfrac12 \mathrm{CE}(Y X^\top / T)

    Similarities are computed a block of images at a time, and anew in the backward pass.

    Args:
        images: ``[images, dim]``; any norm, they are scaled to length one.
        texts: ``[texts, dim]``; any norm. Without ``labels`` row i is the text of image i.
        labels: Which text belongs to each image, long ``[images]``. All images of a text are then right for it, to
            equal shares; texts without an image are wrong for all images, and ask for none themselves.
        temperature: Divides the cosines; a scalar tensor keeps its gradient.

    Returns:
        Scalar; float64 if an input is, else float32. NaN propagates.

    Raises:
        TypeError: An input is of another kind.
        ValueError: A shape does not fit, a label is out of range, there is no image, or the temperature is not
            positive.

    Example:
        >>> round(contrastive_loss(torch.eye(2), torch.eye(2), temperature=1.0).item(), 4)
        0.3133

    References:
        Radford et al., CLIP, ICML 2021; several images of a text as in Khosla et al., NeurIPS 2020.
    """
    labels = check_matched(images, texts, labels)
    _check_some(images)
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
    elif not temperature.requires_grad:
        check_scale("temperature", temperature)
    dtype = score_dtype(images, texts)
    images, texts = unit_vectors(images, dtype), unit_vectors(texts, dtype)
    scale = 1 / torch.as_tensor(temperature, dtype=dtype, device=images.device)

    image_terms, of_texts = [], []
    for start, rows in row_blocks(images, columns=len(texts)):
        own = labels[start : start + len(rows)]
        terms = in_block(_read_block, rows, texts, own, scale, again=len(rows) < len(images))
        image_terms.append(terms[0])
        of_texts.append(terms[1])
    right = scale * (images * texts[labels]).sum(dim=1)

    # Each text asks for its images: the mean over the texts that have some.
    normaliser = torch.stack(of_texts).logsumexp(dim=0)  # [texts]
    counts = labels.bincount(minlength=len(texts)).to(dtype)
    own_logits = right.new_zeros(len(texts)).index_add(0, labels, right) / counts.clamp(min=1)
    asks = (counts > 0).to(dtype)  # as weights: a GPU would be waited for to pick them
    to_texts = torch.cat(image_terms).mean()
    to_images = (asks * (normaliser - own_logits)).sum() / asks.sum()
    return (to_texts + to_images) / 2


def cua_loss(
    images: Tensor,
    texts: Tensor,
    *,
    labels: Tensor | None = None,
    temperature: float | Tensor | None = 0.01,
) -> Tensor:
    r"""Contrastive loss, uniformity and alignment (CUA), each of weight one.

    .. math:: L_{CLIP} + \tfrac12 U(X) + \tfrac12 U(Y) + L_{align}

    Args:
        images: ``[images, dim]``; any norm, they are scaled to length one.
        texts: ``[texts, dim]``; any norm. Without ``labels`` row i is the text of image i, as published.
        labels: Which text belongs to each image, long ``[images]``; texts are then one a class.
        temperature: Of the :func:`contrastive_loss`; None leaves that loss out, for a method that has its own.

    Returns:
        Scalar; float64 if an input is, else float32. A modality of one vector has nothing to push apart, and adds
        nothing. NaN propagates.

    Raises:
        TypeError, ValueError: As :func:`contrastive_loss`.

    Example:
        >>> round(cua_loss(torch.eye(2), torch.eye(2), temperature=1.0).item(), 4)  # 0.3133 - 4 + 0
        -3.6867

    References:
        Fahim, Murphy and Fyshe, It's Not a Modality Gap, arXiv:2405.18570.
    """
    loss = alignment_loss(images, texts, labels=labels)
    for vectors in (images, texts):
        if len(vectors) > 1:
            loss = loss + uniformity_loss(vectors).to(loss.dtype) / 2
    if temperature is None:
        return loss
    return loss + contrastive_loss(images, texts, labels=labels, temperature=temperature)


def cuaxu_loss(
    images: Tensor,
    texts: Tensor,
    *,
    labels: Tensor | None = None,
    temperature: float | Tensor | None = 0.01,
) -> Tensor:
    r"""CUA and cross-modal uniformity (CUAXU), each term of weight one: :func:`cua_loss` plus :math:`U(X, Y)`.

    Args:
        images, texts, labels, temperature: As in :func:`cua_loss`.

    Returns:
        Scalar, as :func:`cua_loss`. Where there is no text of another image, that term adds nothing.

    Raises:
        TypeError, ValueError: As :func:`contrastive_loss`.

    Example:
        >>> round(cuaxu_loss(torch.eye(2), torch.eye(2), temperature=1.0).item(), 4)
        -7.6867

    References:
        Fahim, Murphy and Fyshe, It's Not a Modality Gap, arXiv:2405.18570.
    """
    loss = cua_loss(images, texts, labels=labels, temperature=temperature)
    if len(texts) < 2:
        return loss
    return loss + cross_uniformity_loss(images, texts, labels=labels)


def gap_loss(kind: GapLoss, images: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
    """What a loss by its name adds to a method that has a contrastive loss of its own; labels name rows of texts."""
    losses = {"cua": cua_loss, "cuaxu": cuaxu_loss}
    return losses[kind](images, texts, labels=labels, temperature=None)


def _read_block(rows: Tensor, texts: Tensor, own: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each image ``[rows]``, and of each text the part of its normaliser ``[texts]``."""
    logits = scale * (rows @ texts.T)
    return F.cross_entropy(logits, own, reduction="none"), logits.logsumexp(dim=0)


def _check_some(images: Tensor) -> None:
    if not len(images):
        raise ValueError("expected `images` with at least one row, got none")
