"""Which keys the tokens of a chunk look at: the mask that a model asks for, as pieces of the keys, or made in full.

A rule of transformers (causal, sliding, chunked, packed, one with images) is asked about squares of queries and keys. Most of them turn out to
be seen in full, or not at all, or as padding and packed rows are, by some queries and some keys: only a square that is none of these has a
mask of its own. So no rule need be known by name, and no mask over all keys is made. What a square turned out to be is kept as long as the pass,
its mask only until it is let go of: by layers, where the passes of all chunks of a row are there, those of one chunk at a time.
Shape legend: B rows of a batch, S tokens of the pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from hf_memtune._compat import is_fake, with_values
from hf_memtune.core.pieces import Piece
from hf_memtune.methods.attention.spans import Rows, Span, attention_mask

SQUARE = 512  # keys of a square before the chunk
GROUP = 8  # squares that are asked about together first


class Asked:
    """A mask that a model asked for. given: what it got: a mask, None where the kernel needs none, or a stand-in for the pieces."""

    def __init__(self, stack: str, rule: Callable, queries: Span, keys: Span, finish: Callable[[Tensor], Tensor]):
        self.stack, self.rule, self._queries, self._keys, self._finish = stack, rule, queries, keys, finish
        self.given: Tensor | None = None
        self.stands_in = False

    def stand_in(self) -> Tensor:
        """Of the shape of the mask, and of one number: models hand masks on to their layers, which look at shapes. A layer that reads the
        values gets what nobody overlooks."""
        dtype = self._finish(torch.ones(1, 1, 1, 1, dtype=torch.bool)).dtype
        dtype = dtype if dtype.is_floating_point else torch.float32
        shape = (self._queries.rows.batch, 1, self._queries.index.shape[1], self._keys.visible)
        self.given = torch.full((), torch.nan, dtype=dtype, device=self._queries.index.device).expand(shape)
        self.stands_in = True
        return self.given

    def is_given(self, mask: Tensor | None) -> bool:
        """Whether a layer was given this mask, or a view of all of it; a part is another mask."""
        if mask is None or self.given is None:
            return mask is self.given
        return mask.shape[-2:] == self.given.shape[-2:] and mask.untyped_storage()._cdata == self.given.untyped_storage()._cdata

    @cached_property
    def pieces(self) -> list[Piece]:
        """The keys, in order, without those that no query looks at."""
        return [found if isinstance(found, Piece) else found() for found in self._found]

    @cached_property
    def _found(self) -> "list[Piece | Square]":
        return _joined(pieces_of(self.rule, self._queries, self._keys), self._queries.begins)

    def forget(self) -> None:
        """Let go of the mask, and of those of squares, where a stand-in was given in its place."""
        if self.stands_in:
            self.__dict__.pop("whole", None)
            self.__dict__.pop("pieces", None)

    @cached_property
    def whole(self) -> Tensor:
        """The mask itself, finished: (B, 1, S, keys). Where it is the same for all rows they share its memory."""
        return self._finish(attention_mask(self.rule, self._queries, self._keys)).expand(self._queries.rows.batch, -1, -1, -1)


Square = Callable[[], Piece]  # makes a piece with a mask of its own, without waiting for the device


def pieces_of(rule: Callable, queries: Span, keys: Span) -> Iterator[Piece | Square]:
    """The squares that are looked at; the one of the chunk's own tokens always."""
    start = queries.begins
    bounds = [(first, min(first + SQUARE, start)) for first in range(0, start, SQUARE)] + [(start, keys.visible)]
    if rule is causal_mask_function and queries.selection is None and keys.rows.real is None and queries.rows.segments is None:
        yield from (Piece(first, stop, causal=first == start) for first, stop in bounds)
    elif rule is bidirectional_mask_function and queries.valid is None and keys.rows.real is None:
        yield from (Piece(*b) for b in bounds)
    elif is_fake(queries.index):
        yield from _traced(rule, queries, keys, bounds)
    else:
        bounds = _looked_at(rule, queries, keys, bounds)
        kinds = _kinds(rule, queries, keys, bounds)
        yield from (p for p in (_piece(rule, queries, keys, *b, k) for b, k in zip(bounds, kinds)) if p is not None)


def _looked_at(rule: Callable, queries: Span, keys: Span, bounds: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without squares that no query looks at, as far as whole groups of them show: a window reaches few squares of a long row."""
    *earlier, own = bounds
    groups = [earlier[n : n + GROUP] for n in range(0, len(earlier), GROUP)]
    if len(groups) < 2:
        return bounds
    masks = (attention_mask(rule, queries, keys, group[0][0], group[-1][1]) for group in groups)
    seen = torch.stack([mask.any() for mask in masks]).tolist()
    return [square for group, any_seen in zip(groups, seen) if any_seen for square in group] + [own]


class _Kind(NamedTuple):
    """What is told of a square. same_for_all: whether all queries that look at any of its keys look at the same."""

    any_seen: bool
    all_seen: bool
    is_causal: bool
    all_look: bool
    all_keys: bool
    same_for_all: bool


def _kinds(rule: Callable, queries: Span, keys: Span, bounds: list[tuple[int, int]]) -> list[_Kind]:
    """All are found before any is asked for, so that a GPU is waited for once. No square is kept meanwhile."""
    kinds = []
    for first, stop in bounds:
        mask = attention_mask(rule, queries, keys, first, stop)
        looking, seen = mask.any(-1, keepdim=True), mask.any(-2, keepdim=True)
        is_causal = mask.new_zeros(())
        if first == bounds[-1][0] and queries.selection is None:
            is_causal = (mask == torch.ones_like(mask[0, 0]).tril()).all()
        kinds.append(torch.stack([mask.any(), mask.all(), is_causal, looking.all(), seen.all(), (mask == (looking & seen)).all()]))
    return [_Kind(*kind) for kind in torch.stack(kinds).tolist()]


def _piece(rule: Callable, queries: Span, keys: Span, first: int, stop: int, kind: _Kind) -> Piece | Square | None:
    if kind.all_seen or kind.is_causal:
        return Piece(first, stop, causal=not kind.all_seen)
    if not kind.any_seen and stop < keys.visible:
        return None
    make = partial(_masked, rule, queries, keys, first, stop, kind)
    return make() if kind.same_for_all else make


def _masked(rule: Callable, queries: Span, keys: Span, first: int, stop: int, kind: _Kind) -> Piece:
    mask = attention_mask(rule, queries, keys, first, stop)
    looking = None if kind.all_look else mask.any(-1)
    if kind.same_for_all:
        return Piece(first, stop, seen=None if kind.all_keys else mask.any(-2, keepdim=True), looking=looking)
    return Piece(first, stop, seen=mask.contiguous(), looking=looking)


def _traced(rule: Callable, queries: Span, keys: Span, bounds: list[tuple[int, int]]) -> Iterator[Piece | Square]:
    """Traced tensors have no values: the pieces of rows without padding that are one sequence, with room for the masks of those that are not."""
    rows, start = queries.rows, bounds[-1][0]
    with with_values():
        plain = Rows(1, rows.length, None, torch.arange(rows.length)[None], None).chunk(start, keys.visible)
        kinds = _kinds(rule, plain, plain, bounds)
    is_plain = keys.rows.real is None and rows.segments is None
    for (first, stop), kind in zip(bounds, kinds):
        if not kind.any_seen:
            continue
        is_whole = kind.all_seen or kind.is_causal
        of_its_own = not (is_whole or kind.same_for_all) or (first == start and not (is_plain and queries.selection is None))
        if is_whole and is_plain and not of_its_own:
            yield Piece(first, stop, causal=not kind.all_seen)
            continue
        make = partial(_with_room, rows.batch, queries, first, stop, of_its_own)
        yield make if of_its_own else make()


def _with_room(batch: int, queries: Span, first: int, stop: int, of_its_own: bool) -> Piece:
    new, count = queries.index.new_ones, queries.index.shape[1]
    seen = new((batch, 1, count if of_its_own else 1, stop - first), dtype=torch.bool)
    return Piece(first, stop, seen=seen, looking=new((batch, 1, count), dtype=torch.bool))


def _joined(pieces: Iterator[Piece | Square], border: int) -> list[Piece | Square]:
    """Neighbours that are seen in full are one, but for those of the chunk's own tokens, which begin at `border`."""
    found: list[Piece | Square] = []
    for piece in pieces:
        last = found[-1] if found else None
        if _is_full(last) and _is_full(piece) and last.stop == piece.start != border:
            found.pop()
            piece = replace(piece, start=last.start)
        found.append(piece)
    return found


def _is_full(piece: Piece | Square | None) -> TypeGuard[Piece]:
    return isinstance(piece, Piece) and not piece.causal and piece.seen is None and piece.looking is None
