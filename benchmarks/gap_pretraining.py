"""What does a CLIP learn from the start with each loss? ``python -m benchmarks.gap_pretraining --folders DIR``.

``DIR`` holds what ``python -m czsl_heads.training.pretrain_tiny`` wrote with the same schedule and seed, and with
``--spec.gap_loss`` null, cua and cuaxu, in folders ``none``, ``cua`` and ``cuaxu``. On fresh images of all 144 pairs:
zero-shot accuracy, retrieval both ways, analogies between attributes of one kind, and all metrics of the gap. In an
analogy an image of *red circle*, less the text *red*, plus the text *blue*, should be nearest to images and to the text
of *blue circle*. Writes ``results/gap_pretraining.json`` and a picture for each loss to `docs`. It takes a minute.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import write_results
from czsl_heads import wrap
from czsl_heads._files import read_json
from czsl_heads.data.drawing import ATTRIBUTE_KINDS, ATTRIBUTES, OBJECTS
from czsl_heads.data.shapes import unseen_pairs
from czsl_heads.metrics import gap_report
from czsl_heads.training.pretrain_tiny import PretrainSpec, all_pairs, fresh_features

LOSSES = {"none": "the contrastive loss alone", "cua": "CUA", "cuaxu": "CUAXU"}


def accuracies(scores: Tensor, target: Tensor) -> dict[str, float]:
    """Of images among all pairs: captioned and held-out pairs, and the first image of each text."""
    held_out = {all_pairs().index(pair) for pair in unseen_pairs()}
    unseen = torch.tensor([column in held_out for column in target.tolist()])
    right = (scores.argmax(dim=1) == target).float()
    first = (target[scores.argmax(dim=0)] == torch.arange(scores.shape[1])).float()
    found = {"captioned": right[~unseen], "held_out": right[unseen], "image_to_text": right, "text_to_image": first}
    return {name: round(hits.mean().item(), 4) for name, hits in found.items()}


def analogies(encoder: Any, images: Tensor, target: Tensor, texts: Tensor) -> dict[str, float]:
    """How often the image with one attribute exchanged is nearest to another image, and to the text, of that pair."""
    words = F.normalize(encoder.encode_texts([f"a photo of {attribute}" for attribute in ATTRIBUTES]), dim=-1)
    to_image, to_text, unmoved = [], [], []
    for old, other in permutations(ATTRIBUTES, 2):
        if ATTRIBUTE_KINDS[old] != ATTRIBUTE_KINDS[other]:
            continue
        before, after = ATTRIBUTES.index(old), ATTRIBUTES.index(other)
        rows = (target // len(OBJECTS) == before).nonzero()[:, 0]
        wanted = after * len(OBJECTS) + target[rows] % len(OBJECTS)
        query = F.normalize(images[rows] - words[before] + words[after], dim=-1)
        cosines = query @ images.T
        cosines[torch.arange(len(rows)), rows] = -2.0  # the image itself is no answer
        nearest = target[cosines.argmax(dim=1)]
        to_image.append(nearest == wanted)
        unmoved.append(nearest == target[rows])
        to_text.append((query @ texts.T).argmax(dim=1) == wanted)
    found = {"to_image": to_image, "to_text": to_text, "to_an_image_of_the_old_pair": unmoved}
    return {name: round(torch.cat(hits).float().mean().item(), 4) for name, hits in found.items()}


@torch.no_grad()
def main(folders: Path, imbalance: float = 0.5) -> None:
    """Measure, print and write.

    Args:
        folders: Where the folders of the three CLIPs are.
        imbalance: Of the fresh images.
    """
    rows: dict[str, Any] = {}
    for loss, title in LOSSES.items():
        record = read_json(folders / loss / "tiny_clip.json")
        spec = PretrainSpec(**record["spec"])
        encoder = wrap(f"tiny:{folders / loss}")
        features, target, texts = fresh_features(encoder, spec, imbalance=imbalance)
        images = F.normalize(features, dim=-1)
        report = gap_report(images, texts, target)
        report.plot(
            Path("docs") / f"gap_pretraining-{loss}.png", title=f"pretrained with {title}, imbalance {imbalance}"
        )
        rows[loss] = {
            "spec": record["spec"],
            "logit_scale": record["logit_scale"],
            "accuracy": accuracies(images @ texts.T, target),
            "analogies": analogies(encoder, images, target, texts),
            "gap": {name: round(value, 4) for name, value in report.numbers.items()},
        }
        print(loss, {name: value for name, value in rows[loss].items() if name != "spec"}, flush=True)
    content = {"images": len(target), "imbalance": imbalance, "losses": rows}
    write_results("gap_pretraining", "What does a CLIP learn from the start with each loss?", spec.seed, content)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
