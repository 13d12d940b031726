"""What stands in the blocks of a tower, as those see it who put something else there or run the blocks in parts."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from czsl_heads.encoders.attention import is_plain_attention

Half = Literal["attention", "mlp"]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@runtime_checkable
class AdaptedLayer(Protocol):
    """A layer that an adapter put into a block, in the attention or in the MLP, and that says what it reads.

    Attributes:
        per_token: True if what a token becomes depends on that token alone. A block can be run for a few positions at
            a time only if this is so. A layer that routes the tokens of a batch among experts of fixed capacity, for
            instance, has to say False.
    """

    @property
    def per_token(self) -> bool: ...


@runtime_checkable
class AdaptedAttention(AdaptedLayer, Protocol):
    """An adapted layer in the place of ``nn.MultiheadAttention``: self-attention between two projections.

    Attention itself reads all tokens, so ``per_token`` speaks of the projections.

    Attributes:
        num_heads: The parts of equal size in which queries, keys and values are compared.
        attention_dropout: On the shares by which values are weighed, in training mode.
    """

    @property
    def num_heads(self) -> int: ...
    @property
    def attention_dropout(self) -> float: ...

    def project_in(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[..., dim]`` to queries, keys and values, ``[..., dim]`` each, with what the adapter changes."""
        ...

    def project_out(self, mixed: Tensor) -> Tensor:
        """The values that each token read, heads side by side, ``[..., dim]``, to what it gets, ``[..., dim]``."""
        ...


@runtime_checkable
class AdaptedMLP(AdaptedLayer, Protocol):
    """An adapted layer in the place of an MLP, with something of its own beside it.

    Attributes:
        base: The MLP itself.
        mixture: What stands beside it, and reads the same.
    """

    @property
    def base(self) -> nn.Module: ...
    @property
    def mixture(self) -> nn.Module: ...


class Heads(NamedTuple):
    """What attention compares and reads of tokens, each ``[batch, length, heads, head_dim]``."""

    query: Tensor
    key: Tensor
    value: Tensor


class _Names(NamedTuple):
    """Under which names a container keeps the parts of its block; None where it has no such part."""

    norms: tuple[str, str]  # before attention and before the MLP, as in all pairs below
    attention: str
    scales: tuple[str, str] | None = None
    drops: tuple[str, str] | None = None  # stochastic depth
    beside: tuple[str, str] | None = None  # adapters that read the stream itself
    out: str = "out_proj"  # in the attention


_OPEN_CLIP = _Names(("ln_1", "ln_2"), "attn", ("ls_1", "ls_2"))
_DROP_PATHS = ("drop_path1", "drop_path2")
_OF_TRANSFORMERS = _Names(("layer_norm1", "layer_norm2"), "self_attn")
_NAMES = {
    "open_clip.ResidualAttentionBlock": _OPEN_CLIP,
    "czsl_heads.AdaptedBlock": _OPEN_CLIP._replace(beside=("attn_adapter", "mlp_adapter")),
    "timm.Block": _Names(("norm1", "norm2"), "attn", ("ls1", "ls2"), _DROP_PATHS, out="proj"),
    "timm.EvaBlock": _Names(("norm1", "norm2"), "attn", ("gamma_1", "gamma_2"), _DROP_PATHS, out="proj"),
    "transformers.CLIPEncoderLayer": _OF_TRANSFORMERS,
    "transformers.MetaClip2EncoderLayer": _OF_TRANSFORMERS,
    "transformers.SiglipEncoderLayer": _OF_TRANSFORMERS,
    "transformers.Siglip2EncoderLayer": _OF_TRANSFORMERS,
    "transformers.Tipsv2TextEncoderLayer": _OF_TRANSFORMERS,
    "transformers.Tipsv2VisionLayer": _Names(
        ("norm1", "norm2"), "attention", ("layer_scale1", "layer_scale2"), ("drop_path", "drop_path"), out="o_proj"
    ),
}
_TIMM_ATTENTION = ("timm.Attention", "timm.EvaAttention", "timm.AttentionRope")

# The layers of an MLP: those from the stream (a gated MLP has two), and the one back to it.
_MLPS = (
    (("c_fc",), ("c_proj",)),  # open_clip
    (("fc1_g", "fc1_x"), ("fc2",)),  # timm's SwiGLU
    (("fc1",), ("fc2",)),  # timm (GluMlp has gate and value in one), transformers
    (("w0", "w1"), ("w2",)),  # timm's GeGluMlp
    (("gate_proj", "up_proj"), ("down_proj",)),  # TIPSv2
)

# Layers that act on each token by itself, containers of such layers among them.
_PER_TOKEN = {
    "torch": "Linear NonDynamicallyQuantizableLinear LayerNorm RMSNorm Dropout Identity Sequential "
    "GELU ReLU SiLU Sigmoid Tanh",
    "open_clip": "LayerNorm LayerNormFp32 LayerScale QuickGELU",
    "timm": "Mlp GluMlp SwiGLU GeGluMlp LayerNorm LayerNormFp32 RmsNorm LayerScale DropPath GELU GELUTanh QuickGELU",
    "transformers": "CLIPMLP MetaClip2MLP SiglipMLP Siglip2MLP Tipsv2MLP Tipsv2VisionMLP Tipsv2VisionSwiGLUFFN "
    "Tipsv2VisionLayerScale Tipsv2VisionDropPath",
    "czsl_heads": "Bottleneck",
}


class BlockParts:
    r"""The parts of one residual block, whatever its container:

    .. math:: x \leftarrow x + s_1 \, \mathrm{attention}(\mathrm{norm}_1 x), \quad
              x \leftarrow x + s_2 \, \mathrm{mlp}(\mathrm{norm}_2 x)

    with layer scales :math:`s` where the block has them. Nothing is copied: what is put into the block later is seen.

    Args:
        block: Of open_clip, timm or transformers; a derived class counts as its base.

    Raises:
        TypeError: Another kind of block.

    Example:
        >>> from czsl_heads import wrap
        >>> parts = BlockParts(wrap("tiny").blocks("vision")[0])
        >>> heads = parts.heads(parts.norm("attention", torch.zeros(2, 5, 128)))
        >>> parts.num_heads, heads.key.shape
        (4, torch.Size([2, 5, 4, 32]))
    """

    def __init__(self, block: Any) -> None:
        names = _names(block)
        if names is None:
            raise TypeError(f"expected blocks of {_known_kinds()}, got {type(block).__name__}")
        self.block, self.names = block, names

    @property
    def attention(self) -> Any:
        return getattr(self.block, self.names.attention)

    @property
    def mlp(self) -> Any:
        return self.block.mlp

    def norm(self, half: Half, stream: Tensor) -> Tensor:
        """The stream ``[..., width]`` as attention or the MLP reads it, ``[..., width]``."""
        normed: Tensor = self.norm_layer(half)(stream)
        return normed

    def norm_layer(self, half: Half) -> nn.Module:
        """The layer behind :meth:`norm`."""
        layer: nn.Module = self._part(self.names.norms, half)
        return layer

    @property
    def num_heads(self) -> int:
        heads: int = getattr(self.attention, "num_heads", None) or self.attention.num_attention_heads
        return heads

    @property
    def batch_first(self) -> bool:
        """False if the block takes tokens as ``[length, batch, width]``."""
        return bool(getattr(self.attention, "batch_first", True))

    @property
    def dropout(self) -> float:
        """Of the shares by which attention weighs values: as it is now, that is, zero in eval mode."""
        attention = self.attention
        if not attention.training:
            return 0.0
        if hasattr(attention, "attn_drop"):  # timm
            return float(attention.attn_drop.p)
        known = getattr(attention, "attention_dropout", None)
        return float(attention.dropout if known is None else known)

    def heads(self, normed: Tensor, rope: Tensor | None = None) -> Heads:
        """Queries, keys and values, as they are compared: with what adapters change, normalised and turned.

        Args:
            normed: Of :meth:`norm`, ``[batch, length, width]``.
            rope: Rotary positions of the patches, as timm's blocks take them.
        """
        attention = self.attention
        query, key, value = (self._split_heads(part) for part in self.project_in(normed))
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        if rope is not None:
            query, key = (_turned(part, rope, attention).type_as(value) for part in (query, key))
        return Heads(query, key, value)

    def project_in(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[..., dim]`` of ``[..., width]``, as the projections give them."""
        attention = self.attention
        if isinstance(attention, AdaptedAttention):
            return attention.project_in(normed)
        if isinstance(attention, nn.MultiheadAttention):
            fused = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
        elif getattr(attention, "qkv", None) is None:
            return attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
        elif getattr(attention, "q_bias", None) is None:
            fused = attention.qkv(normed)
        else:
            fused = attention.qkv(normed) + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        query, key, value = fused.chunk(3, dim=-1)
        return query, key, value

    def project_out(self, mixed: Tensor, normed: Tensor | None = None) -> Tensor:
        """The values that tokens read, ``[batch, length, heads, head_dim]``, to what attention gives them.

        Args:
            mixed: What each token read.
            normed: Of :meth:`norm`, ``[batch, length, width]``, of the same tokens: the gate of timm's attention reads
                it, where there is one.
        """
        attention = self.attention
        side_by_side = rearrange(mixed, "batch length heads dim -> batch length (heads dim)")
        if isinstance(attention, AdaptedAttention):
            return attention.project_out(side_by_side)
        if hasattr(attention, "attn_drop"):  # timm
            side_by_side = attention.norm(side_by_side)
            if attention.gate is not None:
                side_by_side = side_by_side * attention.gate(normed).sigmoid()
            dropped: Tensor = attention.proj_drop(attention.proj(side_by_side))
            return dropped
        out: Tensor = getattr(attention, self.names.out)(side_by_side)
        return out

    def scale(self, half: Half, branch: Tensor) -> Tensor:
        """The layer scale on what attention or the MLP gives; without one, the same tensor."""
        scale = None if self.names.scales is None else self._part(self.names.scales, half)
        if scale is None:
            return branch
        scaled: Tensor = scale * branch if isinstance(scale, Tensor) else scale(branch)
        return scaled

    def add(self, half: Half, stream: Tensor, branch: Tensor) -> Tensor:
        """The stream with what attention or the MLP gives it, ``[..., width]``; with adapters beside it."""
        branch = self.scale(half, branch)
        if self.names.drops is not None:
            branch = self._part(self.names.drops, half)(branch)
        stream_after = stream + branch
        if self.names.beside is not None:
            stream_after = stream_after + self._part(self.names.beside, half)(stream)
        return stream_after

    def add_mlp(self, stream: Tensor) -> Tensor:
        """The second half of the block: stream ``[..., width]`` to stream."""
        return self.add("mlp", stream, self.mlp(self.norm("mlp", stream)))

    def linear_layers(self, matrix: str) -> list[tuple[nn.Module, str]]:
        """Where a matrix of the block is kept: the module that holds the layer, and its name there.

        Args:
            matrix: ``q k v`` (or one layer for the three), ``o``, ``fc`` (two layers of a gated MLP) or ``proj``.

        Returns:
            Nothing if there is no such layer: ``nn.MultiheadAttention`` has its weights in its own hands.
        """
        if matrix in ("fc", "proj"):
            mlp = self.mlp.base if isinstance(self.mlp, AdaptedMLP) else self.mlp
            into, back = _mlp_layers(mlp)
            return [(mlp, name) for name in (into if matrix == "fc" else back)]

        name = self.names.out if matrix == "o" else f"{matrix}_proj"
        if matrix != "o" and getattr(self.attention, "qkv", None) is not None:
            name = "qkv"
        return [] if getattr(self.attention, name, None) is None else [(self.attention, name)]

    def _part(self, names: tuple[str, str], half: Half) -> Any:
        return getattr(self.block, names[half == "mlp"])

    def _split_heads(self, part: Tensor) -> Tensor:
        split: Tensor = rearrange(part, "batch length (heads dim) -> batch length heads dim", heads=self.num_heads)
        return split


def cannot_run_in_parts(block: Any) -> str | None:
    """Why a block cannot be run by its :class:`BlockParts`, as what there is instead; None if it can."""
    if _kind(block) not in _NAMES:  # a derived class may do anything
        return f"blocks of kind {type(block).__name__}"
    attention = getattr(block, _NAMES[_kind(block)].attention)
    if not (isinstance(attention, AdaptedAttention) or _is_known_attention(attention)):
        return f"blocks with an attention of another layout ({type(attention).__name__})"
    if getattr(attention, "num_kv_groups", 1) > 1:
        return "blocks with fewer heads of keys than of queries"
    return None


def mixing_layer(layer: nn.Module) -> nn.Module | None:
    """The first layer within a block, or within a layer of it, that may read several tokens at once.

    None if all are known to act on each token by itself, or say so (:class:`AdaptedLayer`). Attention counts by its
    projections.
    """
    for child in layer.children():
        says_so = isinstance(child, AdaptedLayer) and child.per_token
        if says_so:
            continue
        if isinstance(child, AdaptedLayer) or not (_is_known_attention(child) or _is_per_token(child)):
            return child
        if (inner := mixing_layer(child)) is not None:
            return inner
    return None


def reads_one_token(layer: nn.Module) -> bool:
    """True of a layer that is known to act on each token by itself, with all that it holds."""
    return _is_per_token(layer) and mixing_layer(layer) is None


def has_hooks(layer: nn.Module) -> bool:
    """True if something else than its class has a say in what a layer does when it is called."""
    return "forward" in vars(layer) or any(getattr(layer, name) for name in _HOOKS)


def _is_known_attention(layer: Any) -> bool:
    if is_plain_attention(layer) or _kind(layer) in _TIMM_ATTENTION:
        return True
    three = all(hasattr(layer, name) for name in ("q_proj", "k_proj", "v_proj"))
    return three and _kind(layer).startswith("transformers.")


def _is_per_token(layer: nn.Module) -> bool:
    container, _, name = _kind(layer).partition(".")
    activation = type(layer).__module__ == "transformers.activations"
    return activation or name in _PER_TOKEN.get(container, "").split()


def _mlp_layers(mlp: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the layers that lead into the hidden units of an MLP, and of the one that leads back."""
    for into, back in _MLPS:
        if all(isinstance(getattr(mlp, name, None), nn.Module) for name in (*into, *back)):
            return into, back
    return (), ()


def _names(block: Any) -> _Names | None:
    kinds = (f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(block).__mro__)
    return next((_NAMES[kind] for kind in kinds if kind in _NAMES), None)


def _kind(layer: Any) -> str:
    """The package and the class of a layer, by which it is known without importing either."""
    return f"{type(layer).__module__.partition('.')[0]}.{type(layer).__name__}"


def _known_kinds() -> str:
    return "open_clip's ResidualAttentionBlock, timm's Block or EvaBlock, or a CLIP layer of transformers"


def _turned(part: Tensor, rope: Tensor, attention: Any) -> Tensor:
    """Queries or keys ``[batch, length, heads, dim]`` turned by rotary positions, but for the prefix."""
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    prefix, patches = part.transpose(1, 2).tensor_split([attention.num_prefix_tokens], dim=2)
    turned: Tensor = apply_rot_embed_cat(patches, rope, half=getattr(attention, "rotate_half", False))
    return torch.cat([prefix.to(turned.dtype), turned], dim=2).transpose(1, 2)
