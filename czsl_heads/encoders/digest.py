"""What tells one CLIP's weights from another's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def weights_digest(encoder: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: names, kinds, shapes and bits; as a hexadecimal string.

    Example:
        >>> first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> weights_digest(first) == weights_digest(first), weights_digest(first) == weights_digest(second)
        (True, False)
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(_bits(tensor))
    return digest.hexdigest()


def container(encoder: Any) -> str:
    """The package whose code an encoder runs: ``open_clip``, ``transformers``, ``clip`` (OpenAI's), or another."""
    model = getattr(encoder, "model", encoder)
    return type(model).__module__.partition(".")[0]


def activations(encoder: Any) -> str:
    """The kinds of activation in an encoder: two CLIPs of equal weights may differ in nothing else.

    They are named as what they compute, for packages and their versions give one function several names.

    Example:
        >>> activations(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GELU()))
        'GELU'
    """
    kinds = {_activation(module) for module in encoder.modules() if "GELU" in type(module).__name__}
    return ", ".join(sorted(kinds))


def _activation(module: Any) -> str:
    name = type(module).__name__
    if "Quick" in name:
        return "QuickGELU"
    by_tanh = "Tanh" in name or "New" in name or getattr(module, "approximate", "none") == "tanh"
    return "GELU by tanh" if by_tanh else "GELU"


def identity(encoder: Any, digest: str) -> dict[str, str]:
    """What a record says of a CLIP beside its name; ``digest`` is of its weights before anything was trained."""
    return {
        "encoder_container": container(encoder),
        "encoder_activation": activations(encoder),
        "encoder_preprocess": str(getattr(encoder, "preprocess", "")),
        "encoder_digest": digest,
    }


def differs(recorded: Mapping[str, Any], found: Mapping[str, str]) -> str:
    """How a recorded CLIP and the one found here are told apart, in words; empty if they are the same.

    Folders written before there were records of the container and the activation are known by their digest alone.
    """
    known = [name for name in ("encoder_digest", "encoder_activation", "encoder_preprocess") if name in recorded]
    if all(recorded[name] == found[name] for name in known):
        return ""
    others = [name for name in known if name != "encoder_preprocess" and recorded[name] != found[name]]
    if not others:
        return f"images by {recorded['encoder_preprocess']} there, by {found['encoder_preprocess']} here"
    return f"{_in_words(recorded)} there, {_in_words(found)} here"


def _in_words(record: Mapping[str, Any]) -> str:
    parts = [record.get(name) for name in ("encoder_container", "encoder_activation")]
    weights = f"weights {record['encoder_digest'][:12]}"
    return ", ".join([*filter(None, parts), weights])


def _bits(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
