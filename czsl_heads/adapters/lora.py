"""Low-rank adaptation of the blocks of a tower: put in, folded into the weights, taken out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

from torch import nn

from czsl_heads._checks import check_choice, check_integer, check_kind, check_positive, check_range
from czsl_heads.adapters.lora_layers import ATTENTION, LoRAAttention, LoRALinear, Matrix, Mergeable
from czsl_heads.encoders.blocks import has_hooks, is_plain_attention
from czsl_heads.encoders.protocol import Encoder, Tower, check_encoder

MLP: dict[str, str] = {"fc": "c_fc", "proj": "c_proj"}


def add_lora(
    encoder: Encoder,
    *,
    matrices: Sequence[Matrix] = ("q", "k", "v"),
    rank: int = 4,
    alpha: float | None = None,
    dropout: float = 0.0,
    layers: int | Sequence[int] | None = None,
    tower: Tower = "vision",
) -> list[LoRAAttention | LoRALinear]:
    """Put low-rank adapters into the blocks of a tower, in place; the model is unchanged until they are trained.

    :func:`merge_lora` and :func:`unmerge_lora` fold them into the weights and take them out again, for inference;
    :func:`remove_lora` puts the plain layers back.

    Args:
        encoder: A wrapped CLIP with open_clip's residual blocks.
        matrices: Which weights: ``q k v o`` of the attention, ``fc proj`` of the MLP.
        rank: Of each update, at least 1.
        alpha: The update is scaled by ``alpha / rank``, positive; default: ``rank``, which scales by 1.
        dropout: On the input of the update, in training.
        layers: The last so many blocks, or their indices (negative ones count from the end); default: all.
        tower: ``"vision"`` or ``"text"``.

    Returns:
        The new modules. Their weights of the base model keep names and ``requires_grad``; the low-rank ones train.

    Raises:
        ValueError: An option is unknown, empty or out of range, a block is adapted already, or a layer that would be
            replaced has hooks, which would be lost.
        TypeError: ``encoder`` is no Encoder, an option has another type, or a block is of another kind than
            open_clip's ``ResidualAttentionBlock``.

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
    chosen: list[Any] = [blocks[index] for index in _layer_indices(layers, len(blocks))]
    of_attention = [matrix for matrix in ATTENTION if matrix in matrices]
    of_mlp = [name for matrix, name in MLP.items() if matrix in matrices]
    for block in chosen:
        _check_block(block, tower, bool(of_attention), of_mlp)

    scale = 1.0 if alpha is None else alpha / rank
    delta: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": dropout}
    added: list[LoRAAttention | LoRALinear] = []
    for block in chosen:
        if of_attention:
            block.attn = LoRAAttention(block.attn, of_attention, **delta)
            added.append(block.attn)
        for name in of_mlp:
            adapted = LoRALinear(getattr(block.mlp, name), **delta)
            setattr(block.mlp, name, adapted)
            added.append(adapted)
    return added


def merge_lora(encoder: Encoder, *, tower: Tower | None = None) -> None:
    """Fold all updates into the weights, in place, so that the encoder costs what it does without LoRA.

    What is merged already stays so. In training mode merged layers raise when they are called, for their updates would
    get no gradient. A state dict still holds the weights before merging, beside the updates.

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
    """Take the adapters out, in place: plain ``nn.MultiheadAttention`` and ``nn.Linear`` stand there again.

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
        ('MultiheadAttention', False)
    """
    check_kind("merge", merge, bool)
    places = _adapted(encoder, tower)
    for _, _, adapted in places:
        if has_hooks(adapted):
            raise ValueError(
                f"expected LoRA without hooks, which would be lost with it, got hooks on a {type(adapted).__name__}; "
                f"remove them first"
            )
    for parent, name, adapted in places:
        if merge:
            adapted.merge()
        else:
            adapted.unmerge()
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


def _check_block(block: Any, tower: Tower, of_attention: bool, of_mlp: list[str]) -> None:
    """Raise unless a block has what add_lora would replace: its attention, and layers of its MLP by name."""
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    parts = [getattr(mlp, name, None) for name in MLP.values()]
    if any(isinstance(part, Mergeable) for part in (attention, *parts)):
        raise ValueError(f"expected a {tower} tower without LoRA, got one that is adapted already")
    if not isinstance(attention, nn.MultiheadAttention) or None in parts:
        raise TypeError(
            f"expected blocks with nn.MultiheadAttention and an MLP of c_fc, c_proj, got {type(block).__name__}"
        )
    replaced: list[nn.Module] = [attention] if of_attention else []
    if of_attention and not is_plain_attention(attention):
        raise TypeError(
            "expected an nn.MultiheadAttention with one fused in_proj_weight and no bias_k, got another layout"
        )
    for name in of_mlp:
        layer = getattr(mlp, name)
        if type(layer) is not nn.Linear:
            raise TypeError(f"expected an MLP whose {name} is an nn.Linear, got {type(layer).__name__}")
        replaced.append(layer)
    for layer in replaced:
        if has_hooks(layer):
            raise ValueError(
                f"expected a {tower} tower without hooks on what LoRA replaces, got hooks on a {type(layer).__name__}; "
                f"add them afterwards"
            )
