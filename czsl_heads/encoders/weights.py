"""Files of weights: what they hold, and of which architecture they can be."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from czsl_heads.encoders.errors import told

WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".npz", ".npy")


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file by their names; of a training checkpoint its ``state_dict``.

    Files of tensors are read so that none of their content is run. A TorchScript archive, as OpenAI published its
    CLIPs, is a program besides its weights: name one by its path only if you trust where it comes from.

    Raises:
        ValueError: There is no such file, or it does not hold tensors by names.
    """
    remedy = "a file whose download broke off has to be loaded again, and a checkpoint of other objects to be saved as"
    with told(f"weights of a CLIP in {path}", f"{remedy} its state dict alone"):
        content = _content(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(each, Tensor) for each in state.values()):
        raise ValueError(f"expected weights of a CLIP in {path}, by their names, got {type(state).__name__}")
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _content(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise ValueError("it is empty")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if is_torchscript(path):
        from czsl_heads.encoders.openai import read_archive

        return read_archive(path)
    if start[:2] not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):  # a zip archive, or pickled
        raise ValueError(f"it is no file of weights; it starts with {start!r}")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)


def is_torchscript(path: Path) -> bool:
    """True of an archive that ``torch.jit.save`` wrote, as OpenAI published its CLIPs."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def fitting_architectures(state: Mapping[str, Tensor]) -> list[tuple[str, bool]]:
    """The architectures of open_clip whose sizes are those of a file, and whether each has QuickGELU."""
    import open_clip

    shapes = {name.removeprefix("text."): tuple(tensor.shape) for name, tensor in state.items()}
    wanted = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj", "token_embedding.weight")
    if any(name not in shapes for name in (*wanted, "positional_embedding")):
        return []
    found = []
    for architecture in open_clip.list_models():
        config = open_clip.get_model_config(architecture)
        vision, text = config["vision_cfg"], config["text_cfg"]
        if "timm_model_name" in vision or "hf_model_name" in text or isinstance(vision["layers"], list):
            continue
        width, patch, size = vision["width"], vision.get("patch_size"), vision.get("image_size", 224)
        expected = {
            "visual.conv1.weight": (width, 3, patch, patch),
            "visual.positional_embedding": ((size // patch) ** 2 + 1, width),
            "visual.proj": (width, config["embed_dim"]),
            "token_embedding.weight": (text.get("vocab_size", 49408), text.get("width", 512)),
            "positional_embedding": (text.get("context_length", 77), text.get("width", 512)),
        }
        deepest = f"visual.transformer.resblocks.{vision['layers'] - 1}.ln_1.weight"
        deeper = f"visual.transformer.resblocks.{vision['layers']}.ln_1.weight"
        same = all(shapes[name] == shape for name, shape in expected.items())
        if same and deepest in shapes and deeper not in shapes:
            found.append((architecture, bool(config.get("quick_gelu", False))))
    return found
