"""Attention of a chunk's queries to the keys and values that are stored so far, piece by piece: no mask over all keys is made.

OUTPUT. With o_p and lse_p of the pieces p of the keys (see `core.attention_kernels`), the attention to all of them is
    lse = log sum_p exp(lse_p),    o = sum_p exp(lse_p - lse) o_p.
BACKWARD. With o and lse of all keys, each piece gives its own keys' gradient, and its part of the queries'. What is found for the keys of
earlier chunks is booked as owed to them (`core.owed`), where it is summed in place.

The keys and values come from the store, a block at a time, so that it may keep them elsewhere.
Shape legend: B rows, H query heads, K key heads, S queries of the chunk, T tokens in a row, C channels of a head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_memtune.core.attention_kernels import Attended, Kernel, kernel_for
from hf_memtune.core.owed import Live, OwedGradients
from hf_memtune.core.store import KeyValueStore

BLOCK = 2048  # keys that are attended to at a time


@dataclass(frozen=True)
class Piece:
    """Keys [start, stop), and which of them the queries of a chunk may look at.

    causal: query n at keys start to start + n, of as many. seen: (B or 1, 1, S or 1, stop - start) bool, or None for all. looking:
    (B or 1, 1, S) bool, the queries that look at any of them; None for all.
    """

    start: int
    stop: int
    causal: bool = False
    seen: Tensor | None = None
    looking: Tensor | None = None

    def blocks(self) -> "Iterator[Piece]":
        """The piece in parts of `BLOCK` keys; in one where causality numbers them."""
        if self.causal or self.stop - self.start <= BLOCK:
            yield self
            return
        for start in range(self.start, self.stop, BLOCK):
            stop = min(start + BLOCK, self.stop)
            part = replace(self, start=start, stop=stop)
            if self.seen is not None:
                seen = self.seen[..., start - self.start : stop - self.start]
                looking = seen.any(-1) if self.looking is None else seen.any(-1) & self.looking
                part = replace(part, seen=seen, looking=looking)
            yield part

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores: 0, or -inf where nothing is to be seen."""
        if self.seen is None:
            return None
        return torch.zeros(self.seen.shape, dtype=dtype, device=self.seen.device).masked_fill_(~self.seen, -torch.inf)


@dataclass(frozen=True)
class Prefix:
    """What the queries of a chunk attend to: the pieces of an entry of the store.

    scale: of the scores. owed, tokens: where what is found for earlier tokens is booked, and the chunk's own tokens; None without gradient.
    """

    store: KeyValueStore
    key: int
    pieces: Sequence[Piece]
    scale: float
    owed: OwedGradients | None = None
    tokens: Live | None = None

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        """Each block, and its keys and values, (B, K, keys, C) in `dtype`."""
        blocks = [block for piece in self.pieces for block in piece.blocks()]
        reader = self.store.read(self.key, [(block.start, block.stop) for block in blocks])
        for block in blocks:
            keys, values = next(reader)
            yield block, keys.to(dtype), values.to(dtype)
            del keys, values  # whoever holds them when the next are read has three blocks on the device


def attend(query: Tensor, prefix: Prefix) -> Attended:
    """The attention of queries (B, H, S, C) to a prefix."""
    found: Attended | None = None
    for block, keys, values in prefix.blocks(query.dtype):
        part = _kernel(query, values, block).forward(query, keys, values, block.mask(query.dtype), block.causal, prefix.scale)
        if block.looking is not None:
            part = _of_those_looking(part, block.looking)
        found = part if found is None else _merged(found, part)
        del keys, values
    if found is None:
        raise ValueError("attention to nothing: the prefix has no pieces")
    return Attended(found.output.to(query.dtype), found.lse)


def attend_with_gradient(query: Tensor, key: Tensor, value: Tensor, prefix: Prefix) -> Tensor:
    """As `attend`, (B, H, S, C), where `key` and `value`, (B, K, S, C), are those of the chunk's own tokens, which are stored already.

    Gradients reach them, with what later chunks owed to them; what earlier tokens are owed is booked. Of the arguments only the queries
    are saved.
    """
    return _Attend.apply(query, key, value, prefix)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, prefix: Prefix) -> Tensor:
        found = attend(query, prefix)
        ctx.prefix, ctx.dtypes = prefix, (key.dtype, value.dtype)
        ctx.save_for_backward(query, *found)
        return found.output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        query, output, lse = ctx.saved_tensors
        prefix, lse = ctx.prefix, lse.masked_fill(lse == -torch.inf, torch.inf)  # who sees nothing has no weights
        sums = _Sums(prefix, ctx.dtypes, ctx.needs_input_grad[1:3])
        for block, keys, values in prefix.blocks(query.dtype):
            of = Attended(output, lse if block.looking is None else lse.masked_fill(~block.looking, torch.inf))
            kernel, mask = _kernel(query, values, block), block.mask(query.dtype)
            sums.add(block, *kernel.backward(gradient, query, keys, values, of, mask, block.causal, prefix.scale))
            del keys, values
        return sums.of_query(query.dtype), *sums.settled(), None


class _Sums:
    """Gradients of one call of `_Attend`, over its blocks. dtypes, wanted: of its keys and of its values."""

    def __init__(self, prefix: Prefix, dtypes: Sequence[torch.dtype], wanted: Sequence[bool]):
        assert prefix.owed is not None and prefix.tokens is not None, "attention with gradient books what is owed"
        self._owed, self._tokens = prefix.owed, prefix.tokens
        self._of_query: Tensor | None = None
        self._parts = [_Part((prefix.key, name), dtype) for name, dtype, is_wanted in zip(("key", "value"), dtypes, wanted) if is_wanted]
        self._wanted = wanted

    def add(self, block: Piece, of_query: Tensor, of_key: Tensor, of_value: Tensor) -> None:
        wide = torch.promote_types(of_query.dtype, torch.float32)
        self._of_query = of_query if self._of_query is None else self._of_query.to(wide).add_(of_query)
        for part, gradient in zip(self._parts, (g for g, is_wanted in zip((of_key, of_value), self._wanted) if is_wanted)):
            if block.start < self._tokens.start:
                self._owed.book(part.key, gradient, block.start, self._tokens.start, part.dtype)
            else:
                part.add_own(gradient, block.start - self._tokens.start, self._tokens.stop - self._tokens.start)

    def of_query(self, dtype: torch.dtype) -> Tensor:
        assert self._of_query is not None, "a prefix has pieces"
        return self._of_query.to(dtype)

    def settled(self) -> list[Tensor | None]:
        """Of the chunk's own keys and values; None where no gradient is wanted."""
        found = iter(
            [None if part.own is None else self._owed.settle(part.key, part.own, self._tokens).to(part.dtype) for part in self._parts]
        )
        return [next(found) if is_wanted else None for is_wanted in self._wanted]


class _Part:
    """Gradient of the chunk's own keys, or values. dtype: theirs."""

    def __init__(self, key: tuple[int, str], dtype: torch.dtype):
        self.key, self.dtype = key, dtype
        self.own: Tensor | None = None

    def add_own(self, gradient: Tensor, first: int, count: int) -> None:
        """Of the keys from `first` on of the chunk's `count`."""
        if self.own is None and gradient.shape[2] == count:
            self.own = gradient
            return
        if self.own is None:
            self.own = gradient.new_zeros(*gradient.shape[:2], count, gradient.shape[3])
        self.own.narrow(2, first, gradient.shape[2]).add_(gradient)


def _kernel(query: Tensor, values: Tensor, block: Piece) -> Kernel:
    return kernel_for(query, values, block.seen is not None)


def _of_those_looking(part: Attended, looking: Tensor) -> Attended:
    """Kernels give queries that see nothing an output and an lse of their own choice."""
    return Attended(part.output.masked_fill(~looking[..., None], 0), part.lse.masked_fill(~looking, -torch.inf))


def _merged(found: Attended, part: Attended) -> Attended:
    """The attention to the keys of both."""
    lse = torch.logaddexp(found.lse, part.lse)
    seen = lse.masked_fill(lse == -torch.inf, 0)
    wide = torch.promote_types(part.output.dtype, torch.float32)
    output = found.output.to(wide) * (found.lse - seen).exp_()[..., None]
    return Attended(output.addcmul_(part.output.to(wide), (part.lse - seen).exp_()[..., None]), lse)
