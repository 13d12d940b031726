"""In which precision scores are computed: float32 for half inputs, float64 as such, whatever autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def score_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: at a logit scale of 100, half-precision cosines flip near-ties."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Keep products in the dtype of their operands inside an autocast region."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
