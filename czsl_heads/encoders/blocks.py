"""What stands in the blocks of a tower, as those see it who put something else there or run the blocks in parts."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@runtime_checkable
class AdaptedLayer(Protocol):
    """A layer that an adapter put into a block, in the attention or in the MLP, and that says what it reads.

    Attributes:
        per_token: True if what a token becomes depends on that token alone. A block can be run for a few positions at
            a time only if this is so. A layer that routes the tokens of a batch among experts of fixed capacity, for
            instance, has to say False.
    """

    @property
    def per_token(self) -> bool: ...


@runtime_checkable
class AdaptedAttention(AdaptedLayer, Protocol):
    """An adapted layer in the place of ``nn.MultiheadAttention``: self-attention between two projections.

    Attention itself reads all tokens, so ``per_token`` speaks of the projections.

    Attributes:
        num_heads: The parts of equal size in which queries, keys and values are compared.
        attention_dropout: On the shares by which values are weighed, in training mode.
    """

    @property
    def num_heads(self) -> int: ...
    @property
    def attention_dropout(self) -> float: ...

    def project_in(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[..., dim]`` to queries, keys and values, ``[..., dim]`` each, with what the adapter changes."""
        ...

    def project_out(self, mixed: Tensor) -> Tensor:
        """The values that each token read, heads side by side, ``[..., dim]``, to what it gets, ``[..., dim]``."""
        ...


def is_plain_attention(layer: Any) -> bool:
    """True of torch's own attention with one fused ``in_proj_weight`` and nothing added to keys and values."""
    if type(layer) is not nn.MultiheadAttention or layer.in_proj_weight is None:
        return False
    return layer.bias_k is None and not layer.add_zero_attn


def has_hooks(layer: nn.Module) -> bool:
    """True if something else than its class has a say in what a layer does when it is called."""
    return "forward" in vars(layer) or any(getattr(layer, name) for name in _HOOKS)
