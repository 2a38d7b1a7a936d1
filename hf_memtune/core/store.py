"""The keys and values that a context pass leaves behind for the passes after it.

Shape legend: B rows, K key heads, T tokens, S selected tokens, C channels of a head.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_memtune.errors import MemTuneError


class KeyValueStore:
    """Keys and values of every attention module, (B, K, T, C) each, written in chunks of tokens and never differentiated."""

    def __init__(self):
        self._entries: dict[int, tuple[Tensor, Tensor]] = {}
        self._written: dict[int, int] = {}  # tokens of each entry that are there

    def write(self, key: int, keys: Tensor, values: Tensor, start: int, length: int) -> None:
        """Put a chunk (B, K, chunk, C) at token `start` of the entry `key`, whose full length is `length`."""
        if keys.shape[2] == length:  # the whole row at once: keep it, without a second copy
            self._entries[key] = (alone(keys.detach()), alone(values.detach()))
            self._note(key, 0, length)
            return
        if key not in self._entries:
            self._entries[key] = (_empty(keys, length), _empty(values, length))
        for entry, chunk in zip(self._entries[key], (keys, values)):
            entry.narrow(2, start, chunk.shape[2]).copy_(chunk.detach())
        self._note(key, start, start + keys.shape[2])

    def prefix(self, key: int, stop: int) -> tuple[Tensor, Tensor]:
        """The first `stop` tokens of an entry, on the device."""
        return next(self.read(key, [(0, stop)]))

    def read(self, key: int, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values, (B, K, stop - start, C) each, of the tokens [start, stop) of an entry, for each of `bounds`."""
        self._require(key, max(stop for _, stop in bounds))
        keys, values = self._entries[key]
        for start, stop in bounds:
            yield keys.narrow(2, start, stop - start), values.narrow(2, start, stop - start)

    def keys(self) -> list[int]:
        """What there are entries for."""
        return list(self._written)

    def clear(self) -> None:
        """Forget all entries."""
        self._entries.clear()
        self._written.clear()

    def _note(self, key: int, start: int, stop: int) -> None:
        if start <= self._written.get(key, 0):  # else there is a gap, which nobody must read
            self._written[key] = max(self._written.get(key, 0), stop)

    def _require(self, key: int, stop: int) -> None:
        if stop > self._written.get(key, 0):
            raise MemTuneError(
                f"an attention layer has keys and values of {self._written.get(key, 0)} tokens where {stop} are attended to: it did not run for "
                "all chunks of the row. Turn off whatever leaves out layers at random (layerdrop)."
            )

    def tensors(self) -> list[Tensor]:
        """What is kept on the device."""
        return [part for entry in self._entries.values() for part in entry]


def alone(part: Tensor) -> Tensor:
    """The tensor itself, or a copy where it is a view that would keep more alive (queries, of a fused projection)."""
    return part if part.untyped_storage().nbytes() <= part.nbytes else part.clone()


def _empty(chunk: Tensor, length: int) -> Tensor:
    return chunk.new_empty(chunk.shape[0], chunk.shape[1], length, chunk.shape[3])


def place(stored: Tensor, live: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    """A copy of `stored` (B, K, T, C) in which the tokens `index` (B, S) are the live ones (B, K, S, C).

    Gradients reach `live` only, and only where `valid` (B, S; None: everywhere). The positions of a row must be distinct:
    the backward of scatter hands every duplicate the full gradient.
    """
    positions = index[:, None, :, None].expand(live.shape)
    if valid is not None:
        live = torch.where(valid[:, None, :, None], live, stored.gather(2, positions))
    return stored.scatter(2, positions, live)
