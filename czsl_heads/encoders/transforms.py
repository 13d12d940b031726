"""Image transforms of the field: CLIP's own for evaluation, and CSP's augmentation for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def image_transform(
    size: int | tuple[int, int],
    *,
    train: bool = False,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Callable[[Any], Tensor]:
    """Resize the shorter side (bicubic), crop the centre, scale and normalise.

    ``train`` adds what CSP, DFSP and Troika train with, after the crop: a horizontal flip (p 0.5), torchvision's
    default random perspective (p 0.5) and a rotation of up to 5 degrees. It draws from torch's global generator, which
    the data sets of this package seed by (seed, epoch, sample).

    Args:
        size: Side of the square input, or (height, width), in pixels.
        train: Add the augmentation.
        mean, std: Per channel, of pixels in [0, 1].

    Returns:
        A picklable callable, RGB PIL image to float tensor ``[3, height, width]``.
    """
    from torchvision import transforms

    shape = (size, size) if isinstance(size, int) else tuple(size)
    bicubic = transforms.InterpolationMode.BICUBIC
    shorter = size if isinstance(size, int) else shape
    steps: list[Any] = [transforms.Resize(shorter, interpolation=bicubic), transforms.CenterCrop(shape)]
    if train:
        steps += [transforms.RandomHorizontalFlip(), transforms.RandomPerspective(), transforms.RandomRotation(5)]
    steps += [transforms.ToTensor(), transforms.Normalize(tuple(mean), tuple(std))]
    composed: Callable[[Any], Tensor] = transforms.Compose(steps)
    return composed
