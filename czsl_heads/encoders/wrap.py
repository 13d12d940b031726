"""One door for every CLIP."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from czsl_heads.encoders.open_clip import OpenClipEncoder
from czsl_heads.encoders.protocol import check_encoder
from czsl_heads.encoders.tiny import load_tiny

ENCODERS = "czsl_heads.encoders"  # the group of entry points by which other packages bring encoders


def wrap(
    model_or_name: nn.Module | str,
    *,
    frozen: bool = True,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
) -> Any:
    """Put any supported CLIP behind the :class:`~czsl_heads.encoders.protocol.Encoder` protocol.

    Args:
        model_or_name: An open_clip model, or a module that is an Encoder already; ``"tiny"`` (the embedded one) or
            ``"tiny:DIR"`` (of a pretraining run of :mod:`czsl_heads.training.pretrain_tiny`); open_clip's
            ``"ARCHITECTURE"`` (always the same random weights) or ``"ARCHITECTURE:TAG"``, such as ``"ViT-L-14:openai"``
            (TAG may be the path of a checkpoint); or ``"NAME"`` or ``"NAME:TAG"`` of an encoder of another package.
        frozen: Switch off the gradients of all parameters; ``False`` leaves their flags as they are.
        tokenizer: Strings to token ids, for a model object whose vocabulary is not OpenAI's.

    Returns:
        The encoder, in the mode (train or eval) of the model; models made by name are in eval mode. What is an encoder
        already, a compiled one too, is returned itself.

    A package brings an encoder by an entry point of the group ``czsl_heads.encoders``: a function from the TAG (``""``
    without one) to what this function takes, an Encoder or an open_clip model.

    Raises:
        TypeError: No open_clip model, Encoder or name, or a tower of a kind that is not supported.
        ValueError: An unknown name or tag, or a tower that pools otherwise than by the class token.

    Example:
        >>> import torch
        >>> encoder = wrap("tiny")
        >>> encoder.encode_tokens(torch.zeros(2, 3, 48, 48)).shape, encoder.encode_texts(["a red circle"]).shape
        (torch.Size([2, 37, 96]), torch.Size([1, 96]))
    """
    if isinstance(model_or_name, str):
        name, _, tag = model_or_name.partition(":")
        if entry := _brought(name):
            return wrap(entry.load()(tag).eval(), frozen=frozen, tokenizer=tokenizer)
        model, named_tokenizer = _from_name(model_or_name)
        return OpenClipEncoder(model, tokenizer=tokenizer or named_tokenizer, frozen=frozen)
    if not isinstance(model_or_name, nn.Module):
        raise TypeError(f"expected `model_or_name` to be a CLIP model or a name, got {type(model_or_name).__name__}")
    if _is_encoder(model_or_name):
        return _as_it_is(model_or_name, frozen, tokenizer)
    import open_clip

    if not isinstance(model_or_name, (open_clip.CLIP, open_clip.CustomTextCLIP)):
        raise TypeError(
            f"expected `model_or_name` to be an open_clip CLIP or CustomTextCLIP, got {type(model_or_name).__name__}"
        )
    return OpenClipEncoder(model_or_name, tokenizer=tokenizer, frozen=frozen)


def _brought(name: str) -> EntryPoint | None:
    """The entry point by which another package brings an encoder of that name; None if none does."""
    found = {entry.value: entry for entry in entry_points(group=ENCODERS) if entry.name == name}
    if not found:
        return None
    import open_clip

    own = ["this package"] if name == "tiny" or name in open_clip.list_models() else []
    if len(found) + len(own) > 1:
        raise ValueError(f"expected one package that brings the encoder {name}, got {' and '.join([*own, *found])}")
    return next(iter(found.values()))


def _is_encoder(model: nn.Module) -> bool:
    """From Python 3.12 on, isinstance would not see what a compiled encoder passes on."""
    try:
        check_encoder("model_or_name", model)
    except TypeError:
        return False
    return True


def _as_it_is(encoder: Any, frozen: bool, tokenizer: object) -> Any:
    """An Encoder is wrapped already."""
    if tokenizer is not None:
        raise ValueError("expected no `tokenizer` with an Encoder, which has its own, got one")
    return encoder.requires_grad_(False) if frozen else encoder


def _from_name(name: str) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    if name == "tiny" or name.startswith("tiny:"):
        return load_tiny(name.partition(":")[2] or None)
    import open_clip

    architecture, _, tag = name.partition(":")
    if architecture not in open_clip.list_models():
        raise ValueError(
            f'expected `model_or_name` to be "tiny" or "ARCHITECTURE[:TAG]" with one of open_clip.list_models(), '
            f"got {name!r}"
        )
    if tag and not open_clip.get_pretrained_cfg(architecture, tag) and not Path(tag).is_file():
        known = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise ValueError(
            f"expected `model_or_name` with a tag of {architecture} (one of {known}) or the path of a checkpoint, "
            f"got {name!r}"
        )
    if tag:
        model = open_clip.create_model(architecture, pretrained=tag)
    else:
        with torch.random.fork_rng(devices=[]):  # the same random weights each time, or no saved model would fit
            torch.manual_seed(0)
            model = open_clip.create_model(architecture, pretrained=None)
    return model.eval(), open_clip.get_tokenizer(architecture)
