"""Keys and values, and what is owed to them, at home in host memory: a block or two of them are on the device.

A tensor of a row has a home (`HostTensor`), to which chunks are sent and from which blocks are fetched.

FETCHING AHEAD. On CUDA, homes are pinned, and the block that comes next is fetched in a stream of its own meanwhile.
Nothing is read before it is written there, and no memory is used again too early, because
1. only that runs beside the present stream; whatever else is copied, either way, is in the present stream's order;
2. it begins after all that the present stream was given before: what was sent home is there, and the room for the copy, which is of
   the present stream's memory, is no longer used by who had it before;
3. the present stream waits for it before the copy is used, and before its room is given back; nobody writes while a reader is at it.
The processor itself never reads a pinned home, and writes it once: zeros, before anything is copied. Not yet run on a GPU: pinned homes and the stream. The order of waiting is
tested with copies that arrive late.

SEGMENTS. torch makes of whatever is asked for in pinned memory the next power of two of bytes (2.13: ATen/core/CachingHostAllocator.h,
`PowerOf2Ceil`), and keeps it for those who ask for the same power: 2.9 GB would take 4.3. So a home is made of segments that are powers of two
already, or as near to one as whole tokens go. Rows of other lengths use the same ones again.

Shape legend: B rows, K key heads, T tokens in a row, C channels of a head.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_memtune.core.owed import OwedSums
from hf_memtune.core.store import KeyValueStore

SEGMENT_BYTES = 2**26  # of the largest segment of a home
REST_BYTES = 2**20  # what is left of a home below this is one segment, whatever is made of it


class HostMemory:
    """Makes homes, and has the stream in which they are fetched ahead. One for a model serves all its steps.

    asked_bytes: of all homes it was asked for so far, those that are gone again included.
    """

    def __init__(self):
        self._streams: dict[torch.device, Any] = {}
        self.asked_bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room in host memory for what is on `device` otherwise."""
        home = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
        self.asked_bytes += home.nbytes
        return home

    def stream_beside(self, device: torch.device) -> Any:
        """The stream beside the present one of a CUDA device, made to wait for all that the present one was given."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        self._streams[device].wait_stream(torch.cuda.current_stream(device))
        return self._streams[device]


class HostTensor:
    """(B, K, T, C) at home in host memory, of T tokens, of the rows, heads, channels and device of `like`.

    Tokens come first there, so that those of a chunk, or of a block, lie in one piece: what does not cannot be copied without the
    processor. A fetched block has that order too.
    """

    def __init__(self, host: HostMemory, like: Tensor, length: int, dtype: torch.dtype | None = None, zero: bool = False):
        rows, heads, _, channels = like.shape
        self._host, self._device, self.length, dtype = host, like.device, length, dtype or like.dtype
        sizes = segments(length, rows * heads * channels * dtype.itemsize)
        self._segments_TBKC = [host.empty((size, rows, heads, channels), dtype, like.device) for size in sizes]
        for segment in self._segments_TBKC if zero else ():
            segment.zero_()

    def send(self, part: Tensor, start: int) -> None:
        """Put (B, K, S, C) at token `start`."""
        part = tokens_first(part).contiguous()
        for after, home in self._homes(start, start + len(part)):
            home.copy_(part.narrow(0, after, len(home)), non_blocking=True)

    def fetch(self, start: int, stop: int) -> "Fetched":
        """The tokens [start, stop)."""
        return Fetched(self._copied(self._room(start, stop), start))

    def fetch_ahead(self, start: int, stop: int) -> "Fetched":
        """The tokens [start, stop), which are on their way while the device goes on with something else."""
        if self._device.type != "cuda":
            return self.fetch(start, stop)
        room = self._room(start, stop)
        stream = self._host.stream_beside(self._device)
        with torch.cuda.stream(stream):
            copy = self._copied(room, start)
        return Fetched(copy, stream.record_event())

    def _room(self, start: int, stop: int) -> Tensor:
        """On the device, for the tokens [start, stop)."""
        like = self._segments_TBKC[0]
        return torch.empty((stop - start, *like.shape[1:]), dtype=like.dtype, device=self._device)

    def _copied(self, room: Tensor, start: int) -> Tensor:
        """The room, filled with the tokens from `start` on."""
        for after, home in self._homes(start, start + len(room)):
            room.narrow(0, after, len(home)).copy_(home, non_blocking=True)
        return room

    def _homes(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """What each segment has of the tokens [start, stop), and how many of them are in those before it."""
        first = 0
        for segment in self._segments_TBKC:
            lower, upper = max(start, first), min(stop, first + len(segment))
            if lower < upper:
                yield lower - start, segment.narrow(0, lower - first, upper - lower)
            first += len(segment)


def segments(length: int, token_bytes: int) -> Iterator[int]:
    """Tokens of each segment of a home of `length` tokens: what is rounded up in it is less than a token, in the last one less than REST_BYTES."""
    while length:
        room_bytes = SEGMENT_BYTES
        while room_bytes > max(REST_BYTES, length * token_bytes):
            room_bytes //= 2
        size = min(length, max(1, room_bytes // max(1, token_bytes)))  # of keys by which a layer chooses there are no values
        yield size
        length -= size


class Fetched:
    """A copy on the device, (tokens, B, K, C), that is there or on its way."""

    def __init__(self, copy: Tensor, arrival: Any = None):
        self._copy, self._arrival = copy, arrival
        self._made_in = None if arrival is None else torch.cuda.current_stream(copy.device)  # whose memory the copy has

    def ready(self) -> Tensor:
        """The copy, for use in the present stream."""
        if self._arrival is not None:
            torch.cuda.current_stream(self._copy.device).wait_event(self._arrival)
        return self._copy

    def __del__(self):
        if self._made_in is not None:  # or, never used, it might arrive where that stream has put something else by then
            self._made_in.wait_event(self._arrival)


def tokens_first(part: Tensor) -> Tensor:
    """(B, K, T, C) as (T, B, K, C)."""
    return part.permute(2, 0, 1, 3)


def heads_first(part: Tensor) -> Tensor:
    """(T, B, K, C) as (B, K, T, C)."""
    return part.permute(1, 2, 0, 3)


class OffloadedStore(KeyValueStore):
    """Keys and values of every attention module, (B, K, T, C) each, at home in host memory, written in chunks of tokens.

    Whoever reads has two blocks on the device at a time: the one at hand, and the one after it, on its way.
    """

    def __init__(self, host: HostMemory):
        super().__init__()
        self._host = host
        self._homes: dict[int, tuple[HostTensor, HostTensor]] = {}

    def write(self, key: int, keys: Tensor, values: Tensor, start: int, length: int) -> None:
        """Put a chunk (B, K, chunk, C) at token `start` of the entry `key`, whose full length is `length`."""
        chunks = keys.detach(), values.detach()
        if key not in self._homes:
            self._homes[key] = (HostTensor(self._host, chunks[0], length), HostTensor(self._host, chunks[1], length))
        for home, chunk in zip(self._homes[key], chunks):
            home.send(chunk, start)
        self._note(key, start, start + keys.shape[2])

    def read(self, key: int, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Copies on the device, of one of `bounds` after the other."""
        self._require(key, max(stop for _, stop in bounds))
        homes = self._homes[key]
        coming = [home.fetch(*bounds[0]) for home in homes]
        for following in (*bounds[1:], None):
            here = coming
            coming = [home.fetch_ahead(*following) for home in homes] if following is not None else []
            keys, values = (heads_first(part.ready()) for part in here)
            del here
            yield keys, values
            del keys, values  # before the block after the next one is fetched

    def clear(self) -> None:
        super().clear()
        self._homes.clear()

    def tensors(self) -> list[Tensor]:
        return []  # what is on the device is a copy


class OffloadedSums(OwedSums):
    """Sums of gradients at home in host memory: a block at a time comes to the device, and goes back with what was added."""

    def __init__(self, host: HostMemory):
        super().__init__()
        self._host = host
        self._homes: dict[tuple[int, str], HostTensor] = {}

    def add(self, key: tuple[int, str], gradient: Tensor, first: int, length: int, dtype: torch.dtype) -> None:
        home = self._homes.get(key)
        if home is None:
            home = self._homes[key] = HostTensor(self._host, gradient, length, dtype, zero=True)
        owed = home.fetch(first, first + gradient.shape[2]).ready()
        home.send(heads_first(owed).add_(gradient), first)

    def get(self, key: tuple[int, str], start: int, stop: int) -> Tensor | None:
        home = self._homes.get(key)
        return None if home is None or start >= home.length else heads_first(home.fetch(start, stop).ready())

    def drop(self, key: tuple[int, str]) -> None:
        self._homes.pop(key, None)

    def keys(self) -> list[tuple[int, str]]:
        return list(self._homes)

    def tensors(self) -> list[Tensor]:
        return []
