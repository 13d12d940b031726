"""A mixture of low-rank experts beside the MLP of every block of a tower, which reads what the MLP reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from czsl_heads._checks import check_choice, check_integer
from czsl_heads.encoders.blocks import BlockParts, has_hooks, reads_one_token
from czsl_heads.encoders.clip import ClipEncoder
from czsl_heads.encoders.protocol import Encoder, Tower, check_encoder
from czsl_heads.functional.experts import DISPATCHES, Dispatch, mix_experts, moves_tokens, route
from czsl_heads.functional.precision import score_dtype


class ExpertMixture(nn.Module):
    r"""Shared low-rank experts, which see every token, and routed ones, of which each token is sent to a few.

    .. math:: \mathrm{out}(x) = \sum_{s} B_s A_s x + \sum_{i \in \mathrm{top}_k} g_i B_i A_i x, \qquad
              g = \mathrm{softmax}(\mathrm{top}_k(R x))

    Args:
        width: Size of the tokens.
        rank: Of each expert.
        experts: Routed experts, at least 1.
        shared: Experts that see every token; may be 0.
        topk: Routed experts of each token.
        dispatch: Of :func:`czsl_heads.functional.mix_experts`.
        device, dtype: Where the parameters are made and in which dtype, as torch's own layers take them.

    Shape:
        [..., width] to [..., width]; zeros at the start, since every B starts at zero.

    Raises:
        TypeError, ValueError: A size is no integer or out of range, or ``dispatch`` is unknown.

    Example:
        >>> mixture = ExpertMixture(96, rank=4, experts=8, topk=2)
        >>> tuple(mixture(torch.ones(2, 5, 96)).shape), mixture(torch.ones(96)).any().item()
        ((2, 5, 96), False)

    References:
        Zhang et al., EVA, ICLR 2026. The paper states neither rank nor k; docs/baselines.md has our reading.
    """

    def __init__(
        self,
        width: int,
        *,
        rank: int = 8,
        experts: int = 8,
        shared: int = 1,
        topk: int = 2,
        dispatch: Dispatch = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("width", width, 1)
        check_integer("rank", rank, 1)
        check_integer("experts", experts, 1)
        check_integer("shared", shared, 0)
        check_integer("topk", topk, 1, experts)
        check_choice("dispatch", dispatch, DISPATCHES)
        self.experts, self.shared, self.topk, self.dispatch = experts, shared, topk, dispatch
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = nn.Linear(width, experts, bias=False, **made)
        self.down = nn.Parameter(torch.empty(shared + experts, rank, width, **made))  # shared ones first
        self.up = nn.Parameter(torch.empty(shared + experts, width, rank, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw router and lower halves anew, and set the upper halves to zero."""
        self.router.reset_parameters()
        for matrix in self.down:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        nn.init.zeros_(self.up)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[..., width]`` to what is added to them, ``[..., width]``."""
        rows = tokens.reshape(-1, tokens.shape[-1])
        weights, chosen = route(self.router(rows.to(self.router.weight.dtype)), self.topk)
        sizes = {"experts": self.experts, "rank": self.down.shape[1], "k": self.topk}
        if moves_tokens(self.dispatch, rows.device, **sizes):
            down, up = self.down[self.shared :], self.up[self.shared :]
            out = mix_experts(rows, down, up, weights, chosen, dispatch="sparse")
            out = out + self._shared(rows) if self.shared else out
            return out.view(tokens.shape)

        # Shared experts are experts that every token has chosen, with weight one: one product for all.
        every = torch.arange(self.shared, device=rows.device).expand(len(rows), -1)
        weights = torch.cat([weights.new_ones(len(rows), self.shared), weights], dim=1)
        chosen = torch.cat([every, chosen + self.shared], dim=1)
        return mix_experts(rows, self.down, self.up, weights, chosen, dispatch="joined").view(tokens.shape)

    def each(self, tokens: Tensor) -> Tensor:
        """What every expert by itself makes of tokens ``[..., width]``, whatever the router says, shared ones first:
        ``[..., shared + experts, width]``.
        """
        down, up = self.down.to(tokens.dtype), self.up.to(tokens.dtype)
        hidden = einsum(tokens, down, "... dim, experts rank dim -> ... experts rank")
        out: Tensor = einsum(hidden, up, "... experts rank, experts dim rank -> ... experts dim")
        return out

    def _shared(self, rows: Tensor) -> Tensor:
        down, up = (matrix[: self.shared].to(rows.dtype) for matrix in (self.down, self.up))
        return F.linear(F.linear(rows, down.flatten(0, 1)), up.transpose(0, 1).flatten(1))

    def extra_repr(self) -> str:
        sizes = f"rank={self.down.shape[1]}, experts={self.experts}, shared={self.shared}, topk={self.topk}"
        return f"{sizes}, dispatch={self.dispatch!r}"


class ExpertMLP(nn.Module):
    """An MLP with a mixture of experts beside it; it stands in the place of the MLP of a block.

    What a container asks of its MLP (``c_fc.weight``, say) is answered by the MLP itself, :attr:`base`.
    """

    def __init__(self, base: nn.Module, mixture: ExpertMixture) -> None:
        super().__init__()
        self.base, self.mixture = base, mixture.train(base.training)
        self.training = base.training

    @property
    def per_token(self) -> bool:
        """That of the MLP; a mixture sends each token where that token alone decides."""
        return reads_one_token(self.base)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[..., width]`` to what the block adds to its stream, ``[..., width]``."""
        out: Tensor = self.base(tokens) + self.mixture(tokens)
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            found: Any = getattr(self.base, name)
            return found


def add_experts(
    encoder: Encoder,
    *,
    rank: int = 8,
    experts: int = 8,
    shared: int = 1,
    topk: int = 2,
    dispatch: Dispatch = "auto",
    tower: Tower = "vision",
) -> list[ExpertMixture]:
    r"""Put a mixture of experts beside the MLP of every block of a tower, in place; untrained, it changes nothing.

    .. math:: x \leftarrow x + \mathrm{mlp}(\mathrm{norm}_2 x) + \mathrm{mixture}(\mathrm{norm}_2 x)

    Where a block scales what its MLP gives (layer scale), the mixture is scaled along with it.

    Args:
        encoder: A wrapped CLIP.
        rank, experts, shared, topk, dispatch: Of :class:`ExpertMixture`.
        tower: ``"vision"`` or ``"text"``.

    Returns:
        The mixtures, first block to last; they train, in float32 whatever the dtype of the weights.

    Raises:
        ValueError: An option is out of range, the tower has experts already, or hooks on an MLP, which would be lost.
        TypeError: ``encoder`` is no Encoder, or a block is of an unknown kind.

    Example:
        >>> from czsl_heads import wrap
        >>> encoder = wrap("tiny")
        >>> mixtures = add_experts(encoder, rank=2, tower="text")
        >>> len(mixtures), sum(p.numel() for p in encoder.parameters() if p.requires_grad)
        (3, 12672)

    References:
        Zhang et al., EVA, ICLR 2026: parallel to the MLP in every block of both towers, one shared and eight routed.
    """
    check_encoder("encoder", encoder)
    blocks: Any = encoder.blocks(tower)
    for block in blocks:
        _check_mlp(BlockParts(block).mlp, tower)
    mixtures = []
    for block in blocks:
        parts = BlockParts(block)
        norm: Any = parts.norm_layer("mlp")
        weight: Tensor = norm.weight
        made: dict[str, Any] = {"device": weight.device, "dtype": score_dtype(weight)}  # float32 beside half precision
        mixture = ExpertMixture(
            len(weight), rank=rank, experts=experts, shared=shared, topk=topk, dispatch=dispatch, **made
        )
        block.mlp = ExpertMLP(parts.mlp, mixture)
        mixtures.append(mixture)
    return mixtures


def _check_mlp(mlp: nn.Module, tower: Tower) -> None:
    if isinstance(mlp, ExpertMLP):
        raise ValueError(f"expected a {tower} tower without experts, got one that has them already")
    if has_hooks(mlp):
        raise ValueError(f"expected a {tower} tower without hooks on its MLPs, got some; add them afterwards")


def mixtures_of(encoder: Encoder, tower: Tower) -> list[ExpertMixture]:
    """The mixtures of a tower, first block to last; none if it has no experts."""
    mlps = [BlockParts(block).mlp for block in encoder.blocks(tower)]
    return [mlp.mixture for mlp in mlps if isinstance(mlp, ExpertMLP)]


@contextmanager
def watch_routing(encoder: Encoder, tower: Tower) -> Iterator[list[list[Tensor]]]:
    """Keep what the routers say in every call within a ``with`` block, for pictures and for losses of the load.

    Args:
        encoder: A wrapped CLIP with experts.
        tower: ``"vision"`` or ``"text"``.

    Yields:
        For each block a list, which grows by one tensor for each call: the router's logits of every token, ``[tokens of
        the call, experts]``, with gradients; :func:`czsl_heads.functional.experts.route` reads them.

    Raises:
        ValueError: The tower has no experts.

    Example:
        >>> from czsl_heads import wrap
        >>> encoder = wrap("tiny")
        >>> mixtures = add_experts(encoder, tower="text")
        >>> with watch_routing(encoder, "text") as calls:
        ...     features = encoder.encode_texts(["red circle"])
        >>> len(calls), calls[0][0].shape  # three blocks; [SOS], two words and [EOS]
        (3, torch.Size([4, 8]))
    """
    mixtures = mixtures_of(encoder, tower)
    if not mixtures:
        raise ValueError(f"expected a {tower} tower with experts, as `add_experts` makes it, got one without")
    calls: list[list[Tensor]] = [[] for _ in mixtures]
    handles = []
    for mixture, own in zip(mixtures, calls):
        handles.append(mixture.router.register_forward_hook(partial(_keep, own)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _keep(own: list[Tensor], router: nn.Module, inputs: Any, logits: Tensor) -> None:
    own.append(logits)


def load_balance(encoder: Encoder, tower: Tower, calls: list[list[Tensor]], batch: int) -> Tensor:
    r"""How unevenly the tokens of each image or text load the experts, mean over blocks; 1 where they do evenly.

    .. math:: N \sum_i f_i P_i

    with :math:`f_i` the share of the choices that fell on expert i and :math:`P_i` its mean probability.

    Args:
        encoder: A wrapped CLIP with experts.
        tower: ``"vision"`` or ``"text"``.
        calls: Of :func:`watch_routing`, of which the first call is read.
        batch: Images or texts of that call.

    Returns:
        ``[batch]``; gradients reach the routers through :math:`P`.

    References:
        Fedus, Zoph and Shazeer, Switch Transformers, JMLR 2022; within each sequence as in DeepSeek-V3.
    """
    found = []
    for block, mixture, own in zip(encoder.blocks(tower), mixtures_of(encoder, tower), calls):
        logits = own[0].unflatten(0, (max(1, batch), -1) if BlockParts(block).batch_first else (-1, max(1, batch)))
        if not BlockParts(block).batch_first:
            logits = logits.transpose(0, 1)  # [batch, tokens, experts]
        _, chosen = route(logits, mixture.topk)
        shares = F.one_hot(chosen, mixture.experts).float().mean(dim=(1, 2))
        probabilities = logits.softmax(dim=-1).mean(dim=1)
        found.append(mixture.experts * (shares * probabilities).sum(dim=1))
    return torch.stack(found).mean(dim=0)[:batch]


def encode_variants(encoder: Any, images: Tensor, *, checkpoint: bool = False) -> tuple[Tensor, Tensor]:
    r"""Tokens of images, and beside the image feature what it would be if one expert of the last block had its way.

    With :math:`h` what the last MLP reads, and the mixture's own output replaced by that of one expert,

    .. math:: v_i = \mathrm{leave}(x + \mathrm{mlp}(h) + B_i A_i h), \qquad i = 0, \dots, N,

    whatever the router says. Before training, when every B is zero, all of them are the image feature.

    Args:
        encoder: A CLIP wrapped by :func:`czsl_heads.wrap`, with experts in its vision tower.
        images: ``[batch, 3, height, width]``.
        checkpoint: As ``encode_tokens`` takes it.

    Returns:
        ``encode_tokens(images)``, ``[batch, 1 + patches, dim]``, and variants ``[batch, shared + experts, dim]``; not
        normalised.

    Raises:
        TypeError: ``encoder`` was not made by :func:`czsl_heads.wrap`.
        ValueError: Its vision tower has no experts.

    Example:
        >>> from czsl_heads import wrap
        >>> encoder = wrap("tiny")
        >>> mixtures = add_experts(encoder, rank=2, experts=3)
        >>> tokens, variants = encode_variants(encoder, torch.zeros(2, 3, 48, 48))
        >>> variants.shape, torch.allclose(variants, tokens[:, :1])
        (torch.Size([2, 4, 96]), True)

    References:
        Zhang et al., EVA, ICLR 2026: semantic variants. The paper's own text leaves open where they are read; the raw
        outputs of experts are zero at the start, and have no direction.
    """
    if not isinstance(encoder, ClipEncoder):
        raise TypeError(f"expected `encoder` made by `wrap`, got {type(encoder).__name__}")
    if not mixtures_of(encoder, "vision"):
        raise ValueError("expected a vision tower with experts, as `add_experts` makes it, got one without")
    if len(images) == 0:  # which not every container can reshape
        one = encode_variants(encoder, images.new_zeros(1, *images.shape[1:]), checkpoint=checkpoint)
        return one[0][:0], one[1][:0]
    block: Any = encoder.blocks("vision")[-1]
    parts = BlockParts(block)
    mixture: ExpertMixture = block.mlp.mixture
    read: list[tuple[Tensor, Tensor]] = []
    given: list[Tensor] = []
    handles = [
        mixture.register_forward_hook(lambda _, inputs, out: read.append((inputs[0], out))),
        block.register_forward_hook(lambda _, inputs, out: given.append(out[0] if isinstance(out, tuple) else out)),
    ]
    try:
        tokens = encoder.encode_tokens(images, checkpoint=checkpoint)
    finally:
        for handle in handles:
            handle.remove()

    (normed, mixed), stream = read[0], given[0]  # the first call is the block as trained, whatever `dense` does
    if not parts.batch_first:
        normed, mixed, stream = (hidden.transpose(0, 1) for hidden in (normed, mixed, stream))
    if encoder.vision.pools_class_token:  # no other token has a part in the image feature
        normed, mixed, stream = (hidden[:, : encoder.num_prefix] for hidden in (normed, mixed, stream))
    instead = mixture.each(normed) - mixed[:, :, None]  # [batch, tokens, experts, width]
    of_each = stream[:, :, None] + parts.scale("mlp", instead)
    batch, _, count, _ = of_each.shape
    left = encoder.vision.leave(of_each.transpose(1, 2).flatten(0, 1))  # [batch * experts, tokens, dim]
    return tokens, left[:, 0].unflatten(0, (batch, count))
