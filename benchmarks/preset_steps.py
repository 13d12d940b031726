"""What does one step of each preset take? ``python -m benchmarks.preset_steps`` (two minutes on a GPU; a CPU is slow).

Each method that learns, with the preset of each published data set: its numbers of primitives and pairs, its batch, its
options, on a ViT-L/14 of random weights. A step is forward, backward and Adam, in float32 and under bfloat16 autocast.
SAC's second stage, which trains the condenser, is a case by itself. What is written is the median time of a step, the
images per second, the peak of the memory beyond the weights, and whether all gradients are finite.
"""

from __future__ import annotations

import copy
import gc
import logging
from typing import Any

import torch
from torch import nn

from benchmarks.measure import peak_memory, time_in_turn, write_results
from benchmarks.whole_steps import SIZES, draw_images, draw_space
from czsl_heads import wrap
from czsl_heads.models.recipe import build
from czsl_heads.models.registry import method_names
from czsl_heads.training.options import Options, load_options

SEED = 0
CONDENSER = "sac, condenser"


def cases() -> list[tuple[str, str]]:
    """Methods that learn, SAC's second stage among them, with the names of the data sets."""
    learning = [name for name in method_names() if load_options(name, "mit-states")[0].epochs]
    return [(method, data) for method in (*learning, CONDENSER) for data in SIZES]


def measure(model: nn.Module, options: Options, pairs: torch.Tensor, images: torch.Tensor, rounds: int) -> Any:
    """Time, memory and gradients of a step, in both precisions; a step that has no room says so."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=options.learning_rate, weight_decay=options.weight_decay)
    targets = torch.arange(len(images), device=images.device) % len(pairs)
    found: dict[str, Any] = {"images": len(images), "trained_parameters": sum(each.numel() for each in trained)}
    for half in (False, True):

        def step(half: bool = half) -> None:
            optimizer.zero_grad()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
                loss = model.loss(images, pairs, targets)
            loss.backward()
            optimizer.step()

        title = "bfloat16" if half else "float32"
        try:
            peak = peak_memory(step, images.device.type, runs=1)
            seconds = time_in_turn({"step": step}, rounds=rounds)["step"]
        except torch.cuda.OutOfMemoryError as error:
            found[title] = {"error": str(error).split(". ")[0]}
            continue
        found[title] = {
            "seconds": float(f"{seconds:.3g}"),
            "images_per_second": float(f"{len(images) / seconds:.3g}"),
            "peak_gb": round(peak / 2**30, 2),
            "finite": all(bool(each.grad.isfinite().all()) for each in trained if each.grad is not None),
        }
    return found


def main(
    encoder: str = "ViT-L-14-quickgelu",
    scale: float = 1.0,
    images: int | None = None,
    only: str = "",
    rounds: int = 3,
    name: str = "preset_steps",
) -> None:
    """Measure, print and write ``results/NAME-DEVICE.json``.

    Args:
        encoder: A name that ``wrap`` takes; ``tiny`` to try the script.
        scale: The part of the numbers of primitives and pairs, to try the script.
        images: A step; default: the preset's batch.
        only: Run the methods whose name has this in it.
        rounds: How often a step is timed.
        name: Of the results.
    """
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = wrap(encoder).to(device)
    rows = []
    for method, data in cases():
        if only not in method:
            continue
        gc.collect()
        torch.manual_seed(SEED)
        stage_two = method == CONDENSER
        space = draw_space(SIZES[data], scale)
        options, _ = load_options("sac" if stage_two else method, SIZES[data].preset)
        recipe = options.recipe("sac" if stage_two else method, encoder, "max", condenser=stage_two)
        model = build(recipe, space, encoder=copy.deepcopy(base)).to(device).train()
        count = options.batch_size if images is None else images
        pairs = space.pairs[space.seen_mask].to(device)
        step = measure(model, options, pairs, draw_images(model, count, device), rounds)
        rows.append({"method": method, "data": data, "pairs": len(pairs), **step})
        print(rows[-1], flush=True)
        del model
    content = {"encoder": encoder, "scale": scale, "rows": rows}
    write_results(f"{name}-{device}", "What does one step of each preset take?", SEED, content)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
