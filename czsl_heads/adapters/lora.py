"""Low-rank adaptation of the blocks of a tower: put in, folded into the weights, taken out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, get_args

from torch import nn

from czsl_heads._checks import check_choice, check_integer, check_kind, check_positive, check_range
from czsl_heads.adapters.lora_layers import ATTENTION, LoRAAttention, LoRAFusedLinear, LoRALinear, Matrix, Mergeable
from czsl_heads.encoders.attention import is_plain_attention
from czsl_heads.encoders.blocks import BlockParts, has_hooks
from czsl_heads.encoders.protocol import Encoder, Tower, check_encoder

MLP: tuple[Matrix, ...] = ("fc", "proj")
LoRALayer = LoRAAttention | LoRAFusedLinear | LoRALinear


def add_lora(
    encoder: Encoder,
    *,
    matrices: Sequence[Matrix] = ("q", "k", "v"),
    rank: int = 4,
    alpha: float | None = None,
    dropout: float = 0.0,
    layers: int | Sequence[int] | None = None,
    tower: Tower = "vision",
) -> list[LoRALayer]:
    """Put low-rank adapters into the blocks of a tower, in place; the model is unchanged until they are trained.

    :func:`merge_lora` and :func:`unmerge_lora` fold them into the weights and take them out again, for inference;
    :func:`remove_lora` puts the plain layers back.

    Args:
        encoder: A wrapped CLIP.
        matrices: Which weights: ``q k v o`` of the attention, ``fc proj`` of the MLP. In a gated MLP ``fc`` is gate and
            value: both get an update, or one that spans both if the container keeps them in one matrix.
        rank: Of each update, at least 1.
        alpha: The update is scaled by ``alpha / rank``, positive; default: ``rank``, which scales by 1.
        dropout: On the input of the update, in training.
        layers: The last so many blocks, or their indices (negative ones count from the end); default: all.
        tower: ``"vision"`` or ``"text"``.

    Returns:
        The new modules. Their weights of the base model keep names and ``requires_grad``; the low-rank ones train, in
        float32 whatever the dtype of the weights.

    Raises:
        ValueError: An option is unknown, empty or out of range, a block is adapted already, or a layer that would be
            replaced has hooks, which would be lost.
        TypeError: ``encoder`` is no Encoder, an option has another type, a block is of an unknown kind (known are
            open_clip's ``ResidualAttentionBlock``, timm's ``Block`` and ``EvaBlock``, and the layers of the CLIP models
            of transformers), or a layer that would be replaced is no plain ``nn.Linear``.

    Example:
        >>> from czsl_heads import wrap
        >>> encoder = wrap("tiny")
        >>> adapted = add_lora(encoder, matrices=("q", "v"), rank=2, layers=1)
        >>> sum(p.numel() for p in encoder.parameters() if p.requires_grad)
        1024

    References:
        Hu et al., LoRA, ICLR 2022. Zanella and Ben Ayed, CLIP-LoRA, CVPR workshops 2024 (q, k, v; rank 2). SAC tunes
        the vision tower with it; the paper states neither rank nor matrices.
    """
    check_encoder("encoder", encoder)
    if isinstance(matrices, str):
        raise TypeError(f"expected `matrices` to be a sequence of names, got the string {matrices!r}")
    matrices = tuple(matrices)
    if not matrices:
        raise ValueError("expected `matrices` to name at least one, got none")
    for matrix in matrices:
        check_choice("matrices", matrix, (*ATTENTION, *MLP))
    check_integer("rank", rank, 1)
    if alpha is not None:
        check_positive("alpha", alpha)
    check_range("dropout", dropout, 0, 1)

    blocks = encoder.blocks(tower)
    chosen = [blocks[index] for index in _layer_indices(layers, len(blocks))]
    places = [place for block in chosen for place in _places(block, tower, matrices)]

    scale = 1.0 if alpha is None else alpha / rank
    delta: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": dropout}
    added: list[LoRALayer] = []
    for place in places:
        adapted = _adapt(place, delta)
        setattr(place.parent, place.name, adapted)
        added.append(adapted)
    return added


def merge_lora(encoder: Encoder, *, tower: Tower | None = None) -> None:
    """Fold all updates into the weights, in place, so that the encoder costs what it does without LoRA.

    What is merged already stays so. In training mode merged layers raise when they are called, for their updates would
    get no gradient. A state dict still holds the weights before merging, beside the updates; loading one unmerges.
    Weights of half precision are rounded once.

    Args:
        encoder: A wrapped CLIP that :func:`add_lora` changed.
        tower: ``"vision"`` or ``"text"``; default: both.

    Raises:
        ValueError: There is no LoRA, or ``tower`` is unknown.
        TypeError: ``encoder`` is no Encoder.

    Example:
        >>> from czsl_heads import add_lora, wrap
        >>> encoder = wrap("tiny")
        >>> adapted = add_lora(encoder, layers=2)
        >>> merge_lora(encoder)
        >>> [module.merged for module in adapted]
        [True, True]

    References:
        Hu et al., LoRA, ICLR 2022, section 4.1 (no latency at inference).
    """
    for _, _, adapted in _adapted(encoder, tower):
        adapted.merge()


def unmerge_lora(encoder: Encoder, *, tower: Tower | None = None) -> None:
    """Take merged updates out of the weights again, which are then what they were before, to the bit.

    What is not merged stays as it is. Arguments and errors as in :func:`merge_lora`.

    Example:
        >>> from czsl_heads import add_lora, merge_lora, wrap
        >>> encoder = wrap("tiny")
        >>> adapted = add_lora(encoder, layers=2)
        >>> merge_lora(encoder)
        >>> unmerge_lora(encoder)
        >>> [module.merged for module in adapted]
        [False, False]
    """
    for _, _, adapted in _adapted(encoder, tower):
        adapted.unmerge()


def remove_lora(encoder: Encoder, *, merge: bool = False, tower: Tower | None = None) -> None:
    """Take the adapters out, in place: plain ``nn.MultiheadAttention`` or ``nn.Linear`` stand there again.

    They have the very parameters of the base model, so that dtype, device and ``requires_grad`` are those of now, and
    the mode (train or eval) of what they replace. :func:`add_lora` may follow.

    Args:
        encoder: A wrapped CLIP that :func:`add_lora` changed.
        merge: Leave the updates in the weights (PEFT's ``merge_and_unload``). Otherwise the weights are those before
            LoRA, to the bit (PEFT's ``unload``), unless they were trained, too.
        tower: ``"vision"`` or ``"text"``; default: both.

    Raises:
        ValueError: There is no LoRA, an adapted layer has hooks, which would be lost, or ``tower`` is unknown.
        TypeError: ``encoder`` is no Encoder, or ``merge`` no bool.

    Example:
        >>> from czsl_heads import add_lora, wrap
        >>> encoder = wrap("tiny")
        >>> adapted = add_lora(encoder)
        >>> remove_lora(encoder)
        >>> type(encoder.blocks("vision")[0].attn).__name__, any(p.requires_grad for p in encoder.parameters())
        ('FusedAttention', False)
    """
    check_kind("merge", merge, bool)
    places = _adapted(encoder, tower)
    for _, _, adapted in places:
        if has_hooks(adapted):
            raise ValueError(
                f"expected LoRA without hooks, which would be lost with it, got hooks on a {type(adapted).__name__}; "
                f"remove them first"
            )
    parent: Any
    for parent, name, adapted in places:
        if merge:
            adapted.merge()
        else:
            adapted.unmerge()
        if isinstance(adapted, LoRAFusedLinear) and adapted.bias_was_separate is not None:
            parent.qkv_bias_separate = adapted.bias_was_separate
        setattr(parent, name, adapted.plain())


def _adapted(encoder: Encoder, tower: Tower | None) -> list[tuple[nn.Module, str, Mergeable]]:
    """All adapted layers, each with the module that holds it and its name there; ValueError if there is none."""
    check_encoder("encoder", encoder)
    towers: tuple[Tower, ...] = get_args(Tower) if tower is None else (tower,)
    places: list[tuple[nn.Module, str, Mergeable]] = []
    for each in towers:
        for parent in encoder.blocks(each).modules():
            for name, child in parent.named_children():
                if isinstance(child, Mergeable):
                    places.append((parent, name, child))
    if not places:
        where = "an encoder" if tower is None else f"a {tower} tower"
        raise ValueError(f"expected {where} with LoRA, as `add_lora` makes it, got one without")
    return places


def _layer_indices(layers: int | Sequence[int] | None, depth: int) -> list[int]:
    if layers is None:
        return list(range(depth))
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        check_integer("layers", layers, 1, depth)
        return list(range(depth - layers, depth))
    layers = list(layers)
    for index in layers:
        check_integer("layers", index, -depth, depth - 1)
    indices = sorted({index % depth for index in layers})
    if not indices:
        raise ValueError("expected `layers` to name at least one block, got none")
    return indices


class _Place(NamedTuple):
    """A layer that is to be replaced, and the matrices that get an update there."""

    parent: Any
    name: str
    matrices: list[Matrix]


def _places(block: Any, tower: Tower, matrices: Sequence[Matrix]) -> list[_Place]:
    """What add_lora replaces in a block, attention first; TypeError or ValueError if it cannot."""
    if any(isinstance(layer, Mergeable) for layer in block.modules()):
        raise ValueError(f"expected a {tower} tower without LoRA, got one that is adapted already")
    parts = BlockParts(block)
    places = []
    of_attention = [matrix for matrix in ATTENTION if matrix in matrices]
    if isinstance(parts.attention, nn.MultiheadAttention):
        if of_attention:
            places.append(_Place(block, parts.names.attention, of_attention))
    else:
        places.extend(_linear_places(parts, of_attention, parts.attention))
    places.extend(_linear_places(parts, [matrix for matrix in MLP if matrix in matrices], parts.mlp))
    for place in places:
        _check_place(place, tower)
    return places


def _linear_places(parts: BlockParts, matrices: Sequence[Matrix], holder: Any) -> list[_Place]:
    places: dict[str, _Place] = {}
    for matrix in matrices:
        layers = parts.linear_layers(matrix)
        if not layers:
            raise TypeError(f"expected blocks with a linear layer for `matrices` {matrix!r}, got {_kind(holder)}")
        for parent, name in layers:
            places.setdefault(name, _Place(parent, name, [])).matrices.append(matrix)
    return list(places.values())


def _check_place(place: _Place, tower: Tower) -> None:
    layer = getattr(place.parent, place.name)
    if isinstance(layer, nn.MultiheadAttention):
        if not is_plain_attention(layer):
            raise TypeError(
                "expected an nn.MultiheadAttention with one fused in_proj_weight and no bias_k, got another layout"
            )
    elif type(layer) is not nn.Linear:
        half = "an MLP" if place.matrices[0] in MLP else "an attention"
        raise TypeError(f"expected {half} whose {place.name} is an nn.Linear, got {_kind(layer)}")
    if has_hooks(layer):
        raise ValueError(
            f"expected a {tower} tower without hooks on what LoRA replaces, got hooks on a {_kind(layer)}; "
            f"add them afterwards"
        )


def _adapt(place: _Place, delta: dict[str, Any]) -> LoRALayer:
    layer = getattr(place.parent, place.name)
    if isinstance(layer, nn.MultiheadAttention):
        return LoRAAttention(layer, place.matrices, **delta)
    if place.name != "qkv":
        return LoRALinear(layer, **delta)
    fused = LoRAFusedLinear(layer, place.matrices, **delta)
    if getattr(place.parent, "q_bias", None) is not None:
        # timm's EvaAttention takes the weight alone, unless its bias is to be added apart: then it calls the layer.
        fused.bias_was_separate = place.parent.qkv_bias_separate
        place.parent.qkv_bias_separate = True
    return fused


def _kind(layer: Any) -> str:
    return type(layer).__name__
