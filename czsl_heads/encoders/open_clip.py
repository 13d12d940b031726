"""open_clip models behind the Encoder protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from czsl_heads._checks import check_choice, check_shapes, check_tensor
from czsl_heads.encoders.protocol import Tower
from czsl_heads.encoders.transforms import CLIP_MEAN, CLIP_STD, image_transform

OPENAI_VOCABULARY = 49408


class OpenClipEncoder(nn.Module):
    """An open_clip ``CLIP`` or ``CustomTextCLIP`` whose vision tower is a VisionTransformer pooled by the class token.

    Implements :class:`czsl_heads.encoders.protocol.Encoder`; made by :func:`czsl_heads.wrap`. The model is kept as
    ``.model`` and shared, not copied.

    Args:
        model: The open_clip model.
        tokenizer: Strings to token ids ``[n, context_length]``. Default: OpenAI's, where the vocabulary has its size.
        frozen: Switch off the gradients of all parameters; ``False`` leaves their flags as they are.

    Raises:
        TypeError: The model, or one of its towers, is of a kind that is not supported; the message says why.
        ValueError: The tower pools in a way that is not supported, or no tokenizer fits the vocabulary.
    """

    num_prefix = 1

    def __init__(
        self, model: nn.Module, *, tokenizer: Callable[[list[str]], Tensor] | None = None, frozen: bool = True
    ) -> None:
        super().__init__()
        _check_vision(model)
        text = getattr(model, "text", model)
        _check_text(text)
        self.model: Any = model
        self.tokenizer = tokenizer or _default_tokenizer(text)
        self.training = model.training  # of this module alone: the parts of the model may be in modes of their own
        if frozen:
            self.requires_grad_(False)

    @property
    def _visual(self) -> Any:
        return self.model.visual

    @property
    def _text(self) -> Any:
        """The module that holds the text tower: open_clip's ``CLIP`` keeps its parts on itself."""
        return getattr(self.model, "text", self.model)

    @property
    def _text_pool(self) -> str:
        return _text_pool(self._text)

    @property
    def dim(self) -> int:
        return int(self._visual.proj.shape[1])

    @property
    def text_dim(self) -> int:
        return int(self._text.token_embedding.embedding_dim)

    @property
    def context_length(self) -> int:
        """Positions that the text tower has."""
        return int(self._text.context_length)

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self._visual.grid_size
        return int(rows), int(columns)

    @property
    def image_size(self) -> int | tuple[int, int]:
        height, width = (int(side) for side in self._visual.image_size)
        return height if height == width else (height, width)

    @property
    def causal_text(self) -> bool:
        return self._text.attn_mask is not None and self._text_pool in ("argmax", "eos")

    @property
    def logit_scale(self) -> Tensor:
        scale: Tensor = self.model.logit_scale.exp().reshape(())
        return scale

    def encode_tokens(self, images: Tensor, *, checkpoint: bool = False) -> Tensor:
        """Images to all output tokens of the vision tower, each through ``ln_post`` and the projection.

        Args:
            images: ``[batch, 3, height, width]`` of :attr:`image_size`, normalised by :meth:`transform`.
            checkpoint: Keep no activations of this call but what enters each block, and run the blocks again in the
                backward pass, with the same dropout; nothing is set on the model. open_clip's own
                ``set_grad_checkpointing`` is heeded besides.

        Returns:
            ``[batch, 1 + patches, dim]``, [CLS] first, patches row by row; not normalised. Token 0 is the model's own
            image feature.

        Raises:
            TypeError, ValueError: ``images`` is no float tensor, or of another shape.
        """
        self._check_images(images)
        if len(images) == 0:
            return self.encode_tokens(_one_blank(images), checkpoint=checkpoint)[:0]
        hidden = self._visual._embeds(images)
        if checkpoint and torch.is_grad_enabled():
            for block in self.blocks("vision"):
                hidden = run_again_in_backward(block, hidden, use_reentrant=False)
        else:
            hidden = self._visual.transformer(hidden)
        tokens: Tensor = self._visual.ln_post(hidden) @ self._visual.proj
        return tokens

    def encode_images(self, images: Tensor) -> Tensor:
        """Images ``[batch, 3, height, width]`` to the model's own features ``[batch, dim]``; not normalised.

        Arguments and errors as in :meth:`encode_tokens`.
        """
        self._check_images(images)
        if len(images) == 0:
            return self.encode_images(_one_blank(images))[:0]
        features: Tensor = self.model.encode_image(images)
        return features

    def _check_images(self, images: Tensor) -> None:
        height, width = self._visual.image_size
        check_tensor("images", images)
        check_shapes(images=(images, f"batch 3 {height} {width}"))

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
        embedding = self._text.token_embedding
        tokens = self.tokenizer(list(texts)).to(embedding.weight.device)
        eos = self._pooled_position(tokens)
        if self.causal_text:
            tokens = tokens[:, : int(eos.max()) + 1]
        return embedding(tokens), eos

    def _check_length(self, texts: list[str]) -> None:
        """open_clip truncates in silence; a prompt that lost its object would be scored all the same."""
        encode = getattr(self.tokenizer, "encode", None)
        if encode is None:
            return
        for text in texts:
            length = len(encode(text)) + 2
            if length > self.context_length:
                raise ValueError(
                    f"expected `texts` of at most {self.context_length} tokens, got {length} tokens in {text!r}"
                )

    def _pooled_position(self, tokens: Tensor) -> Tensor:
        pool = self._text_pool
        if pool == "argmax":
            return tokens.argmax(dim=-1)
        if pool == "eos":
            eos_id: Any = getattr(self._text, "eos_id", getattr(self._text, "text_eos_id", None))
            return tokens.eq(eos_id).int().argmax(dim=-1)
        return tokens.new_full((len(tokens),), 0 if pool == "first" else tokens.shape[1] - 1)

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
        mask = self._text.attn_mask
        mask = None if mask is None else mask[:length, :length]
        hidden = self._text.transformer(self.enter_text_blocks(embeddings), attn_mask=mask)
        return self.leave_text_blocks(hidden[torch.arange(len(hidden), device=hidden.device), eos])

    def enter_text_blocks(self, embeddings: Tensor, start: int = 0) -> Tensor:
        """Token embeddings ``[n, length, text_dim]`` to what the first text block takes at ``start`` and on."""
        dtype = self._text.transformer.get_cast_dtype()
        stop = start + embeddings.shape[1]
        if stop > len(self._text.positional_embedding):
            length = len(self._text.positional_embedding)
            raise ValueError(f"expected prompts of at most {length} tokens, [SOS] and [EOS] included, got {stop}")
        positions = self._text.positional_embedding[start:stop]
        hidden: Tensor = embeddings.to(dtype) + positions.to(dtype)
        return hidden

    def leave_text_blocks(self, hidden: Tensor) -> Tensor:
        """What the last text block gives where it is pooled, ``[n, text_dim]``, to ``[n, dim]``; not normalised."""
        projection = self._text.text_projection
        pooled: Tensor = self._text.ln_final(hidden)
        if projection is None:
            return pooled
        features: Tensor = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return features

    @property
    def checkpoints_text(self) -> bool:
        """True after open_clip's ``set_grad_checkpointing``: text blocks keep no activations."""
        return bool(getattr(self._text.transformer, "grad_checkpointing", False))

    def blocks(self, tower: Tower) -> nn.ModuleList:
        """The residual blocks of the ``"vision"`` or ``"text"`` tower, first to last; items may be replaced."""
        check_choice("tower", tower, ("vision", "text"))
        blocks: nn.ModuleList = (self._visual if tower == "vision" else self._text).transformer.resblocks
        return blocks

    def transform(self, train: bool = False) -> Callable[[Any], Tensor]:
        """RGB PIL image to input tensor, with the mean and deviation of this model's pretraining."""
        config = getattr(self._visual, "preprocess_cfg", None) or {}
        mean, std = config.get("mean", CLIP_MEAN), config.get("std", CLIP_STD)
        return image_transform(self.image_size, train=train, mean=mean, std=std)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, text_dim={self.text_dim}, grid={self.grid}, image_size={self.image_size}"


def _check_vision(model: nn.Module) -> None:
    from open_clip.transformer import VisionTransformer

    visual = getattr(model, "visual", None)
    if not isinstance(visual, VisionTransformer):
        kind = type(visual).__name__
        why = {
            "TimmModel": "a timm tower pools and projects in ways that differ from model to model",
            "ModifiedResNet": "a ResNet has no class token, and its attention pooling projects one vector only",
        }.get(kind, "it has no class token and patch tokens in one projected space")
        raise TypeError(f"expected a vision tower of kind VisionTransformer, got {kind}: {why}")
    if visual.attn_pool is not None:
        raise ValueError(
            "expected a vision tower pooled by the class token, got attention pooling: "
            "its patch tokens are not in the space of the image feature"
        )
    if visual.pool_type != "tok":
        raise ValueError(
            f"expected a vision tower pooled by the class token, got pool_type={visual.pool_type!r}: "
            "its token 0 is not the image feature"
        )
    if visual.proj is None:
        raise ValueError("expected a vision tower with a projection, got none: its tokens are not in the joint space")


def _check_text(text: nn.Module) -> None:
    needed = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection", "attn_mask")
    missing = [name for name in needed if not hasattr(text, name)]
    if missing:
        raise TypeError(
            f"expected an open_clip text tower with token embeddings, got {type(text).__name__} without "
            f"{', '.join(missing)}: prompts cannot be put in"
        )
    if getattr(text, "cls_emb", None) is not None:
        raise ValueError("expected a text tower pooled at a token, got one that appends a class embedding (CoCa)")
    if getattr(text, "use_pad_mask", False):
        raise ValueError("expected a text tower without a padding mask, got use_pad_mask=True: it needs token ids")
    if _text_pool(text) == "none":
        raise ValueError("expected a text tower that pools to one vector, got pool_type='none'")


def _text_pool(text: nn.Module) -> str:
    pool: Any = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", None)
    return str(pool)


def _default_tokenizer(text: Any) -> Callable[[list[str]], Tensor]:
    from open_clip import SimpleTokenizer

    if text.vocab_size != OPENAI_VOCABULARY:
        raise ValueError(
            f"expected `tokenizer` for a vocabulary of {text.vocab_size} (OpenAI's has {OPENAI_VOCABULARY}), got None; "
            "pass open_clip.get_tokenizer(name), or wrap the model by its name"
        )
    tokenizer: Callable[[list[str]], Tensor] = SimpleTokenizer(context_length=text.context_length)
    return tokenizer


def _one_blank(images: Tensor) -> Tensor:
    """One image in place of none, which open_clip cannot reshape."""
    return images.new_zeros(1, *images.shape[1:])
