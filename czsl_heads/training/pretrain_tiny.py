"""Pretrain the embedded tiny CLIP on captioned shapes: ``python -m czsl_heads.training.pretrain_tiny --out DIR``.

Scenes of the seen pairs of the shapes world, at every level of information imbalance, with captions that name the pair,
the attribute or the object. No caption ever names an unseen pair (of validation or of test), and no scene shows one.
Writes the merge file of the tokenizer, the weights, and a record of the run, from which the model card is made.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file
from torch import Tensor

from czsl_heads._files import whole_file, write_json
from czsl_heads.data.drawing import ATTRIBUTES, OBJECTS, compose, render
from czsl_heads.data.shapes import companions, split_pairs, unseen_pairs
from czsl_heads.encoders.open_clip import OpenClipEncoder
from czsl_heads.encoders.tiny import IMAGE_SIZE, MERGES, RECORD, WEIGHTS, build_tiny
from czsl_heads.encoders.transforms import CLIP_MEAN, CLIP_STD
from czsl_heads.functional.gap_losses import GapLoss, contrastive_loss, gap_loss

PREFIXES = ("a photo of a", "a photo of", "a picture of a", "an image of the", "a", "the", "a drawing of a", "")
PAIR_TEMPLATES = tuple(f"{prefix} {{attribute}} {{object}}".strip() for prefix in PREFIXES)
ATTRIBUTE_TEMPLATES = tuple(f"{prefix} {{attribute}}{noun}".strip() for prefix in PREFIXES for noun in ("", " object"))
OBJECT_TEMPLATES = tuple(f"{prefix} {{object}}".strip() for prefix in PREFIXES)
_KINDS = (("attribute", ATTRIBUTES), ("object", OBJECTS))
# Templates, the kinds of label (columns of `labels`, items of `_KINDS`) that they name, the option with their weight.
_CAPTIONS = (
    (PAIR_TEMPLATES, [0, 1], "pair_weight"),
    (ATTRIBUTE_TEMPLATES, [0], "part_weight"),
    (OBJECT_TEMPLATES, [1], "part_weight"),
)

_TRAIN_STREAM, _TEST_STREAM = 1001, 1002  # random streams of their own: no image is shared with any data set


@dataclass(frozen=True)
class PretrainSpec:
    """The run: ``images`` drawn once, ``steps`` of ``batch_size``, a share ``spelled`` of captions in letters.

    ``pair_weight`` and ``part_weight`` weigh the losses of captions that name the pair, and the attribute or the object
    alone; ``layers`` and ``patch_size`` are of the vision tower. ``gap_loss`` (``cua`` or ``cuaxu``) is added to the
    contrastive loss of each kind of caption, with ``gap_weight``.
    """

    images: int = 60_000
    steps: int = 2_400
    batch_size: int = 256
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: float = 0.08
    spelled: float = 0.1
    test_per_pair: int = 25
    seed: int = 0
    pair_weight: float = 1.0
    part_weight: float = 0.3
    layers: int = 4
    patch_size: int = 8
    gap_loss: GapLoss | None = None
    gap_weight: float = 1.0


def train_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Greedy byte-pair merges until every word is one token (most frequent pair first, ties in alphabetical order).

    Example:
        >>> train_merges(["red", "bed"])
        [('e', 'd</w>'), ('b', 'ed</w>'), ('r', 'ed</w>')]
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges = []
    while any(len(piece) > 1 for piece in pieces):
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        first, second = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((first, second))
        pieces = [_merge(piece, first, second) for piece in pieces]
    return merges


def _merge(piece: list[str], first: str, second: str) -> list[str]:
    merged: list[str] = []
    for part in piece:
        if merged and (merged[-1], part) == (first, second):
            merged[-1] = first + second
        else:
            merged.append(part)
    return merged


def write_merges(path: Path) -> None:
    """The merge file in open_clip's format: a header line, then a merge a line, gzipped, the same bytes every time."""
    words = [*ATTRIBUTES, *OBJECTS, *(word for prefix in PREFIXES for word in prefix.split()), "object"]
    lines = ["#version: shapes", *(" ".join(merge) for merge in train_merges(words))]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def _draw_one(task: tuple[list[int], str, str, float | None]) -> np.ndarray:
    key, attribute, obj, imbalance = task
    rng = np.random.default_rng(key)
    level = rng.random() if imbalance is None else imbalance
    scene = compose(attribute, obj, rng, imbalance=level, companions=companions())
    return np.asarray(render(scene, IMAGE_SIZE, rng)[0])


def _draw_all(tasks: Sequence[tuple[list[int], str, str, float | None]]) -> Tensor:
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        images = np.stack(list(pool.map(_draw_one, tasks, chunksize=500)))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _normalise(images: Tensor) -> Tensor:
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


class _Scenes(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Pixels and (attribute, object) indices, taken a whole batch at a time."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.pixels[indices], self.labels[indices]


class _Pretraining(lightning.LightningModule):
    def __init__(self, encoder: OpenClipEncoder, spec: PretrainSpec) -> None:
        super().__init__()
        self.encoder, self.spec = encoder, spec
        self.rng = np.random.default_rng([spec.seed, 7])
        self._vision = torch.compile(encoder.encode_images)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, labels = batch
        if self.rng.random() < 0.5:
            pixels = pixels.flip(-1)
        images = self._vision(_normalise(pixels))
        scale = self.encoder.logit_scale.clamp(max=100)
        total = images.new_zeros(())
        for templates, named, option in _CAPTIONS:
            weight: float = getattr(self.spec, option)
            if not weight:
                continue
            captioned, inverse = labels[:, named].unique(dim=0, return_inverse=True)
            template = templates[self.rng.integers(len(templates))]
            texts = [_caption(template, named, key) for key in captioned.tolist()]
            features = self._encode(texts)
            total = total + weight * contrastive_loss(images, features, labels=inverse, temperature=1 / scale)
            if self.spec.gap_loss is not None:
                gap = gap_loss(self.spec.gap_loss, images, features, inverse)
                total = total + weight * self.spec.gap_weight * gap
        self.log("loss", total, prog_bar=True)
        return total

    def _encode(self, texts: list[str]) -> Tensor:
        """Text features; now and then a batch's captions are spelled in letters, which other words are made of."""
        if self.rng.random() >= self.spec.spelled:
            return self.encoder.encode_texts(texts)
        tokenizer: Any = self.encoder.tokenizer
        ranks, tokenizer.bpe_ranks, cache = tokenizer.bpe_ranks, {}, tokenizer.cache
        tokenizer.cache = {name: name for name in ("<start_of_text>", "<end_of_text>")}
        try:
            return self.encoder.encode_texts(texts)
        finally:
            tokenizer.bpe_ranks, tokenizer.cache = ranks, cache

    def configure_optimizers(self) -> Any:
        spec = self.spec
        matrices = [p for p in self.encoder.parameters() if p.ndim >= 2]
        vectors = [p for p in self.encoder.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, spec.learning_rate, total_steps=spec.steps, pct_start=spec.warmup, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _caption(template: str, named: Sequence[int], key: Sequence[int]) -> str:
    kinds = ((_KINDS[kind], index) for kind, index in zip(named, key))
    return template.format(**{name: words[index] for (name, words), index in kinds})


def all_pairs() -> list[tuple[str, str]]:
    """Every pair of the world, attribute-major."""
    return [(attribute, obj) for attribute in ATTRIBUTES for obj in OBJECTS]


@torch.no_grad()
def fresh_features(
    encoder: OpenClipEncoder, spec: PretrainSpec, *, imbalance: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of images that no training saw ``[images, dim]``, the pair of each ``[images]``, and the texts of all
    pairs ``[pairs, dim]``, of length one.
    """
    encoder.eval()
    pairs = all_pairs()
    texts = F.normalize(encoder.encode_texts([f"a photo of {attribute} {obj}" for attribute, obj in pairs]), dim=-1)
    tasks = [
        ([spec.seed, _TEST_STREAM, column, number], *pair, imbalance)
        for column, pair in enumerate(pairs)
        for number in range(spec.test_per_pair)
    ]
    target = torch.arange(len(pairs)).repeat_interleave(spec.test_per_pair)
    pixels = _draw_all(tasks)
    features = torch.cat([encoder.encode_images(_normalise(chunk)) for chunk in pixels.split(512)])
    return features, target, texts


def zero_shot(encoder: OpenClipEncoder, spec: PretrainSpec, *, imbalance: float = 0.5) -> dict[str, float]:
    """Top-1 accuracy among all pairs on fresh images, for captioned and for held-out pairs, and per primitive."""
    features, target, texts = fresh_features(encoder, spec, imbalance=imbalance)
    predicted = (features @ texts.T).argmax(dim=1)
    held_out = {ATTRIBUTES.index(a) * len(OBJECTS) + OBJECTS.index(o) for a, o in unseen_pairs()}
    unseen = torch.tensor([column in held_out for column in target.tolist()])
    right = predicted == target
    accuracies = {
        "seen": right[~unseen],
        "held_out": right[unseen],
        "attribute": predicted // len(OBJECTS) == target // len(OBJECTS),
        "object": predicted % len(OBJECTS) == target % len(OBJECTS),
    }
    return {name: round(hits.float().mean().item(), 4) for name, hits in accuracies.items()}


def pretrain(out: Path, spec: PretrainSpec) -> dict[str, Any]:
    """Run the whole pretraining and write its files to ``out``; returns the record."""
    lightning.seed_everything(spec.seed)
    out.mkdir(parents=True, exist_ok=True)
    write_merges(out / MERGES)
    model, tokenizer = build_tiny(out / MERGES, layers=spec.layers, patch_size=spec.patch_size)
    encoder = OpenClipEncoder(model, tokenizer=tokenizer, frozen=False)

    pairs = split_pairs("train")
    tasks = [([spec.seed, _TRAIN_STREAM, n], *pairs[n % len(pairs)], None) for n in range(spec.images)]
    pixels = _draw_all(tasks)
    labels = torch.tensor([(ATTRIBUTES.index(a), OBJECTS.index(o)) for _, a, o, _ in tasks])
    loader = torch.utils.data.DataLoader(
        _Scenes(pixels, labels), spec.batch_size, shuffle=True, drop_last=True, collate_fn=lambda batch: batch
    )
    trainer = lightning.Trainer(
        max_steps=spec.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=CSVLogger(out, name="log", version=""),
        enable_checkpointing=False,
    )
    start = time.perf_counter()
    trainer.fit(_Pretraining(encoder, spec), loader)
    seconds = time.perf_counter() - start

    with whole_file(out / WEIGHTS) as path:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    record = {
        "spec": asdict(spec),
        "parameters": sum(p.numel() for p in model.parameters()),
        "captioned_pairs": len(pairs),
        "held_out_pairs": len(unseen_pairs()),
        "minutes": round(seconds / 60, 1),
        "logit_scale": round(encoder.logit_scale.item(), 2),
        "zero_shot": {str(level): zero_shot(encoder, spec, imbalance=level) for level in (0.0, 0.5, 1.0)},
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    written: dict[str, Any] = write_json(out / RECORD, record)
    return written


if __name__ == "__main__":
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_class_arguments(PretrainSpec, "spec")
    arguments = parser.parse_args()
    spec = PretrainSpec(**vars(arguments.spec))
    print(json.dumps(pretrain(arguments.out, spec), indent=2))
