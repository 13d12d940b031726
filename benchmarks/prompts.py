"""What does a shared prefix save in encoding prompts? ``python -m benchmarks.prompts`` (about 20 minutes on two cores).

The text tower of ViT-L/14 with random weights, MIT-States' numbers of attributes, objects and training pairs, forward
and backward to the prompts: ours against the same code that runs every prompt by itself, on the positions that it needs
(7 and 6), on 8 (as CSP and its followers do) and on all 77 (as open_clip does). All prompts on 77 positions want 60 GB,
so they are run in ten parts, once. All ways agree in features and gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import peak_memory, time_in_turn, write_results
from czsl_heads import CompositionSpace, SoftPrompts, wrap
from czsl_heads.encoders.open_clip import OpenClipEncoder

SEED = 0
SIZES = 115, 245, 1262  # attributes, objects, pairs
VISION = {"image_size": 28, "patch_size": 14, "width": 64, "layers": 1, "head_width": 64}  # open_clip wants one
CONTEXT = 3  # "a photo of"
LONG, PARTS = 77, 10


class PaddedPrompts(SoftPrompts):
    """Plain prompts that are run on ``length`` positions, as from a tokenizer with that context length."""

    length: int

    def _encode_plain(self, front: Tensor, tables: tuple[Tensor, ...], prompts: Tensor) -> Tensor:
        (encoder,) = self._encoder
        words = [table[rows] for table, rows in zip(tables, prompts.unbind(dim=1))]
        count, position = len(prompts), len(front) + len(words)
        end = self.get_buffer("_end")[:1].expand(self.length - position, -1)
        parts = [front.expand(count, -1, -1), torch.stack(words, dim=1), end.expand(count, -1, -1)]
        return encoder.encode_embeddings(torch.cat(parts, dim=1), torch.full((count,), position, device=front.device))


def draw_encoder(width: int, layers: int, quick_gelu: bool) -> OpenClipEncoder:
    import open_clip

    torch.manual_seed(SEED)
    text = {"width": width, "heads": width // 64, "layers": layers}
    return wrap(open_clip.CLIP(width, VISION, text, quick_gelu=quick_gelu).eval())


def draw_space(scale: float) -> CompositionSpace:
    """Random pairs, in the order of their attributes and objects."""
    attrs, objs, pairs = (max(1, round(scale * size)) for size in SIZES)
    drawn = torch.randperm(attrs * objs, generator=torch.Generator().manual_seed(SEED))[:pairs].sort().values
    names = [f"attribute {i}" for i in range(attrs)], [f"object {i}" for i in range(objs)]
    return CompositionSpace(*names, seen=[(names[0][i // objs], names[1][i % objs]) for i in drawn.tolist()])


def ways(encoder: OpenClipEncoder, space: CompositionSpace, lengths: list[int]) -> dict[str, SoftPrompts]:
    found: dict[str, SoftPrompts] = {"prefix": SoftPrompts(encoder, space, encode="prefix")}
    found["plain"] = SoftPrompts(encoder, space, encode="plain")
    found["prefix, checkpointed"] = SoftPrompts(encoder, space, encode="prefix", checkpoint=True)
    for length in lengths:
        padded = PaddedPrompts(encoder, space, encode="plain")
        padded.length = length
        found[f"{length} positions"] = padded
    return found


def step(prompts: SoftPrompts, space: CompositionSpace, weights: list[Tensor]) -> list[Tensor]:
    """Features and gradients; the loss gives every feature a weight of its own."""
    prompts.zero_grad()
    features = prompts(space)
    torch.stack([(part * weight).sum() for part, weight in zip(features, weights)]).sum().backward()
    return [*(part.detach() for part in features), *(p.grad for p in prompts.parameters() if p.grad is not None)]


def step_in_parts(prompts: SoftPrompts, space: CompositionSpace, weights: list[Tensor], parts: range) -> list[Tensor]:
    """:func:`step` on every tenth prompt, then on the next ones; some of these ten parts, or all."""
    prompts.zero_grad()
    contexts = prompts.pair_context, prompts.attribute_context, prompts.object_context
    sizes = len(space.attributes), len(space.objects)
    rows = [space.pairs, *(torch.arange(size)[:, None] for size in sizes)]
    features = [torch.zeros_like(weight) for weight in weights]
    for part in parts:
        attributes, objects = prompts.primitives.split(sizes)
        tables = (attributes, objects), (attributes,), (objects,)
        chunk = [kind[part::PARTS].to(attributes.device) for kind in rows]
        found = prompts.encode_kinds(contexts, tables, chunk)
        torch.stack([(own * weight[part::PARTS]).sum() for own, weight in zip(found, weights)]).sum().backward()
        for whole, own in zip(features, found):
            whole[part::PARTS] = own.detach()
    return [*features, *(p.grad for p in prompts.parameters() if p.grad is not None)]


def worst_differences(results: dict[str, list[Tensor]]) -> dict[str, float]:
    """The largest difference of each way from ``"plain"``, relative to the largest number; at most 1e-5."""
    plain = results["plain"]
    worst = {name: max(map(relative_difference, parts, plain)) for name, parts in results.items()}
    assert all(value <= 1e-5 for value in worst.values()), worst
    return worst


def relative_difference(part: Tensor, other: Tensor) -> float:
    return float((part - other).abs().max() / other.abs().max().clamp(min=1))


def measure(encoder: OpenClipEncoder, scale: float, rounds: int, device: str) -> dict[str, Any]:
    """Seconds and peak memory of a step of each way, and both as multiples of ours."""
    space = draw_space(scale)
    sizes = len(space.attributes), len(space.objects), len(space)
    generator = torch.Generator().manual_seed(SEED)
    attrs, objs, pairs = (torch.randn(size, encoder.dim, generator=generator).to(device) for size in sizes)
    prompts = {name: way.to(device) for name, way in ways(encoder, space, [8, LONG]).items()}
    long = partial(step_in_parts, prompts.pop(f"{LONG} positions"), space, [pairs, attrs, objs])
    rivals: dict[str, Callable[[], list[Tensor]]] = {
        name: partial(step, way, space, [pairs, attrs, objs]) for name, way in prompts.items()
    }
    results = {name: [part.clone() for part in run()] for name, run in rivals.items()}
    memory = {name: peak_memory(run, device, runs=1) / 1e6 for name, run in rivals.items()}
    # What a part keeps for its backward pass, all parts would keep together.
    memory[f"{LONG} positions"] = PARTS * peak_memory(partial(long, range(1)), device, runs=1) / 1e6
    seconds = time_in_turn(dict(rivals), rounds=rounds)
    results[f"{LONG} positions"], seconds[f"{LONG} positions"] = timed(partial(long, range(PARTS)))
    return {
        "attributes, objects, pairs": sizes,
        "positions": count_positions(*sizes, [8, LONG]),
        "worst_difference": worst_differences(results),
        "seconds": {name: float(f"{value:.3g}") for name, value in seconds.items()},
        "times_faster": {name: round(value / seconds["prefix"], 2) for name, value in seconds.items()},
        "megabytes": {name: round(value) for name, value in memory.items()},
        "times_smaller": {name: round(value / memory["prefix"], 2) for name, value in memory.items()},
    }


def timed(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], float]:
    start = time.perf_counter()
    found = run()  # minutes on a CPU, and so neither warmed up nor repeated
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.perf_counter() - start


def count_positions(attrs: int, objs: int, pairs: int, lengths: list[int]) -> dict[str, int]:
    front, prompts = 1 + CONTEXT, attrs + objs + pairs
    found = {"prefix": 3 * front + attrs + 2 * prompts, "plain": (front + 2) * prompts + pairs}
    return found | {f"{length} positions": length * prompts for length in lengths}


def main(
    width: int = 768,
    layers: int = 12,
    quick_gelu: bool = False,
    scale: float = 1.0,
    rounds: int = 3,
    name: str = "prompts",
) -> None:
    """Measure, print and write ``results/NAME.json``.

    Args:
        width: Of the text tower; 64 a head.
        layers: Of the text tower.
        quick_gelu: The activation of OpenAI's weights, instead of open_clip's default.
        scale: The part of MIT-States' numbers that is encoded, to try the script.
        rounds: How often each way is timed, but for that on 77 positions.
        name: Of the results, with the device behind it.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = draw_encoder(width, layers, quick_gelu).to(device)
    found = measure(encoder, scale, rounds, device)
    print(found, flush=True)
    tower = {"width": width, "layers": layers, "activation": "quick_gelu" if quick_gelu else "gelu"}
    content = {"tower": tower, "dtype": "float32", "threads": torch.get_num_threads(), **found}
    write_results(f"{name}-{device}", "What does a shared prefix save in encoding prompts?", SEED, content)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
