"""Maps laid over the image that they are of: single pictures for a page, and a strip of them for a file."""

from __future__ import annotations

import io
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from torch import Tensor

from czsl_heads._files import save_figure
from czsl_heads.encoders.dense import Dense
from czsl_heads.report.maps import TokenMap

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 192  # shorter side of a picture, in pixels, at least
HEAT = 0.6  # how much of the map there is in the mixture
MARK = (255, 64, 64)


class Panel(NamedTuple):
    """A picture, what it is, and the range of the map in words."""

    title: str
    picture: Image
    note: str


def enlarge(image: Image) -> Image:
    """The image at a whole multiple of its size, pixels kept as squares, so that it is large enough to be seen."""
    factor = max(1, -(-SIDE // min(image.size)))
    return image.resize((factor * image.width, factor * image.height), 0)


def overlay(image: Image, patches: Tensor) -> Image:
    """An image in grey under the patches ``[rows, columns]`` of a map, dark (lowest) to bright yellow (highest)."""
    from matplotlib import colormaps
    from PIL.Image import blend, fromarray

    low, high = patches.min(), patches.max()
    heat = (patches - low) / (high - low).clamp_min(torch.finfo(patches.dtype).tiny)
    colors = fromarray(colormaps["viridis"](heat.numpy(), bytes=True)[..., :3], "RGB")
    grey = enlarge(image).convert("L").convert("RGB")
    return blend(grey, colors.resize(grey.size, 0), HEAT)


def mark_winner(picture: Image, found: TokenMap) -> Image:
    """Outline the token of the highest number: its patch, or the whole picture for [CLS]."""
    from PIL import ImageDraw

    rows, columns = found.patches.shape
    patch = int(found.winner) - len(found.prefix)
    box: tuple[float, ...] = (0, 0, picture.width, picture.height)
    if patch >= 0:
        row, column = divmod(patch, columns)
        height, width = picture.height / rows, picture.width / columns
        box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
    marked = picture.copy()
    left, above, right, below = map(round, box)
    ImageDraw.Draw(marked).rectangle((left, above, right - 1, below - 1), outline=MARK, width=4)
    return marked


def cosine_panel(title: str, image: Image, found: TokenMap) -> Panel:
    """A map of cosines, its winner marked."""
    low, high, prefix = (float(number) for number in (found.patches.min(), found.patches.max(), found.prefix.max()))
    winner = "[CLS]" if int(found.winner) < len(found.prefix) else "a patch"
    own = "left out" if prefix == -torch.inf else f"{prefix:.2f}"
    note = f"patches {low:.2f} to {high:.2f}, [CLS] {own}: {winner} wins"
    return Panel(title, mark_winner(overlay(image, found.patches), found), note)


def share_panel(title: str, image: Image, found: TokenMap) -> Panel:
    """A map of attention, whose numbers are shares."""
    low, high, prefix = (
        f"{100 * float(share):.1f} %" for share in (found.patches.min(), found.patches.max(), found.prefix.sum())
    )
    return Panel(title, overlay(image, found.patches), f"patches {low} to {high}, [CLS] {prefix}")


def panels(image: Image, maps: dict[str, TokenMap]) -> list[Panel]:
    """The image and the maps of a :class:`~czsl_heads.report.findings.Finding`, one picture each."""
    found = [Panel("image", enlarge(image), "as the encoder sees it")]
    found.append(cosine_panel("alignment with the predicted pair", image, maps["alignment"]))
    if "condenser" in maps:
        found.append(share_panel("attention of the condenser (VAC)", image, maps["condenser"]))
    if "attention" in maps:
        found.append(share_panel("attention of [CLS], last block", image, maps["attention"]))
    recipes = [recipe for recipe in get_args(Dense) if recipe in maps]
    found += [cosine_panel(f"dense patches, {recipe}", image, maps[recipe]) for recipe in recipes]
    return found


def data_uri(picture: Image) -> str:
    """A picture as an address that holds it."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"


def png_uri(content: bytes) -> str:
    """The content of a PNG file as an address that holds it."""
    return f"data:image/png;base64,{b64encode(content).decode()}"


def save_strip(title: str, strip: list[Panel], path: Path) -> None:
    """Write panels side by side to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(strip), 3.7), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(strip), squeeze=False)[0], strip):
        axis.imshow(panel.picture)
        axis.set_title(panel.title, fontsize=9, parse_math=False)
        axis.set_xlabel(panel.note.replace(": ", ":\n"), fontsize=8)
        axis.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize=10, parse_math=False)
    save_figure(figure, path, dpi=130)
