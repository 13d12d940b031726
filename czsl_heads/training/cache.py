"""Images encoded once, for a stage in which encoder and prompts stand still."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from czsl_heads.models.method import Logits, Method
from czsl_heads.prompts.soft import TextFeatures
from czsl_heads.training.feature_cache import encoded
from czsl_heads.training.shares import Shares, map_tensors, with_tensors

CACHE_BYTES = 2 * 2**30  # kept without being asked to


class EncodedImages(Dataset[Any]):
    """What a method makes of images before it is asked for vectors: their encoding, its own logits, their columns.

    Indexed by lists of numbers or of ``(epoch, number)``.
    """

    def __init__(self, encoded: Any, logits: Logits, columns: Tensor) -> None:
        self.encoded, self.logits, self.columns = encoded, logits, columns

    def __len__(self) -> int:
        return len(self.columns)

    def __getitems__(self, indices: list[int] | list[tuple[int, int]]) -> tuple[Any, Logits, Tensor]:
        rows = [index[1] if isinstance(index, tuple) else index for index in indices]

        def take(tensor: Tensor) -> Tensor:
            return tensor[rows]

        return map_tensors(take, self.encoded), map_tensors(take, self.logits), self.columns[rows]

    @property
    def num_bytes(self) -> int:
        sizes: list[int] = []
        map_tensors(lambda tensor: sizes.append(tensor.nbytes), (self.encoded, self.logits, self.columns))
        return sum(sizes)


@torch.no_grad()
def encode_images(
    method: Method,
    loader: DataLoader[Any],
    texts: TextFeatures,
    *,
    device: torch.device,
    limit: int | None,
    dtype: torch.dtype = torch.float32,
) -> EncodedImages | None:
    """Encode all images of an evaluation's loader and keep the result in main memory.

    Each of several processes encodes its share, and gets all of it. None if it would take over ``limit`` bytes.
    """
    shares: Shares = loader.batch_sampler.shares  # type: ignore[union-attr]
    parts: list[Any] = []
    for turn, (images, columns) in enumerate(loader):
        found = encoded(method, images.to(device, dtype))
        (logits,) = method.compare(found, texts)
        part = map_tensors(Tensor.cpu, (found, logits, columns))
        kept = EncodedImages(*part)
        if limit is not None and not parts and kept.num_bytes / len(kept) * len(loader.dataset) > limit:  # type: ignore[arg-type]
            return None
        parts.append(part if shares.has_own(turn) else map_tensors(_nothing_of, part))

    tensors: list[list[Tensor]] = [[] for _ in parts]
    for own, part in zip(tensors, parts):
        map_tensors(own.append, part)
    every = shares.joined([torch.cat(batches) for batches in zip(*tensors)])
    return EncodedImages(*with_tensors(parts[0], every))


def _nothing_of(tensor: Tensor) -> Tensor:
    return tensor[:0]
