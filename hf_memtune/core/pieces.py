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


def attend_with_gradient(query: Tensor, key: Tensor, value: Tensor, prefix: Prefix, known: Attended | None = None) -> Tensor:
    """As `attend`, (B, H, S, C), where `key` and `value`, (B, K, S, C), are those of the chunk's own tokens, which are stored already.

    Gradients reach them, with what later chunks owed to them; what earlier tokens are owed is booked. Of the arguments only the queries
    are saved. known: what the attention was found to be before, which is then not computed again.
    """
    return _Attend.apply(query, key, value, prefix, known)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, prefix: Prefix, known: Attended | None) -> Tensor:
        found = attend(query, prefix) if known is None else known
        ctx.prefix, ctx.dtypes = prefix, (key.dtype, value.dtype)
        ctx.save_for_backward(query, *found)
        return found.output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        query, output, lse = ctx.saved_tensors
        prefix, lse = ctx.prefix, lse.masked_fill(lse == -torch.inf, torch.inf)  # who sees nothing has no weights
        wanted = zip(("key", "value"), ctx.dtypes, ctx.needs_input_grad[1:3])
        parts = [_Part(prefix, name, dtype) if is_wanted else None for name, dtype, is_wanted in wanted]
        of_query: Tensor | None = None
        for block, keys, values in prefix.blocks(query.dtype):
            of = Attended(output, lse if block.looking is None else lse.masked_fill(~block.looking, torch.inf))
            kernel, mask = _kernel(query, values, block), block.mask(query.dtype)
            found, *others = kernel.backward(gradient, query, keys, values, of, mask, block.causal, prefix.scale)
            of_query = found if of_query is None else of_query.to(torch.promote_types(found.dtype, torch.float32)).add_(found)
            for part, other in zip(parts, others):
                if part is not None:
                    part.add(block, other)
            del keys, values, others
        assert of_query is not None, "a prefix has pieces"
        return of_query.to(query.dtype), *(None if part is None else part.settled() for part in parts), None, None


class _Part:
    """Gradient of the keys, or of the values, of a prefix: that of earlier tokens is booked, that of the chunk's own is kept. dtype: theirs."""

    def __init__(self, prefix: Prefix, name: str, dtype: torch.dtype):
        assert prefix.owed is not None and prefix.tokens is not None, "attention with gradient books what is owed"
        self._owed, self._tokens, self._key, self._dtype = prefix.owed, prefix.tokens, (prefix.key, name), dtype
        self._own: Tensor | None = None

    def add(self, block: Piece, gradient: Tensor) -> None:
        """(B, K, keys of the block, C)."""
        start, count = self._tokens.start, self._tokens.stop - self._tokens.start
        if block.start < start:
            self._owed.book(self._key, gradient, block.start, start, self._dtype)
        elif gradient.shape[2] == count:
            self._own = gradient
        else:
            if self._own is None:
                self._own = gradient.new_zeros(*gradient.shape[:2], count, gradient.shape[3])
            self._own.narrow(2, block.start - start, gradient.shape[2]).add_(gradient)

    def settled(self) -> Tensor | None:
        """What all chunks found for the chunk's own."""
        return None if self._own is None else self._owed.settle(self._key, self._own, self._tokens).to(self._dtype)


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
