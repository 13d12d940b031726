"""Images encoded once, for a stage in which encoder and prompts stand still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from czsl_heads.models.method import Logits, Method
from czsl_heads.prompts.soft import TextFeatures
from czsl_heads.training.feature_cache import encoded

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


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A tensor, or tuples of such, plain or named, with a function of each tensor in its place."""
    if isinstance(value, Tensor):
        return function(value)
    parts = [map_tensors(function, part) for part in value]
    return value._make(parts) if hasattr(value, "_make") else tuple(parts)


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
    """Encode all images of a loader and keep the result in main memory; None if it would take over ``limit`` bytes."""
    parts: list[EncodedImages] = []
    for images, columns in loader:
        found = encoded(method, images.to(device, dtype))
        (logits,) = method.compare(found, texts)
        part = EncodedImages(map_tensors(Tensor.cpu, found), map_tensors(Tensor.cpu, logits), columns)
        if limit is not None and not parts and part.num_bytes / len(part) * len(loader.dataset) > limit:  # type: ignore[arg-type]
            return None
        parts.append(part)
    return EncodedImages(
        _joined([part.encoded for part in parts]),
        _joined([part.logits for part in parts]),
        torch.cat([part.columns for part in parts]),
    )


def _joined(parts: list[Any]) -> Any:
    """Tensors, or tuples of such, behind each other."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    fields = [_joined([*each]) for each in zip(*parts)]
    return first._make(fields) if hasattr(first, "_make") else tuple(fields)
