"""Images encoded once, for a stage in which encoder and prompts stand still."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from czsl_heads.models.sac import SAC, BranchLogits, SpaceTexts

CACHE_BYTES = 2 * 2**30  # kept without being asked to


class EncodedImages(Dataset[Any]):
    """Tokens, alignment logits and columns of images; indexed by lists of numbers or of ``(epoch, number)``."""

    def __init__(self, tokens: Tensor, logits: BranchLogits, columns: Tensor) -> None:
        self.tokens, self.logits, self.columns = tokens, logits, columns

    def __len__(self) -> int:
        return len(self.columns)

    def __getitems__(self, indices: list[int] | list[tuple[int, int]]) -> tuple[Tensor, BranchLogits, Tensor]:
        rows = [index[1] if isinstance(index, tuple) else index for index in indices]
        return self.tokens[rows], BranchLogits(*(logits[rows] for logits in self.logits)), self.columns[rows]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tokens, *self.logits, self.columns))


@torch.no_grad()
def encode_images(
    sac: SAC,
    loader: DataLoader[Any],
    texts: SpaceTexts,
    *,
    device: torch.device,
    limit: int | None,
    dtype: torch.dtype = torch.float32,
) -> EncodedImages | None:
    """Encode all images of a loader and keep the result in main memory; None if it would take over ``limit`` bytes."""
    parts: list[EncodedImages] = []
    for images, columns in loader:
        tokens = sac.encoder.encode_tokens(images.to(device, dtype))
        logits = sac.align(tokens, texts)
        part = EncodedImages(tokens.cpu(), BranchLogits(*(rows.cpu() for rows in logits)), columns)
        if limit is not None and not parts and part.num_bytes / len(part) * len(loader.dataset) > limit:  # type: ignore[arg-type]
            return None
        parts.append(part)
    return EncodedImages(
        torch.cat([part.tokens for part in parts]),
        BranchLogits(*(torch.cat(rows) for rows in zip(*(part.logits for part in parts)))),
        torch.cat([part.columns for part in parts]),
    )
