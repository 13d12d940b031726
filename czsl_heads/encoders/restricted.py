"""The image feature of a part of an image: what a CLIP would say of an object if it were told where that is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from czsl_heads._checks import check_integer, check_kind, check_shapes, check_tensor
from czsl_heads.encoders.blocks import BlockParts, cannot_run_in_parts
from czsl_heads.encoders.clip import ClipEncoder


def restricted_features(encoder: ClipEncoder, images: Tensor, inside: Tensor, *, blocks: int = 2) -> Tensor:
    """Image features made of some patches alone, without any training.

    A class token attends, in the last blocks, to itself, to registers where there are any, and to the patches inside;
    all other tokens are as they are. A tower that takes the mean of its patches takes that of the patches inside, and
    has no use for ``blocks``. An image without a patch inside keeps its own feature.

    Args:
        encoder: A wrapped CLIP whose vision tower pools a class token or the mean of patches.
        images: ``[batch, 3, height, width]``, normalised.
        inside: True for the patches of the object, bool ``[batch, rows, columns]`` of the encoder's grid.
        blocks: In how many of the last blocks the class token is told.

    Returns:
        ``[batch, dim]``, not normalised.

    Raises:
        TypeError: The tower pools by attention, or its blocks are of an unknown kind.
        TypeError, ValueError: An argument is of another kind or shape, or out of range.

    Example:
        >>> from czsl_heads import wrap
        >>> encoder, images = wrap("tiny"), torch.zeros(2, 3, 48, 48)
        >>> inside = torch.zeros(2, *encoder.grid, dtype=torch.bool)
        >>> inside[:, 2:4, 2:4] = True
        >>> restricted_features(encoder, images, inside).shape
        torch.Size([2, 96])
    """
    check_kind("encoder", encoder, ClipEncoder)
    check_tensor("inside", inside, dtypes=(torch.bool,))
    rows, columns = encoder.grid
    check_shapes(images=(images, "batch 3 height width"), inside=(inside, f"batch {rows} {columns}"))
    tower = encoder.vision
    check_integer("blocks", blocks, 1, len(tower.blocks))
    if reason := cannot_restrict(encoder):
        raise TypeError(f"expected `encoder` to pool a class token or the mean of patches, got {reason}")

    patches = inside.flatten(1).to(images.device)  # [batch, patches]
    patches = patches | ~patches.any(dim=1, keepdim=True)
    every = [*tower.blocks]
    told = len(every) - blocks if tower.pools_class_token else len(every)
    hidden = tower.enter(images.to(tower.dtype))
    for place, block in enumerate(every):
        step = block if place < told else _Told(block, patches, encoder.num_prefix)
        hidden = tower.step(step, hidden)  # type: ignore[arg-type]
    if tower.pools_class_token:
        return tower.leave(hidden)[:, 0]
    kept = F.pad(patches, (encoder.num_prefix, 0), value=True)  # [batch, tokens]
    features = [tower.leave(tokens[own][None])[:, 0] for tokens, own in zip(hidden, kept)]
    return torch.cat(features) if features else tower.leave(hidden)[:, 0]


def patches_touched(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which patches have any pixel in a mask.

    Args:
        masks: True inside the object, bool ``[batch, height, width]``, as the encoder sees the image.
        grid: Rows and columns of patches.

    Returns:
        Bool ``[batch, rows, columns]``.
    """
    check_tensor("masks", masks, dtypes=(torch.bool,))
    check_shapes(masks=(masks, "batch height width"))
    return F.adaptive_max_pool2d(masks.float()[:, None], grid)[:, 0] > 0


def cannot_restrict(encoder: ClipEncoder) -> str | None:
    """Why an encoder has no such features, as what it is instead; None if it has."""
    tower = encoder.vision
    if not tower.pools_class_token and _pools_by_attention(tower):
        return "a tower that pools by attention"
    reasons = [cannot_run_in_parts(block) for block in tower.blocks] if tower.pools_class_token else []
    return next((reason for reason in reasons if reason), None)


class _Told:
    """A block in which the first token reads no patch outside; called as the container calls the block."""

    def __init__(self, block: nn.Module, patches: Tensor, num_prefix: int) -> None:
        self.parts = BlockParts(block)
        self.allowed = F.pad(patches, (num_prefix, 0), value=True)  # [batch, tokens]

    def __call__(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if not self.parts.batch_first:
            return self._read(hidden.transpose(0, 1), None).transpose(0, 1)
        return self._read(hidden, options.get("rope"))

    def _read(self, stream: Tensor, rope: Tensor | None) -> Tensor:
        parts, tokens = self.parts, stream.shape[1]
        normed = parts.norm("attention", stream)
        query, key, value = (part.transpose(1, 2) for part in parts.heads(normed, rope))
        mask = self.allowed.new_ones(len(stream), 1, tokens, tokens)
        mask[:, 0, 0] = self.allowed
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=parts.dropout)
        attended = parts.project_out(mixed.transpose(1, 2), normed)
        return parts.add_mlp(parts.add("attention", stream, attended))


def _pools_by_attention(tower: Any) -> bool:
    from czsl_heads.encoders.hugging_face_towers import SiglipVision

    trunk = getattr(getattr(tower, "visual", None), "trunk", None)
    return isinstance(tower, SiglipVision) or getattr(trunk, "global_pool", None) == "map"
