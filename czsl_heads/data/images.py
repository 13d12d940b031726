"""Pictures of any kind as RGB: turned upright, transparent ones on white, deep ones scaled, very large ones reduced."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from czsl_heads._checks import check_kind
from czsl_heads._files import check_regular

BACKGROUND = "white"  # what transparent pictures lie on
# A JPEG of more pixels is decoded at a half, a quarter or an eighth of its size. No picture of the published data sets
# has so many, and what is left is many times what any CLIP looks at.
LARGE = 16 * 2**20
_ORIENTATION = 0x0112  # the EXIF tag
_BITS_PER_SAMPLE = 258  # the TIFF tag


class DataError(ValueError):
    """A data set on disk is not as the layout says; the message names the file and, where there is one, the line."""


def open_image(path: str | os.PathLike[str], *, upright: bool = True) -> Image.Image:
    """Decode an image file to 8-bit RGB, as a viewer shows it.

    The EXIF orientation is applied. Transparent pictures are put onto white. 16 bits a channel are scaled to 8. Of an
    animation the first frame is taken. A JPEG of more than 16 million pixels is decoded at a half, a quarter or an
    eighth of its size, so that it takes 50 MB at most; files of other kinds may have as many pixels as Pillow allows,
    which is twice ``PIL.Image.MAX_IMAGE_PIXELS``.

    Args:
        path: The file.
        upright: Turn the picture as its EXIF orientation says; without, it is read as it is stored.

    Returns:
        An RGB image, detached from the file.

    Raises:
        DataError: The file is missing, no image, cut short, too large, or of pixels without a known range (32-bit
            integers, floats).

    Example:
        >>> from tempfile import mkdtemp
        >>> path = f"{mkdtemp()}/grey.png"
        >>> Image.fromarray(np.full((2, 3), 32896, dtype=np.uint16)).save(path)
        >>> image = open_image(path)
        >>> image.mode, image.size, image.getpixel((0, 0))
        ('RGB', (3, 2), (128, 128, 128))
    """
    with open_raw(path) as image:
        return as_rgb(image, upright=upright)


@contextmanager
def open_raw(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """A picture of which only the head was read; what goes wrong with it inside the block is a DataError too."""
    try:
        with _opened(path) as image:
            yield image
    except FileNotFoundError:
        raise DataError(f"{path}: expected an image file, got none") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: expected an image, got a file of another kind") from None
    except _DepthError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # decoders raise errors of every kind
        raise DataError(f"{path}: expected a whole image, got one that cannot be decoded ({error})") from error


def as_rgb(image: Image.Image, *, upright: bool = True) -> Image.Image:
    """An opened picture as :func:`open_image` gives it.

    Raises:
        TypeError: ``image`` is no PIL image.
        ValueError: Its pixels have no known range.
    """
    check_kind("image", image, Image.Image)
    turned = ImageOps.exif_transpose(image) if upright and orientation(image) != 1 else image
    return _flattened(_eight_bits(turned, image))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened picture, 1 to 8; 1 where it has none, or none that can be read."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged tags raise errors of every kind, and viewers then show the picture as it is
        return 1
    return found if found in range(1, 9) else 1


def depth(image: Image.Image) -> int:
    """Bits of a channel of an opened picture."""
    if image.mode.startswith("I;16"):
        tags: Any = getattr(image, "tag_v2", {})
        return int(max(tags.get(_BITS_PER_SAMPLE, (16,))))
    if image.mode in ("I", "F"):
        return 16 if image.mode == "I" and image.format in ("PNG", "PPM") else 32
    return 8


def quiet_pillow(_: int = 0) -> None:
    """Keep Pillow's warnings off the screen, in this process; commands and their workers call it."""
    warnings.filterwarnings("ignore", module=r"PIL\b")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class _DepthError(ValueError):
    """Pixels without a known range."""


def _opened(path: str | os.PathLike[str]) -> Image.Image:
    """The picture, of which only the head was read; a large JPEG is told to decode at a reduced size."""
    check_regular(path)
    try:
        image: Any = Image.open(path)
    except Image.DecompressionBombError:
        image = _large_jpeg(path)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        factor = _reduction(image.size)
        if factor > 1:
            image.draft(image.mode, (image.width // factor, image.height // factor))
    opened: Image.Image = image
    return opened


def _reduction(size: tuple[int, int]) -> int:
    """By how much the sides of a JPEG of this size are divided when it is decoded."""
    return next((factor for factor in (1, 2, 4) if math.prod(size) <= LARGE * factor**2), 8)


def _large_jpeg(path: str | os.PathLike[str]) -> Any:
    """A JPEG that Pillow refuses to open for its size; what refuses it again is any other file."""
    with open(path, "rb") as file:
        if file.read(3) != b"\xff\xd8\xff":
            return Image.open(path)
    image = JpegImagePlugin.JpegImageFile(path)
    most = 64 * LARGE
    if image.width * image.height > most:
        image.close()
        raise ValueError(f"of more than {most} pixels")
    return image


def _eight_bits(image: Image.Image, original: Image.Image) -> Image.Image:
    """Channels of 8 bits; ``original`` says of what depth they were."""
    if not image.mode.startswith(("I", "F")):
        return image
    bits = depth(original)
    if bits > 16:
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise _DepthError(
            f"expected an image of 8 or 16 bits a channel, got {kind} (mode {image.mode}), whose range is not known"
        )
    most = 2**bits - 1
    values = np.asarray(image, dtype=np.float32)  # [height, width]
    scaled = np.clip(values * (255 / most), 0, 255)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _flattened(image: Image.Image) -> Image.Image:
    """RGB; what is transparent shows the background."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, BACKGROUND)
    return Image.alpha_composite(ground, layer).convert("RGB")
