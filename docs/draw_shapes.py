"""Draw docs/shapes.png, the picture of docs/shapes.md: `python docs/draw_shapes.py`."""

from pathlib import Path

from PIL import Image

from czsl_heads.data.drawing import ATTRIBUTES, OBJECTS
from czsl_heads.data.shapes import ShapesSpec, draw, split_pairs

SIDE, GAP = 48, 2


def sheet() -> Image.Image:
    """All training pairs at the default imbalance, then one row each at imbalance 0 and 1; unseen pairs stay blank."""
    train = set(split_pairs("train"))
    rows = [(attribute, 0.5) for attribute in ATTRIBUTES] + [("striped", 0.0), ("striped", 1.0)]
    step = SIDE + GAP
    picture = Image.new("RGB", (step * len(OBJECTS) + GAP, step * len(rows) + 3 * GAP), "white")
    for i, (attribute, imbalance) in enumerate(rows):
        for j, obj in enumerate(OBJECTS):
            if (attribute, obj) in train:
                image, _ = draw(ShapesSpec(imbalance=imbalance), "train", attribute, obj, 0)
                picture.paste(image, (GAP + j * step, GAP + i * step + (2 * GAP if i >= len(ATTRIBUTES) else 0)))
    return picture.quantize(256)


if __name__ == "__main__":
    sheet().save(Path(__file__).with_name("shapes.png"), optimize=True)
