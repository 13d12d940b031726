"""What tells one CLIP's weights from another's."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def weights_digest(encoder: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: names, kinds, shapes and bits; as a hexadecimal string.

    Example:
        >>> first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> weights_digest(first) == weights_digest(first), weights_digest(first) == weights_digest(second)
        (True, False)
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(_bits(tensor))
    return digest.hexdigest()


def _bits(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
