"""Whether a line can tell images from texts: a gap that is closed leaves nothing to tell them by."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from czsl_heads._checks import check_integer
from czsl_heads.functional.uniformity import check_matched
from czsl_heads.functional.unit import wide_unit_rows


def linear_separability(images: Tensor, texts: Tensor, *, labels: Tensor | None = None, seed: int = 0) -> float:
    """Test accuracy of a logistic regression that tells images from texts; 0.5 where the gap is closed.

    As published: scikit-learn's ``LogisticRegression`` with its defaults, which stop at 100 iterations, on 80 % of the
    pairs; a pair is on one side of the split with both of its vectors.

    Args:
        images: ``[images, dim]``; any norm but zero.
        texts: ``[texts, dim]``; any norm but zero. Without ``labels``, row i is the text of image i.
        labels: Which text belongs to each image, long ``[images]``. A text of several images then stands on both sides.
        seed: Draws the split.

    Returns:
        The share of the vectors of the other pairs that are told right, in [0, 1].

    Raises:
        TypeError: An input is of another kind.
        ValueError: A shape does not fit, a label is out of range, a vector is zero or not finite, or there are fewer
            than two pairs.
        ModuleNotFoundError: There is no scikit-learn (``pip install 'czsl-heads[train]'``).

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> images, texts = (torch.rand(40, 3, generator=generator) for _ in range(2))
        >>> linear_separability(images, -texts)
        1.0

    References:
        Shi et al., Towards Understanding the Modality Gap in CLIP, 2023. Fahim, Murphy and Fyshe, arXiv:2405.18570.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    labels = check_matched(images, texts, labels)
    check_integer("images.shape[0]", len(images), 2)
    check_integer("seed", seed, 0)
    both = [wide_unit_rows("images", images), wide_unit_rows("texts", texts)[labels]]
    for name, vectors in zip(("images", "texts"), both):
        if not vectors.isfinite().all():
            raise ValueError(f"expected `{name}` to be finite, got NaN or an infinity")

    order = np.random.default_rng(seed).permutation(len(images))
    train, test = np.split(order, [int(0.8 * len(order))])
    pairs = torch.stack(both).numpy(force=True)  # [2, pairs, dim]
    modality = np.repeat([0, 1], [len(train), len(train)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 100 iterations are part of what was published
        fitted = LogisticRegression(random_state=seed).fit(np.concatenate(pairs[:, train]), modality)
    expected = np.repeat([0, 1], [len(test), len(test)])
    return float(fitted.score(np.concatenate(pairs[:, test]), expected))
