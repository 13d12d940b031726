"""The towers of CLIP models of Hugging Face transformers, 4.48 and 5 alike.

Their parts are reached through ``model.vision_model`` and ``model.text_model``, which have the same names in both.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from czsl_heads.encoders.clip import Tokenizer
from czsl_heads.encoders.towers import TextTower, VisionTower


class HuggingFaceVision(VisionTower):
    """What the vision towers of transformers have in common."""

    def __init__(self, model: Any) -> None:
        self.model, self.tower = model, model.vision_model
        config = self.tower.config
        self.patch_size = _pair(config.patch_size)
        self._size = self._native_size = self._size_of(config)
        self._two_masks = _takes_two_masks(self.blocks)

    def _size_of(self, config: Any) -> tuple[int, int]:
        return _pair(config.image_size)

    @property
    def dim(self) -> int:
        return int(self.tower.config.hidden_size)

    @property
    def image_size(self) -> tuple[int, int]:
        return self._size

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self._size
        return height // self.patch_size[0], width // self.patch_size[1]

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.tower.encoder.layers
        return blocks

    @property
    def dtype(self) -> torch.dtype:
        first: Tensor = next(iter(self.tower.embeddings.parameters()))
        return first.dtype

    def resize(self, image_size: tuple[int, int]) -> None:
        """Take images of another size from now on; positions are interpolated by the model's own code."""
        inside = all(side > 0 and side % patch == 0 for side, patch in zip(image_size, self.patch_size))
        if not inside and image_size != self._native_size:
            raise ValueError(f"expected `image_size` in multiples of the patches {self.patch_size}, got {image_size}")
        self._size = image_size

    @property
    def interpolates(self) -> bool:
        """True if images have another size than in pretraining."""
        return self._size != self._native_size

    def step(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return _step(block, hidden, None, two_masks=self._two_masks)

    def run(self, images: Tensor, *, checkpoint: bool = False, last: Callable[..., Tensor] | None = None) -> Tensor:
        """As the base class; checkpoints that transformers was told to make are heeded besides."""
        checkpoint = checkpoint or _must_checkpoint(self.tower.encoder, self.blocks)
        return super().run(images, checkpoint=checkpoint, last=last)

    def pool(self, images: Tensor) -> Tensor:
        output = self.model.get_image_features(pixel_values=images, interpolate_pos_encoding=self.interpolates)
        return _feature(output)


class ClipVision(HuggingFaceVision):
    """The vision tower of ``CLIPModel`` and ``MetaClip2Model``: class token first, one projection for all tokens."""

    num_prefix = 1

    @property
    def dim(self) -> int:
        return int(self.model.config.projection_dim)

    def enter(self, images: Tensor) -> Tensor:
        embeddings = self.tower.embeddings(images, interpolate_pos_encoding=self.interpolates)
        hidden: Tensor = self.tower.pre_layrnorm(embeddings)  # the name is transformers'
        return hidden

    def leave(self, hidden: Tensor) -> Tensor:
        tokens: Tensor = self.model.visual_projection(self.tower.post_layernorm(hidden))
        return tokens


class SiglipVision(HuggingFaceVision):
    """The vision tower of ``SiglipModel``: no class token; a head pools the patches by attention."""

    num_prefix = 0

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if getattr(self.tower, "head", None) is None:
            raise ValueError("expected a SigLIP with its pooling head, got vision_use_head=False: it pools no feature")

    def enter(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.tower.embeddings(images, interpolate_pos_encoding=self.interpolates)
        return hidden

    def leave(self, hidden: Tensor) -> Tensor:
        normed = self.tower.post_layernorm(hidden)
        image = self.tower.head(normed)
        return torch.cat([image[:, None], _each_alone(self.tower.head, normed)], dim=1)


class Siglip2Vision(SiglipVision):
    """The vision tower of ``Siglip2Model`` (NaFlex), whose input is patches; here images of one size."""

    def _size_of(self, config: Any) -> tuple[int, int]:
        rows = math.isqrt(config.num_patches)
        return rows * self.patch_size[0], rows * self.patch_size[1]

    def enter(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.tower.embeddings(self._patches(images), self._shapes(images))
        return hidden

    def pool(self, images: Tensor) -> Tensor:
        patches = self._patches(images)
        output = self.model.get_image_features(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=images.device),
            spatial_shapes=self._shapes(images),
        )
        return _feature(output)

    def _patches(self, images: Tensor) -> Tensor:
        """Images ``[batch, 3, height, width]`` to ``[batch, patches, pixels]``, colours of a pixel side by side."""
        height, width = self.patch_size
        patches: Tensor = rearrange(
            images, "batch rgb (rows ph) (columns pw) -> batch (rows columns) (ph pw rgb)", ph=height, pw=width
        )
        return patches

    def _shapes(self, images: Tensor) -> Tensor:
        """Rows and columns of patches of each image ``[batch, 2]``."""
        return torch.tensor(self.grid, device=images.device).expand(len(images), -1)


class Tipsv2Vision(HuggingFaceVision):
    """The vision tower of ``Tipsv2Model``: class token, registers, patches, all in the joint space as they are."""

    @property
    def num_prefix(self) -> int:  # type: ignore[override]
        return 1 + int(self.tower.config.num_register_tokens)

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.tower.encoder.layer
        return blocks

    def enter(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.tower.embeddings(images)  # it interpolates by itself
        return hidden

    def leave(self, hidden: Tensor) -> Tensor:
        normed = self.tower.layernorm(hidden)
        return torch.cat([normed[:, :1], normed[:, self.num_prefix :]], dim=1)

    def pool(self, images: Tensor) -> Tensor:
        return _feature(self.model.get_image_features(pixel_values=images))


class HuggingFaceText(TextTower):
    """What the text towers of transformers have in common."""

    causal = False

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self.model, self.tower = model, model.text_model
        self._two_masks = _takes_two_masks(self.blocks)

    @property
    def text_dim(self) -> int:
        return int(self.tower.config.hidden_size)

    @property
    def context_length(self) -> int:
        return int(self.tower.config.max_position_embeddings)

    @property
    def checkpoints(self) -> bool:
        """True if transformers was told to make checkpoints, in training mode."""
        return _checkpoints(self.tower.encoder, self.blocks)

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.tower.encoder.layers
        return blocks

    def embed(self, tokens: Tensor) -> Tensor:
        embeddings: Tensor = self.tower.embeddings.token_embedding(tokens)
        return embeddings

    def enter(self, embeddings: Tensor, start: int = 0) -> Tensor:
        positions: Tensor = self.tower.embeddings.position_embedding.weight[start : start + embeddings.shape[1]]
        return embeddings.to(positions.dtype) + positions

    def run(self, hidden: Tensor) -> Tensor:
        return self._run(hidden, None)

    def _run(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """All blocks; ``mask`` is added to the attention logits ``[n, 1, queries, keys]``."""
        checkpoint = _must_checkpoint(self.tower.encoder, self.blocks)
        for block in self.blocks:
            if checkpoint:
                hidden = run_again_in_backward(
                    _step, block, hidden, mask, two_masks=self._two_masks, use_reentrant=False
                )
            else:
                hidden = _step(block, hidden, mask, two_masks=self._two_masks)
        return hidden

    def _check_mask(self) -> None:
        kind = getattr(self.tower.config, "_attn_implementation", None)
        if kind not in (None, "eager", "sdpa"):
            raise ValueError(
                f"expected a text tower with attention sdpa or eager, got {kind}, which takes no mask of its own; "
                'load the model with attn_implementation="sdpa"'
            )


class ClipText(HuggingFaceText):
    """The text tower of ``CLIPModel``: causal, pooled at [EOS]."""

    causal = True
    legacy_eos = True

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        super().__init__(model, tokenizer)
        self._check_mask()

    def pooled_position(self, tokens: Tensor) -> Tensor:
        """The first [EOS]; the highest id in configurations of old, whose ``eos_token_id`` is a wrong 2."""
        eos = self.tower.config.eos_token_id
        if eos == 2 and self.legacy_eos:
            return tokens.argmax(dim=-1)
        return tokens.eq(eos).int().argmax(dim=-1)

    def run(self, hidden: Tensor) -> Tensor:
        count, length, _ = hidden.shape
        later = torch.full((length, length), -torch.inf, dtype=hidden.dtype, device=hidden.device).triu(1)
        return self._run(hidden, later.expand(count, 1, length, length))

    def leave(self, hidden: Tensor) -> Tensor:
        features: Tensor = self.model.text_projection(self.tower.final_layer_norm(hidden))
        return features


class MetaClip2Text(ClipText):
    """The text tower of ``MetaClip2Model``, whose [EOS] is 2 indeed."""

    legacy_eos = False


class SiglipText(HuggingFaceText):
    """The text tower of ``SiglipModel`` and ``Siglip2Model``: not causal; pooled at its last position, always."""

    start = 0

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        super().__init__(model, tokenizer)
        self.end_id = _end_id(tokenizer)

    def pooled_position(self, tokens: Tensor) -> Tensor:
        """Where the text ends: the first [EOS]. What is pooled is the last position, which reads it."""
        return _first(tokens, self.end_id)

    def encode(self, embeddings: Tensor, eos: Tensor) -> Tensor:
        return self.leave(self.run(self.enter(embeddings))[:, -1])

    def leave(self, hidden: Tensor) -> Tensor:
        features: Tensor = self.tower.head(self.tower.final_layer_norm(hidden))
        return features


class Tipsv2Text(HuggingFaceText):
    """The text tower of ``Tipsv2Model``: not causal, padding masked; the mean over the tokens of the text."""

    start = 0

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        super().__init__(model, tokenizer)
        self._check_mask()
        self.end_id = _end_id(tokenizer)

    def pooled_position(self, tokens: Tensor) -> Tensor:
        """Where the text ends: the first position of the padding. What is pooled is all that stands before."""
        return _first(tokens, self.end_id)

    def enter(self, embeddings: Tensor, start: int = 0) -> Tensor:
        parts = self.tower.embeddings
        positions: Tensor = parts.position_embedding.weights[start : start + embeddings.shape[1]]
        embeddings = embeddings.to(parts.token_embedding.weight.dtype) * parts.embed_scale
        return embeddings + positions.to(embeddings.dtype)

    def encode(self, embeddings: Tensor, eos: Tensor) -> Tensor:
        hidden = self.enter(embeddings)
        inside = torch.arange(hidden.shape[1], device=eos.device) < eos[:, None]
        mask = torch.zeros(inside.shape, dtype=hidden.dtype, device=hidden.device)
        mask = mask.masked_fill(~inside, torch.finfo(hidden.dtype).min)  # finite: an empty text reads something, too
        count, length = inside.shape
        hidden = self._run(hidden, mask[:, None, None].expand(count, 1, length, length))

        normed = self.tower.final_layer_norm(hidden) * inside[..., None]
        pooled: Tensor = normed.sum(dim=1) / (inside.sum(dim=1, keepdim=True) + self.tower.config.pooling_epsilon)
        return pooled.to(hidden.dtype)

    def leave(self, hidden: Tensor) -> Tensor:
        return hidden


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _feature(output: Any) -> Tensor:
    """transformers 5 returns the feature inside an output object, 4 by itself."""
    feature: Tensor = getattr(output, "pooler_output", output)
    return feature


def _each_alone(head: Any, tokens: Tensor) -> Tensor:
    """SigLIP's pooling head on each of ``[batch, tokens, dim]`` by itself: where one key is read, its share is one."""
    attention = head.attention
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    values = F.linear(tokens, weight[-tokens.shape[-1] :], bias[-tokens.shape[-1] :])
    mixed = attention.out_proj(values)
    pooled: Tensor = mixed + head.mlp(head.layernorm(mixed))
    return pooled


def _takes_two_masks(blocks: nn.ModuleList) -> bool:
    """CLIP's layers take padding and causal mask apart in transformers 4, and their sum in 5."""
    return "causal_attention_mask" in inspect.signature(type(blocks[0]).forward).parameters


def _step(block: nn.Module, hidden: Tensor, mask: Tensor | None, *, two_masks: bool) -> Tensor:
    """One block; it returns a tuple in transformers 4, and its hidden states alone in 5."""
    output: Any = block(hidden, None, mask) if two_masks else block(hidden, mask)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _checkpoints(encoder: Any, blocks: nn.ModuleList) -> bool:
    """True if checkpoints are switched on: for the whole encoder in transformers 4, for each block in 5."""
    flags = [getattr(each, "gradient_checkpointing", False) for each in (encoder, *blocks)]
    return any(flags) and bool(encoder.training)


def _must_checkpoint(encoder: Any, blocks: nn.ModuleList) -> bool:
    """True if the container wants checkpoints that its blocks do not see to themselves, as those of version 5 do."""
    by_themselves = hasattr(blocks[0], "gradient_checkpointing")
    return _checkpoints(encoder, blocks) and not by_themselves and torch.is_grad_enabled()


def _end_id(tokenizer: Tokenizer) -> int:
    """The id that stands behind the last word of a text: the first one of an empty text."""
    return int(tokenizer([""])[0, 0])


def _first(tokens: Tensor, wanted: int) -> Tensor:
    """The first position of an id in each row ``[n, length]``; the length where there is none."""
    found = tokens.eq(wanted)
    return torch.where(found.any(dim=-1), found.int().argmax(dim=-1), tokens.shape[-1])
