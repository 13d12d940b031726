"""Vision towers of timm in open_clip's ``TimmModel``: EVA, MobileCLIP-B, SigLIP, Perception Encoder, ViTamin."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from czsl_heads._checks import check_integer
from czsl_heads.encoders.towers import VisionTower
from czsl_heads.functional.precision import score_dtype

POOLS = {"token": "the class token", "map": "attention", "avg": "the mean of patches"}  # by timm's names
OTHER_TRUNK = "its patches do not go to the image feature as single tokens"
OTHER_POOL = "no patch has a way of its own through it"


def timm_tower(visual: Any) -> TimmTower:
    """The tower of open_clip's ``TimmModel``.

    Raises:
        TypeError: Its trunk is none of timm's plain vision transformers.
        ValueError: It pools otherwise than by class token or attention, or its positions are of an unknown kind.
    """
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    trunk = visual.trunk
    towers: dict[type, type[TimmTower]] = {VisionTransformer: TimmViT, Eva: TimmEva}
    if type(trunk) not in towers:
        raise TypeError(
            f"expected a timm tower of kind VisionTransformer or Eva, got {type(trunk).__name__}: {OTHER_TRUNK}"
        )
    if trunk.global_pool not in POOLS:
        raise ValueError(
            f"expected a timm tower pooled by {', '.join(POOLS.values())}, got global_pool={trunk.global_pool!r}: "
            f"{OTHER_POOL}"
        )
    if trunk.global_pool == "avg" and not isinstance(trunk.fc_norm, (nn.LayerNorm, nn.Identity)):
        raise ValueError(
            f"expected a layer norm behind the mean of patches, got {type(trunk.fc_norm).__name__}: "
            "what it does to the mean is not known for a patch"
        )
    if trunk.global_pool == "avg" and getattr(trunk, "pool_include_prefix", False):
        raise ValueError("expected a mean of patches alone, got pool_include_prefix=True: it is no mean of the patches")
    if trunk.global_pool == "map" and trunk.attn_pool.pos_embed is not None:
        raise ValueError(
            "expected attention pooling without positions of its own, got some: a patch alone would get the first one"
        )
    if getattr(trunk, "rope_mixed", False):
        raise ValueError(
            "expected rotary positions that all blocks share, got rope_mixed=True: a block does not know its own"
        )
    return towers[type(trunk)](visual)


class TimmTower(VisionTower):
    r"""A plain vision transformer of timm, and the projection behind it. Token 0 is the model's own image feature.

    How patches get to the joint space follows from how the tower pools:

    * By the class token: all tokens go its way, ``head(fc_norm(norm(x)))``. Registers are left out.
    * By attention: each patch goes through the pooling as if there were no other. The softmax over one token is one,
      so that the query does not matter. With the value :math:`v` of the token it becomes
      :math:`p + \mathrm{mlp}(\mathrm{norm}(p))` with :math:`p = W_o v`.
    * By the mean of patches: as in :class:`czsl_heads.encoders.open_clip.ViT`, by the statistics of the pooled state.
      If the projection is linear, the mean of the patch tokens is the image feature.

    References:
        Zhai et al., Sigmoid loss for language image pre-training, ICCV 2023 (SigLIP). Zhou, Loy and Dai, Extract free
        dense labels from CLIP, ECCV 2022 (MaskCLIP: the value path of an attention pooling).
    """

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.num_prefix = int(visual.trunk.num_prefix_tokens)

    @property
    def dim(self) -> int:
        for layer in (*reversed(list(self.visual.head.modules())), self.visual.trunk.head):
            if isinstance(layer, nn.Linear):  # the last one has the say
                return int(layer.out_features)
        return int(self.visual.trunk.num_features)

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.visual.trunk.patch_embed.img_size
        return int(height), int(width)

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.visual.trunk.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def blocks(self) -> nn.ModuleList:
        # Where it is an nn.Sequential, what is asked of it here is the same: len, iteration, items set in place.
        return cast(nn.ModuleList, self.visual.trunk.blocks)

    @property
    def pools_class_token(self) -> bool:
        return bool(self.visual.trunk.global_pool == "token")

    @property
    def dtype(self) -> torch.dtype:
        first: Tensor = next(iter(self.visual.trunk.patch_embed.parameters()))
        return first.dtype

    def resize(self, image_size: tuple[int, int]) -> None:
        """By timm's ``set_input_size``: learned positions are interpolated, rotary ones computed for the new grid."""
        per_patch = self.visual.trunk.patch_embed.feat_ratio(as_scalar=False)
        size = check_image_size(image_size, per_patch)
        self.visual.trunk.set_input_size(img_size=size)
        self.visual.image_size = size

    def leave(self, hidden: Tensor) -> Tensor:
        trunk = self.visual.trunk
        normed = trunk.norm(hidden)
        patches = normed[:, self.num_prefix :]
        if trunk.global_pool == "token":
            return self._behind(trunk.fc_norm(torch.cat([normed[:, :1], patches], dim=1)))

        if trunk.global_pool == "map":
            patches = trunk.fc_norm(pooled_alone(trunk.attn_pool, patches))
        elif isinstance(trunk.fc_norm, nn.LayerNorm):
            patches = normalised_as_their_mean(patches, trunk.fc_norm)
        feature: Tensor = self.visual.head(trunk.forward_head(normed))
        return torch.cat([feature[:, None], self._behind(patches)], dim=1)

    def _behind(self, pooled: Tensor) -> Tensor:
        """The projection, ``[..., width]`` to ``[..., dim]``."""
        trunk = self.visual.trunk
        features: Tensor = self.visual.head(trunk.head(trunk.head_drop(pooled)))
        return features

    def pool(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images)
        return features

    @abstractmethod
    def _start(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the first block takes, ``[batch, tokens, width]``, and what all blocks take besides."""

    def enter(self, images: Tensor) -> Tensor:
        return self._start(images)[0]

    def run(self, images: Tensor, *, checkpoint: bool = False, last: Callable[..., Tensor] | None = None) -> Tensor:
        """As the base class; timm's own ``set_grad_checkpointing`` is heeded besides."""
        again = checkpoint or (bool(self.visual.trunk.grad_checkpointing) and torch.is_grad_enabled())
        hidden, shared = self._start(images)
        for block in self._steps(last):
            if again:
                hidden = run_again_in_backward(block, hidden, use_reentrant=False, **shared)
            else:
                hidden = block(hidden, **shared)
        return hidden


class TimmViT(TimmTower):
    """timm's ``VisionTransformer``, hybrid ones with a convolutional stem among them."""

    def _start(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        trunk = self.visual.trunk
        hidden: Tensor = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))
        return hidden, {}


class TimmEva(TimmTower):
    """timm's ``Eva``; its attention turns queries and keys by rotary positions, if it has them."""

    def _start(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        trunk = self.visual.trunk
        hidden, rope = trunk._pos_embed(trunk.patch_embed(images))
        return trunk.norm_pre(hidden), {"rope": rope}

    def step(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One block, on the tokens of all patches."""
        out: Tensor = block(hidden, rope=self._rope())
        return out

    def _rope(self) -> Tensor | None:
        """Sines and cosines of the whole grid, as ``Eva._pos_embed`` returns them."""
        trunk = self.visual.trunk
        if trunk.rope is None:
            return None
        stored = hasattr(trunk.rope, "feat_shape") and not trunk.dynamic_img_size
        rope: Tensor = trunk.rope.get_embed() if stored else trunk.rope.get_embed(shape=self.grid)
        return rope

    def keep_patches(self, choose: Callable[[Tensor], Tensor | None]) -> torch.utils.hooks.RemovableHandle:
        """In training mode, let the blocks see some patches only, each with its own rotary position.

        Args:
            choose: From tokens, prefix and patches, ``[batch, tokens, width]``, to the patches that stay, as indices
                ``[batch, kept]``, or to None if all do.

        Returns:
            A handle, whose ``remove()`` undoes it.
        """
        trunk, prefix = self.visual.trunk, self.num_prefix
        if trunk.patch_drop is None:
            trunk.patch_drop = _KeepAll().train(trunk.training)

        def keep(layer: nn.Module, arguments: tuple[Tensor], out: tuple[Tensor, Tensor | None]) -> Any:
            kept = choose(arguments[0]) if layer.training else None
            if kept is None:
                return None
            rows = torch.arange(len(kept), device=kept.device)[:, None]
            tokens = torch.cat([arguments[0][:, :prefix], arguments[0][rows, kept + prefix]], dim=1)
            return tokens, kept

        handle: torch.utils.hooks.RemovableHandle = trunk.patch_drop.register_forward_hook(keep)
        return handle


class _KeepAll(nn.Module):
    """Where timm's ``Eva`` asks which patches stay, the answer "all"."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return tokens, None


def pooled_alone(pool: Any, tokens: Tensor) -> Tensor:
    """What timm's ``AttentionPoolLatent`` makes of each token as if there were no other, ``[batch, tokens, width]``."""
    _, values = pool.kv(tokens).chunk(2, dim=-1)
    pooled: Tensor = pool.proj_drop(pool.proj(values))
    return pooled if pool.mlp is None else pooled + pool.mlp(pool.norm(pooled))


def normalised_as_their_mean(tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Layer norm by the mean and the deviation that the mean token has, ``[batch, tokens, width]``.

    The mean of what comes out is the layer norm of the mean token.
    """
    wide = tokens.to(score_dtype(tokens))
    variance, centre = torch.var_mean(wide.mean(dim=1, keepdim=True), dim=-1, correction=0, keepdim=True)
    normed = (wide - centre) * (variance + norm.eps).rsqrt() * norm.weight + norm.bias
    return normed.to(tokens.dtype)


def check_image_size(image_size: Any, per_patch: tuple[int, int]) -> tuple[int, int]:
    """Height and width; TypeError or ValueError unless they are integers, and whole patches, at least one."""
    if not isinstance(image_size, tuple) or len(image_size) != 2:
        raise TypeError(f"expected `image_size` to be (height, width), got {image_size!r}")
    for size, least in zip(image_size, per_patch):
        check_integer("image_size", size, least)
        if size % least:
            raise ValueError(f"expected `image_size` in multiples of the patches {per_patch}, got {image_size}")
    height, width = image_size
    return int(height), int(width)
