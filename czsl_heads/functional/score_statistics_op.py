"""How the statistics of scores are found in one pass: columns lie in tiles, whose maxima answer most questions.

Columns are gathered group by group (seen candidates, unseen ones, the rest) and cut into tiles of 32. What is asked of
a group follows from the maxima of its tiles, and from one or a few tiles per sample: each score is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FIRST_BIAS = 1e3  # the bias of the official code's first pass, at which no seen pair is predicted
_TILE = 32  # columns of which the maximum is taken first; fewer where groups are small
_CHUNK = 1 << 20  # scores that are copied at once: few enough for a CPU's cache


class Layout(NamedTuple):
    """The columns of a block of scores in tiles: group by group, the last tile of each filled up.

    Attributes:
        places: Column within the block of each place, ``[tiles, size]``.
        padding: Whether the place only fills up, with the last column of the group once more.
        columns: Column of each place; rising within a group.
        keys: Last column of each tile plus ``bound`` times its group, ``[tiles]``; rising over all of them.
        group_index: Groups of candidates that are not empty: seen ones, 0, and buckets of unseen ones, 1 and so on.
        group_keys, last_tiles: Of each of these groups: what ``keys`` adds for it, and its last tile.
        first, bound: Columns of the block are at least ``first`` and below ``bound``.
        num_seen: The first tiles, as many, are those of seen pairs.
        spans: Of each group of candidates: its first tile, and the one after its last.
    """

    places: Tensor
    padding: Tensor
    columns: Tensor
    keys: Tensor
    group_index: Tensor
    group_keys: Tensor
    last_tiles: Tensor
    first: int
    bound: int
    num_seen: int
    spans: list[tuple[int, int]]

    def to(self, device: torch.device) -> Layout:
        moved: list[Any] = [part.to(device) if isinstance(part, Tensor) else part for part in self]
        return Layout(*moved)


def lay_out(groups: Tensor, num_groups: int, first: int) -> Layout:
    """Groups: 0 seen candidates, 1 other seen pairs, 2 and on buckets of unseen candidates, last other unseen pairs."""
    counts = groups.bincount(minlength=num_groups)
    size = min(_TILE, max(4, len(groups) // int((counts > 0).sum())))
    tiles = (counts + size - 1) // size

    group = torch.arange(num_groups).repeat_interleave(tiles)  # of each tile
    earlier = torch.arange(len(group)) - (tiles.cumsum(0) - tiles)[group]  # tiles of the same group before it
    rank = earlier[:, None] * size + torch.arange(size)  # of each place within its group
    last = counts[group, None] - 1
    start = (counts.cumsum(0) - counts)[group, None]
    places = groups.argsort(stable=True)[start + rank.minimum(last)]

    edges = [0, *tiles.cumsum(0).tolist()]
    of_candidates = [number for number in (0, *range(2, num_groups - 1)) if edges[number] < edges[number + 1]]
    numbers = torch.tensor(of_candidates, dtype=torch.long)
    bound = first + len(groups)
    return Layout(
        places=places,
        padding=rank > last,
        columns=places + first,
        keys=group * bound + places[:, -1] + first,
        group_index=(numbers - 1).clamp(min=0),
        group_keys=numbers * bound,
        last_tiles=tiles.cumsum(0)[numbers] - 1,
        first=first,
        bound=bound,
        num_seen=edges[2],
        spans=[(edges[number], edges[number + 1]) for number in of_candidates],
    )


class Found(NamedTuple):
    """What some of the columns say of samples ``n``: enough to be joined with what the other columns say.

    Attributes:
        score: Of the true pair ``[n]``; NaN where its column is another one.
        unranked: Whether a score is NaN or +inf, bool ``[n]``.
        negatives: The best scores of wrong candidates ``[n, 1 + buckets, 2, k]``: among seen pairs, and among each
            bucket of unseen ones, those before the true column and those after.
        best_seen: Of seen pairs ``[n, k]``.
        top_scores, top_columns: The best candidates at each bias, and their columns ``[n, biases, k]``.
    """

    score: Tensor
    unranked: Tensor
    negatives: Tensor
    best_seen: Tensor
    top_scores: Tensor
    top_columns: Tensor


def join(found: Found, other: Found) -> Found:
    """What the columns of both say."""
    k = found.best_seen.shape[1]
    columns, order = torch.cat([found.top_columns, other.top_columns], dim=2).sort(dim=2, stable=True)
    scores = torch.cat([found.top_scores, other.top_scores], dim=2).gather(2, order)
    best, rank = _first_largest(scores, k)
    return Found(
        score=torch.where(found.score.isnan(), other.score, found.score),
        unranked=found.unranked | other.unranked,
        negatives=merged(found.negatives, other.negatives),
        best_seen=merged(found.best_seen, other.best_seen),
        top_scores=best,
        top_columns=columns.gather(2, rank),
    )


def finish(found: Found, target: Tensor, primitives: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Target, score, negatives, best seen score, and whether the ``primitives`` of columns are right."""
    ranked = found.top_scores > -torch.inf
    hits = []
    for primitive in primitives:
        primitive = primitive.to(target.device)
        right = primitive[found.top_columns] == primitive[target][:, None, None]
        hits.append((right & ranked).any(dim=2))
    score = found.score.masked_fill(found.unranked, torch.nan)
    return target, score, found.negatives.flatten(1, 2), found.best_seen[:, -1], torch.stack(hits, dim=2)


class Gathering:
    """Statistics under construction, on the device of the scores; primitives at each of ``biases``."""

    def __init__(self, target: Tensor, num_buckets: int, biases: Sequence[float], topk: int) -> None:
        samples, device = len(target), target.device
        self.target, self.biases, self.topk = target, biases, topk
        kind: dict[str, Any] = {"dtype": torch.float32, "device": device}  # whatever the default is
        self.score = torch.full((samples,), torch.nan, **kind)
        self.negatives = torch.full((samples, 1 + num_buckets, 2, topk), -torch.inf, **kind)
        self.best_seen = torch.full((samples, topk), -torch.inf, **kind)
        self.unranked = torch.zeros(samples, dtype=torch.bool, device=device)
        self.top_scores = torch.full((samples, len(biases), topk), -torch.inf, **kind)
        self.top_columns = torch.zeros((samples, len(biases), topk), dtype=torch.long, device=device)

    @property
    def found(self) -> Found:
        """What the blocks so far say."""
        return Found(self.score, self.unranked, self.negatives, self.best_seen, self.top_scores, self.top_columns)

    def add(self, block: Tensor, layout: Layout) -> None:
        own_tiles = self.negatives.shape[1] * self.topk * layout.places.shape[1]
        rows = min(len(block), max(1, _CHUNK // max(layout.places.numel(), own_tiles)))
        copies = torch.empty(rows, layout.places.numel(), dtype=torch.float32, device=block.device)
        for start in range(0, len(block), max(1, rows)):
            part = slice(start, start + rows)
            self._add_rows(part, _Tiles(block[part].float(), layout, copies))

    def _add_rows(self, part: slice, tiles: _Tiles) -> None:
        self.unranked[part] |= ~(tiles.maxima.amax(dim=1) < torch.inf)
        if tiles.layout.num_seen:
            best = tiles.best(tiles.maxima[:, : tiles.layout.num_seen], 0, self.topk)
            self.best_seen[part] = merged(self.best_seen[part], best)
        self._add_negatives(part, tiles)
        target = self.target[part]
        rows = ((target >= tiles.layout.first) & (target < tiles.layout.bound)).nonzero()[:, 0]
        if len(rows):
            self._add_own_tiles(part, rows, tiles)
        if self.biases:
            self._add_top(part, tiles)

    def _add_negatives(self, part: slice, tiles: _Tiles) -> None:
        """Negatives in tiles that lie as a whole before or after the true column."""
        layout, target = tiles.layout, self.target[part, None]
        if not layout.spans:
            return
        found = []
        for outside in (layout.columns[:, -1] >= target, layout.columns[:, 0] <= target):
            maxima = tiles.maxima.masked_fill(outside, -torch.inf)
            found.append([tiles.best(maxima[:, start:end], start, self.topk) for start, end in layout.spans])
        sides = torch.stack([torch.stack(side, dim=1) for side in found], dim=2)  # [n, groups, 2, topk]
        index = part, layout.group_index
        self.negatives[index] = merged(self.negatives[index], sides)

    def _add_own_tiles(self, part: slice, rows: Tensor, tiles: _Tiles) -> None:
        """The true score, and negatives in the one tile of each group that lies around the true column."""
        layout, samples = tiles.layout, part.start + rows
        target = self.target[samples, None]
        self.score[samples] = tiles.block[rows, target[:, 0] - layout.first]

        around = torch.searchsorted(layout.keys, layout.group_keys + target).minimum(layout.last_tiles)
        columns, target = _rows_of(layout.columns, around), target[..., None]
        scores = tiles.pick(around, rows)  # [rows, groups, size]
        if self.topk > 1:  # what lies as a whole on one side was counted; the largest one may be counted twice
            whole = (columns[..., :1] > target) | (columns[..., -1:] < target)
            scores = scores.masked_fill(_rows_of(layout.padding, around) | whole, -torch.inf)
        sides = [scores.masked_fill(outside, -torch.inf) for outside in (columns >= target, columns <= target)]
        index = samples[:, None], layout.group_index
        found = torch.stack([_largest(side, self.topk) for side in sides], dim=2)
        self.negatives[index] = merged(self.negatives[index], found)

    def _add_top(self, part: slice, tiles: _Tiles) -> None:
        """Best candidates at each bias, the lowest column first among equals."""
        found = [[(self.top_scores[part, point], self.top_columns[part, point])] for point in range(len(self.biases))]
        for start, end in tiles.layout.spans:
            unbiased = tiles.first_best(start, end, self.topk, 0.0)
            seen = end <= tiles.layout.num_seen
            for point, bias in enumerate(self.biases):
                same = seen or bias == 0
                found[point].append(unbiased if same else tiles.first_best(start, end, self.topk, bias))
        for point, (scores, columns) in enumerate(zip(*candidates) for candidates in found):
            pool, order = torch.cat(columns, dim=1).sort(dim=1, stable=True)
            values, rank = _first_largest(torch.cat(scores, dim=1).gather(1, order), self.topk)
            self.top_scores[part, point], self.top_columns[part, point] = values, pool.gather(1, rank)


class _Tiles:
    """Rows of a block of float32 scores, copied tile by tile.

    Attributes:
        scores: ``[n, tiles, size]``.
        maxima: ``[n, tiles]``.
    """

    def __init__(self, block: Tensor, layout: Layout, copies: Tensor) -> None:
        self.block, self.layout = block, layout
        index = layout.places.flatten()
        self.scores = torch.index_select(block, 1, index, out=copies[: len(block)]).view(-1, *layout.places.shape)
        self.maxima = self.scores.amax(dim=2)

    def pick(self, which: Tensor, rows: Tensor | None = None) -> Tensor:
        """The scores of some tiles ``[rows, m]`` of some rows, default all: ``[rows, m, size]``."""
        rows = torch.arange(len(which), device=which.device) if rows is None else rows
        return _rows_of(self.scores.flatten(0, 1), rows[:, None] * self.scores.shape[1] + which)

    def best(self, maxima: Tensor, start: int, k: int) -> Tensor:
        """The ``k`` largest scores ``[n, k]`` in tiles from ``start`` on, -inf where there are fewer.

        Tiles whose maximum ``[n, tiles]`` is -inf are left out. The ``k`` largest scores lie in the ``k`` tiles of the
        largest maxima.
        """
        if k == 1:
            return maxima.amax(dim=1, keepdim=True)
        tiles = maxima.topk(min(k, maxima.shape[1]), dim=1)
        which = start + tiles.indices
        left_out = _rows_of(self.layout.padding, which) | (tiles.values[..., None] == -torch.inf)
        return _largest(self.pick(which).masked_fill(left_out, -torch.inf).flatten(1), k)

    def first_best(self, start: int, end: int, k: int, bias: float) -> tuple[Tensor, Tensor]:
        """The largest scores with ``bias`` added, and their columns; the lowest first among equals."""
        # Adding is monotone in float32 too, so the maximum of a tile is still its maximum.
        which = start + _first_largest(self.maxima[:, start:end] + bias, min(k, end - start))[1]
        which = which.sort(dim=1).values if k > 1 else which
        scores = self.pick(which) + bias
        if k > 1:
            scores = scores.masked_fill(_rows_of(self.layout.padding, which), -torch.inf)
        values, rank = _first_largest(scores.flatten(1), min(k, scores[0].numel()))
        return values, _rows_of(self.layout.columns, which).flatten(1).gather(1, rank)


def _rows_of(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` for a table of two dimensions, four times faster."""
    return table.index_select(0, index.flatten()).view(*index.shape, table.shape[1])


def _largest(values: Tensor, k: int) -> Tensor:
    """Along the last dimension, -inf where there are fewer."""
    if k == 1:
        return values.amax(dim=-1, keepdim=True)
    return F.pad(values, (0, max(0, k - values.shape[-1])), value=-torch.inf).topk(k, dim=-1).values


def merged(known: Tensor, found: Tensor) -> Tensor:
    """The largest of both along the last dimension, as many as there are in each."""
    k = known.shape[-1]
    return torch.maximum(known, found) if k == 1 else torch.cat([known, found], dim=-1).topk(k, dim=-1).values


def _first_largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest values and their indices, the lowest index first among equals (topk promises no order)."""
    if k == 1:
        best, index = values.max(dim=-1, keepdim=True)
        return best, index
    ordered, order = values.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :k], order[..., :k]
