"""A data set of five images, written by hand."""

from PIL import Image

from czsl_heads.data.layout import SPLIT_NAME, write_metadata

METADATA = f"metadata_{SPLIT_NAME}.t7"
PAIRS = {
    "train": ["wet dog", "old cat", "old dog"],
    "val": ["wet cat", "old cat"],
    "test": ["old dog", "wet cat"],
}


def row(image, attr, obj, name):
    return {"image": image, "attr": attr, "obj": obj, "set": name}


def small_rows():
    return [
        row("wet_dog/1.png", "wet", "dog", "train"),
        row("old_cat/2.png", "old", "cat", "train"),
        row("wet_cat/3.png", "wet", "cat", "val"),
        row("wet_cat/4.png", "wet", "cat", "test"),
        row("old_dog/5.png", "old", "dog", "test"),
    ]


def picture(path, value=7, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 2 * value, 3 * value)).save(path)


def write_pairs(root, name, lines):
    (root / SPLIT_NAME).mkdir(exist_ok=True)
    (root / SPLIT_NAME / f"{name}_pairs.txt").write_text("\n".join(lines), encoding="utf-8")


def write_animals(root):
    """The whole data set in a new folder."""
    for number, entry in enumerate(small_rows(), 1):
        picture(root / "images" / entry["image"], value=10 * number)
    for name, lines in PAIRS.items():
        write_pairs(root, name, lines)
    write_metadata(root, small_rows())
    return root
