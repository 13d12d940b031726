"""The shapes world: a real image data set that needs no download, written in the field's own layout.

Twelve attributes of four kinds times twelve objects. Which pairs are seen is part of the world, not of a seed, because
the tiny CLIP that the package ships was pretrained without captions of the unseen ones: (object - attribute) mod 6, by
sorted index, makes a pair unseen in validation (0), unseen in test (3), or seen (else). So every attribute and every
object has two pairs of each unseen kind and eight seen ones; the seen pairs of remainder 1 also stand in validation
and those of remainder 4 in test, as the real data sets mix both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from czsl_heads._checks import check_range
from czsl_heads._files import whole_folder
from czsl_heads.data.drawing import ATTRIBUTES, OBJECTS, compose, render
from czsl_heads.data.layout import SPLIT_NAME, write_metadata
from czsl_heads.space import CompositionSpace

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
MIN_IMAGE_SIZE = 48

_REMAINDERS: dict[Split, tuple[int, ...]] = {"train": (1, 2, 4, 5), "val": (0, 1), "test": (3, 4)}


def split_pairs(split: Split) -> list[tuple[str, str]]:
    """The (attribute, object) names of a split, sorted.

    Example:
        >>> [len(split_pairs(split)) for split in SPLITS]
        [96, 48, 48]
    """
    return [
        (attribute, obj)
        for i, attribute in enumerate(ATTRIBUTES)
        for j, obj in enumerate(OBJECTS)
        if (j - i) % 6 in _REMAINDERS[split]
    ]


def unseen_pairs() -> list[tuple[str, str]]:
    """All pairs without training images, those of validation and of test: the tiny CLIP never saw them captioned."""
    seen = set(split_pairs("train"))
    return [(attribute, obj) for attribute in ATTRIBUTES for obj in OBJECTS if (attribute, obj) not in seen]


def shapes_space() -> CompositionSpace:
    """The space of the world, as :func:`~czsl_heads.data.read_dataset` finds it in every data set of it."""
    seen = split_pairs("train")
    return CompositionSpace(ATTRIBUTES, OBJECTS, seen, unseen_pairs()).subset(sorted([*seen, *unseen_pairs()]))


def beyond_shapes(encoder: str, space: CompositionSpace) -> str | None:
    """What is to be said where the embedded CLIP, which knows the shapes world only, is to look at anything else.

    Args:
        encoder: The name of an encoder.
        space: The words of a data set.

    Returns:
        A line; None for other encoders, and for words of the shapes world.
    """
    strange = [name for name in (*space.attributes, *space.objects) if name not in (*ATTRIBUTES, *OBJECTS)]
    if encoder != "tiny" or not strange:
        return None
    return (
        f"the encoder tiny knows drawn shapes only, and none of {', '.join(map(repr, strange[:3]))}: expect results at "
        "chance; for photographs take --encoder ViT-B-32:openai, or another that czsl encoders lists"
    )


def companions() -> dict[str, tuple[str, ...]]:
    """For each object, the attributes that images may show on it unsaid: those of its seen pairs."""
    seen = split_pairs("train")
    return {obj: tuple(attribute for attribute, other in seen if other == obj) for obj in OBJECTS}


@dataclass(frozen=True)
class ShapesSpec:
    """What decides every pixel of a shapes data set.

    Args:
        seed: Non-negative; every image is drawn from (seed, split, pair, number), so sizes do not change pixels.
        imbalance: Information imbalance in [0, 1]: how much of the image the label leaves unsaid (distractors,
            clutter, place, size, turn, a second attribute).
        image_size: Side in pixels, at least 48.
        train_per_pair, val_per_pair, test_per_pair: Images for each pair of a split, at least 1.
    """

    seed: int = 0
    imbalance: float = 0.5
    image_size: int = 48
    train_per_pair: int = 20
    val_per_pair: int = 10
    test_per_pair: int = 20

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0)
        check_range("imbalance", self.imbalance, 0, 1)
        check_range("image_size", self.image_size, MIN_IMAGE_SIZE)
        for split in SPLITS:
            check_range(f"{split}_per_pair", self.per_pair(split), 1)

    def per_pair(self, split: Split) -> int:
        count: int = getattr(self, f"{split}_per_pair")
        return count


def draw(spec: ShapesSpec, split: Split, attribute: str, obj: str, number: int) -> tuple[Any, Any]:
    """One image and its mask, as PIL images; depends on its arguments only."""
    key = [spec.seed, SPLITS.index(split), ATTRIBUTES.index(attribute), OBJECTS.index(obj), number]
    rng = np.random.default_rng(key)
    scene = compose(attribute, obj, rng, imbalance=spec.imbalance, companions=companions())
    return render(scene, spec.image_size, rng)


def make_shapes(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    imbalance: float = 0.5,
    image_size: int = 48,
    train_per_pair: int = 20,
    val_per_pair: int = 10,
    test_per_pair: int = 20,
) -> Path:
    """Write a shapes data set to disk, in the layout of MIT-States, UT-Zappos and C-GQA.

    ``images/<attribute>_<object>/*.png``, ``masks/`` alike (255 inside the named object),
    ``compositional-split-natural/{train,val,test}_pairs.txt``, ``metadata_compositional-split-natural.t7`` and
    ``shapes.json`` (the arguments). All or nothing: the folder appears when it is whole.

    Args:
        out: Folder to make; it must not exist, or be empty.
        seed: Non-negative; the same seed gives the same bits.
        imbalance: How much of the image the label leaves unsaid, in [0, 1].
        image_size: Side of the images in pixels, at least 48.
        train_per_pair: Images for each of the 96 training pairs.
        val_per_pair: Images for each of the 48 validation pairs (24 seen, 24 unseen).
        test_per_pair: Images for each of the 48 test pairs (24 seen, 24 other unseen).

    Returns:
        The path of the data set.

    Raises:
        ValueError: An argument is out of range.
        FileExistsError: ``out`` exists and is not an empty folder.
        OSError: ``out`` cannot be written.
    """
    spec = ShapesSpec(seed, imbalance, image_size, train_per_pair, val_per_pair, test_per_pair)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"expected `out` to be a new or empty folder, got {out}, which holds something")
    with whole_folder(out) as building:
        _write(building, spec)
    return out


def _write(root: Path, spec: ShapesSpec) -> None:
    rows = []
    for split, attribute, obj, number in _items(spec):
        name = f"{attribute}_{obj}/{split}_{number:04d}.png"
        image, mask = draw(spec, split, attribute, obj, number)
        for folder, picture in (("images", image), ("masks", mask)):
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        rows.append({"image": name, "attr": attribute, "obj": obj, "set": split})
    write_metadata(root, rows)
    (root / SPLIT_NAME).mkdir()
    for split in SPLITS:
        lines = [f"{attribute} {obj}" for attribute, obj in split_pairs(split)]
        (root / SPLIT_NAME / f"{split}_pairs.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / "shapes.json").write_text(json.dumps(asdict(spec), indent=2) + "\n", encoding="utf-8")


def _items(spec: ShapesSpec) -> Iterator[tuple[Split, str, str, int]]:
    for split in SPLITS:
        for attribute, obj in split_pairs(split):
            for number in range(spec.per_pair(split)):
                yield split, attribute, obj, number
