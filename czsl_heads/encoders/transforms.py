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


def split_transform(transform: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Tensor]] | None:
    """What a transform does to the geometry of every picture alike, and the rest; None if it does not begin so.

    Args:
        transform: A torchvision ``Compose``, such as :meth:`Preprocess.transform` gives.

    Returns:
        A function of a PIL image to one of a fixed size, whose ``repr`` says what it does, and one from there on.
    """
    from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
    from torchvision.transforms import CenterCrop, Compose, Resize

    if not isinstance(transform, Compose):
        return None
    steps = list(transform.transforms)
    count = 0
    while count < len(steps) and isinstance(steps[count], (Resize, ResizeKeepRatio, CenterCrop, CenterCropOrPad)):
        count += 1
    if not any(_fixes_size(step) for step in steps[:count]):
        return None
    whole: Callable[[Any], Tensor] = Compose(steps[count:])
    return _Geometry(steps[:count]), whole


class _Geometry:
    """Steps one after the other; all that decides them is in the ``repr``, which those of open_clip do not say."""

    def __init__(self, steps: list[Any]) -> None:
        self.steps = steps

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image

    def __repr__(self) -> str:
        said = []
        for step in self.steps:
            settings = sorted((name, repr(value)) for name, value in vars(step).items() if not name.startswith("_"))
            said.append(f"{type(step).__name__}{settings}")
        return " ".join(said)


def _fixes_size(step: Any) -> bool:
    """Whether pictures of all shapes have one size behind a step."""
    from open_clip.transform import CenterCropOrPad
    from torchvision.transforms import CenterCrop, Resize

    sides = getattr(step, "size", None)
    squashes = isinstance(step, Resize) and isinstance(sides, (tuple, list)) and len(sides) == 2
    return squashes or isinstance(step, (CenterCrop, CenterCropOrPad))


def _per_channel(value: Any) -> tuple[float, ...]:
    """One number stands for all three channels, as in open_clip."""
    if not value:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
