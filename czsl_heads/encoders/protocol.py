"""What every wrapped CLIP offers: the one interface that prompts, adapters, data and training are written against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

Tower = Literal["vision", "text"]


@runtime_checkable
class Encoder(Protocol):
    """Any CLIP, seen as two towers that end in one joint space of ``dim`` dimensions.

    Attributes:
        dim: Size of the joint space.
        text_dim: Width of the token embeddings that the text tower takes.
        num_prefix: Tokens before the patches inside the blocks of the vision tower: class token and registers, if there
            are any. What :meth:`encode_tokens` returns has one token before the patches in any case.
        grid: Rows and columns of patches.
        image_size: Side of the square input in pixels, or (height, width).
        causal_text: True if a text's feature depends on the positions up to its [EOS] only.
        logit_scale: The multiplier of the cosines (about 100), not its logarithm; scalar tensor.
    """

    @property
    def dim(self) -> int: ...
    @property
    def text_dim(self) -> int: ...
    @property
    def num_prefix(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def image_size(self) -> int | tuple[int, int]: ...
    @property
    def causal_text(self) -> bool: ...
    @property
    def logit_scale(self) -> Tensor: ...

    def encode_tokens(self, images: Tensor, *, checkpoint: bool = False) -> Tensor:
        """``[batch, 3, height, width]`` to ``[batch, 1 + patches, dim]``; projected, not normalised.

        Token 0 is the model's own image feature, also where a tower has no class token. With ``checkpoint`` the blocks
        keep no activations but are run again in the backward pass.
        """
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """``[batch, 3, height, width]`` to ``[batch, dim]`` by the model's own pooling; not normalised."""
        ...

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Strings to ``[texts, dim]``; not normalised."""
        ...

    def embed_texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Strings to token embeddings ``[n, length, text_dim]`` and the index of [EOS] in each, ``[n]``."""
        ...

    def encode_embeddings(self, embeddings: Tensor, eos: Tensor) -> Tensor:
        """What :meth:`embed_texts` returns, or prompts built from it, to ``[n, dim]``; not normalised."""
        ...

    def blocks(self, tower: Tower) -> nn.ModuleList:
        """The transformer blocks of a tower, first to last; items may be replaced in place."""
        ...

    def transform(self, train: bool = False) -> Callable[[Any], Tensor]:
        """PIL image to input tensor, as this model was pretrained; ``train`` adds the field's augmentation."""
        ...


@runtime_checkable
class OpenTextTower(Protocol):
    """What an :class:`Encoder` may offer besides, so that its text blocks can be run from outside, a few positions at
    a time: ``leave(blocks(enter(embeddings)))`` is what :meth:`Encoder.encode_embeddings` computes.
    """

    @property
    def checkpoints_text(self) -> bool: ...

    def enter_text_blocks(self, embeddings: Tensor, start: int = 0) -> Tensor:
        """Token embeddings ``[n, length, text_dim]`` to what the first block takes at positions ``start`` and on."""
        ...

    def leave_text_blocks(self, hidden: Tensor) -> Tensor:
        """What the last block gives where it is pooled, ``[n, text_dim]``, to ``[n, dim]``; not normalised."""
        ...


def check_encoder(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` has all that an :class:`Encoder` has (a compiled one passes it on)."""
    for member in vars(Encoder):
        if not member.startswith("_") and not hasattr(value, member):
            raise TypeError(
                f"expected `{name}` to be an Encoder, as `wrap` returns, got {type(value).__name__} without `{member}`"
            )
