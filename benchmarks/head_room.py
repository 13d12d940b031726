"""How much could any choice of patches win on the shapes world? ``python -m benchmarks.head_room`` (two minutes).

The tiny CLIP, zero-shot, on the test images of the shapes world (drawn anew, three levels of imbalance). The exact AUC
of the closed world by the image feature, and by the same told where the labelled object is: [CLS] reads only patches
that touch the object's mask, in the last one, two, three or four blocks. Head-room is what the second is ahead.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dense_tokens import CONTEXT, SEED, read_images
from benchmarks.measure import write_results
from czsl_heads import wrap
from czsl_heads.data import CompositionDataset, make_shapes, read_dataset
from czsl_heads.encoders.restricted import patches_touched, restricted_features
from czsl_heads.functional import alignment
from czsl_heads.metrics import CZSLScore

IMBALANCES = (0.0, 0.5, 1.0)
BATCH = 64


def auc(dataset: CompositionDataset, features: Tensor, texts: Tensor, columns: Tensor) -> float:
    score = CZSLScore(dataset.space, eval_mask=dataset.eval_mask("test"), protocol="exact")
    score.update(alignment(features[:, None], texts, reduce="cls"), columns)
    return score.result().auc


@torch.no_grad()
def measure(imbalance: float, test_per_pair: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        options = {"imbalance": imbalance, "seed": SEED, "test_per_pair": test_per_pair}
        dataset = read_dataset(make_shapes(Path(folder) / "shapes", **options))
        encoder = wrap("tiny")
        images, columns, masks = read_images(dataset, encoder)
    inside = patches_touched(masks, encoder.grid)
    texts = encoder.encode_texts([f"{CONTEXT} {attribute} {obj}" for attribute, obj in dataset.space])

    own = torch.cat([encoder.encode_images(part) for part in images.split(BATCH)])
    found: dict[str, Any] = {"imbalance": imbalance, "images": len(images)}
    found["image_feature"] = round(auc(dataset, own, texts, columns), 4)
    for blocks in range(1, len(encoder.vision.blocks) + 1):
        parts = zip(images.split(BATCH), inside.split(BATCH))
        told = torch.cat([restricted_features(encoder, *part, blocks=blocks) for part in parts])
        found[f"oracle_{blocks}"] = round(auc(dataset, told, texts, columns), 4)
    return found


def main(test_per_pair: int = 20, name: str = "head_room") -> None:
    """Measure, print and write ``results/NAME.json``.

    Args:
        test_per_pair: Test images of each pair.
        name: Of the results.
    """
    rows = []
    for imbalance in IMBALANCES:
        rows.append(measure(imbalance, test_per_pair))
        print(rows[-1], flush=True)
    question = "How much could any choice of patches win on the shapes world?"
    write_results(name, question, SEED, {"encoder": "tiny", "rows": rows})


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
