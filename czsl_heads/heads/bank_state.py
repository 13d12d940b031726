"""What a memory bank saves, and whether what is loaded can be the state of one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from czsl_heads._checks import check_index, check_integer, check_shapes, check_tensor
from czsl_heads.functional.bank import arrival_ranks, row_counts

STATE = ("sizes", "features", "entropy", "pair", "count", "texts", "text_pair", "text_rank", "num_rejected")
_COUNTS = ("sizes", "pair", "count", "text_pair", "text_rank", "num_rejected")
_BLOCKS = (("features", "entropy", "pair"), ("texts", "text_pair", "text_rank"))


def check_state(state: dict[str, Tensor], prefix: str = "", *, num_pairs: int, dim: int, slots: int) -> None:
    """Raise TypeError or ValueError unless a bank of these sizes can hold ``state``, which has all of :data:`STATE`.

    Errors name tensors as they stand in the whole state, by ``prefix`` and name.
    """
    for name in STATE:
        if name in _COUNTS:
            check_tensor(prefix + name, state[name], dtypes=(torch.long,))
        else:
            check_tensor(prefix + name, state[name])
    for name, axes in (("sizes", "3"), ("count", ""), ("num_rejected", "")):
        check_shapes(**{prefix + name: (state[name], axes)})

    on_meta = state["sizes"].is_meta
    expected = {"num_pairs": num_pairs, "dim": dim, "slots": slots}
    found = expected.values() if on_meta else state["sizes"].tolist()
    for (name, size), other in zip(expected.items(), found):
        if size != other:
            raise ValueError(f"expected the state of a bank of {name}={size}, got {name}={other}")

    for vectors, *indices in _BLOCKS:
        rows = {prefix + name: (state[name], "rows") for name in indices}
        check_shapes(**{prefix + vectors: (state[vectors], f"rows {dim}"), **rows})
    if not on_meta:
        _check_entries(state, prefix, num_pairs, slots)


def _check_entries(state: dict[str, Tensor], prefix: str, num_pairs: int, slots: int) -> None:
    for name, vectors in (("pair", "features"), ("text_pair", "texts")):
        check_index(prefix + name, state[name], num_pairs, wait=True)
        most = int(row_counts(state[name], num_pairs).max())
        if most > slots:
            raise ValueError(f"expected `{prefix}{name}` of at most {slots} entries in a row, got {most}")
        _check_unit(prefix + vectors, state[vectors])

    # Of probabilities over the pairs whose sum is within 0.01 of 1, as an update takes them.
    entropy, highest = state["entropy"], 1.01 * math.log(num_pairs) + 0.011
    wrong = entropy[~((entropy >= -0.011) & (entropy <= highest))]
    if len(wrong):
        raise ValueError(f"expected `{prefix}entropy` between 0 and log {num_pairs}, got {float(wrong[0])}")
    if not torch.equal(state["text_rank"], arrival_ranks(state["text_pair"])):
        raise ValueError(f"expected `{prefix}text_rank` to count the texts of each row, got other numbers")
    if int(state["count"]) != len(state["pair"]):
        raise ValueError(f"expected `{prefix}count` to be the {len(state['pair'])} entries, got {int(state['count'])}")
    check_integer(f"{prefix}num_rejected", int(state["num_rejected"]), 0)


def _check_unit(name: str, vectors: Tensor) -> None:
    length = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.promote_types(vectors.dtype, torch.float32))
    wrong = ~((length - 1).abs() <= 0.01)  # half precision rounds lengths by less; NaN is wrong
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"expected `{name}` of unit length, got a length of {float(length[row]):.4g} in row {row}")
