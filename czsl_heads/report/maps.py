"""Where a model looks: maps over the patches of an image, and whether they point at its object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from czsl_heads._checks import check_shapes, check_tensor
from czsl_heads.adapters.lora_layers import LoRAAttention
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.functional.unit import unit_vectors
from czsl_heads.models.method import Method


class TokenMap(NamedTuple):
    """One number for each token of each image.

    Attributes:
        prefix: Of the image feature, token 0: ``[batch, 1]``.
        patches: Of the patches, as they lie in the image: ``[batch, rows, columns]``.
    """

    prefix: Tensor
    patches: Tensor

    @property
    def winner(self) -> Tensor:
        """The token of the highest number, long ``[batch]``: 0 is [CLS], patches come row by row behind the prefix."""
        patches = rearrange(self.patches, "... rows columns -> ... (rows columns)")
        return torch.cat([self.prefix, patches], dim=-1).argmax(dim=-1)

    def image(self, index: int) -> TokenMap:
        """The map of one image, without the batch axis in all that it has, on the CPU."""
        return TokenMap(self.prefix[index].cpu(), self.patches[index].cpu())


def token_map(numbers: Tensor, encoder: Encoder) -> TokenMap:
    """Lay out numbers ``[batch, tokens]`` of all tokens of an encoder.

    Raises:
        TypeError, ValueError: ``numbers`` is no float tensor, or of another number of tokens.
    """
    rows, columns = encoder.grid
    check_tensor("numbers", numbers)
    check_shapes(numbers=(numbers, f"batch {1 + rows * columns}"))
    prefix, patches = numbers.split([1, rows * columns], dim=1)
    return TokenMap(prefix, rearrange(patches, "batch (rows columns) -> batch rows columns", rows=rows))


def alignment_map(tokens: Tensor, texts: Tensor, encoder: Encoder) -> TokenMap:
    """Cosine of every token ``[batch, tokens, dim]`` with the text of its image ``[batch, dim]``."""
    check_tensor("tokens", tokens)
    check_tensor("texts", texts)
    check_shapes(tokens=(tokens, "batch tokens dim"), texts=(texts, "batch dim"))
    tokens, texts = unit_vectors(tokens, torch.float32), unit_vectors(texts, torch.float32)
    cosines = einsum(tokens, texts, "batch tokens dim, batch dim -> batch tokens")
    return token_map(cosines, encoder)


@torch.no_grad()
def encode_with_attention(model: Method, images: Tensor) -> tuple[Any, TokenMap]:
    """``model.encode(images)``, and how much [CLS] reads of each token in the last block, mean over heads.

    Returns:
        What the method encodes, and the map; all of its numbers for one image sum to one.

    Raises:
        TypeError: The last block has no attention that can return its weights.
    """
    encoder = model.encoder
    attention = getattr(encoder.blocks("vision")[-1], "attn", None)
    if not isinstance(attention, (nn.MultiheadAttention, LoRAAttention)):
        raise TypeError(f"expected blocks with nn.MultiheadAttention or LoRA in it, got {type(attention).__name__}")
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = attention.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    try:
        encoded = model.encode(images)
    finally:
        handle.remove()
    arguments, options = calls[0]
    _, weights = attention(*arguments, **{**options, "need_weights": True})
    return encoded, token_map(weights[:, 0], encoder)


def crop_transform(encoder: Encoder, *, nearest: bool = False) -> Callable[[Any], Any]:
    """What ``encoder.transform()`` does to the geometry of a PIL image, and nothing else: resize and crop.

    ``nearest`` invents no values between those of a mask.
    """
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    whole: Any = encoder.transform()
    steps = [step for step in whole.transforms if isinstance(step, (Resize, CenterCrop))]
    if nearest:
        flat = InterpolationMode.NEAREST
        steps = [Resize(step.size, flat) if isinstance(step, Resize) else step for step in steps]
    composed: Callable[[Any], Any] = Compose(steps)
    return composed


def centres_inside(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Whether the centre of each patch is inside the mask.

    Args:
        masks: True inside the object, bool ``[batch, height, width]``, as the encoder sees the image.
        grid: Rows and columns of patches; the centre of a patch is the pixel at (row + 1/2) height / rows, rounded
            down, and so on.

    Returns:
        Bool ``[batch, rows, columns]``.
    """
    check_tensor("masks", masks, dtypes=(torch.bool,))
    sizes = check_shapes(masks=(masks, "batch height width"))
    lines, places = (
        [(2 * index + 1) * size // (2 * count) for index in range(count)]
        for size, count in zip((sizes["height"], sizes["width"]), grid)
    )
    return masks[:, lines][:, :, places]


def points_inside(patches: Tensor, inside: Tensor) -> Tensor:
    """Whether the highest patch of each map is inside the mask.

    Args:
        patches: Maps ``[batch, rows, columns]``.
        inside: Of :func:`centres_inside`, bool ``[batch, rows, columns]``.

    Returns:
        Bool ``[batch]``; its mean is the pointing score, and the mean of ``inside`` what chance would score.
    """
    check_tensor("patches", patches)
    check_tensor("inside", inside, dtypes=(torch.bool,))
    check_shapes(patches=(patches, "batch rows columns"), inside=(inside, "batch rows columns"))
    numbers, hits = (rearrange(each, "batch rows columns -> batch (rows columns)") for each in (patches, inside))
    highest = numbers.argmax(dim=1, keepdim=True)
    return hits.gather(1, highest).squeeze(1)
