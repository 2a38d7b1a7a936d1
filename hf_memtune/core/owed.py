"""What later tokens owe to the keys and values of earlier ones: the link between the chunks of a streamed backward pass.

Shape legend: B rows, K key heads, T tokens in a row, S tokens of a chunk that run, C channels of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2048  # tokens of which the mass is taken at a time


@dataclass(frozen=True)
class Live:
    """The tokens of a chunk that run with gradient: all of [start, stop), or `index` (B, S) among them where `valid` (B, S)."""

    start: int
    stop: int
    index: Tensor | None = None
    valid: Tensor | None = None


class OwedSums:
    """Sums of gradients, (B, K, tokens, C) each, of the first tokens of a row: allocated once, changed in place."""

    def __init__(self):
        self._sums: dict[tuple[int, str], Tensor] = {}

    def add(self, key: tuple[int, str], gradient: Tensor, first: int, length: int, dtype: torch.dtype) -> None:
        """Add what is owed to the tokens from `first` on, (B, K, some, C). length: tokens that may be owed anything, at the first time."""
        if key not in self._sums:
            self._sums[key] = gradient.new_zeros((*gradient.shape[:2], length, gradient.shape[3]), dtype=dtype)
        self._sums[key].narrow(2, first, gradient.shape[2]).add_(gradient)

    def get(self, key: tuple[int, str], start: int, stop: int) -> Tensor | None:
        """What is owed to the tokens [start, stop), not to be changed; None: nothing."""
        owed = self._sums.get(key)
        return None if owed is None or start >= owed.shape[2] else owed.narrow(2, start, stop - start)

    def drop(self, key: tuple[int, str]) -> None:
        """Forget a sum, if there is one."""
        self._sums.pop(key, None)

    def keys(self) -> list[tuple[int, str]]:
        """What there is a sum for."""
        return list(self._sums)

    def tensors(self) -> list[Tensor]:
        """The sums that are kept on the device."""
        return list(self._sums.values())


class OwedGradients:
    """dL/dK and dL/dV of every attention module, from the chunks that went backward so far.

    dtype: what sums are kept in; None: as the gradients come. sums: where they are kept.
    """

    def __init__(self, dtype: torch.dtype | None = None, sums: OwedSums | None = None):
        self.dtype = dtype
        self._sums = OwedSums() if sums is None else sums

    def attach(self, key: int, live: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], tokens: Live):
        """Stored keys and values (B, K, stop, C) through which gradients reach those of the live tokens, (B, K, S, C) each."""
        parts = zip(("key", "value"), live, stored)
        return tuple(Streamed.apply(mine, whole, self, (key, name), tokens) for name, mine, whole in parts)

    def book(self, key: tuple[int, str], gradient: Tensor, first: int, length: int, dtype: torch.dtype) -> None:
        """Add what a chunk found, (B, K, some, C), for tokens from `first` on of the `length` before it. dtype: of their keys, or values."""
        self._sums.add(key, gradient, first, length, self.dtype or dtype)

    def settle(self, key: tuple[int, str], own: Tensor, tokens: Live) -> Tensor:
        """What all chunks found for the live tokens of a chunk, whose turn has come. own: what it found itself, (B, K, stop - start, C)."""
        owed = self._sums.get(key, tokens.start, tokens.stop)
        if owed is not None:
            own = (owed + own).to(own.dtype)
        if not tokens.start:
            self._sums.drop(key)  # the first chunk: nothing is before it
        return own if tokens.index is None else _at(own, tokens)

    def tensors(self) -> list[Tensor]:
        """The sums that are kept on the device."""
        return self._sums.tensors()

    def mass(self, stop: int) -> Tensor | None:
        """(B, stop): for each token, the norm of what is owed to its keys and values in all layers; None before the first debt."""
        blocks = [self._squares(start, min(start + BLOCK, stop)) for start in range(0, stop, BLOCK)]
        found = [block for block in blocks if block is not None]
        return torch.cat(found, 1).sqrt() if found else None

    def _squares(self, start: int, stop: int) -> Tensor | None:
        """(B, stop - start): the squares of the mass of these tokens."""
        owed = (self._sums.get(key, start, stop) for key in self._sums.keys())
        squares = [debt.float().square().sum((1, 3)) for debt in owed if debt is not None]
        return torch.stack(squares).sum(0) if squares else None


def _at(own: Tensor, tokens: Live) -> Tensor:
    """What of (B, K, chunk, C) belongs to the live tokens: (B, K, S, C), 0 at fillers."""
    assert tokens.index is not None
    rows, heads, _, channels = own.shape
    index = (tokens.index - tokens.start)[:, None, :, None].expand(rows, heads, -1, channels)
    taken = own.gather(2, index)
    return taken if tokens.valid is None else taken.masked_fill(~tokens.valid[:, None, :, None], 0)


class Streamed(torch.autograd.Function):
    """Keys (or values) of all tokens up to a chunk's end, as a function of those of the chunk's own tokens.

    K = [K_before, K_own], where the stored K_own equals the live one: forward is the identity on what is stored, and no copy of it
    is made or saved. For a loss that is the sum over chunks c of L_c, and chunks going backward from the last,
        dL/dK_own = sum over c >= own of dL_c/dK_own = gradient of this chunk + what later chunks owe,
    which is complete when the chunk's turn comes; what it finds for K_before is added to what is owed there.
    """

    @staticmethod
    def forward(ctx, live, stored, owed, key, tokens):
        ctx.owed, ctx.key, ctx.tokens = owed, key, tokens
        return stored.detach()

    @staticmethod
    def backward(ctx, gradient):
        start, count = ctx.tokens.start, ctx.tokens.stop - ctx.tokens.start
        if start:
            ctx.owed.book(ctx.key, gradient.narrow(2, 0, start), 0, start, gradient.dtype)
        return ctx.owed.settle(ctx.key, gradient.narrow(2, start, count), ctx.tokens), None, None, None, None
