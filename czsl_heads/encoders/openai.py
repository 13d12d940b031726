"""CLIPs of OpenAI's own package and in its layout, turned into open_clip's, whose tensors have the same names.

The package, ``clip``, is not imported: its models are known by their class and their attributes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from czsl_heads._checks import check_kind, check_shapes, check_tensor

if TYPE_CHECKING:
    from open_clip import CLIP

HEAD_WIDTH = 64  # OpenAI's loader derives the number of heads from it
NUMBERS = ("input_resolution", "context_length", "vocab_size")  # which its archives keep among the weights
_AXES = {
    "visual.conv1.weight": "width 3 patch patch",
    "visual.positional_embedding": "positions width",
    "visual.proj": "width dim",
    "token_embedding.weight": "vocabulary text_width",
    "positional_embedding": "context text_width",
    "text_projection": "text_width dim",
}
_PARTS = ("visual", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
_RESNET = "a ResNet has no class token, and its attention pooling projects one vector only"


def is_openai_state(state: Any) -> bool:
    """True of tensors by names that can only be OpenAI's, as its archives hold them.

    open_clip gives its tensors the same names. But OpenAI's archives keep three numbers besides, among them the
    resolution of the images. A state dict without them may be of a CLIP with GELU or with QuickGELU, and is not
    taken for OpenAI's.

    Example:
        >>> is_openai_state({"visual.conv1.weight": torch.zeros(8, 3, 4, 4)})
        False
    """
    return isinstance(state, Mapping) and "token_embedding.weight" in state and all(name in state for name in NUMBERS)


def is_openai_model(model: Any) -> bool:
    """True of a ``clip.model.CLIP``, as ``clip.load`` returns it, with ``jit=True`` too."""
    if isinstance(model, torch.jit.ScriptModule):
        return getattr(model, "original_name", None) == "CLIP" and is_openai_state(model.state_dict())
    return (
        type(model).__name__ == "CLIP"
        and not type(model).__module__.startswith("open_clip.")
        and all(hasattr(model, name) for name in _PARTS)
        and hasattr(model.visual, "input_resolution")
    )


def read_archive(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive by their names, on the CPU, as OpenAI published its CLIPs.

    Such a file is a program besides its weights. It is not run here, but it is parsed and compiled: read one only if
    you trust where it comes from.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated; the files stay what they are
        archive: Any = torch.jit.load(path, map_location="cpu")
    weights: dict[str, Tensor] = archive.state_dict()
    return weights


def clip_of_openai_state(state: Mapping[str, Tensor]) -> CLIP:
    """An open_clip ``CLIP`` in eval mode and in float32, with the weights of a state dict in OpenAI's layout.

    All sizes follow from shapes, as in OpenAI's loader: widths, layers, patches, vocabulary, context, and width // 64
    heads. The activation is QuickGELU, with which OpenAI trained all of its models. Weights are copied.

    Args:
        state: Of a CLIP with a vision transformer, in any float dtype, with or without the numbers of an archive.

    Raises:
        TypeError: ``state`` is no mapping of names to tensors.
        ValueError: It is of a CLIP with a ResNet, or a tensor is missing, unknown, or of a shape that cannot be right.

    References:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021.
    """
    check_kind("state", state, Mapping)
    for name, tensor in state.items():
        check_tensor(f"state[{name!r}]", tensor, dtypes=None)
    dim, vision, text = _sizes(state)
    _check_resolution(state, vision["image_size"])
    return _copied(state, dim, vision, text, quick_gelu=True).eval()


def clip_of_openai_model(model: nn.Module) -> CLIP:
    """An open_clip ``CLIP`` in float32 with a copy of the weights of a ``clip.model.CLIP``, in its mode.

    Nothing is shared: what is changed in the one is not changed in the other. Heads and activation are those of the
    model, and gradients are switched off where they are there.

    Raises:
        ValueError: The model has a ResNet, an activation other than QuickGELU and GELU, or further weights.
    """
    state = model.state_dict()
    if isinstance(model, torch.jit.ScriptModule):
        return clip_of_openai_state(state).train(model.training).to(state["ln_final.weight"].device)
    dim, vision, text = _sizes(state, model)
    clip = _copied(state, dim, vision, text, quick_gelu=_is_quick(model))
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in clip.named_parameters():
        parameter.requires_grad_(trained[name])
    return clip.train(model.training).to(state["ln_final.weight"].device)


def _copied(
    state: Mapping[str, Tensor], dim: int, vision: dict[str, int], text: dict[str, int], *, quick_gelu: bool
) -> CLIP:
    from open_clip import CLIP

    with torch.random.fork_rng(devices=[]):  # its random weights are not kept
        clip = CLIP(dim, vision, text, quick_gelu=quick_gelu)
    weights = {name: tensor for name, tensor in state.items() if name not in (*NUMBERS, "attn_mask")}
    try:
        clip.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip().rstrip(".")
        raise ValueError(f"expected `state` with the weights of a CLIP in OpenAI's layout, got one: {first}") from error
    return clip


def _sizes(state: Mapping[str, Tensor], model: Any = None) -> tuple[int, dict[str, int], dict[str, int]]:
    """Joint width, and the configurations of the vision and the text tower; heads are those of ``model``, if any."""
    if "visual.layer1.0.conv1.weight" in state:
        raise ValueError(f"expected `state` of a CLIP with a vision transformer, got one with a ResNet: {_RESNET}")
    if missing := [name for name in _AXES if name not in state]:
        raise ValueError(f"expected `state` of a CLIP with a vision transformer, got no {missing[0]!r}")
    size = check_shapes(**{name: (state[name], axes) for name, axes in _AXES.items()})
    grid = round((size["positions"] - 1) ** 0.5)
    if grid < 1 or grid**2 + 1 != size["positions"]:
        positions = size["positions"]
        raise ValueError(
            f"expected `visual.positional_embedding` of [CLS] and a square of patches, got {positions} rows"
        )
    vision = {"image_size": grid * size["patch"], "patch_size": size["patch"], "width": size["width"]}
    vision |= {"layers": _depth(state, "visual.transformer.")}
    vision |= {"head_width": size["width"] // _heads("visual.proj", size["width"], model and model.visual)}
    text = {"context_length": size["context"], "vocab_size": size["vocabulary"], "width": size["text_width"]}
    text |= {"layers": _depth(state, "transformer."), "heads": _heads("text_projection", size["text_width"], model)}
    return size["dim"], vision, text


def _depth(state: Mapping[str, Tensor], tower: str) -> int:
    prefix = f"{tower}resblocks."
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})


def _heads(name: str, width: int, tower: Any) -> int:
    """Heads of an attention of that width: those of the tower, or without one by OpenAI's rule."""
    heads = int(tower.transformer.resblocks[0].attn.num_heads) if tower is not None else width // HEAD_WIDTH
    if heads < 1 or width % heads:
        raise ValueError(f"expected `{name}` of a width that width // 64 heads divide, got {width}")
    return heads


def _is_quick(model: Any) -> bool:
    names = {type(layer).__name__ for layer in model.transformer.resblocks[0].mlp}
    if not names & {"QuickGELU", "GELU"}:
        raise ValueError(f"expected `model` with QuickGELU or GELU in its blocks, got {', '.join(sorted(names))}")
    return "QuickGELU" in names


def _check_resolution(state: Mapping[str, Tensor], image_size: int) -> None:
    if "input_resolution" in state and int(state["input_resolution"]) != image_size:
        resolution = int(state["input_resolution"])
        raise ValueError(f"expected `state` with input_resolution {image_size}, as its positions say, got {resolution}")
