"""Image transforms of the field: a CLIP's own for evaluation, and CSP's augmentation for training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "longest", "squash"]


@dataclass(frozen=True)
class Preprocess:
    """How images were prepared when a CLIP was pretrained.

    Attributes:
        size: Height and width of the input in pixels.
        mean, std: Per channel, of pixels in [0, 1].
        interpolation: Of the resizing.
        resize_mode: ``"shortest"``: the whole input is covered, and the centre cropped. ``"longest"``: the whole image
            is shown, and the rest filled. ``"squash"``: both sides are resized, whatever the shape of the image.
        fill: What ``"longest"`` fills with, in [0, 255].
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"
    fill: int = 0

    @classmethod
    def of_open_clip(cls, size: tuple[int, int], config: Mapping[str, Any]) -> Preprocess:
        """From what open_clip writes down of a model: its ``preprocess_cfg``, which may lack any part."""
        known = {name: config[name] for name in ("interpolation", "resize_mode") if config.get(name)}
        mean, std = (_per_channel(config.get(name)) for name in ("mean", "std"))
        return cls(size, mean or CLIP_MEAN, std or CLIP_STD, fill=config.get("fill_color") or 0, **known)

    def transform(self, train: bool = False) -> Callable[[Any], Tensor]:
        """RGB PIL image to a float tensor ``[3, height, width]``; as open_clip prepares images for evaluation.

        ``train`` adds what CSP, DFSP and Troika train with, after the crop: a horizontal flip (p 0.5), torchvision's
        default random perspective (p 0.5) and a rotation of up to 5 degrees. It draws from torch's global generator,
        which the data sets of this package seed by (seed, epoch, sample). The result can be pickled.
        """
        from open_clip.transform import image_transform
        from torchvision import transforms

        composed: Any = image_transform(
            self.size,
            is_train=False,
            mean=self.mean,
            std=self.std,
            resize_mode=self.resize_mode,
            interpolation=self.interpolation,
            fill_color=self.fill,
        )
        *geometry, convert, to_tensor, normalize = composed.transforms
        augmentation: list[Any] = []
        if train:
            flip, perspective = transforms.RandomHorizontalFlip(), transforms.RandomPerspective()
            augmentation = [flip, perspective, transforms.RandomRotation(5)]
        steps = [*geometry, *augmentation, convert, to_tensor, normalize]
        whole: Callable[[Any], Tensor] = transforms.Compose(steps)
        return whole


def _per_channel(value: Any) -> tuple[float, ...]:
    """One number stands for all three channels, as in open_clip."""
    if not value:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
