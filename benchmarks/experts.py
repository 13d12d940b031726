"""What does a mixture of experts cost? ``python -m benchmarks.experts`` (about two minutes on a CPU).

At the sizes of ViT-L/14 (width 1024, 257 tokens of each image): the two ways of ``functional.mix_experts`` against a
loop over all experts, each of which sees every token, forward alone and with the backward pass; and the share that
experts in both towers have in a training step of the whole encoder, against a step whose gradient goes the same way
through the blocks and in which one parameter is trained. Weights are random: only times are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import time_in_turn, write_results
from czsl_heads import add_experts, wrap
from czsl_heads.functional import mix_experts, route
from czsl_heads.functional.experts import gates

SEED = 0
WIDTH, TOKENS = 1024, 257
WAYS = ("sparse", "joined", "auto")
# experts, rank, k: what EVA is read to have first, and where tokens are worth moving
SIZES = ((8, 8, 2), (8, 64, 2), (32, 8, 2), (64, 16, 2), (128, 8, 2))


def loop(tokens: Tensor, down: Tensor, up: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """All experts see all tokens."""
    spread = gates(weights, experts, len(down))
    mixed = torch.zeros_like(tokens)
    for number in range(len(down)):
        out = F.linear(F.linear(tokens, down[number]), up[number])
        mixed = mixed + spread[:, number : number + 1] * out
    return mixed


def compare_ways(images: int, sizes: tuple[int, int, int], rounds: int, device: str) -> dict[str, Any]:
    experts, rank, k = sizes
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randn(images * TOKENS, WIDTH, generator=generator)
    down = torch.randn(experts, rank, WIDTH, generator=generator) / WIDTH**0.5
    up = torch.randn(experts, WIDTH, rank, generator=generator) / rank**0.5
    weights, chosen = route(torch.randn(len(tokens), experts, generator=generator), k)
    tokens, down, up, weights, chosen = (tensor.to(device) for tensor in (tokens, down, up, weights, chosen))
    # Whoever runs behind the loop pays for the memory that it gave back: one run that no ratio is taken of.
    ways: dict[str, Callable[..., Tensor]] = {"loop": loop, "behind the loop": mix_experts}
    for way in WAYS:
        ways[way] = lambda *inputs, way=way: mix_experts(*inputs, dispatch=way)  # type: ignore[misc]

    found: dict[str, Any] = {"experts": experts, "rank": rank, "k": k}
    for train in (False, True):
        inputs = [tensor.clone().requires_grad_(train) for tensor in (tokens, down, up, weights)]

        def run(way: Callable[..., Tensor], inputs: list[Tensor] = inputs, train: bool = train) -> None:
            mixed = way(*inputs, chosen)
            if train:
                torch.autograd.grad(mixed.sum(), inputs)

        rivals = {name: (lambda way=way: run(way)) for name, way in ways.items()}
        seconds = time_in_turn(rivals, rounds=rounds)
        ratios = {f"loop / {name}": round(seconds["loop"] / seconds[name], 2) for name in WAYS}
        found["forward and backward" if train else "forward"] = ratios
    return found


def share_of_a_step(encoder_name: str, images: int, rounds: int, device: str) -> dict[str, Any]:
    """How much longer a training step takes with experts in both towers."""
    steps = {}
    for name in ("without", "with"):
        torch.manual_seed(SEED)
        encoder: Any = wrap(encoder_name).to(device)
        if name == "with":
            for tower in ("vision", "text"):
                add_experts(encoder, tower=tower)
        # What every gradient has to reach anyway: the parameters that stand before the first block of each tower.
        encoder.model.visual.class_embedding.requires_grad_(True)
        encoder.model.positional_embedding.requires_grad_(True)
        size = encoder.image_size
        pixels = torch.randn(images, 3, size, size).to(device)
        texts = [f"a photo of a thing {number}" for number in range(images)]
        steps[name] = _step(encoder, pixels, texts)
    seconds = time_in_turn(steps, rounds=rounds)
    return {
        "encoder": encoder_name,
        "images and texts": images,
        "with / without": round(seconds["with"] / seconds["without"], 3),
        "share of the step": round(1 - seconds["without"] / seconds["with"], 3),
    }


def _step(encoder: Any, pixels: Tensor, texts: list[str]) -> Callable[[], None]:
    learned = [parameter for parameter in encoder.parameters() if parameter.requires_grad]

    def step() -> None:
        similar = encoder.encode_tokens(pixels)[:, 0] @ encoder.encode_texts(texts).T
        torch.autograd.grad(similar.sum(), learned, allow_unused=True)

    return step


def main(images: int = 16, step_images: int = 4, encoder: str = "ViT-L-14", rounds: int = 5) -> None:
    """Measure, print and write ``results/experts-DEVICE.json``.

    Args:
        images: Images whose tokens are mixed.
        step_images: Images and texts of the training step.
        encoder: Architecture of the training step, with random weights.
        rounds: How often each is timed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = []
    for sizes in SIZES:
        ways.append(compare_ways(images, sizes, rounds, device))
        print(ways[-1], flush=True)
    step = share_of_a_step(encoder, step_images, rounds, device)
    print(step, flush=True)
    content = {"width": WIDTH, "tokens": images * TOKENS, "ways": ways, "step": step}
    write_results(f"experts-{device}", "What does a mixture of experts cost?", SEED, content)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
