"""One door for every CLIP."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from czsl_heads._checks import check_integer
from czsl_heads.encoders import names
from czsl_heads.encoders.clip import ClipEncoder, Dense
from czsl_heads.encoders.open_clip import OpenClipEncoder
from czsl_heads.encoders.protocol import check_encoder


def wrap(
    model_or_name: nn.Module | Mapping[str, Any] | str,
    *,
    frozen: bool | None = None,
    dense: Dense = "none",
    tokenizer: Any = None,
    image_size: int | tuple[int, int] | None = None,
) -> Any:
    """Put any supported CLIP behind the :class:`~czsl_heads.encoders.protocol.Encoder` protocol.

    Names are:

    * ``"tiny"``, the embedded CLIP, or ``"tiny:DIR"``, of a run of :mod:`czsl_heads.training.pretrain_tiny`;
    * ``"ARCHITECTURE:TAG"`` of open_clip, such as ``"ViT-L-14:openai"``;
    * ``"ARCHITECTURE:PATH"``, a file of weights, such as ``"ViT-L-14-quickgelu:finetuned.pt"``;
    * ``"PATH"``, a file in OpenAI's own layout, such as ``"~/.cache/clip/ViT-L-14.pt"``;
    * ``"ARCHITECTURE"``, always the same random weights;
    * ``"hf-hub:OWNER/NAME"`` or ``"local-dir:DIR"``, open_clip's own folders, on the hub or here;
    * ``"hf:OWNER/NAME"`` or ``"hf:DIR"``, a model of transformers, on the hub or here;
    * ``"NAME"`` or ``"NAME:TAG"`` of an encoder of another package.

    :func:`czsl_heads.encoders.names.load` says what activation and what preparation of images each has.

    Args:
        model_or_name: A name; or a model: an open_clip ``CLIP`` or ``CustomTextCLIP``, a CLIP, SigLIP or TIPS of
            transformers, a CLIP of OpenAI's package, or a state dict in OpenAI's layout; or an Encoder.
        frozen: Switch off the gradients of all parameters; ``False`` leaves their flags as they are. Default: ``True``
            for names and models. What is an Encoder already is left as it is, or what adapters train in it would stop.
        dense: What the last block does to the patch tokens, see :mod:`czsl_heads.encoders.dense`.
        tokenizer: Strings to token ids, or a tokenizer of transformers, where the right one is not found by itself.
        image_size: Another side of the input in pixels, or (height, width). Positions are interpolated, in the model
            itself.

    Returns:
        The encoder, in the mode (train or eval) of the model; models made by name are in eval mode. What is an encoder
        already, a compiled one too, is returned itself.

    A package brings an encoder by an entry point of the group ``czsl_heads.encoders``: a function from the TAG (``""``
    without one) to what this function takes, an Encoder or a model.

    Raises:
        TypeError: Neither name nor model nor Encoder, or a tower of a kind that is not supported.
        ValueError: An unknown name or tag, or weights that cannot be had; a tower that pools in a way that is not
            supported; an option for an Encoder, which has its own, or an ``image_size`` that the tower cannot take.
        ModuleNotFoundError: A package is missing; the message has the extra that brings it.

    Example:
        >>> import torch
        >>> encoder = wrap("tiny")
        >>> encoder.encode_tokens(torch.zeros(2, 3, 48, 48)).shape, encoder.encode_texts(["a red circle"]).shape
        (torch.Size([2, 37, 96]), torch.Size([1, 96]))
    """
    size = None if image_size is None else _size(image_size)
    options: dict[str, Any] = {"tokenizer": tokenizer, "frozen": frozen is not False, "dense": dense}
    if isinstance(model_or_name, str):
        head, _, tag = model_or_name.partition(":")
        if entry := names.brought(head):
            return _brought(entry.load()(tag).eval(), size, options)
        return _resized(names.load(model_or_name, **options), size)
    if isinstance(model_or_name, nn.Module) and _is_encoder(model_or_name):
        return _as_it_is(model_or_name, frozen, dense=dense, tokenizer=tokenizer, image_size=image_size)
    return _resized(_wrapped(model_or_name, options), size)


def _brought(model: Any, size: tuple[int, int] | None, options: dict[str, Any]) -> Any:
    """What another package's entry point gave, as it was asked for by name."""
    if not isinstance(model, ClipEncoder):
        return wrap(model, image_size=size, **options)
    model.dense = options["dense"]
    whole = wrap(model, frozen=options["frozen"], tokenizer=options["tokenizer"])
    return _resized(whole, size)


def _wrapped(model: Any, options: dict[str, Any]) -> ClipEncoder:
    """The encoder of a container's model."""
    from open_clip import CLIP, CoCa, CustomTextCLIP

    from czsl_heads.encoders import openai

    if isinstance(model, (CLIP, CustomTextCLIP)):
        return OpenClipEncoder(model, **options)
    if isinstance(model, Mapping):
        return OpenClipEncoder(_of_state(model), **options)
    if openai.is_openai_model(model):
        return OpenClipEncoder(openai.clip_of_openai_model(model), **options)
    if "transformers" in sys.modules:  # else nothing is of it
        from czsl_heads.encoders import hugging_face

        if hugging_face.supports(model):
            return hugging_face.HuggingFaceEncoder(model, **options)
    why = ": its images are pooled by queries that mix all patches" if isinstance(model, CoCa) else ""
    raise TypeError(
        "expected `model_or_name` to be a name, an Encoder, a CLIP of open_clip (CLIP, CustomTextCLIP), transformers "
        f"or OpenAI's package, or a state dict in OpenAI's layout, got {type(model).__name__}{why}"
    )


def _of_state(state: Mapping[str, Any]) -> nn.Module:
    from czsl_heads.encoders import openai

    if openai.is_openai_state(state):
        model: nn.Module = openai.clip_of_openai_state(state)
        return model
    raise ValueError(
        f"expected a state dict of OpenAI's archives, with {', '.join(openai.NUMBERS)}, got one without, which does "
        'not say its activation: save it, and name its architecture, as "ViT-L-14:PATH" (GELU) or '
        '"ViT-L-14-quickgelu:PATH" (QuickGELU)'
    )


def _size(image_size: Any) -> tuple[int, int]:
    sides = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2:
        raise ValueError(f"expected `image_size` to be a side or (height, width), got {image_size!r}")
    for side in sides:
        check_integer("image_size", side, 1)
    return sides


def _resized(encoder: ClipEncoder, size: tuple[int, int] | None) -> ClipEncoder:
    if size is not None and size != encoder.vision.image_size:
        encoder.vision.resize(size)
        encoder.resized_to = size
        encoder.preprocess = replace(encoder.preprocess, size=size)
    return encoder


def _is_encoder(model: nn.Module) -> bool:
    """From Python 3.12 on, isinstance would not see what a compiled encoder passes on."""
    try:
        check_encoder("model_or_name", model)
    except TypeError:
        return False
    return True


def _as_it_is(encoder: Any, frozen: bool | None, **options: Any) -> Any:
    """An Encoder is wrapped already."""
    for name, value in options.items():
        if value not in (None, "none"):
            raise ValueError(f"expected no `{name}` with an Encoder, which has its own, got one")
    return encoder.requires_grad_(False) if frozen else encoder
