"""The embedded tiny CLIP: an open_clip model of 1.2 million parameters, pretrained on captioned shapes.

Its card is ``docs/tiny_clip.md``; :mod:`czsl_heads.training.pretrain_tiny` makes its files.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_clip import CLIP, SimpleTokenizer

IMAGE_SIZE = 48
CONTEXT_LENGTH = 77  # CLIP's own, so that code written for CLIP fits
WEIGHTS = "tiny_clip.safetensors"
MERGES = "tiny_bpe.txt.gz"
RECORD = "tiny_clip.json"  # of the pretraining run

VISION = {"image_size": IMAGE_SIZE, "width": 128, "head_width": 32}
TEXT = {"context_length": CONTEXT_LENGTH, "width": 96, "heads": 3, "layers": 3}
DIM = 96


def build_tiny(merges: Path | None = None, *, layers: int = 4, patch_size: int = 8) -> tuple[CLIP, SimpleTokenizer]:
    """The tiny architecture with random weights, and its tokenizer.

    The tokenizer is open_clip's byte-level BPE with a small merge file: a word of the shapes world is one token, any
    other text falls back to pieces and bytes.

    Args:
        merges: A merge file; default: the one that the package ships.
        layers, patch_size: Of the vision tower.
    """
    from open_clip import CLIP, SimpleTokenizer

    with nullcontext(merges) if merges else as_file(_asset(MERGES)) as path:
        tokenizer = SimpleTokenizer(bpe_path=str(path), context_length=CONTEXT_LENGTH)
    vision = {**VISION, "layers": layers, "patch_size": patch_size}
    return CLIP(DIM, vision, {**TEXT, "vocab_size": tokenizer.vocab_size}), tokenizer


def load_tiny(folder: str | os.PathLike[str] | None = None) -> tuple[CLIP, SimpleTokenizer]:
    """A tiny CLIP in eval mode, and its tokenizer.

    Args:
        folder: Where :mod:`czsl_heads.training.pretrain_tiny` wrote one; default: the one that the package ships.

    Raises:
        ValueError: ``folder`` holds no such model, or one of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with nullcontext(Path(folder)) if folder else as_file(_asset("")) as root:
        if missing := [name for name in (RECORD, WEIGHTS, MERGES) if not (root / name).is_file()]:
            raise ValueError(f"expected `folder` with {', '.join(missing)}, as pretrain_tiny writes it, got {root}")
        try:
            spec = json.loads((root / RECORD).read_text(encoding="utf-8"))["spec"]
            shape = {name: spec[name] for name in ("layers", "patch_size") if name in spec}
            model, tokenizer = build_tiny(root / MERGES, **shape)
            model.load_state_dict(load_file(root / WEIGHTS))
        except (ValueError, KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
            raise ValueError(
                f"expected `folder` with a tiny CLIP, as pretrain_tiny writes it, got {root} ({error})"
            ) from error
    return model.eval(), tokenizer


def _asset(name: str) -> Any:
    return files("czsl_heads.encoders") / "assets" / name
