"""Memory of a training step of Troika at the size of C-GQA with ViT-L/14: ``python -m benchmarks.troika_memory``.

5,592 seen pairs of 413 attributes and 674 objects, 16 images, two layers of traction, Sparse Alignment in all branches,
float32; weights and images at random. The peak of forward pass, loss and backward pass is beyond the weights, gradients
included, with and without running the blocks of both towers again. On a GPU if there is one.
"""

from __future__ import annotations

import gc
from itertools import product
from typing import Any

import torch

from benchmarks.measure import RESULTS, peak_memory, write_results
from benchmarks.whole_steps import SEED, SIZES, draw_images, draw_space
from czsl_heads._files import read_json
from czsl_heads.models.recipe import build
from czsl_heads.training.options import load_options

QUESTION = "What memory does a training step of Troika take at the size of C-GQA, batch 16?"
BATCH = 16


def step_bytes(
    device: str, *, checkpoint: bool, disentangle: str, encoder: str = "ViT-L-14", scale: float = 1.0
) -> dict[str, float]:
    """Weights, and the peak of a step beyond them, in GB, with a part ``scale`` of the primitives and pairs."""
    torch.manual_seed(SEED)
    space = draw_space(SIZES["C-GQA"], scale)
    options, _ = load_options("troika", "cgqa", {"checkpoint": checkpoint, "model.disentangle": disentangle})
    troika = build(options.recipe("troika", encoder, "max"), space).to(device)
    pairs = space.pairs[space.seen_mask].to(device)
    images, targets = draw_images(troika, BATCH, device), torch.arange(BATCH, device=device) % len(pairs)

    def step() -> None:
        troika.train().loss(images, pairs, targets).backward()

    peak = peak_memory(step, device, runs=1)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in troika.parameters())
    trained = sum(parameter.numel() for parameter in troika.parameters() if parameter.requires_grad)
    return {"weights_gb": weights / 2**30, "peak_gb": peak / 2**30, "trained_parameters": trained}


def kept_rows(device: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of other choices that were measured before, and these."""
    path = RESULTS / f"troika_memory-{device}.json"
    before = read_json(path)["rows"] if path.exists() else []
    measured = [row["checkpoint"] for row in rows]
    return [row for row in before if row["checkpoint"] not in measured] + rows


if __name__ == "__main__":
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=list[bool], default=[True, False])
    parser.add_argument("--scale", type=float, default=1.0, help="part of the pairs, for a trial: nothing is written")
    asked = parser.parse_args()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for checkpoint, disentangle in product(asked.checkpoint, ("winner", "each")):
        gc.collect()
        choices = {"checkpoint": checkpoint, "disentangle": disentangle}
        rows.append({"device": where, **choices, **step_bytes(where, scale=asked.scale, **choices)})
        print(rows[-1], flush=True)
    if asked.scale == 1:
        write_results(f"troika_memory-{where}", QUESTION, SEED, {"rows": kept_rows(where, rows)})
