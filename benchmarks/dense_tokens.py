"""Do dense patch tokens point better, and name better? ``python -m benchmarks.dense_tokens`` (about two minutes).

The tiny CLIP, zero-shot, on the test images of the shapes world (drawn anew, default settings), by each recipe of
``wrap(model, dense=...)``. How often does the patch that matches the labelled pair best lie on its object: with its
centre, as reports count it, or with any pixel? And the exact AUC of the closed world by the image feature alone, by the
best patch, and by the best of all tokens.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from benchmarks.measure import write_results
from czsl_heads import wrap
from czsl_heads.data import CompositionDataset, make_shapes, read_dataset
from czsl_heads.data.layout import open_image
from czsl_heads.encoders.dense import Dense
from czsl_heads.encoders.restricted import patches_touched
from czsl_heads.functional import alignment
from czsl_heads.metrics import CZSLScore
from czsl_heads.report.maps import alignment_map, centres_inside, crop_transform, points_inside

SEED = 0
CONTEXT = "a photo of"
NUMBERS = ("auc", "attr_accuracy", "obj_accuracy")


def read_images(dataset: CompositionDataset, encoder: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Test images as the encoder sees them, the columns of their pairs, and the masks of their objects."""
    samples, transform = dataset.samples["test"], encoder.transform()
    crop = crop_transform(encoder, nearest=True)
    images, masks = [], []
    for sample in samples:
        images.append(transform(open_image(sample.path)))
        path = dataset.root / "masks" / sample.path.relative_to(dataset.root / "images").with_suffix(".png")
        masks.append(pil_to_tensor(crop(open_image(path).convert("L")))[0] > 127)
    columns = torch.tensor([sample.column for sample in samples])
    return torch.stack(images), columns, torch.stack(masks)


def share(hits: Tensor) -> dict[str, float]:
    """The share of images, and its standard error."""
    mean = hits.float().mean().item()
    return {"share": round(mean, 4), "error": round((mean * (1 - mean) / len(hits)) ** 0.5, 4)}


def score(dataset: CompositionDataset, tokens: Tensor, texts: Tensor, columns: Tensor) -> dict[str, float]:
    found = CZSLScore(dataset.space, eval_mask=dataset.eval_mask("test"), protocol="exact")
    found.update(alignment(tokens, texts, reduce="max"), columns)
    result = found.result()
    return {name: round(getattr(result, name), 4) for name in NUMBERS}


@torch.no_grad()
def main(test_per_pair: int = 20) -> None:
    """Measure, print and write ``results/dense_tokens.json``.

    Args:
        test_per_pair: Test images of each pair.
    """
    with tempfile.TemporaryDirectory() as folder:
        dataset = read_dataset(make_shapes(Path(folder) / "shapes", seed=SEED, test_per_pair=test_per_pair))
        encoder = wrap("tiny")
        images, columns, masks = read_images(dataset, encoder)
    inside = {"centre": centres_inside(masks, encoder.grid), "any_pixel": patches_touched(masks, encoder.grid)}
    texts = encoder.encode_texts([f"{CONTEXT} {attribute} {obj}" for attribute, obj in dataset.space])

    rows: dict[str, dict[str, Any]] = {}
    for dense in get_args(Dense):
        encoder.dense = dense
        tokens = torch.cat([encoder.encode_tokens(part) for part in images.split(64)])
        maps = alignment_map(tokens, texts[columns], encoder).patches
        rows[dense] = {
            "pointing": {name: share(points_inside(maps, patches)) for name, patches in inside.items()},
            "patches": score(dataset, tokens[:, 1:], texts, columns),
            "all": score(dataset, tokens, texts, columns),
        }
        print(dense, rows[dense], flush=True)
    feature = score(dataset, tokens[:, :1], texts, columns)
    content = {
        "images": len(images),
        "chance": {name: round(patches.float().mean().item(), 4) for name, patches in inside.items()},
        "image_feature": feature,
        "recipes": rows,
    }
    write_results("dense_tokens", "Do dense patch tokens point better, and name better?", SEED, content)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
