"""What the released code saves, read into our modules: OpenAI-layout CLIPs of any size, vocabularies, named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from czsl_heads import CompositionSpace
from czsl_heads._checks import check_shapes, check_tensor
from czsl_heads.encoders.open_clip import OPENAI_VOCABULARY, OpenClipEncoder

_HEAD_WIDTH = 64  # OpenAI's loader derives the number of heads from it
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def read_clip(state: Mapping[str, Tensor]) -> OpenClipEncoder:
    """A wrapped CLIP in eval mode, frozen and in float32, from a state dict in OpenAI's layout.

    All sizes follow from shapes, as in OpenAI's loader: widths, layers, patches, context, heads = width // 64. The
    activation is QuickGELU.

    Args:
        state: Of a CLIP with a ViT, in any float dtype; names may begin with ``clip.`` or ``clip_model.``.

    Raises:
        TypeError: ``state`` is no mapping of names to tensors.
        ValueError: A tensor is missing, unknown, or of a shape that cannot be right.
    """
    from open_clip import CLIP

    state = _clip_weights(state)
    dim, vision, text = _sizes(state)
    with torch.random.fork_rng(devices=[]):  # its random weights are not kept
        model = CLIP(dim, vision, text, quick_gelu=True)
    copy_named(model.state_dict(keep_vars=True), state, "the state of CLIP")
    return OpenClipEncoder(model.eval())


def read_vocabulary(attributes: Sequence[str], objects: Sequence[str]) -> CompositionSpace:
    """The space of all pairs of these primitives, in the order given. Errors as :class:`CompositionSpace`."""
    return CompositionSpace(attributes, objects, seen=[(0, 0)]).open_world()


def check_table(name: str, table: Any, rows: int, width: int) -> Tensor:
    """A saved table of embeddings in float32; ValueError or TypeError unless it is ``[rows, width]``."""
    check_tensor(name, table)
    check_shapes(**{name: (table, f"{rows} {width}")})
    copied: Tensor = table.detach().to("cpu", torch.float32, copy=True)
    return copied


def check_context(name: str, context: Any, encoder: OpenClipEncoder, *, words: int = 2) -> Tensor:
    """A saved context ``[length, text_dim]`` in float32; errors also where so many words do not fit behind it."""
    check_tensor(name, context)
    length = check_shapes(**{name: (context, f"length {encoder.text_dim}")})["length"]
    longest = encoder.context_length - words - 2  # [SOS] and [EOS]
    if not 1 <= length <= longest:
        raise ValueError(f"expected `{name}` of 1 to {longest} vectors, which the context takes, got {length}")
    copied: Tensor = context.detach().to("cpu", torch.float32, copy=True)
    return copied


@torch.no_grad()
def copy_named(ours: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: str) -> None:
    """Copy ``saved`` tensors into ``ours`` of the same names; ValueError unless names and shapes agree."""
    missing, unknown = sorted(ours.keys() - saved.keys()), sorted(saved.keys() - ours.keys())
    if missing or unknown:
        named = [
            f"{kind} {', '.join(map(repr, names[:3]))}" for kind, names in (("no", missing), ("also", unknown)) if names
        ]
        raise ValueError(f"expected {source} with {len(ours)} tensors, got {' and '.join(named)}")
    for name, tensor in ours.items():
        if saved[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, got {tuple(saved[name].shape)}"
            raise ValueError(f"expected {source} with `{name}` of shape {shapes}")
        tensor.copy_(saved[name])


def check_state(name: str, state: Any) -> None:
    """Raise TypeError unless ``state`` maps names to tensors."""
    if not isinstance(state, Mapping):
        raise TypeError(f"expected `{name}` to be a mapping of names to tensors, got {type(state).__name__}")
    for key, value in state.items():
        check_tensor(f"{name}[{key!r}]", value, dtypes=None)


def _clip_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    check_state("clip_state", state)
    prefixes = [prefix for prefix in ("", "clip.", "clip_model.") if f"{prefix}ln_final.weight" in state]
    if not prefixes:
        raise ValueError("expected `clip_state` in OpenAI's layout, got no 'ln_final.weight'")
    named = {name.removeprefix(prefixes[0]): tensor for name, tensor in state.items() if name.startswith(prefixes[0])}
    return {name: tensor for name, tensor in named.items() if name not in _NO_WEIGHTS}


def _sizes(state: Mapping[str, Tensor]) -> tuple[int, dict[str, int], dict[str, int]]:
    """Joint width, and the configurations of the vision and the text tower."""
    axes = {
        "visual.conv1.weight": "width 3 patch patch",
        "visual.positional_embedding": "positions width",
        "visual.proj": "width dim",
        "token_embedding.weight": f"{OPENAI_VOCABULARY} text_width",
        "positional_embedding": "context text_width",
        "text_projection": "text_width dim",
    }
    if missing := [name for name in axes if name not in state]:
        raise ValueError(f"expected `clip_state` of a CLIP with a ViT, got no {missing[0]!r}")
    size = check_shapes(**{name: (state[name], text) for name, text in axes.items()})
    grid = round((size["positions"] - 1) ** 0.5)
    if grid < 1 or grid**2 + 1 != size["positions"]:
        positions = size["positions"]
        raise ValueError(
            f"expected `visual.positional_embedding` of [CLS] and a square of patches, got {positions} rows"
        )
    vision = {"image_size": grid * size["patch"], "patch_size": size["patch"], "width": size["width"]}
    text = {"context_length": size["context"], "vocab_size": OPENAI_VOCABULARY, "width": size["text_width"]}
    vision |= {"layers": _depth(state, "visual.transformer."), "head_width": _HEAD_WIDTH}
    text |= {"layers": _depth(state, "transformer."), "heads": count_heads("text_projection", size["text_width"])}
    count_heads("visual.proj", size["width"])
    return size["dim"], vision, text


def _depth(state: Mapping[str, Tensor], tower: str) -> int:
    prefix = f"{tower}resblocks."
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})


def count_heads(name: str, width: int) -> int:
    """Heads of an attention of that width by OpenAI's rule; ValueError where they do not divide it."""
    heads = width // _HEAD_WIDTH
    if heads < 1 or width % heads:
        raise ValueError(f"expected `{name}` of a width that width // 64 heads divide, got {width}")
    return heads
