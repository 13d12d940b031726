"""Patch dropout: in training, a vision tower sees a random part of each image's patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from czsl_heads._checks import check_range
from czsl_heads.encoders.protocol import Encoder


def drop_patches(encoder: Encoder, rate: float) -> torch.utils.hooks.RemovableHandle:
    """Hide a share of the patch tokens from the vision tower, anew for each image and step, in training mode only.

    The tokens are taken away before the first block, after positions were added; the prefix ([CLS]) always stays. What
    is drawn comes from torch's global generator. ``encode_tokens`` then returns fewer tokens.

    Args:
        encoder: A wrapped CLIP; changed in place.
        rate: Share of the patches to hide, in [0, 1); at least one patch stays.

    Returns:
        A handle, whose ``remove()`` undoes it.

    Raises:
        TypeError, ValueError: ``rate`` is no number in [0, 1).

    Example:
        >>> from czsl_heads import wrap
        >>> encoder = wrap("tiny").train()
        >>> handle = drop_patches(encoder, 0.5)
        >>> encoder.encode_tokens(torch.zeros(2, 3, 48, 48)).shape  # [CLS] and half of 36 patches
        torch.Size([2, 19, 96])

    References:
        Li et al., FLIP, CVPR 2023 (dropping patches in training). Zhang et al., SAM, CVPR 2026 (SAC): Fig. 2.
    """
    check_range("rate", rate, 0, 1)
    if rate == 1:
        raise ValueError("expected `rate` to be below 1, got 1")
    prefix = encoder.num_prefix

    def choose(tokens: Tensor) -> Tensor | None:
        patches = tokens.shape[1] - prefix
        kept = max(1, round(patches * (1 - rate)))
        if kept == patches:
            return None
        return torch.rand(len(tokens), patches, device=tokens.device).argsort(dim=1)[:, :kept].sort(dim=1).values

    # Where every block turns its patches by their places, they have to be told to all of them.
    keep_patches = getattr(getattr(encoder, "vision", None), "keep_patches", None)
    if keep_patches is not None:
        handle: torch.utils.hooks.RemovableHandle = keep_patches(choose)
        return handle

    def drop(block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        tokens: Tensor = arguments[0]
        kept = choose(tokens) if block.training else None
        if kept is None:
            return None
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        return (torch.cat([tokens[:, :prefix], tokens[rows, kept + prefix]], dim=1), *arguments[1:])

    return encoder.blocks("vision")[0].register_forward_pre_hook(drop)
