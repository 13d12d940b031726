"""The label space of a compositional task: attributes, objects, and which of their pairs exist and were trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from czsl_heads._checks import check_shapes, check_tensor

Pair: TypeAlias = tuple[str, str] | tuple[int, int]


def clean_name(name: str) -> str:
    """The form of a primitive's name that goes into a prompt: dots become spaces, letters become lower case.

    Underscores and hyphens stay, as in the code of CSP and Troika, so that prompts agree with theirs.

    Example:
        >>> clean_name("Faux.Leather"), clean_name("traffic_light")
        ('faux leather', 'traffic_light')
    """
    return name.replace(".", " ").lower()


class CompositionSpace:
    """Attributes, objects, and an ordered list of pairs, each seen (trained on) or unseen.

    A pair is (attribute index, object index); its position in :attr:`pairs` is the column of its score. ``len``,
    iteration and indexing go over the pairs by name, and ``in`` takes names or indices. Instances do not change:
    :meth:`subset` and :meth:`open_world` return new ones over the same primitives.

    Args:
        attributes: Names of the attributes, without repeats; the order is kept.
        objects: Names of the objects, likewise.
        seen: Pairs with training images, as names or as indices, without repeats; at least one.
        unseen: Further pairs. ``pairs`` lists ``seen`` first, each in the order given.
        words: What prompts say in place of a name; of names that it lacks they say :func:`clean_name`.

    Attributes:
        attributes, objects: Tuples of names.
        words: A dict of names and what prompts say in their place, where that is not :func:`clean_name`.
        pairs: Long tensor ``[P, 2]``.
        seen_mask: Bool tensor ``[P]``, true where the pair is seen.

    Raises:
        ValueError: A name or pair is repeated, a pair or a key of ``words`` names an unknown primitive, a pair is
            both seen and unseen, or ``seen`` or what a prompt should say is empty. The message names the offender.
        TypeError: A name or what stands for it is no string, an argument no sequence, or ``words`` no mapping.

    Example:
        >>> space = CompositionSpace(["black", "white"], ["swan", "cat"], seen=[("white", "swan"), ("black", "cat")])
        >>> space.pairs.tolist(), space.seen_mask.tolist()
        ([[1, 0], [0, 1]], [True, True])
        >>> space.open_world().pairs.tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1]]

        By name it is a sequence of its pairs:

        >>> list(space), space[-1], ("black", "swan") in space
        ([('white', 'swan'), ('black', 'cat')], ('black', 'cat'), False)
    """

    attributes: tuple[str, ...]
    objects: tuple[str, ...]
    pairs: Tensor
    seen_mask: Tensor
    words: dict[str, str]
    _by_name: tuple[dict[str, int], dict[str, int]] | None = None

    def __init__(
        self,
        attributes: Sequence[str],
        objects: Sequence[str],
        seen: Iterable[Pair],
        unseen: Iterable[Pair] = (),
        *,
        words: Mapping[str, str] | None = None,
    ) -> None:
        self.attributes = _checked_names("attributes", attributes)
        self.objects = _checked_names("objects", objects)
        self.words = _checked_words({} if words is None else words, {*self.attributes, *self.objects})
        for role, group in (("seen", seen), ("unseen", unseen)):
            if isinstance(group, str) or not isinstance(group, (Tensor, Iterable)):
                raise TypeError(f"expected `{role}` to be an iterable of pairs, got {group!r}")
        seen, unseen = list(seen), list(unseen)
        if not seen:
            raise ValueError("expected `seen` to hold at least one pair, got none")
        attr_index, obj_index = self._indices()
        columns: dict[tuple[int, int], bool] = {}
        for role, group in (("seen", seen), ("unseen", unseen)):
            for pair in group:
                key = _resolve(pair, role, attr_index, obj_index)
                if key in columns:
                    name = self._pair_name(key)
                    if columns[key] == (role == "seen"):
                        raise ValueError(f"expected `{role}` without repeats, got {name} twice")
                    raise ValueError(f"expected `seen` and `unseen` to be disjoint, got {name} in both")
                columns[key] = role == "seen"
        self._set(torch.tensor(list(columns), dtype=torch.long), torch.tensor(list(columns.values())))

    def _set(self, pairs: Tensor, seen_mask: Tensor) -> None:
        self.pairs, self.seen_mask = pairs, seen_mask
        self._copies: dict[torch.device, Tensor] = {}
        self._column = torch.full((len(self.attributes) * len(self.objects),), -1, dtype=torch.long)
        self._column[self._code(pairs)] = torch.arange(len(pairs))

    def _indices(self) -> tuple[dict[str, int], dict[str, int]]:
        """Attributes and objects by name; made once."""
        if self._by_name is None:
            attr_index = {name: index for index, name in enumerate(self.attributes)}
            self._by_name = attr_index, {name: index for index, name in enumerate(self.objects)}
        return self._by_name

    def _code(self, pairs: Tensor) -> Tensor:
        return pairs[:, 0] * len(self.objects) + pairs[:, 1]

    def _pair_name(self, pair: Sequence[int]) -> str:
        return f"({', '.join(self._names(pair))})"

    def _derive(self, pairs: Tensor, seen_mask: Tensor) -> CompositionSpace:
        space = object.__new__(CompositionSpace)
        space.attributes, space.objects, space.words = self.attributes, self.objects, dict(self.words)
        space._set(pairs, seen_mask)
        return space

    @property
    def attribute_words(self) -> tuple[str, ...]:
        """What prompts say of each attribute, in order.

        Example:
            >>> CompositionSpace(["Faux.Fur", "wet"], ["dog"], seen=[("wet", "dog")]).attribute_words
            ('faux fur', 'wet')
        """
        return tuple(self.words.get(name, clean_name(name)) for name in self.attributes)

    @property
    def object_words(self) -> tuple[str, ...]:
        """What prompts say of each object, in order.

        Example:
            >>> words = {"Boots.Ankle": "ankle boots"}
            >>> CompositionSpace(["wet"], ["Boots.Ankle"], seen=[(0, 0)], words=words).object_words
            ('ankle boots',)
        """
        return tuple(self.words.get(name, clean_name(name)) for name in self.objects)

    def with_words(self, words: Mapping[str, str]) -> CompositionSpace:
        """The same space, of which prompts say other words.

        Args:
            words: As in the constructor; those of this space are not kept.

        Returns:
            A new space.

        Raises:
            ValueError: A key names no primitive, or a value is empty.
            TypeError: ``words`` is no mapping, or a value no string.

        Example:
            >>> space = CompositionSpace(["Faux.Fur"], ["boots"], seen=[("Faux.Fur", "boots")])
            >>> space.with_words({"Faux.Fur": "fake fur"}).attribute_words, space.attribute_words
            (('fake fur',), ('faux fur',))
        """
        space = self._derive(self.pairs, self.seen_mask)
        space.words = _checked_words(words, {*self.attributes, *self.objects})
        return space

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_copies": {}}

    def pairs_on(self, device: torch.device) -> Tensor:
        """:attr:`pairs` on a device, where they stay: a step that copied them anew would wait for it.

        Example:
            >>> space = CompositionSpace(["black"], ["swan"], seen=[("black", "swan")])
            >>> space.pairs_on(torch.device("meta")) is space.pairs_on(torch.device("meta"))
            True
        """
        if device == self.pairs.device:
            return self.pairs
        if device not in self._copies:
            with torch.inference_mode(False):  # an inference tensor could be part of no backward pass later
                self._copies[device] = self.pairs.to(device)
        return self._copies[device]

    @property
    def pair_names(self) -> list[tuple[str, str]]:
        """Names of the pairs, in order."""
        return [self._names(pair) for pair in self.pairs.tolist()]

    def _names(self, pair: Sequence[int]) -> tuple[str, str]:
        return self.attributes[pair[0]], self.objects[pair[1]]

    def index(self, pairs: Tensor | Iterable[Pair]) -> Tensor:
        """Columns of the given pairs.

        Args:
            pairs: Long tensor ``[n, 2]`` of indices, or an iterable of pairs as names or indices.

        Returns:
            Long tensor ``[n]``.

        Raises:
            ValueError: A primitive is unknown, or a pair is not in this space.
        """
        wanted = self._as_tensor(pairs)
        columns = self._column[self._code(wanted)]
        if (columns < 0).any():
            first = wanted[columns < 0][0].tolist()
            raise ValueError(f"expected `pairs` of this space, got {self._pair_name(first)}, which is not in it")
        return columns

    def _as_tensor(self, pairs: Tensor | Iterable[Pair]) -> Tensor:
        if isinstance(pairs, Tensor):
            check_tensor("pairs", pairs, dtypes=(torch.long, torch.int32))
            check_shapes(pairs=(pairs, "pairs 2"))
            wanted = pairs.long().cpu()
            limits = torch.tensor([len(self.attributes), len(self.objects)])
            wrong = ((wanted < 0) | (wanted >= limits)).any(dim=1)
            if wrong.any():
                first = tuple(wanted[wrong][0].tolist())
                raise ValueError(f"expected `pairs` of indices below {tuple(limits.tolist())}, got {first}")
            return wanted
        attr_index, obj_index = self._indices()
        resolved = [_resolve(pair, "pairs", attr_index, obj_index) for pair in pairs]
        return torch.tensor(resolved, dtype=torch.long).reshape(-1, 2)

    def subset(self, mask_or_pairs: Tensor | Iterable[Pair]) -> CompositionSpace:
        """The space of some of these pairs.

        Args:
            mask_or_pairs: Bool tensor ``[P]`` (the order is kept), or pairs as in :meth:`index` (their order is taken).

        Raises:
            ValueError: The mask has another length, a pair is not in this space or repeated, or nothing is left.
        """
        if isinstance(mask_or_pairs, Tensor) and mask_or_pairs.dtype == torch.bool:
            check_shapes(mask_or_pairs=(mask_or_pairs, str(len(self))))
            columns = mask_or_pairs.cpu().nonzero().squeeze(1)
        else:
            columns = self.index(mask_or_pairs)
            if len(columns.unique()) < len(columns):
                values, counts = columns.unique(return_counts=True)
                twice = self.pairs[values[counts > 1][0]].tolist()
                raise ValueError(f"expected `mask_or_pairs` without repeats, got {self._pair_name(twice)} twice")
        if not len(columns):
            raise ValueError("expected `mask_or_pairs` to keep at least one pair, got none")
        return self._derive(self.pairs[columns], self.seen_mask[columns])

    def open_world(self) -> CompositionSpace:
        """Every attribute with every object, attribute-major; seen pairs stay seen."""
        pairs = torch.cartesian_prod(torch.arange(len(self.attributes)), torch.arange(len(self.objects)))
        seen_mask = torch.zeros(len(pairs), dtype=torch.bool)
        seen_mask[self._code(self.pairs[self.seen_mask])] = True
        return self._derive(pairs.reshape(-1, 2), seen_mask)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.pair_names)

    @overload
    def __getitem__(self, column: int) -> tuple[str, str]: ...
    @overload
    def __getitem__(self, column: slice) -> list[tuple[str, str]]: ...
    def __getitem__(self, column: int | slice) -> tuple[str, str] | list[tuple[str, str]]:
        if isinstance(column, slice):
            return [self._names(self.pairs[place].tolist()) for place in range(*column.indices(len(self)))]
        if isinstance(column, bool) or not hasattr(column, "__index__"):
            raise TypeError(f"expected `column` to be an integer or a slice, got {column!r}")
        position = column.__index__()
        if not -len(self) <= position < len(self):
            raise IndexError(f"expected `column` of the {len(self)} pairs, got {position}")
        return self._names(self.pairs[position].tolist())

    def __contains__(self, pair: object) -> bool:
        """Whether a pair, as names or indices, is in this space; False for what is no pair of its primitives."""
        try:
            wanted = self._as_tensor([pair])  # type: ignore[list-item]
        except (TypeError, ValueError):
            return False
        return bool(self._column[self._code(wanted)] >= 0)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CompositionSpace):
            return NotImplemented
        same_names = self.attributes == other.attributes and self.objects == other.objects
        said = self.attribute_words, self.object_words
        same_names = same_names and said == (other.attribute_words, other.object_words)
        return same_names and torch.equal(self.pairs, other.pairs) and torch.equal(self.seen_mask, other.seen_mask)

    def __hash__(self) -> int:
        return hash((self.attributes, self.objects, len(self)))

    def __repr__(self) -> str:
        seen = int(self.seen_mask.sum())
        return (
            f"CompositionSpace(attributes={len(self.attributes)}, objects={len(self.objects)}, "
            f"seen={seen}, unseen={len(self) - seen})"
        )


def _checked_names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"expected `{argument}` to be a sequence of names, got the string {names!r}")
    if not isinstance(names, Iterable):
        raise TypeError(f"expected `{argument}` to be a sequence of names, got {names!r}")
    names = tuple(names)
    known: set[str] = set()
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"expected `{argument}` to hold strings, got {name!r}")
        if not name.strip():
            raise ValueError(f"expected `{argument}` to hold names, got {name!r}")
        if name in known:
            raise ValueError(f"expected `{argument}` without repeats, got {name!r} twice")
        known.add(name)
    if not known:
        raise ValueError(f"expected `{argument}` to hold at least one name, got none")
    return names


def _checked_words(words: Mapping[str, str], names: set[str]) -> dict[str, str]:
    """Those that differ from what prompts say anyway."""
    if not isinstance(words, Mapping):
        raise TypeError(f"expected `words` to be a mapping of names to words, got {words!r}")
    for name, said in words.items():
        if name not in names:
            near = get_close_matches(str(name), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"expected `words` of known primitives, got the unknown {name!r}{hint}")
        if not isinstance(said, str):
            raise TypeError(f"expected `words` to hold strings, got {said!r} for {name!r}")
        if not said.strip():
            raise ValueError(f"expected `words` to hold words, got {said!r} for {name!r}")
    return {name: said for name, said in words.items() if said != clean_name(name)}


def _resolve(pair: Pair, argument: str, attr_index: dict[str, int], obj_index: dict[str, int]) -> tuple[int, int]:
    if isinstance(pair, (Tensor, np.ndarray)):
        pair = tuple(pair.tolist())
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise TypeError(f"expected `{argument}` to hold (attribute, object) pairs, got {pair!r}")
    kinds = (("attribute", attr_index), ("object", obj_index))
    attr, obj = (_resolve_one(part, pair, argument, kind, known) for part, (kind, known) in zip(pair, kinds))
    return attr, obj


def _resolve_one(part: object, pair: Pair, argument: str, kind: str, known: dict[str, int]) -> int:
    if isinstance(part, str):
        if part not in known:
            raise ValueError(
                f"expected `{argument}` to name known primitives, got the unknown {kind} {part!r} in {pair!r}"
            )
        return known[part]
    if isinstance(part, bool) or not hasattr(part, "__index__"):
        raise TypeError(f"expected `{argument}` to hold names or indices, got {part!r} in {pair!r}")
    index = int(part.__index__())
    if not 0 <= index < len(known):
        raise ValueError(f"expected `{argument}` to hold {kind} indices below {len(known)}, got {index} in {pair!r}")
    return index
