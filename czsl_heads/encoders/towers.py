"""What the two towers of a CLIP are to this package, whatever container they come in.

A tower is cut where others want to look in: before its blocks, at each block, and behind the last one. It holds no
weights of its own but refers to the container's model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward


class VisionTower(ABC):
    """From images to tokens in the joint space.

    Attributes:
        num_prefix: Tokens that stand before the patches inside the blocks: class token and registers, if there are any.
    """

    num_prefix: int

    @property
    @abstractmethod
    def dim(self) -> int:
        """Size of the joint space."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The residual blocks, first to last; items may be replaced in place."""

    @property
    def pools_class_token(self) -> bool:
        """True if the image feature is made of the first token alone."""
        return self.num_prefix > 0

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights which images meet first; here of the first block."""
        return next(self.blocks.parameters()).dtype

    def resize(self, image_size: tuple[int, int]) -> None:
        """Take images of another size from now on, by interpolated positions; ValueError if the tower cannot."""
        raise NotImplementedError

    @abstractmethod
    def enter(self, images: Tensor) -> Tensor:
        """Images ``[batch, 3, height, width]`` to what the first block takes, ``[batch, tokens, width]``."""

    def step(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One block; hidden states keep their shape."""
        out: Tensor = block(hidden)
        return out

    @abstractmethod
    def leave(self, hidden: Tensor) -> Tensor:
        """What the last block gives to ``[batch, 1 + patches, dim]``, not normalised; token 0 is the image feature.

        Patches go the way that leads from them to the image feature, each by itself.
        """

    @abstractmethod
    def pool(self, images: Tensor) -> Tensor:
        """Images to image features ``[batch, dim]`` by the container's own code; not normalised."""

    def run(self, images: Tensor, *, checkpoint: bool = False, last: Callable[..., Tensor] | None = None) -> Tensor:
        """Images to what the last block gives.

        Args:
            images: ``[batch, 3, height, width]``.
            checkpoint: Run the blocks again in the backward pass.
            last: Is called in the place of the last block, with all that the block would get.
        """
        hidden = self.enter(images)
        for block in self._steps(last):
            if checkpoint:
                hidden = run_again_in_backward(self.step, block, hidden, use_reentrant=False)
            else:
                hidden = self.step(block, hidden)
        return hidden

    def _steps(self, last: Callable[..., Tensor] | None) -> list[Any]:
        blocks = [*self.blocks]
        return blocks if last is None else [*blocks[:-1], last]


class TextTower(ABC):
    """From token ids, or embeddings in their place, to text features.

    Attributes:
        causal: True if a text's feature depends on the positions up to its [EOS] only.
        checkpoints: True if the container runs text blocks again in the backward pass.
        start: Tokens before the first word of a text: 1 for an [SOS], 0 where there is none.
    """

    start: int = 1

    @property
    @abstractmethod
    def text_dim(self) -> int:
        """Width of the token embeddings."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Positions that the tower has."""

    @property
    @abstractmethod
    def causal(self) -> bool: ...

    @property
    def checkpoints(self) -> bool:
        return False

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The residual blocks, first to last; items may be replaced in place."""

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids ``[n, length]`` to embeddings ``[n, length, text_dim]``, without positions."""

    @abstractmethod
    def pooled_position(self, tokens: Tensor) -> Tensor:
        """The position whose state becomes the text feature ``[n]``, of token ids ``[n, length]``."""

    @abstractmethod
    def enter(self, embeddings: Tensor, start: int = 0) -> Tensor:
        """Embeddings ``[n, length, text_dim]`` at positions ``start`` and on to what the first block takes."""

    @abstractmethod
    def run(self, hidden: Tensor) -> Tensor:
        """All blocks, from position 0 on ``[n, length, text_dim]``."""

    @abstractmethod
    def leave(self, hidden: Tensor) -> Tensor:
        """What the last block gives where it is pooled ``[n, text_dim]`` to ``[n, dim]``; not normalised."""

    def encode(self, embeddings: Tensor, eos: Tensor) -> Tensor:
        """Embeddings ``[n, length, text_dim]`` of texts that end at ``eos`` ``[n]`` to ``[n, dim]``; not normalised."""
        return self.leave(at_positions(self.run(self.enter(embeddings)), eos))


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """One state of each row: ``[n, length, width]`` and ``[n]`` to ``[n, width]``."""
    rows: Any = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, positions]
