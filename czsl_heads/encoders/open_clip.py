"""open_clip models behind the Encoder protocol."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from czsl_heads.encoders.clip import ClipEncoder, Dense, Tokenizer
from czsl_heads.encoders.timm_towers import check_image_size, normalised_as_their_mean, timm_tower
from czsl_heads.encoders.towers import TextTower, VisionTower
from czsl_heads.encoders.transforms import Preprocess

OPENAI_VOCABULARY = 49408

RESNET = "its attention pooling projects one vector, and not single patches"
OTHER_TOWER = "it has no patch tokens in the space of the image feature"
COCA_POOL = "its queries mix all patches, so that no token is one patch's"
NO_POOL = "it makes no image feature"
IDS_ONLY = "its text tower takes token ids, and prompts cannot be put in"


class OpenClipEncoder(ClipEncoder):
    """An open_clip ``CLIP`` or ``CustomTextCLIP``, :class:`czsl_heads.encoders.clip.ClipEncoder` of its container.

    Args:
        model: The open_clip model.
        tokenizer: Strings to token ids ``[n, context_length]``. Default: OpenAI's, where the vocabulary has its size.
        frozen: Switch off the gradients of all parameters; ``False`` leaves their flags as they are.

    Raises:
        TypeError: The model, or one of its towers, is of a kind that is not supported; the message says why.
        ValueError: The tower pools in a way that is not supported, or no tokenizer fits the vocabulary.
    """

    def __init__(
        self, model: nn.Module, *, tokenizer: Tokenizer | None = None, frozen: bool = True, dense: Dense = "none"
    ) -> None:
        vision = vision_tower(getattr(model, "visual", None))
        text = getattr(model, "text", model)  # open_clip's ``CLIP`` keeps the parts of its text tower on itself
        _check_text(text)
        tokenizer = tokenizer or _default_tokenizer(text)
        config = getattr(model.visual, "preprocess_cfg", None) or {}
        kind = OpenClipText if _text_pool(text) in ("argmax", "eos") else PlacePooledText
        super().__init__(
            model,
            vision,
            kind(text, tokenizer),
            tokenizer=tokenizer,
            preprocess=Preprocess.of_open_clip(vision.image_size, config),
            frozen=frozen,
            dense=dense,
        )


def vision_tower(visual: Any) -> VisionTower:
    """The tower of an open_clip ``model.visual``; TypeError or ValueError with the reason if it is not supported."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, TimmModel):
        return timm_tower(visual)
    if isinstance(visual, VisionTransformer):
        _check_vit(visual)
        return ViT(visual)
    kind = type(visual).__name__
    why = RESNET if kind == "ModifiedResNet" else OTHER_TOWER
    raise TypeError(f"expected a vision tower of kind VisionTransformer or TimmModel, got {kind}: {why}")


class ViT(VisionTower):
    """open_clip's ``VisionTransformer``, pooled by the class token or by the mean of its patches (CLIPA).

    Patches go through the last layer norm and the projection. Pooled by the mean, they do so in one of two orders:

    * The norm before the mean: it is each patch's own.
    * The norm behind the mean (``final_ln_after_pool``): patches are normalised by mean and deviation of the *pooled*
      state, for their own would be other numbers than the image feature is made with.

    In both, the mean of the patch tokens is the image feature, token 0.

    References:
        Li, Wang and Xie, CLIPA: an inverse scaling law for CLIP training, NeurIPS 2023.
    """

    num_prefix = 1

    def __init__(self, visual: Any) -> None:
        self.visual = visual

    @property
    def dim(self) -> int:
        return int(self.visual.proj.shape[1])

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.visual.image_size
        return int(height), int(width)

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.visual.grid_size
        return int(rows), int(columns)

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.visual.transformer.resblocks
        return blocks

    @property
    def pools_class_token(self) -> bool:
        return bool(self.visual.pool_type == "tok")

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.visual.conv1.weight.dtype
        return dtype

    def resize(self, image_size: tuple[int, int]) -> None:
        """By bicubic interpolation of the positions, as open_clip does when it loads weights of another size."""
        from timm.layers.pos_embed import resample_abs_pos_embed

        visual = self.visual
        size = check_image_size(image_size, visual.patch_size)
        grid = (size[0] // visual.patch_size[0], size[1] // visual.patch_size[1])
        positions = visual.positional_embedding  # of the class token, then of the patches
        resampled = resample_abs_pos_embed(positions.detach()[None], new_size=grid, old_size=self.grid)[0]
        visual.positional_embedding = nn.Parameter(resampled, requires_grad=positions.requires_grad)
        visual.image_size, visual.grid_size = size, grid

    def enter(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.visual._embeds(images)
        return hidden

    def step(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.visual.transformer.batch_first:
            return super().step(block, hidden)
        return super().step(block, hidden.transpose(0, 1)).transpose(0, 1)

    def leave(self, hidden: Tensor) -> Tensor:
        norm, projection = self.visual.ln_post, self.visual.proj
        if self.visual.pool_type == "tok":
            tokens: Tensor = norm(hidden) @ projection
            return tokens

        pooled, patches = self.visual._pool(hidden)
        if self.visual.final_ln_after_pool:
            patches = normalised_as_their_mean(patches, norm)
        out: Tensor = torch.cat([pooled[:, None], patches], dim=1) @ projection
        return out

    def pool(self, images: Tensor) -> Tensor:
        features: Any = self.visual(images)
        feature: Tensor = features[0] if isinstance(features, tuple) else features
        return feature

    def run(self, images: Tensor, *, checkpoint: bool = False, last: Callable[..., Tensor] | None = None) -> Tensor:
        """As the base class; open_clip's own ``set_grad_checkpointing`` is heeded besides."""
        own = bool(self.visual.transformer.grad_checkpointing) and torch.is_grad_enabled()
        return super().run(images, checkpoint=checkpoint or own, last=last)


class OpenClipText(TextTower):
    """The text tower of open_clip's ``CLIP``, or its ``TextTransformer``, pooled where the text ends.

    Args:
        text: The module.
        tokenizer: What it is used with; it is asked how texts start and end.
    """

    def __init__(self, text: Any, tokenizer: Tokenizer) -> None:
        self.tower, self.tokenizer = text, tokenizer

    @cached_property
    def start(self) -> int:  # type: ignore[override]
        empty, word = self.tokenizer(["", "a"])
        common = int(empty.ne(word).int().argmax())  # what stands in front of any word
        return common if common <= 1 else 0  # more is padding, of a tokenizer that pads in front

    @cached_property
    def end_id(self) -> int:
        """What stands behind the last word: in an empty text, behind what every text starts with."""
        return int(self.tokenizer([""])[0, self.start])

    @property
    def text_dim(self) -> int:
        return int(self.tower.token_embedding.embedding_dim)

    @property
    def context_length(self) -> int:
        return int(self.tower.context_length)

    @property
    def causal(self) -> bool:
        return self.tower.attn_mask is not None

    @property
    def checkpoints(self) -> bool:
        """True after open_clip's ``set_grad_checkpointing``."""
        return bool(getattr(self.tower.transformer, "grad_checkpointing", False))

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.tower.transformer.resblocks
        return blocks

    def embed(self, tokens: Tensor) -> Tensor:
        embeddings: Tensor = self.tower.token_embedding(tokens)
        return embeddings

    def pooled_position(self, tokens: Tensor) -> Tensor:
        if _text_pool(self.tower) == "argmax":
            return tokens.argmax(dim=-1)
        eos_id: Any = getattr(self.tower, "eos_id", getattr(self.tower, "text_eos_id", None))
        return tokens.eq(eos_id).int().argmax(dim=-1)

    def enter(self, embeddings: Tensor, start: int = 0) -> Tensor:
        dtype = self.tower.transformer.get_cast_dtype()
        positions = self.tower.positional_embedding[start : start + embeddings.shape[1]]
        hidden: Tensor = embeddings.to(dtype) + positions.to(dtype)
        return hidden

    def run(self, hidden: Tensor) -> Tensor:
        length, mask = hidden.shape[1], self.tower.attn_mask
        mask = None if mask is None else mask[:length, :length]
        out: Tensor = self.tower.transformer(hidden, attn_mask=mask)
        return out

    def leave(self, hidden: Tensor) -> Tensor:
        projection = self.tower.text_projection
        pooled: Tensor = self.tower.ln_final(hidden)
        if projection is None:
            return pooled
        features: Tensor = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return features


class PlacePooledText(OpenClipText):
    """One that pools its first or its last position, wherever the text ends (SigLIP, CLIPA)."""

    causal = False

    def pooled_position(self, tokens: Tensor) -> Tensor:
        """Where the text ends: at the first [EOS], or where the padding begins. What is pooled reads it."""
        ends = tokens.eq(self.end_id)
        ends[:, : self.start] = False
        return ends.int().argmax(dim=-1)

    def encode(self, embeddings: Tensor, eos: Tensor) -> Tensor:
        place = 0 if _text_pool(self.tower) == "first" else -1
        return self.leave(self.run(self.enter(embeddings))[:, place])


def _check_vit(visual: Any) -> None:
    if visual.attn_pool is not None:
        raise ValueError(f"expected a vision tower pooled by class token or mean, got attention pooling: {COCA_POOL}")
    if visual.pool_type == "none":
        raise ValueError(f"expected a vision tower pooled by class token or mean, got pool_type='none': {NO_POOL}")
    if visual.proj is None:
        raise ValueError("expected a vision tower with a projection, got none: its tokens are not in the joint space")


def _check_text(text: nn.Module) -> None:
    needed = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection", "attn_mask")
    missing = [name for name in needed if not hasattr(text, name)]
    if missing:
        raise TypeError(
            f"expected an open_clip text tower with token embeddings, got {type(text).__name__} without "
            f"{', '.join(missing)}: {IDS_ONLY}"
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


def _default_tokenizer(text: Any) -> Tokenizer:
    from open_clip import SimpleTokenizer

    if text.vocab_size != OPENAI_VOCABULARY:
        raise ValueError(
            f"expected `tokenizer` for a vocabulary of {text.vocab_size} (OpenAI's has {OPENAI_VOCABULARY}), got None; "
            "pass open_clip.get_tokenizer(name), or wrap the model by its name"
        )
    tokenizer: Tokenizer = SimpleTokenizer(context_length=text.context_length)
    return tokenizer
