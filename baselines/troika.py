"""Troika: branches for pair, attribute and object, adapters in the vision tower, texts drawn towards each image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from baselines.official import (
    check_context,
    check_state,
    check_table,
    copy_named,
    count_heads,
    read_clip,
    read_vocabulary,
)
from czsl_heads import CompositionSpace
from czsl_heads._checks import check_choice, check_integer, check_kind, check_range
from czsl_heads.adapters.bottleneck import AdaptedBlock, add_bottlenecks
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.functional.fusion import combine
from czsl_heads.functional.maxsim import maxsim
from czsl_heads.functional.unit import unit_vectors
from czsl_heads.models.method import Align, Logits, Method, cross_entropies
from czsl_heads.prompts.soft import Encode, SoftPrompts, TextFeatures

PatchNorm = Literal["fresh", "cumulative"]
Fusion = Literal["probs", "logits"]
Branch = Literal["pairs", "attributes", "objects"]
Weights = tuple[float, float, float]
Device = torch.device | str | None
BRANCHES: tuple[Branch, ...] = ("pairs", "attributes", "objects")
_ROWS = 16384  # images x texts that traction works on at once


class Quirks(NamedTuple):
    """What the released code does besides the method; the defaults are the clean reading."""

    patch_norm: PatchNorm = "fresh"
    fusion: Fusion = "probs"
    text_chunk: int = 0
    fused_validation_loss: bool = False
    stays_in_eval: bool = False


OFFICIAL = Quirks("cumulative", "logits", 1024, True, True)


class Disentangler(nn.Module):
    """An image feature in the view of one primitive: linear, batch norm, ReLU, dropout of one half.

    Batch norm takes its statistics from all tokens that come in.

    Args:
        dim: Of the joint space.
        device, dtype: Of the parameters, as torch's own layers take them.

    Shape:
        [batch, tokens, dim] to [batch, tokens, dim].

    Raises:
        ValueError: One token alone comes in, in training mode.

    Example:
        >>> Disentangler(6).eval()(torch.ones(2, 5, 6)).shape
        torch.Size([2, 5, 6])

    References:
        Huang et al., Troika, CVPR 2024.
    """

    def __init__(self, dim: int, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.norm = nn.BatchNorm1d(dim, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[batch, tokens, dim]`` to their views, ``[batch, tokens, dim]``."""
        if self.training and tokens.shape[:2] == (1, 1):
            raise ValueError("expected `images` to be at least two in training, for batch norm, got one")
        # as rows, since batch norm would take dimension 1, the tokens, for channels
        projected = self.proj(tokens.to(self.proj.weight.dtype))  # a CLIP of half precision does not decide ours
        rows = rearrange(projected, "batch tokens dim -> (batch tokens) dim")
        hidden = F.dropout(F.relu(self.norm(rows)), training=self.training)
        viewed: Tensor = rearrange(hidden, "(batch tokens) dim -> batch tokens dim", tokens=tokens.shape[1])
        return viewed


class CrossAttention(nn.Module):
    """Texts attend to tokens; the projections of both have no bias.

    Args:
        dim: Of texts and tokens; it has ``dim // 64`` heads.
        dropout: On what comes out, in training.
        device, dtype: Of the parameters, as torch's own layers take them.

    Raises:
        ValueError: The heads do not divide ``dim``.
    """

    def __init__(self, dim: int, dropout: float, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        kind: Any = {"device": device, "dtype": dtype}
        self.heads = count_heads("dim", dim)
        self.q_proj = nn.Linear(dim, dim, bias=False, **kind)
        self.k_proj = nn.Linear(dim, dim, bias=False, **kind)
        self.v_proj = nn.Linear(dim, dim, bias=False, **kind)
        self.proj = nn.Linear(dim, dim, **kind)
        self.proj_drop = nn.Dropout(dropout)

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, tokens, dim / heads]``, which all texts share."""
        return self._split(self.k_proj(tokens)), self._split(self.v_proj(tokens))

    def forward(self, texts: Tensor, read: tuple[Tensor, Tensor]) -> Tensor:
        """Texts ``[batch, texts, dim]`` and what :meth:`read` gives to what each text gets, ``[batch, texts, dim]``."""
        mixed = F.scaled_dot_product_attention(self._split(self.q_proj(texts)), *read)
        attended: Tensor = self.proj_drop(self.proj(rearrange(mixed, "batch heads n dim -> batch n (heads dim)")))
        return attended

    def _split(self, vectors: Tensor) -> Tensor:
        parts: Tensor = rearrange(vectors, "batch n (heads dim) -> batch heads n dim", heads=self.heads)
        return parts


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), OpenAI's."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return hidden * torch.sigmoid(1.702 * hidden)


class TractionLayer(nn.Module):
    """Texts attend to tokens, then pass an MLP; only the MLP has a layer norm before it.

    Arguments and errors as in :class:`CrossAttention`.
    """

    def __init__(self, dim: int, dropout: float, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        kind: Any = {"device": device, "dtype": dtype}
        self.cross_attn = CrossAttention(dim, dropout, **kind)
        self.norm = nn.LayerNorm(dim, **kind)
        up, down = nn.Linear(dim, 4 * dim, **kind), nn.Linear(4 * dim, dim, **kind)
        self.mlp = nn.Sequential(up, QuickGELU(), nn.Dropout(dropout), down)
        self.dropout = nn.Dropout(dropout)

    def forward(self, texts: Tensor, read: tuple[Tensor, Tensor]) -> Tensor:
        """Texts ``[batch, texts, dim]`` and what the attention reads of tokens to ``[batch, texts, dim]``."""
        texts = texts + self.cross_attn(texts, read)
        out: Tensor = texts + self.dropout(self.mlp(self.norm(texts)))
        return out


class Traction(nn.Module):
    r"""Cross-modal traction: each text moves towards each image.

    .. math:: \hat t_{bk} = \mathrm{normalize}(t_k + \lambda \odot \mathrm{layers}(t_k; \mathrm{ln}(X_b)))

    Texts do not read each other, so that any part of them can be run by itself.

    Args:
        dim: Of texts and tokens.
        layers: How many times texts attend to tokens.
        init: What each entry of :math:`\lambda` starts from.
        dropout: Inside the layers, in training.
        device, dtype: Of the parameters, as torch's own layers take them.

    Raises:
        TypeError, ValueError: An argument is of another kind, or out of range.

    Example:
        >>> traction = Traction(64, 2, init=0.1, dropout=0.0)
        >>> tokens, texts = torch.ones(3, 5, 64), torch.ones(4, 64)
        >>> traction(texts, traction.read(tokens), 3).shape
        torch.Size([3, 4, 64])

    References:
        Huang et al., Troika, CVPR 2024.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        *,
        init: float,
        dropout: float,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("layers", layers, 0)
        check_range("traction_dropout", dropout, 0, 1)
        kind: Any = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(TractionLayer(dim, dropout, **kind) for _ in range(layers))
        self.weight = nn.Parameter(torch.full((dim,), float(init), **kind))
        self.token_norm = nn.LayerNorm(dim, **kind)

    def read(self, normed: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the layers read of tokens ``[batch, tokens, dim]``, normed."""
        layers: Any = self.layers
        return [layer.cross_attn.read(normed) for layer in layers]

    def forward(self, texts: Tensor, reads: list[tuple[Tensor, Tensor]], batch: int) -> Tensor:
        """Unit texts ``[texts, dim]`` or ``[batch, texts, dim]`` to ``[batch, texts, dim]``, unit rows."""
        texts = texts.to(self.weight.dtype)
        moved = texts.expand(batch, -1, -1)
        for layer, read in zip(self.layers, reads):
            moved = layer(moved, read)
        return unit_vectors(texts + self.weight * moved)


class Troika(Method):
    r"""Multi-path cross-modal traction: with v the [CLS] feature and :math:`\hat t` the texts after traction,

    .. math:: \ell_{pair} = \tau \cos(v, \hat t_{ao}), \quad \ell_{attr} = \tau \cos(D_a(v), \hat t_a), \quad
              \ell_{obj} = \tau \cos(D_o(v), \hat t_o)

    Args:
        encoder: A wrapped CLIP; adapters are put into its vision tower.
        space: Gives the primitives; pairs are passed to each call.
        align: How an image is compared with texts, in all branches: ``"cls"``, as published, or a
            :class:`~czsl_heads.SparseAlignHead`, whose ``include_cls`` says whether [CLS] is one of the tokens.
        align_branches: Where ``align`` stands; the other branches compare [CLS].
        disentangle: ``"winner"``: one token an image is disentangled, the one that wins the best pair, and compared
            with all attributes and objects. These logits then depend on which pairs are asked for. ``"each"``: every
            token is disentangled, and the head takes its pick for each text.
        layers, init_weight, traction_dropout: Of the :class:`Traction`.
        traction_chunk: Texts that traction works on at once; the result is the same. Where there are several chunks,
            their activations are not kept but computed again in the backward pass. Default: as many as keep images x
            texts at 16,384.
        adapter_dim, adapter_dropout: Of the adapters.
        context: The words that the three contexts start from.
        primitives: The table to start from; default: of each name, the mean of its token embeddings.
        dropout: On the whole table, in training.
        loss_weights: Of the losses of pairs, attributes and objects.
        inference_weights: The same in the scores; a primitive of weight 0 is a factor of 1.
        official: Turn on what the released code does: the options below, where they are None, and prompts run whole.
        patch_norm: ``"fresh"``: tokens are normed once in each branch; ``"cumulative"`` (official): once for pairs,
            twice for attributes, three times for objects, since the normed tokens take the place of the tokens.
        fusion: ``"probs"`` adds probabilities of pair and primitives, as the paper; ``"logits"`` (official) adds to
            the pair's logit.
        text_chunk: Pairs that the released evaluation encodes at once (official: 1024; 0: all). Each chunk brings its
            own copy of attributes and objects, so that their probabilities are divided by the number of chunks.
        fused_validation_loss: Whether :meth:`validation_loss` takes the fused scores for logits (official: yes).
        stays_in_eval: Whether ``train()`` no longer has an effect after training was interrupted by ``eval()``
            (official: yes). A loop that sets modes by other means is not reached.
        encode: Of :class:`~czsl_heads.prompts.soft.SoftPrompts`.
        checkpoint: Keep no activations of the blocks of both towers in training but run them again.

    Shape:
        images [batch, 3, height, width], pairs [K, 2] long (attribute index, object index); to :class:`Logits`.

    Raises:
        TypeError, ValueError: An argument is of another kind, shape or range, or pairs name no primitives.

    Example:
        >>> import torch
        >>> from czsl_heads import CompositionSpace, SparseAlignHead, wrap
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")]).open_world()
        >>> troika = Troika(wrap("tiny"), space, align=SparseAlignHead(), layers=1).eval()
        >>> [tuple(logits.shape) for logits in troika(torch.zeros(3, 3, 48, 48), space.pairs)]
        [(3, 2), (3, 2), (3, 1)]

    References:
        Huang et al., Troika: Multi-Path Cross-Modal Traction for Compositional Zero-Shot Learning, CVPR 2024.
    """

    def __init__(
        self,
        encoder: Encoder,
        space: CompositionSpace,
        *,
        align: Align = "cls",
        align_branches: Sequence[Branch] = BRANCHES,
        disentangle: Literal["winner", "each"] = "winner",
        layers: int = 2,
        init_weight: float = 0.1,
        traction_dropout: float = 0.0,
        traction_chunk: int | None = None,
        adapter_dim: int = 64,
        adapter_dropout: float = 0.1,
        context: str = "a photo of",
        primitives: Tensor | None = None,
        dropout: float = 0.0,
        loss_weights: Weights = (1.0, 0.1, 0.1),
        inference_weights: Weights = (1.0, 1.0, 1.0),
        official: bool = False,
        patch_norm: PatchNorm | None = None,
        fusion: Fusion | None = None,
        text_chunk: int | None = None,
        fused_validation_loss: bool | None = None,
        stays_in_eval: bool | None = None,
        encode: Encode | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__(encoder, space, align=align)
        asked = (patch_norm, fusion, text_chunk, fused_validation_loss, stays_in_eval)
        named: Any = {name: value for name, value in zip(Quirks._fields, asked) if value is not None}
        self.quirks = (OFFICIAL if official else Quirks())._replace(**named)

        for name, switch in (("official", official), ("checkpoint", checkpoint)):
            check_kind(name, switch, bool)
        if isinstance(align_branches, str) or not isinstance(align_branches, Sequence):
            raise TypeError(f"expected `align_branches` to be a list of names, got {align_branches!r}")
        check_integer("adapter_dim", adapter_dim, 1)
        check_range("adapter_dropout", adapter_dropout, 0, 1)
        check_range("init_weight", init_weight, -math.inf)
        self.align_branches, self.disentangle = tuple(align_branches), disentangle
        self.traction_chunk = traction_chunk
        self.loss_weights, self.inference_weights = loss_weights, inference_weights
        self._check_options()

        self.prompts = SoftPrompts(
            encoder,
            space,
            context=context,
            primitives=primitives,
            dropout=dropout,
            encode=encode or ("plain" if official else "auto"),
            checkpoint=checkpoint,
        )
        self.attribute_disentangler = Disentangler(encoder.dim)
        self.object_disentangler = Disentangler(encoder.dim)
        self.traction = Traction(encoder.dim, layers, init=init_weight, dropout=traction_dropout)
        self.checkpoint, self._was_trained = checkpoint, False
        add_bottlenecks(encoder, dim=adapter_dim, dropout=adapter_dropout)  # last: it changes what was passed in

    @property
    def scores_apart(self) -> bool:
        """Unless the best of all pairs is asked for, or copies are counted."""
        return self.disentangle != "winner" and not self.quirks.text_chunk

    def texts(self, pairs: Tensor) -> TextFeatures:
        """Unit text features before traction."""
        return self.prompts.texts(pairs)

    def compare(self, tokens: Tensor, texts: TextFeatures, *vectors: Tensor) -> list[Logits]:
        """Logits of all branches, of the tokens and of each vector, which takes the length of [CLS], too.

        The tokens are what texts are drawn to.
        """
        normed = self._normed(tokens)
        for_pairs, for_attributes, for_objects = (self._compared_tokens(branch, tokens) for branch in BRANCHES)
        single = self._as_long_as_cls(tokens, vectors)
        of_pairs = self._branch([for_pairs, *single], normed[0], texts.pairs)

        if self.disentangle == "winner" and max(for_attributes.shape[1], for_objects.shape[1]) > 1:
            winner = self._winner(of_pairs[0], tokens, normed[0], texts.pairs)  # [batch, 1, dim]
            for_attributes = for_attributes if for_attributes.shape[1] == 1 else winner
            for_objects = for_objects if for_objects.shape[1] == 1 else winner

        attributes = [self.attribute_disentangler(view) for view in (for_attributes, *single)]
        objects = [self.object_disentangler(view) for view in (for_objects, *single)]
        of_attributes = self._branch(attributes, normed[1], texts.attributes)
        of_objects = self._branch(objects, normed[2], texts.objects)
        return [Logits(*logits) for logits in zip(of_pairs, of_attributes, of_objects)]

    def classify(self, tokens: Tensor, texts: TextFeatures, *vectors: Tensor) -> list[Logits]:
        """What :meth:`compare` says of the vectors, without comparing the tokens, which texts are drawn to."""
        single = self._as_long_as_cls(tokens, vectors)
        attributes = [self.attribute_disentangler(view) for view in single]
        objects = [self.object_disentangler(view) for view in single]
        branches = map(self._branch, (single, attributes, objects), self._normed(tokens), texts)
        return [Logits(*logits) for logits in zip(*branches)]

    @staticmethod
    def _as_long_as_cls(tokens: Tensor, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Vectors ``[batch, 1, dim]`` of the length of [CLS], at which the disentanglers were trained."""
        length = tokens[:, :1].norm(dim=-1, keepdim=True)
        return [length * unit_vectors(vector)[:, None].to(tokens.dtype) for vector in vectors]

    def fuse(self, logits: Logits, pairs: Tensor) -> Tensor:
        """One score a pair from the logits of all branches: :math:`w_p p(a, o) + w_a p(a) \\, w_o p(o)`."""
        if self.quirks.fusion == "probs":
            return self.probabilities(logits, pairs)
        return self._fused(logits.pairs, logits, pairs)

    def probabilities(self, logits: Logits, pairs: Tensor) -> Tensor:
        return self._fused(logits.pairs.softmax(dim=1), logits, pairs)

    def _fused(self, of_pairs: Tensor, logits: Logits, pairs: Tensor) -> Tensor:
        pair_weight, attr_weight, obj_weight = self.inference_weights
        of_attributes = self._weighted(logits.attributes, attr_weight, self._copies(pairs))
        of_objects = self._weighted(logits.objects, obj_weight, self._copies(pairs))
        return combine(pair_weight * of_pairs, of_attributes, of_objects, pairs)

    @staticmethod
    def _weighted(logits: Tensor, weight: float, copies: int) -> Tensor:
        return logits.softmax(dim=1) * (weight / copies) if weight else torch.ones_like(logits)

    def losses(self, logits: Logits, pairs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropies of the branches, and their weighted sum."""
        terms = cross_entropies(logits, pairs, targets)
        weighted = [weight * term for weight, term in zip(self.loss_weights, terms.values())]
        return terms | {"loss": torch.stack(weighted).sum()}

    def validation_losses(self, logits: Logits, pairs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """:meth:`losses`, or what the released evaluation calls so (``fused_validation_loss``, ``text_chunk``)."""
        if self.quirks.fused_validation_loss:
            logits = logits._replace(pairs=self.fuse(logits, pairs))
        found = self.losses(logits, pairs, targets)
        return found | {"loss": found["loss"] + math.log(self._copies(pairs)) * sum(self.loss_weights[1:])}

    def train(self, mode: bool = True) -> Troika:
        """As in torch, but for ``stays_in_eval``."""
        if mode and self.quirks.stays_in_eval and self._was_trained and not self.training:
            return self
        self._was_trained |= mode
        return super().train(mode)

    def _copies(self, pairs: Tensor) -> int:
        """Copies of each primitive among which the released evaluation spreads its probability."""
        return math.ceil(len(pairs) / self.quirks.text_chunk) if self.quirks.text_chunk else 1

    def _normed(self, tokens: Tensor) -> Sequence[Tensor]:
        """What traction reads in each branch."""
        first = self.traction.token_norm(tokens.to(self.traction.weight.dtype))
        if self.quirks.patch_norm == "fresh":
            return [first] * 3
        second = self.traction.token_norm(first)
        return [first, second, self.traction.token_norm(second)]

    def _compared_tokens(self, branch: Branch, tokens: Tensor) -> Tensor:
        """The tokens that are compared with texts in a branch: all, or [CLS] alone, ``[batch, 1, dim]``."""
        if branch in self.align_branches and self.seam.takes_tokens:
            return tokens
        return tokens[:, :1]

    def _branch(self, views: list[Tensor], normed: Tensor, texts: Tensor) -> list[Tensor]:
        """Logits ``[batch, texts]`` of each view in one branch, chunk by chunk of its texts, which are drawn once."""
        reads, batch = self.traction.read(normed), len(normed)

        def compare(chunk: Tensor) -> tuple[Tensor, ...]:
            drawn = self.traction(chunk, reads, batch)
            return tuple(self.seam(view, drawn, self.encoder.logit_scale) for view in views)

        chunks = texts.split(self.traction_chunk or max(1, _ROWS // max(1, batch)))
        again = len(chunks) > 1 and torch.is_grad_enabled()
        run: Callable[[Tensor], Any] = (
            partial(run_again_in_backward, compare, use_reentrant=False) if again else compare
        )
        return [torch.cat(parts, dim=1) for parts in zip(*map(run, chunks))]

    def _winner(self, logits: Tensor, tokens: Tensor, normed: Tensor, texts: Tensor) -> Tensor:
        """The token of each image that wins its best pair ``[batch, 1, dim]``."""
        candidates = tokens if self.seam.head.include_cls else tokens[:, 1:]
        with torch.no_grad():
            best = texts[logits.argmax(dim=1)][:, None]
            drawn = self.traction(best, self.traction.read(normed), len(tokens))
            _, index = maxsim(unit_vectors(candidates), drawn, return_index=True)
        return candidates[torch.arange(len(index), device=index.device)[:, None], index]

    def _check_options(self) -> None:
        for name in ("fused_validation_loss", "stays_in_eval"):
            check_kind(name, getattr(self.quirks, name), bool)
        check_choice("patch_norm", self.quirks.patch_norm, ("fresh", "cumulative"))
        check_choice("fusion", self.quirks.fusion, ("probs", "logits"))
        check_integer("text_chunk", self.quirks.text_chunk, 0)
        for branch in self.align_branches:
            check_choice("align_branches", branch, BRANCHES)
        check_choice("disentangle", self.disentangle, ("winner", "each"))
        if self.traction_chunk is not None:
            check_integer("traction_chunk", self.traction_chunk, 1)
        for name in ("loss_weights", "inference_weights"):
            weights = getattr(self, name)
            check_kind(name, weights, Sequence)
            if len(weights) != 3:
                raise ValueError(f"expected `{name}` of pairs, attributes and objects, got {weights}")
            for weight in weights:
                check_range(name, weight, 0)

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        attributes: Sequence[str],
        objects: Sequence[str],
        **options: Any,
    ) -> Troika:
        """What the released code saved, in eval mode and with its numbers.

        Args:
            state: State dict of the whole official module, its CLIP of any size.
            attributes, objects: Names in the order of the table ``soft_att_obj``.
            options: Of the constructor, such as ``align``, or the weights of losses and scores, which the released code
                does not save; ``official`` is True. What the state decides is refused.

        Raises:
            TypeError, ValueError: A tensor is missing or unknown, or of a shape that cannot be right; or an option is.
        """
        clip, own = _split_state(state)
        encoder, space = read_clip(clip), read_vocabulary(attributes, objects)
        rows = len(space.attributes) + len(space.objects)
        decided: dict[str, Any] = {
            "primitives": check_table("soft_att_obj", own["soft_att_obj"], rows, encoder.text_dim),
            "layers": len({name.split(".")[1] for name in own if name.startswith("cmt.")}),
            "adapter_dim": len(own["additional_visual_params.0.down_proj.bias"]),
        }
        model = cls(encoder, space, context="", official=True, **decided, **options)
        for name, of_whom in _CONTEXTS.items():
            words = 2 if of_whom == "pair_context" else 1
            setattr(model.prompts, of_whom, nn.Parameter(check_context(name, own[name], encoder, words=words)))
        copy_named(model.official_tensors(), own, "the state of Troika")
        return model.eval()

    def official_tensors(self) -> dict[str, Tensor]:
        """Our tensors, less CLIP's, by the names under which the released code saves them."""
        blocks = [block for block in self.encoder.blocks("vision") if isinstance(block, AdaptedBlock)]
        adapters = [*(block.attn_adapter for block in blocks), *(block.mlp_adapter for block in blocks)]
        modules: dict[str, nn.Module] = {
            **{f"additional_visual_params.{index}": adapter for index, adapter in enumerate(adapters)},
            **{f"cmt.{index}": layer for index, layer in enumerate(self.traction.layers)},
            "patch_norm": self.traction.token_norm,
        }
        for name, view in (("attr", self.attribute_disentangler), ("obj", self.object_disentangler)):
            modules |= {f"{name}_disentangler.fc1": view.proj, f"{name}_disentangler.bn1_fc": view.norm}
        tensors: dict[str, Tensor] = {"soft_att_obj": self.prompts.primitives, "lamda": self.traction.weight}
        tensors |= {name: getattr(self.prompts, of_whom) for name, of_whom in _CONTEXTS.items()}
        for prefix, module in modules.items():
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict(keep_vars=True).items()}
        return tensors


_CONTEXTS = {
    "comp_ctx_vectors": "pair_context",
    "attr_ctx_vectors": "attribute_context",
    "obj_ctx_vectors": "object_context",
}
_NEEDED = ("soft_att_obj", "additional_visual_params.0.down_proj.bias", *_CONTEXTS)


def _split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """CLIP's weights and the method's own; ``text_encoder`` only names parts of CLIP again."""
    check_state("state", state)
    clip = {name: tensor for name, tensor in state.items() if name.startswith("clip.")}
    own = {name: tensor for name, tensor in state.items() if not name.startswith(("clip.", "text_encoder."))}
    if missing := [name for name in _NEEDED if name not in own]:
        raise ValueError(f"expected `state` of the official Troika, got no {missing[0]!r}")
    return clip, own
