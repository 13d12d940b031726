"""Maxsim as an operator that never holds all products, and whose gradient flows through the winners alone.

Forward walks over chunks of images and texts: a product, then its best tokens. Backward is a gather and a segment sum
over the winners, which does 1/tokens of the work of the two dense products that it replaces, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from czsl_heads.functional.huge_pages import empty_in_huge_pages
from czsl_heads.functional.precision import no_autocast, score_dtype

SPARE = 3  # tokens beyond the k best by a bfloat16 product that are scored again in full precision
_WIDE = 1024  # texts at once below which images are rather cut: a product of few columns is slow
_NEAR = 2048  # tokens, and texts, at once on a CPU: the product of more is no faster, and its results leave the caches


def streamed(
    tokens: Tensor, texts: Tensor, *, k: int, select: str, with_index: bool, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """Scores ``[batch, texts]`` and, ``with_index``, the chosen tokens ``[batch, texts, k]`` (else an empty tensor)."""
    dtype = score_dtype(tokens, texts)
    scores = tokens.new_empty(tokens.shape[0], texts.shape[-2], dtype=dtype)
    index = tokens.new_empty((*scores.shape, k) if with_index else (0,), dtype=torch.long)
    images, columns = _chunk_sizes(tokens, texts, k, select, chunk_bytes)
    for part in _slices(scores.shape[0], images):
        block = tokens[part].to(dtype)
        narrow = block.bfloat16() if select == "bf16" else block
        for some in _slices(scores.shape[1], columns):
            own = (texts[some] if texts.ndim == 2 else texts[part, some]).to(dtype)
            if select == "bf16":
                values, chosen = _rescored(block, own, _candidates(narrow, own, k), k)
            else:
                values, chosen = _best(_products(block, own), k, with_index)
            scores[part, some] = values.mean(dim=2)
            if with_index:
                index[part, some] = chosen
    return scores, index


def _slices(size: int, most: int) -> list[slice]:
    """As few slices as ``most`` allows, of about the same length."""
    step = max(1, -(-size // max(1, -(-size // most))))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _chunk_sizes(tokens: Tensor, texts: Tensor, k: int, select: str, chunk_bytes: int) -> tuple[int, int]:
    """How many images and how many texts to take at once, so that what is held besides the results fits."""
    batch, length, dim = tokens.shape
    count, dtype = texts.shape[-2], score_dtype(tokens, texts)
    # Of an image and a text: its products, of k tokens also their sorted copy, in case that many are equal; and the
    # chosen tokens, whose indices are sorted and turned into rows.
    if select == "bf16":
        pair = 2 * length + 100 * min(k + SPARE, length)
    else:
        pair = length * dtype.itemsize + 16 if k == 1 else length * (4 * dtype.itemsize + 8) + 60 * (k + 1)
    # Per vector: its copy in another precision, or in order.
    token, text = (
        dim * (dtype.itemsize * (value.dtype != dtype or not value.is_contiguous()) + 2 * (select == "bf16"))
        for value in (tokens, texts)
    )
    images = chunk_bytes // (length * token + min(count, _WIDE) * pair + 1)
    images = max(1, min(images, batch))
    own = text * (images if texts.ndim == 3 else 1)
    columns = (chunk_bytes - images * length * token) // (images * pair + own + 1)
    if tokens.device.type == "cpu":
        images, columns = min(images, max(1, round(_NEAR / length))), min(columns, _NEAR)
    return images, max(1, min(columns, count))


def _products(tokens: Tensor, texts: Tensor) -> Tensor:
    """``[batch, texts, tokens]``, tokens innermost, where the search for the best of them is fastest."""
    if texts.ndim == 3:
        return texts @ tokens.mT
    products = texts @ rearrange(tokens, "batch tokens dim -> (batch tokens) dim").mT
    return rearrange(products, "texts (batch tokens) -> batch texts tokens", tokens=tokens.shape[1])


def _best(products: Tensor, k: int, with_index: bool) -> tuple[Tensor, Tensor]:
    """The ``k`` largest over the last axis and where they stand, best first, the lowest index among equals."""
    if not with_index:
        best = products.amax(dim=-1, keepdim=True) if k == 1 else products.topk(k, dim=-1).values
        return best, best
    if k == 1:
        values, index = products.max(dim=-1, keepdim=True)
        return values, index
    # topk promises no order among equals: one more value tells whether it had a choice, and then the sort decides.
    values, index = products.topk(min(k + 1, products.shape[-1]), dim=-1)
    if k < products.shape[-1]:
        open_choice = ~(values[..., k - 1] > values[..., k])
        if open_choice.any():
            ordered, order = products[open_choice].sort(dim=-1, descending=True, stable=True)
            values[open_choice], index[open_choice] = ordered[:, : k + 1], order[:, : k + 1]
    return _ordered(values[..., :k], index[..., :k], k)


def _ordered(values: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best of some tokens, best first, the lowest index among equals."""
    index, order = index.sort(dim=-1)
    values, rank = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values[..., :k], index.gather(-1, rank)[..., :k]


def _candidates(tokens: Tensor, texts: Tensor, k: int) -> Tensor:
    """The tokens that may be among the ``k`` best, by products in the precision of the tokens, in no order."""
    best = _products(tokens, texts.to(tokens.dtype)).topk(min(k + SPARE, tokens.shape[1]), dim=-1, sorted=False)
    return best.indices


def _rescored(tokens: Tensor, texts: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best of some tokens ``[batch, texts, some]``, scored in full precision."""
    length = tokens.shape[1]
    rows, sources = (part.flatten().contiguous() for part in (_rows(index, length), _sources(index, texts)))
    # The derivative of a weighted sum of rows by its weights is the inner products of rows that are wanted here; this
    # kernel computes them in place, while a gather would first write every chosen token out for every text.
    values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        texts.flatten(0, -2), tokens.flatten(0, 1), rows, sources[:0], sources, 0
    )
    return _ordered(values.view(index.shape), index, k)


def _rows(index: Tensor, length: int) -> Tensor:
    """Chosen tokens ``[batch, texts, k]`` as rows of all images' tokens."""
    return index + torch.arange(0, index.shape[0] * length, length, device=index.device)[:, None, None]


def _sources(index: Tensor, texts: Tensor) -> Tensor:
    """For each chosen token ``[batch, texts, k]``, the text that chose it, as a row of all texts."""
    images, count = (index.shape[0] if texts.ndim == 3 else 1), index.shape[1]
    return torch.arange(images * count, device=index.device).view(images, count, 1).expand_as(index)


def winner_gradients(
    grad: Tensor, tokens: Tensor, texts: Tensor, index: Tensor, *, for_tokens: bool, for_texts: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and texts (an empty tensor where not wanted) from those of the scores ``[batch, texts]``."""
    batch, length, _ = tokens.shape
    rows = _rows(index, length)
    weights = (grad / index.shape[2])[:, :, None].expand_as(index)
    grad_tokens, grad_texts = tokens.new_empty(0), texts.new_empty(0)
    if for_texts:
        shape = "(batch texts) k" if texts.ndim == 3 else "texts (batch k)"
        bags, parts = (rearrange(value, f"batch texts k -> {shape}") for value in (rows, weights))
        grad_texts = _weighted_sums(tokens.flatten(0, 1), bags, parts).view(texts.shape)
    if for_tokens:
        winners, order = rows.flatten().sort(stable=True)
        bags, parts = (value.flatten()[order] for value in (_sources(index, texts), weights))
        sums = _sums_of_few if _are_few(index, batch * length) else _sums_of_all
        grad_tokens = sums(texts.flatten(0, -2), bags, parts, winners, batch * length).view(tokens.shape)
    return grad_tokens.to(tokens.dtype), grad_texts.to(texts.dtype)


def _are_few(index: Tensor, num_tokens: int) -> bool:
    """Whether most tokens have won nothing; not where finding those that have would wait for a device."""
    return index.device.type == "cpu" and 0 < 2 * index.numel() <= num_tokens


def _sums_of_all(vectors: Tensor, bags: Tensor, weights: Tensor, winners: Tensor, num_tokens: int) -> Tensor:
    starts = torch.searchsorted(winners, torch.arange(num_tokens, device=winners.device))
    return _weighted_sums(vectors, bags, weights, starts)


def _sums_of_few(vectors: Tensor, bags: Tensor, weights: Tensor, winners: Tensor, num_tokens: int) -> Tensor:
    """As above, for few winners: what counts is then the time that the system takes to hand out so much memory."""
    rows, counts = torch.unique_consecutive(winners, return_counts=True)
    sums = _weighted_sums(vectors, bags, weights, counts.cumsum(0) - counts)
    every = empty_in_huge_pages((num_tokens, sums.shape[1]), sums.dtype).zero_()
    return every.index_copy_(0, rows, sums)


def _weighted_sums(vectors: Tensor, bags: Tensor, weights: Tensor, starts: Tensor | None = None) -> Tensor:
    """One weighted sum of vectors a bag, in a fixed order: a scatter would add up as its threads come along."""
    if not bags.numel() or not vectors.shape[1]:
        return vectors.new_zeros(len(bags if starts is None else starts), vectors.shape[1], dtype=weights.dtype)
    vectors, bags, weights = vectors.to(weights.dtype), bags.contiguous(), weights.contiguous()
    return F.embedding_bag(bags, vectors, starts, per_sample_weights=weights, mode="sum")


@torch.library.custom_op(
    "czsl_heads::maxsim",
    mutates_args=(),
    schema="(Tensor tokens, Tensor texts, int k, str select, str backend, bool with_index, int chunk_bytes)"
    " -> (Tensor, Tensor)",
)
def maxsim_op(
    tokens: Tensor, texts: Tensor, k: int, select: str, backend: str, with_index: bool, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    with no_autocast(tokens.device):
        if backend == "triton":
            scores, index = _triton(tokens, texts)
            return scores, index[:, :, None]
        return streamed(tokens, texts, k=k, select=select, with_index=with_index, chunk_bytes=chunk_bytes)


@maxsim_op.register_fake
def _(
    tokens: Tensor, texts: Tensor, k: int, select: str, backend: str, with_index: bool, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    scores = tokens.new_empty(tokens.shape[0], texts.shape[-2], dtype=score_dtype(tokens, texts))
    indexed = with_index or backend == "triton"
    return scores, tokens.new_empty((*scores.shape, k) if indexed else (0,), dtype=torch.long)


@torch.library.custom_op(
    "czsl_heads::maxsim_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor tokens, Tensor texts, Tensor index, bool for_tokens, bool for_texts)"
    " -> (Tensor, Tensor)",
)
def maxsim_backward_op(
    grad: Tensor, tokens: Tensor, texts: Tensor, index: Tensor, for_tokens: bool, for_texts: bool
) -> tuple[Tensor, Tensor]:
    with no_autocast(tokens.device):
        return winner_gradients(grad, tokens, texts, index, for_tokens=for_tokens, for_texts=for_texts)


@maxsim_backward_op.register_fake
def _(
    grad: Tensor, tokens: Tensor, texts: Tensor, index: Tensor, for_tokens: bool, for_texts: bool
) -> tuple[Tensor, Tensor]:
    return (
        tokens.new_empty(tokens.shape if for_tokens else (0,)),
        texts.new_empty(texts.shape if for_texts else (0,)),
    )


def _triton(tokens: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    try:
        from czsl_heads.functional.maxsim_triton import launched
    except ImportError as error:
        raise ImportError('expected Triton for backend="triton", got none: pip install triton') from error
    return launched(tokens, texts)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, texts, *_ = inputs
    ctx.save_for_backward(tokens, texts, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    for_tokens, for_texts, *_rest = ctx.needs_input_grad
    grads = maxsim_backward_op(grad, *ctx.saved_tensors, for_tokens, for_texts)
    return grads[0] if for_tokens else None, grads[1] if for_texts else None, None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError('expected one derivative of maxsim, got a call for the second; backend="dense" has it')


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> None:
    raise NotImplementedError(
        'expected maxsim outside torch.vmap, got a call inside; it takes a batch itself, and backend="dense" has vmap'
    )


maxsim_op.register_autograd(_backward, setup_context=_keep)
maxsim_backward_op.register_autograd(_no_second_derivative)
maxsim_op.register_vmap(_no_vmap)
maxsim_backward_op.register_vmap(_no_vmap)
