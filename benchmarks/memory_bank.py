"""What does a memory bank cost beside the product that it cannot do without? ``python -m benchmarks.memory_bank``.

At the size of C-GQA's open world (278,362 pairs, dim 768, a batch of 64): seconds of reading and of an update as
multiples of the bare product of features and texts, with texts alone, with what the images of C-GQA leave there (the
32,018 of its training and test splits, over 7,767 pairs with a long tail), and in the worst case, where each of 32,000
images is the only one of its pair; and the memory that taking these in takes at its peak, growth included. At
MIT-States' closed world, against a dense bank that is updated one image at a time. About five minutes on two cores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import peak_memory, time_in_turn, write_results
from czsl_heads import DynamicMemoryBank

SEED = 0
BATCH, DIM, SLOTS = 64, 768, 16
OPEN_PAIRS, CLOSED_PAIRS, IMAGES = 278_362, 7_767, 32_018  # C-GQA
WORST_IMAGES = 32_000
MIT_PAIRS, MIT_IMAGES = 1_962, 30_338


class DenseBank:
    """All slots of all pairs, updated image by image: the usual way."""

    def __init__(self, texts: Tensor) -> None:
        self.vectors = texts.new_zeros(len(texts), SLOTS, texts.shape[1])
        self.entropy = texts.new_full((len(texts), SLOTS), torch.inf)
        self.filled = torch.zeros(len(texts), SLOTS, dtype=torch.bool, device=texts.device)
        self.vectors[:, 0], self.filled[:, 0] = texts, True  # a text's entropy is inf: it leaves first

    def update(self, features: Tensor, probs: Tensor, pair_index: Tensor | None = None) -> None:
        entropy = torch.special.entr(probs).sum(dim=1)
        for feature, value, pair in zip(features, entropy, probs.argmax(dim=1) if pair_index is None else pair_index):
            free = (~self.filled[pair]).nonzero()
            slot = free[0, 0] if len(free) > 0 else self.entropy[pair].argmax()
            if len(free) > 0 or value < self.entropy[pair, slot]:
                self.vectors[pair, slot] = F.normalize(feature, dim=0)
                self.entropy[pair, slot], self.filled[pair, slot] = value, True

    def __call__(self, features: Tensor) -> Tensor:
        cosines = torch.einsum("bd,pnd->bpn", F.normalize(features, dim=1), self.vectors)
        weights = (cosines / 0.1).masked_fill(~self.filled, -torch.inf).softmax(dim=2)
        return 100 * torch.einsum("bpn,pnd,bd->bp", weights, self.vectors, F.normalize(features, dim=1))


def long_tail(images: int, pairs: int, generator: torch.Generator) -> Tensor:
    """Pairs of images, the i-th as often as 1/i."""
    return torch.multinomial(1 / torch.arange(1, pairs + 1).double(), images, replacement=True, generator=generator)


def fill(bank: Any, pair_index: Tensor, probs: Tensor, generator: torch.Generator, *, anew: bool = False) -> Any:
    """Show the bank an image for each index, in batches; predictions, drawn anew for each or not, rank them."""
    for labels in pair_index.split(BATCH):
        features = torch.randn(len(labels), DIM, generator=generator).to(probs.device)
        if anew:
            probs = draw_probs(probs.shape[1], generator).to(probs.device)
        bank.update(features, probs[: len(labels)], pair_index=labels.to(probs.device))
    return bank


def draw_probs(pairs: int, generator: torch.Generator) -> Tensor:
    return (3 * torch.randn(BATCH, pairs, generator=generator)).softmax(dim=1)


def draw(pairs: int, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Unit texts, features of a batch, and predictions for it."""
    texts = F.normalize(torch.randn(pairs, DIM, generator=generator), dim=1)
    features = torch.randn(BATCH, DIM, generator=generator)
    return texts.to(device), features.to(device), draw_probs(pairs, generator).to(device)


def new_bank(texts: Tensor) -> DynamicMemoryBank:
    bank = DynamicMemoryBank(len(texts), DIM, slots=SLOTS).to(texts.device)
    bank.fill_texts(texts, torch.arange(len(texts), device=texts.device))
    return bank


@torch.no_grad()
def measure_open_world(device: str, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    texts, features, probs = draw(OPEN_PAIRS, device, generator)
    places = torch.randperm(OPEN_PAIRS, generator=generator)
    fills = {
        "texts alone": places[:0],
        "images of C-GQA": places[long_tail(IMAGES, CLOSED_PAIRS, generator)],
        "each image another pair": places[:WORST_IMAGES],
    }
    rows = []
    for name, pair_index in fills.items():
        filled = fill(new_bank(texts), pair_index, probs, generator)
        for empty in ("mask", "zero"):
            bank = copy.deepcopy(filled)
            bank.empty = empty  # type: ignore[assignment]
            rivals: dict[str, Callable[[], object]] = {
                "product": partial(torch.matmul, features, texts.mT),
                "read": partial(bank, features),
                "update": partial(bank.update, features, probs),
            }
            seconds = time_in_turn(rivals, rounds=rounds)
            ratios = {key: round(seconds[key] / seconds["product"], 2) for key in ("read", "update")}
            ratios["both"] = round((seconds["read"] + seconds["update"]) / seconds["product"], 2)
            rows.append({"fill": name, "empty": empty, "entries": int(bank.count), "times_the_product": ratios})
            print(rows[-1], flush=True)

    def grow() -> object:
        bank = fill(new_bank(texts), fills["each image another pair"], probs, generator)
        return bank, bank(features)

    peak = round(peak_memory(grow, device) / 1e6)
    print(f"peak of growing to {WORST_IMAGES} images and reading: {peak} MB", flush=True)
    sizes = {"pairs": OPEN_PAIRS, "dim": DIM, "slots": SLOTS, "batch": BATCH}
    return {"sizes": sizes, "rows": rows, "megabytes_beyond_texts": peak}


@torch.no_grad()
def measure_dense(device: str, rounds: int) -> dict[str, Any]:
    """Seconds of the dense bank as multiples of ours, with the same entries."""
    generator = torch.Generator().manual_seed(SEED)
    texts, features, probs = draw(MIT_PAIRS, device, generator)
    pair_index = long_tail(MIT_IMAGES, MIT_PAIRS, generator)
    banks = new_bank(texts), DenseBank(texts)
    # Drawn anew, since of equal predictions the dense bank would not know the earlier.
    seeded = partial(torch.Generator().manual_seed, SEED)
    ours, dense = (fill(bank, pair_index, probs, seeded(), anew=True) for bank in banks)
    torch.testing.assert_close(ours(features), dense(features), atol=1e-3, rtol=1e-4)
    rivals: dict[str, Callable[[], object]] = {
        "read": partial(ours, features),
        "update": partial(ours.update, features, probs),
        "dense read": partial(dense, features),
        "dense update": partial(dense.update, features, probs),
    }
    seconds = time_in_turn(rivals, rounds=rounds)
    row = {
        "pairs": MIT_PAIRS,
        "entries": int(ours.count),
        "times_faster": {key: round(seconds[f"dense {key}"] / seconds[key], 1) for key in ("read", "update")},
    }
    print(row, flush=True)
    return row


def main(rounds: int = 15) -> None:
    """Measure, print and write ``results/memory_bank-DEVICE.json``.

    Args:
        rounds: How often each is timed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content = {
        "threads": torch.get_num_threads(),
        "open_world": measure_open_world(device, rounds),
        "dense": measure_dense(device, rounds),
    }
    write_results(f"memory_bank-{device}", "What does a memory bank cost beside its bare product?", SEED, content)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
