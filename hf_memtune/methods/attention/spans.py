"""Which tokens of which rows run in a pass, and what they may attend to.

Shape legend: B rows of a batch, T tokens in a row (padding included), S tokens of the pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function

from hf_memtune._compat import is_fake, packed_mask_function
from hf_memtune.core.selection import Selection


@dataclass(frozen=True)
class Rows:
    """The rows that one stack of layers works on.

    real: (B, T) bool, or None where there is no padding. positions: (B or 1, T) int64. segments: (B, T) int64, the number
    of the packed sequence a token belongs to, or None where a row is one sequence. labelled_until: (B, T) bool, the tokens up to
    the last label, for rows whose padding shows in their labels alone: attention sees what comes after, scores do not.
    """

    batch: int
    length: int
    real: Tensor | None
    positions: Tensor
    segments: Tensor | None
    labelled_until: Tensor | None = None

    @property
    def scored(self) -> Tensor | None:
        """(B, T) bool: the tokens that are scored and may be kept; None for all."""
        return self.real if self.labelled_until is None else self.labelled_until

    def real_tokens(self) -> Tensor | int:
        """Number of tokens that are scored."""
        return self.batch * self.length if self.scored is None else self.scored.sum()

    @property
    def longest(self) -> int:
        """Tokens of the longest row that are scored."""
        return self.length if self.scored is None or is_fake(self.scored) else int(self.scored.sum(1).amax())

    def chunk(self, start: int, stop: int, visible: int | None = None) -> "Span":
        """Tokens [start, stop) of every row, seeing keys up to `visible` (default: up to their own end)."""
        index = torch.arange(start, stop, device=self.positions.device)[None]
        return Span(self, index, stop if visible is None else visible, start=start)

    def whole(self) -> "Span":
        return self.chunk(0, self.length)

    def kept(self, selection: Selection) -> "Span":
        """The selected tokens of every row, seeing all keys their mask allows."""
        return Span(self, selection.index, self.length, selection=selection)

    def kept_of_chunk(self, selection: Selection, start: int, stop: int) -> "Span":
        """The selected tokens of [start, stop), seeing keys up to `stop`."""
        return Span(self, selection.index, stop, selection=selection, chunk_start=start)


@dataclass(frozen=True)
class Chunks:
    """The chunks of a row: each begins at one of `starts`, and the last one ends at `length`."""

    starts: tuple[int, ...]
    length: int

    @classmethod
    def of(cls, length: int, size: int, joins_last: bool = False, may_begin: Tensor | None = None) -> "Chunks":
        """Chunks of `size` tokens. joins_last: a last one of a single token is a part of the one before it: layers with a state take such for
        one that is being generated, and go another way. may_begin: (T,) bool, where chunks may begin; those before it become longer.
        """
        starts = [0]
        while (start := starts[-1] + size) < length:
            if may_begin is not None:
                found = may_begin[start:].nonzero()
                start = length if not len(found) else start + int(found[0])
            if start >= length - int(joins_last):
                break
            starts.append(start)
        return cls(tuple(starts), length)

    @property
    def count(self) -> int:
        return len(self.starts)

    def bounds(self, number: int, together: int = 1) -> tuple[int, int]:
        """The first token of a chunk, and the one after the last token of the last of the chunks that run together."""
        after = number + together
        return self.starts[number], self.length if after == self.count else self.starts[after]


@dataclass(frozen=True)
class Span:
    """Tokens `index` (B or 1, S) of `rows`; keys [0, visible) exist for them.

    start: of contiguous tokens, the first. selection: where they are chosen, from the chunk that begins at `chunk_start`, or from
    the whole row.
    """

    rows: Rows
    index: Tensor
    visible: int
    start: int | None = None
    selection: Selection | None = None
    chunk_start: int | None = None

    @property
    def valid(self) -> Tensor | None:
        """(B, S) bool, False at fillers; None where there are none."""
        return self.selection.valid if self.selection is not None and self.selection.is_ragged else None

    @property
    def first(self) -> int:
        """Of contiguous tokens, the first."""
        assert self.start is not None, "chosen tokens have no first one"
        return self.start

    @property
    def begins(self) -> int:
        """Where the chunk begins that the tokens are of, or were chosen from."""
        start = self.start if self.selection is None else self.chunk_start
        assert start is not None, "tokens chosen from the whole row are of no chunk"
        return start

    def take(self, values: Tensor) -> Tensor:
        """The entries of `values` (B or 1, T, ...) for these tokens."""
        if self.selection is None:
            return values.narrow(1, self.first, self.index.shape[1])
        return self.selection.gather(values)


def attention_mask(mask_function: Callable, queries: Span, keys: Span, first: int = 0, stop: int | None = None) -> Tensor:
    """(B or 1, 1, S, keys) bool, True where a query may look, of the keys [first, stop): by default all that are visible.

    `mask_function(batch, head, query, key)` is transformers' own index-based rule (causal, sliding, chunked,
    bidirectional); evaluated at the positions of the queries, it serves every kind of layer.
    """
    rows = queries.rows
    if rows.segments is not None and mask_function is not bidirectional_mask_function:
        positions = rows.positions.expand(rows.batch, -1)
        mask_function = packed_mask_function(mask_function, positions, rows.segments)
    device = queries.index.device
    batch = torch.arange(rows.batch, device=device)[:, None, None, None]
    head = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=device)
    stop = keys.visible if stop is None else stop
    key = torch.arange(first, stop, device=device)[None, None, None]
    mask = mask_function(batch, head, queries.index[:, None, :, None], key)
    if keys.rows.real is not None:
        mask = mask & keys.rows.real[:, None, None, first:stop]
    if queries.valid is not None:
        mask = mask | ~queries.valid[:, None, :, None]  # a filler at padding would otherwise see nothing and become NaN
    return mask.expand(-1, 1, queries.index.shape[1], stop - first)


def additive(visible: Tensor, dtype: torch.dtype, hidden: float) -> Tensor:
    """The mask the kernels add. Made once a pass: from a boolean one they would make it again in every layer.

    Its rows lie 8 elements apart or a multiple of that, without which CUDA's memory-efficient kernel copies it in every call.
    """
    keys = visible.shape[-1]
    room = torch.full((*visible.shape[:-1], -(-keys // 8) * 8), hidden, dtype=dtype, device=visible.device)
    return room[..., :keys].masked_fill_(visible, 0)
