"""A CLIP of any container behind the Encoder protocol: two towers, a tokenizer, and how images are prepared."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, get_args

import torch
from torch import Tensor, nn

from czsl_heads._checks import check_choice, check_shapes, check_tensor
from czsl_heads.encoders.attention import fuse_attention
from czsl_heads.encoders.dense import BothWays, check_block
from czsl_heads.encoders.dense import Dense as Dense
from czsl_heads.encoders.protocol import Tower
from czsl_heads.encoders.towers import TextTower, VisionTower
from czsl_heads.encoders.transforms import Preprocess

Tokenizer = Callable[[list[str]], Tensor]


class ClipEncoder(nn.Module):
    """Implements :class:`czsl_heads.encoders.protocol.Encoder`; made by :func:`czsl_heads.wrap`.

    Each container has a class of its own, which knows where the parts of its models are. The model is kept as
    ``.model`` and shared, not copied. Its ``nn.MultiheadAttention`` become
    :class:`~czsl_heads.encoders.attention.FusedAttention`, which is one too, with the same weights.

    Args:
        model: The container's model.
        vision, text: Its towers.
        tokenizer: Strings to token ids ``[n, context_length]``.
        preprocess: How the images of its pretraining were prepared.
        frozen: Switch off the gradients of all parameters; ``False`` leaves their flags as they are.
        dense: What the last block does to the patch tokens, see :mod:`czsl_heads.encoders.dense`.

    Raises:
        TypeError: ``dense`` is not ``"none"``, and the blocks of the vision tower are of an unknown kind.
    """

    resized_to: tuple[int, int] | None = None  # the size that wrap was asked for, if that is not the model's own

    def __init__(
        self,
        model: nn.Module,
        vision: VisionTower,
        text: TextTower,
        *,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        frozen: bool = True,
        dense: Dense = "none",
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.vision, self.text = vision, text
        self.dense = dense
        self.tokenizer, self.preprocess = tokenizer, preprocess
        fuse_attention(model)
        self.training = model.training  # of this module alone: the parts of the model may be in modes of their own
        if frozen:
            self.requires_grad_(False)

    @property
    def dense(self) -> Dense:
        """What the last block does to the patch tokens; may be set to another recipe at any time."""
        return self._dense

    @dense.setter
    def dense(self, dense: Dense) -> None:
        check_choice("dense", dense, get_args(Dense))
        if dense != "none":
            check_block(self.vision.blocks[-1], dense)
        self._dense: Dense = dense

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches inside the blocks of the vision tower."""
        return self.vision.num_prefix

    @property
    def dim(self) -> int:
        """Size of the joint space."""
        return self.vision.dim

    @property
    def text_dim(self) -> int:
        """Width of the token embeddings that the text tower takes."""
        return self.text.text_dim

    @property
    def context_length(self) -> int:
        """Positions that the text tower has."""
        return self.text.context_length

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.vision.grid

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side of the square input in pixels, or (height, width)."""
        height, width = self.vision.image_size
        return height if height == width else (height, width)

    @property
    def causal_text(self) -> bool:
        """True if a text's feature depends on the positions up to its [EOS] only."""
        return self.text.causal

    @property
    def text_start(self) -> int:
        """Tokens before the first word of a text: 1 for an [SOS], 0 where there is none."""
        return self.text.start

    @property
    def logit_scale(self) -> Tensor:
        """The multiplier of the cosines, not its logarithm; scalar tensor."""
        scale: Tensor = self.model.logit_scale.exp().reshape(())
        return scale

    @property
    def logit_bias(self) -> Tensor | None:
        """What is added to the logits of a model trained by a sigmoid loss; None elsewhere. It changes no ranking."""
        bias: Tensor | None = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.reshape(())

    def encode_tokens(self, images: Tensor, *, checkpoint: bool = False) -> Tensor:
        """Images to the image feature and all patch tokens, each brought into the joint space.

        Args:
            images: ``[batch, 3, height, width]`` of :attr:`image_size`, normalised by :meth:`transform`; of any float
                dtype, and brought into that of the tower.
            checkpoint: Keep no activations of this call but what enters each block, and run the blocks again in the
                backward pass, with the same dropout; nothing is set on the model.

        Returns:
            ``[batch, 1 + patches, dim]``, patches row by row; not normalised. Token 0 is the model's own image feature,
            whatever ``dense`` says.

        Raises:
            TypeError, ValueError: ``images`` is no float tensor, or of another shape; with ``dense="naclip"`` some
                patches have been dropped.
        """
        images = self._checked(images)
        if len(images) == 0:
            return self.encode_tokens(_one_blank(images), checkpoint=checkpoint)[:0]
        checkpoint = checkpoint and torch.is_grad_enabled()
        if self.dense == "none":
            return self.vision.leave(self.vision.run(images, checkpoint=checkpoint))

        both_ways = BothWays(self.vision.blocks[-1], self.dense, self.grid, self.num_prefix)
        hidden = self.vision.run(images, checkpoint=checkpoint, last=both_ways)
        # Apart, for a head that pools makes of twice as many images other roundings.
        as_trained, dense = (self.vision.leave(half) for half in hidden.chunk(2))
        return torch.cat([as_trained[:, :1], dense[:, 1:]], dim=1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images ``[batch, 3, height, width]`` to the model's own features ``[batch, dim]``; not normalised.

        Arguments and errors as in :meth:`encode_tokens`.
        """
        images = self._checked(images)
        if len(images) == 0:
            return self.encode_images(_one_blank(images))[:0]
        return self.vision.pool(images)

    def _checked(self, images: Tensor) -> Tensor:
        height, width = self.vision.image_size
        check_tensor("images", images)
        check_shapes(images=(images, f"batch 3 {height} {width}"))
        return images.to(self.vision.dtype)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Strings to text features ``[texts, dim]``; not normalised. Runs only as many positions as are needed."""
        return self.encode_embeddings(*self.embed_texts(texts))

    def embed_texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Strings to token embeddings and the position that is pooled.

        Args:
            texts: Strings; at least one.

        Returns:
            Embeddings ``[n, length, text_dim]`` without positions, and the pooled position (of [EOS]) ``[n]``. Where
            :attr:`causal_text` holds, ``length`` is the longest text's; elsewhere the full context.

        Raises:
            TypeError: ``texts`` is no list of strings.
            ValueError: ``texts`` is empty, or one does not fit the context.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"expected `texts` to be a list of strings, got {texts!r}")
        if not texts:
            raise ValueError("expected `texts` to hold at least one string, got none")
        self._check_length(texts)
        tokens = self.tokenizer(list(texts)).to(self.logit_scale.device)
        eos = self.text.pooled_position(tokens)
        if self.causal_text:
            tokens = tokens[:, : int(eos.max()) + 1]
        return self.text.embed(tokens), eos

    def _check_length(self, texts: list[str]) -> None:
        """Tokenizers truncate in silence; a prompt that lost its object would be scored all the same."""
        limit = self.context_length
        encode = getattr(self.tokenizer, "encode", None)
        if encode is None or not hasattr(self.tokenizer, "sot_token_id"):
            for text, fits in zip(texts, _fit(self.tokenizer, texts, limit)):
                if not fits:
                    raise ValueError(f"expected `texts` of at most {limit} tokens, got more in {text!r}")
            return
        for text in texts:
            length = len(encode(text)) + 2  # OpenAI's tokenizer adds [SOS] and [EOS] afterwards
            if length > limit:
                raise ValueError(f"expected `texts` of at most {limit} tokens, got {length} tokens in {text!r}")

    def encode_embeddings(self, embeddings: Tensor, eos: Tensor) -> Tensor:
        """Token embeddings to text features.

        Args:
            embeddings: ``[n, length, text_dim]``, [SOS] first, without positional embeddings. Where the tower is not
                causal, ``length`` must be the full context.
            eos: Position to pool in each row, ``[n]``, long.

        Returns:
            ``[n, dim]``; not normalised.

        Raises:
            TypeError, ValueError: A shape or dtype does not fit, or the rows are longer than the context.
        """
        check_tensor("embeddings", embeddings)
        check_tensor("eos", eos, dtypes=(torch.long,))
        sizes = check_shapes(embeddings=(embeddings, f"texts length {self.text_dim}"), eos=(eos, "texts"))
        length = sizes["length"]
        if length > self.context_length or (length < self.context_length and not self.causal_text):
            most = "at most" if self.causal_text else "exactly"
            raise ValueError(f"expected `embeddings` of {most} {self.context_length} positions, got {length}")
        return self.text.encode(embeddings, eos)

    def enter_text_blocks(self, embeddings: Tensor, start: int = 0) -> Tensor:
        """Token embeddings ``[n, length, text_dim]`` to what the first text block takes at ``start`` and on."""
        stop = start + embeddings.shape[1]
        if stop > self.context_length:
            length = self.context_length
            raise ValueError(f"expected prompts of at most {length} tokens, [SOS] and [EOS] included, got {stop}")
        return self.text.enter(embeddings, start)

    def leave_text_blocks(self, hidden: Tensor) -> Tensor:
        """What the last text block gives where it is pooled, ``[n, text_dim]``, to ``[n, dim]``; not normalised."""
        return self.text.leave(hidden)

    @property
    def checkpoints_text(self) -> bool:
        """True if the container runs text blocks again in the backward pass, so that they keep no activations."""
        return self.text.checkpoints

    def blocks(self, tower: Tower) -> nn.ModuleList:
        """The residual blocks of the ``"vision"`` or ``"text"`` tower, first to last; items may be replaced."""
        check_choice("tower", tower, ("vision", "text"))
        return self.vision.blocks if tower == "vision" else self.text.blocks

    def transform(self, train: bool = False) -> Callable[[Any], Tensor]:
        """RGB PIL image to input tensor, prepared as in this model's pretraining; ``train`` adds the augmentation."""
        return self.preprocess.transform(train)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, text_dim={self.text_dim}, grid={self.grid}, image_size={self.image_size}"


def _one_blank(images: Tensor) -> Tensor:
    """One image in place of none, which not every container can reshape."""
    return images.new_zeros(1, *images.shape[1:])


def _fit(tokenizer: Tokenizer, texts: list[str], length: int) -> list[bool]:
    """Whether each text has no more tokens with twice the room; nothing if the tokenizer cannot be given any."""
    if "context_length" not in signature(tokenizer).parameters:
        return []
    make: Any = tokenizer
    tight, roomy = make([*texts, ""], context_length=length), make([*texts, ""], context_length=2 * length)
    padding = roomy[-1].mode().values  # the empty text is little else
    fits: list[bool] = ((roomy != padding).sum(dim=1) <= (tight != padding).sum(dim=1)).tolist()
    return fits[:-1]
