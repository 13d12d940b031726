"""Where a model looks: maps over the patches of an image, and whether they point at its object."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple, get_args

import torch
from einops import einsum, rearrange
from torch import Tensor

from czsl_heads._checks import check_shapes, check_tensor
from czsl_heads.encoders.blocks import BlockParts, cannot_run_in_parts
from czsl_heads.encoders.clip import ClipEncoder
from czsl_heads.encoders.dense import Dense
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.functional.precision import score_dtype
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
def encode_with_attention(model: Method, images: Tensor) -> tuple[Any, TokenMap | None]:
    """``model.encode(images)``, and how much [CLS] reads of each token in the last block, mean over heads.

    Returns:
        What the method encodes, and the map; all of its numbers for one image sum to one, and the shares of registers
        count among those of [CLS]. None in place of the map if no class token is pooled, or the last block is of
        another kind than :class:`~czsl_heads.encoders.blocks.BlockParts` knows.
    """
    encoder = model.encoder
    block: Any = encoder.blocks("vision")[-1]
    pools = encoder.vision.pools_class_token if isinstance(encoder, ClipEncoder) else encoder.num_prefix > 0
    if not pools or cannot_run_in_parts(block):
        return model.encode(images), None

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    try:
        encoded = model.encode(images)
    finally:
        handle.remove()
    arguments, options = calls[0]
    shares = _shares_of_first(BlockParts(block), arguments[0], options.get("rope"))
    of_prefix, of_patches = shares.tensor_split([encoder.num_prefix], dim=1)
    return encoded, token_map(torch.cat([of_prefix.sum(dim=1, keepdim=True), of_patches], dim=1), encoder)


def _shares_of_first(parts: BlockParts, hidden: Tensor, rope: Tensor | None) -> Tensor:
    """How much the first token reads of each, mean over heads, ``[batch, tokens]``."""
    stream = hidden if parts.batch_first else hidden.transpose(0, 1)
    heads = parts.heads(parts.norm("attention", stream), rope)
    query, key = heads.query[:, 0], heads.key
    logits = einsum(query, key, "batch heads dim, batch tokens heads dim -> batch heads tokens")
    shares: Tensor = (logits * query.shape[-1] ** -0.5).softmax(dim=-1, dtype=score_dtype(logits))
    return shares.mean(dim=1)


def dense_recipes(encoder: Encoder) -> list[Dense]:
    """The recipes for dense patch tokens that an encoder takes beside what it has now; none if its blocks are unknown.

    Example:
        >>> from czsl_heads import wrap
        >>> dense_recipes(wrap("tiny", dense="naclip"))
        ['value', 'sclip', 'clearclip']
    """
    if not isinstance(encoder, ClipEncoder) or cannot_run_in_parts(encoder.blocks("vision")[-1]):
        return []
    return [recipe for recipe in get_args(Dense) if recipe not in ("none", encoder.dense)]


def encode_densely(model: Method, images: Tensor, recipe: Dense) -> Any:
    """``model.encode(images)`` with the patch tokens of a recipe; the model is left as it was."""
    encoder: Any = model.encoder
    before, encoder.dense = encoder.dense, recipe
    try:
        return model.encode(images)
    finally:
        encoder.dense = before


def crop_transform(encoder: Encoder, *, nearest: bool = False) -> Callable[[Any], Any]:
    """What ``encoder.transform()`` does to the geometry of a PIL image, and nothing else: resize, crop and fill up.

    ``nearest`` is for masks: it invents no values between theirs, and what is filled up is outside.
    """
    from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    whole: Any = encoder.transform()
    kinds = (Resize, ResizeKeepRatio, CenterCrop, CenterCropOrPad)
    steps = [copy(step) for step in whole.transforms if isinstance(step, kinds)]
    for step in steps if nearest else ():
        if isinstance(step, (Resize, ResizeKeepRatio)):
            step.interpolation = InterpolationMode.NEAREST
        elif isinstance(step, CenterCropOrPad):
            step.fill = 0
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
