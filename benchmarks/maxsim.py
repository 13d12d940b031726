"""How fast is maxsim, and what does ``select="bf16"`` change? ``python -m benchmarks.maxsim``.

At the published shapes of each data set with ViT-L/14 at 224 pixels (257 tokens, 768 dimensions), ours against the
plain way, ``einsum`` then ``amax`` with autograd, eager and under ``torch.compile``; on CUDA also against
late-interaction-kernels and flash-maxsim where they are installed. Then, on tokens of the tiny CLIP, how often a
bfloat16 product picks another token than a float32 one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import peak_memory, time_in_turn, write_results
from czsl_heads import wrap
from czsl_heads.data import make_shapes, read_dataset
from czsl_heads.functional import maxsim

SEED = 0
TOKENS, DIM = 257, 768
# Images and texts of a batch: in training (forward and backward), and of the open world (forward only).
TRAINING = {
    "UT-Zappos": (64, 83),
    "MIT-States": (64, 1262),
    "MIT-States, 32 images": (32, 1262),
    "C-GQA": (16, 5592),
}
OPEN_WORLD = {"MIT-States, open world": (32, 28175), "C-GQA, open world": (4, 278362)}
CUDA_TARGET = {"C-GQA, open world, 16 images": (16, 278362)}


def plain(tokens: Tensor, texts: Tensor) -> Tensor:
    """What one writes first; the backward pass of ``amax`` shares a gradient among equals."""
    return torch.einsum("bld,cd->blc", tokens, texts).amax(dim=1)


def product(tokens: Tensor, texts: Tensor) -> Tensor:
    return tokens.flatten(0, 1) @ texts.mT


def rivals(device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": maxsim,
        "plain": plain,
        "plain, torch.compile": torch.compile(plain),
    }
    if device == "cuda":
        ways["ours, triton"] = partial(maxsim, backend="triton")
        # Each text is a query of one token; their scores are [texts, images].
        for name, module, function in (
            ("late-interaction-kernels", "late_interaction_kernels", "maxsim"),
            ("flash-maxsim", "flash_maxsim", "flash_maxsim_batched_train"),
        ):
            try:
                found = getattr(importlib.import_module(module), function)
            except ImportError:
                continue
            ways[name] = lambda tokens, texts, found=found: found(texts[:, None], tokens).mT  # type: ignore[misc]
    return ways


def draw(images: int, texts: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    vectors = (torch.randn(*shape, DIM, generator=generator) for shape in ((images, TOKENS), (texts,)))
    tokens, rows = (F.normalize(part, dim=-1).to(device, dtype) for part in vectors)
    return tokens, rows


def step(way: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor], grad: Tensor) -> None:
    for value in inputs:
        value.grad = None
    way(*inputs).backward(grad)


def measure(images: int, texts: int, device: str, dtype: torch.dtype, *, backward: bool) -> dict[str, Any]:
    """Times as multiples of the bare product, so that machines can be compared; peak memory in MB."""
    tokens, rows = draw(images, texts, device, dtype)
    ways = rivals(device)
    if not backward and device == "cpu":
        del ways["plain, torch.compile"]  # no faster at the shapes of training, and it would be minutes
    ways, failures = able(ways, tokens, rows, backward=backward)
    forward: dict[str, Callable[[], object]] = {"product": partial(product, tokens, rows)}
    forward |= {name: partial(way, tokens, rows) for name, way in ways.items()}
    forward["ours, with index"] = partial(maxsim, tokens, rows, return_index=True)
    forward["ours, bf16 selection"] = partial(maxsim, tokens, rows, select="bf16", return_index=True)
    seconds = {"forward": time_in_turn(forward)}
    memory = {name: peak_memory(forward[name], device) for name in ("ours", "plain")}
    found: dict[str, Any] = {"memory_mb": {"forward": {name: round(value / 1e6) for name, value in memory.items()}}}
    if backward:
        inputs = [tokens.clone().requires_grad_(), rows.clone().requires_grad_()]
        grad = torch.randn(images, texts, generator=torch.Generator().manual_seed(SEED)).to(device)
        ways["ours, bf16 selection"] = partial(maxsim, select="bf16")
        steps = {name: partial(step, way, inputs, grad) for name, way in ways.items()}
        seconds["step"] = time_in_turn({"product": forward["product"], **steps})
        if dtype == torch.float32:  # halves have ties, among which the plain way shares the gradient
            check_gradients(inputs, grad)
        memory = {name: peak_memory(steps[name], device) for name in ("ours", "plain")}
        found["memory_mb"]["step"] = {name: round(value / 1e6) for name, value in memory.items()}
    found["products"] = {
        part: {name: round(value / times["product"], 3) for name, value in times.items() if name != "product"}
        for part, times in seconds.items()
    }
    found |= {"failed": failures} if failures else {}
    return {"images": images, "texts": texts, "tokens": TOKENS, "dim": DIM, "dtype": str(dtype)[6:], **found}


def able(
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]], tokens: Tensor, rows: Tensor, *, backward: bool
) -> tuple[dict[str, Callable[[Tensor, Tensor], Tensor]], dict[str, str]]:
    """The ways that can do it here, and what the others say: a rival's failure is a result, ours is an error."""
    failures = {}
    for name, way in ways.items():
        inputs = [value.clone().requires_grad_(backward) for value in (tokens, rows)]
        try:
            scores = way(*inputs)
            if backward:
                scores.sum().backward()
        except Exception as error:
            if name.startswith("ours"):
                raise
            failures[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return {name: way for name, way in ways.items() if name not in failures}, failures


def check_gradients(inputs: list[Tensor], grad: Tensor) -> None:
    """Ours are those of the plain way, but for near-ties that another order of sums decides otherwise."""
    gradients = []
    for way in (plain, maxsim):
        step(way, inputs, grad)
        gradients.append([value.grad for value in inputs])
    for one, other in zip(*gradients):
        assert one is not None
        assert other is not None
        assert (~torch.isclose(one, other, atol=1e-5, rtol=1e-4)).float().mean() < 1e-3


def selection() -> list[dict[str, Any]]:
    """What a bfloat16 product does to the winner: on random vectors, and on images of the shapes world."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = [torch.randn(*shape, DIM, generator=generator) for shape in ((64, TOKENS), (500,))]
    cases = {"random vectors, 768 dimensions": (drawn[0], drawn[1]), "tiny CLIP, shapes test images": _shapes_tokens()}
    return [{"vectors": name, **_selection(*case)} for name, case in cases.items()]


def _shapes_tokens() -> tuple[Tensor, Tensor]:
    encoder = wrap("tiny")
    with TemporaryDirectory() as folder, torch.no_grad():
        dataset = read_dataset(make_shapes(Path(folder) / "shapes", train_per_pair=1, val_per_pair=1))
        loader = torch.utils.data.DataLoader(dataset.images("test", encoder.transform()), batch_size=128)
        tokens = torch.cat([encoder.encode_tokens(images) for images, _ in loader])
        names = [f"a photo of {attribute} {obj}" for attribute, obj in dataset.space.pair_names]
        return tokens, encoder.encode_texts(names)


def _selection(tokens: Tensor, texts: Tensor) -> dict[str, Any]:
    tokens, texts = F.normalize(tokens, dim=-1), F.normalize(texts, dim=-1)
    scores, index = maxsim(tokens, texts, return_index=True)
    picked_scores, picked = maxsim(tokens, texts, select="bf16", return_index=True)
    products = (tokens.bfloat16() @ texts.bfloat16().mT).max(dim=1).indices
    bound = max(
        float(((part.bfloat16() @ texts.bfloat16().mT).float() - part @ texts.mT).abs().max())
        for part in tokens.split(64)
    )
    alone = maxsim_of(tokens, texts, products)
    return {
        "decisions": scores.numel(),
        "error_of_a_product_in_logits": round(100 * bound, 4),
        "other_winner": {
            "bf16 selection": int((picked != index).sum()),
            "bf16 product alone": int((products != index).sum()),
        },
        "worst_difference_in_logits": {
            "bf16 selection": round(100 * float((scores - picked_scores).max()), 4),
            "bf16 product alone": round(100 * float((scores - alone).max()), 4),
        },
        "cls_wins": {
            "float32": int((index == 0).sum()),
            "bf16 selection": int((picked == 0).sum()),
            "bf16 product alone": int((products == 0).sum()),
        },
    }


def maxsim_of(tokens: Tensor, texts: Tensor, index: Tensor) -> Tensor:
    """Full-precision scores of given tokens."""
    return torch.cat(
        [(part @ texts.mT).gather(1, some[:, None])[:, 0] for part, some in zip(tokens.split(64), index.split(64))]
    )


def main(threads: int | None = None, name: str = "maxsim") -> None:
    """Measure, print and write ``results/NAME-DEVICE.json``.

    Args:
        threads: Of the CPU; default: as many as torch takes.
        name: Of the results.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads is not None:
        torch.set_num_threads(threads)
    shapes = [(shape, sizes, True) for shape, sizes in TRAINING.items()]
    shapes += [(shape, sizes, False) for shape, sizes in OPEN_WORLD.items()]
    dtypes = [torch.float32]
    if device == "cuda":
        shapes += [(shape, sizes, False) for shape, sizes in CUDA_TARGET.items()]
        dtypes.append(torch.bfloat16)
    rows = []
    for dtype in dtypes:
        for shape, (images, texts), backward in shapes:
            rows.append({"shape": shape, **measure(images, texts, device, dtype, backward=backward)})
            print(_line(rows[-1]), flush=True)
    found = selection()
    for case in found:
        print(case)
    question = "How fast is maxsim, and what does a bfloat16 selection change?"
    write_results(f"{name}-{device}", question, SEED, {"rows": rows, "selection": found})


def _line(row: dict[str, Any]) -> str:
    forward = row["products"]["forward"]
    words = f"{row['shape']:28} {row['dtype']:8} forward {forward['ours']:.2f} products"
    words += f", index {forward['ours, with index']:.2f}, bf16 {forward['ours, bf16 selection']:.2f}"
    if "step" in row["products"]:
        step_times = row["products"]["step"]
        words += "; step: " + ", ".join(
            f"{value / step_times['ours']:.2f}x {name}" for name, value in step_times.items() if name != "ours"
        )
    return f"{words}; {row['memory_mb']}"


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
