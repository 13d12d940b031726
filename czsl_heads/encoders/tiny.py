"""The embedded tiny CLIP: an open_clip model of 1.2 million parameters, pretrained on captioned shapes.

Its card is ``docs/tiny_clip.md``; :mod:`czsl_heads.training.pretrain_tiny` makes its files.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_clip import CLIP, SimpleTokenizer

IMAGE_SIZE = 48
CONTEXT_LENGTH = 77  # CLIP's own, so that code written for CLIP fits
WEIGHTS = "tiny_clip.safetensors"
MERGES = "tiny_bpe.txt.gz"

VISION = {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32}
TEXT = {"context_length": CONTEXT_LENGTH, "width": 96, "heads": 3, "layers": 3}
DIM = 96


def build_tiny(merges: Path | None = None) -> tuple[CLIP, SimpleTokenizer]:
    """The tiny architecture with random weights, and its tokenizer.

    The tokenizer is open_clip's byte-level BPE with a small merge file: a word of the shapes world is one token, any
    other text falls back to pieces and bytes.

    Args:
        merges: A merge file; default: the one that the package ships.
    """
    from open_clip import CLIP, SimpleTokenizer

    if merges is None:
        with as_file(_asset(MERGES)) as path:
            tokenizer = SimpleTokenizer(bpe_path=str(path), context_length=CONTEXT_LENGTH)
    else:
        tokenizer = SimpleTokenizer(bpe_path=str(merges), context_length=CONTEXT_LENGTH)
    return CLIP(DIM, VISION, {**TEXT, "vocab_size": tokenizer.vocab_size}), tokenizer


def load_tiny() -> tuple[CLIP, SimpleTokenizer]:
    """The tiny CLIP with the weights that the package ships, in eval mode, and its tokenizer."""
    from safetensors.torch import load_file

    model, tokenizer = build_tiny()
    with as_file(_asset(WEIGHTS)) as path:
        model.load_state_dict(load_file(path))
    return model.eval(), tokenizer


def _asset(name: str) -> Any:
    return files("czsl_heads.encoders") / "assets" / name
