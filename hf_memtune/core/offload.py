"""Keys and values, and what is owed to them, at home in host memory: those of a layer or two are on the device.

A tensor of a row has a home (`HostTensor`), to which chunks are sent and from which a prefix is fetched. Where autograd would save a
fetched prefix, it saves its address (`OffloadedStore.unsaved`), or the prefixes of all layers would stay on the device.

FETCHING AHEAD. On CUDA, homes are pinned, and the entry that will be asked for next is fetched in a stream of its own meanwhile.
Nothing is read before it is written there, and no memory is used again too early, because
1. only that runs beside the present stream; whatever else is copied, either way, is in the present stream's order;
2. it begins after all that the present stream was given before: what was sent home is there, and the room for the copy, which is of
   the present stream's memory, is no longer used by who had it before;
3. the present stream waits for it before the copy is used, before its home is written again, and before its room is given back.
The processor itself neither reads nor writes a pinned home. Not yet run on a GPU: pinned homes and the stream. The order of waiting is
tested with copies that arrive late.

Shape legend: B rows, K key heads, T tokens in a row, C channels of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_memtune._compat import saved_tensors_hooks_in_force
from hf_memtune.core.owed import OwedSums
from hf_memtune.core.store import KeyValueStore


class HostMemory:
    """Makes homes, and has the stream in which they are fetched ahead. One for a model serves all its steps."""

    def __init__(self):
        self._streams: dict[torch.device, Any] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room in host memory for what is on `device` otherwise."""
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")

    def stream_beside(self, device: torch.device) -> Any:
        """The stream beside the present one of a CUDA device, made to wait for all that the present one was given."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        self._streams[device].wait_stream(torch.cuda.current_stream(device))
        return self._streams[device]


class HostTensor:
    """(B, K, T, C) at home in host memory, for T tokens at most, of the rows, heads, channels and device of `like`.

    Tokens come first there, so that those of a chunk, or of a prefix, lie in one piece: what does not cannot be copied without the
    processor. A fetched prefix has that order too.
    """

    def __init__(self, host: HostMemory, like: Tensor, length: int):
        rows, heads, _, channels = like.shape
        self._host, self._device, self.length = host, like.device, length
        self._home_TBKC = host.empty((length, rows, heads, channels), like.dtype, like.device)

    def send(self, part: Tensor, start: int) -> None:
        """Put (B, K, S, C) at token `start`."""
        home = self._home_TBKC.narrow(0, start, part.shape[2])
        home.copy_(tokens_first(part).contiguous(), non_blocking=True)

    def fetch(self, stop: int) -> "Fetched":
        """The first `stop` tokens."""
        home = self._home_TBKC.narrow(0, 0, stop)
        return Fetched(torch.empty_like(home, device=self._device).copy_(home, non_blocking=True))

    def fetch_ahead(self, stop: int) -> "Fetched":
        """The first `stop` tokens, which are on their way while the device goes on with something else."""
        if self._device.type != "cuda":
            return self.fetch(stop)
        home = self._home_TBKC.narrow(0, 0, stop)
        copy = torch.empty_like(home, device=self._device)
        stream = self._host.stream_beside(self._device)
        with torch.cuda.stream(stream):
            copy.copy_(home, non_blocking=True)
        return Fetched(copy, stream.record_event())


class Fetched:
    """A copy on the device, (tokens, B, K, C), that is there or on its way."""

    def __init__(self, copy: Tensor, arrival: Any = None):
        self._copy, self._arrival = copy, arrival

    def ready(self) -> Tensor:
        """The copy, for use in the present stream."""
        if self._arrival is not None:
            torch.cuda.current_stream(self._copy.device).wait_event(self._arrival)
        return self._copy

    def __del__(self):
        self.ready()  # or, never used, it might arrive where the present stream has put something else by then


def tokens_first(part: Tensor) -> Tensor:
    """(B, K, T, C) as (T, B, K, C)."""
    return part.permute(2, 0, 1, 3)


def heads_first(part: Tensor) -> Tensor:
    """(T, B, K, C) as (B, K, T, C)."""
    return part.permute(1, 2, 0, 3)


class _Prefix:
    """Keys and values of the first `stop` tokens of an entry, on the device."""

    def __init__(self, stop: int, keys: Fetched, values: Fetched):
        self.stop, self._keys, self._values = stop, keys, values

    def ready(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (stop, B, K, C) each."""
        return self._keys.ready(), self._values.ready()


@dataclass(frozen=True)
class _Address:
    """What is saved in place of a view of a prefix. part: 0 of keys, 1 of values."""

    entry: int
    stop: int
    part: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class OffloadedStore(KeyValueStore):
    """Keys and values of every attention module, (B, K, T, C) each, at home in host memory, written in chunks of tokens.

    On the device are two entries at most: the one asked for last, and the one expected next. Passes ask for entries in the order in
    which they are first written, backward in reverse.
    """

    def __init__(self, host: HostMemory):
        self._host = host
        self._homes: dict[int, tuple[HostTensor, HostTensor]] = {}
        self._here: dict[int, _Prefix] = {}
        self._last: int | None = None

    def write(self, key: int, keys: Tensor, values: Tensor, start: int, length: int) -> None:
        """Put a chunk (B, K, chunk, C) at token `start` of the entry `key`, whose full length is `length`."""
        chunks, stop = (keys.detach(), values.detach()), start + keys.shape[2]
        if key not in self._homes:
            self._homes[key] = (HostTensor(self._host, chunks[0], length), HostTensor(self._host, chunks[1], length))
        here = self._here.get(key)
        if here is not None and here.stop < stop:
            del self._here[key]
        elif here is not None:  # fetched ahead, when these tokens were not there yet
            for part, chunk in zip(here.ready(), chunks):
                part.narrow(0, start, stop - start).copy_(tokens_first(chunk))
        for home, chunk in zip(self._homes[key], chunks):
            home.send(chunk, start)

    def tensors(self) -> list[Tensor]:
        return []  # what is on the device is a copy

    def prefix(self, key: int, stop: int) -> tuple[Tensor, Tensor]:
        """The first `stop` tokens of an entry, on the device."""
        keys, values = (heads_first(part.narrow(0, 0, stop)) for part in self._ask(key, stop))
        return keys, values

    @contextmanager
    def unsaved(self, key: int, stored: tuple[Tensor, Tensor]) -> Iterator[None]:
        """While open, autograd saves the address of `stored`, a prefix of the entry `key`, and of its views, and fetches them again.

        All other tensors go to the hooks that were in force before, such as those of activation checkpointing.
        """
        stop, dtypes = stored[0].shape[2], [part.dtype for part in stored]
        numbers = {part.untyped_storage()._cdata: number for number, part in enumerate(stored)}
        pack_other, unpack_other = saved_tensors_hooks_in_force() or (_itself, _itself)

        def pack(tensor: Tensor) -> Any:
            part = numbers.get(tensor.untyped_storage()._cdata)
            if part is None or tensor.dtype != dtypes[part]:
                return pack_other(tensor)
            return _Address(key, stop, part, tensor.size(), tensor.stride(), tensor.storage_offset())

        def unpack(packed: Any) -> Tensor:
            return self._at(packed) if isinstance(packed, _Address) else unpack_other(packed)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _at(self, address: _Address) -> Tensor:
        # a longer prefix has the same strides, for tokens come first
        return self._ask(address.entry, address.stop)[address.part].as_strided(address.size, address.stride, address.offset)

    def _ask(self, key: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of `stop` tokens or more, (tokens, B, K, C) each; the entry expected next is fetched meanwhile."""
        if key not in self._here or self._here[key].stop < stop:
            self._here.clear()  # first, or three would be on the device
            self._here[key] = _Prefix(stop, *(home.fetch(stop) for home in self._homes[key]))
        if key != self._last:
            self._expect(self._next_of(key), key, stop)
            self._last = key
        return self._here[key].ready()

    def _expect(self, expected: int | None, key: int, stop: int) -> None:
        self._here = {k: prefix for k, prefix in self._here.items() if k in (key, expected)}
        if expected is not None and expected not in self._here:
            homes = self._homes[expected]
            stop = min(stop, homes[0].length)  # keys of an encoder are as many as its own tokens
            self._here[expected] = _Prefix(stop, *(home.fetch_ahead(stop) for home in homes))

    def _next_of(self, key: int) -> int | None:
        """The entry as far on as `key` is from the one asked for before; at either end, back again: forward is followed by backward."""
        order = list(self._homes)
        here = order.index(key)
        step = here - order.index(self._last) if self._last is not None else 1
        found = [at for at in (here + step, here - step) if 0 <= at < len(order)]
        return order[found[0]] if found else None


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class OffloadedSums(OwedSums):
    """Sums of gradients at home in host memory: one at a time comes to the device, and goes back with what was added."""

    def __init__(self, host: HostMemory):
        super().__init__()
        self._host = host
        self._homes: dict[tuple[int, str], HostTensor] = {}

    def get(self, key: tuple[int, str], stop: int) -> Tensor | None:
        return heads_first(self._homes[key].fetch(stop).ready()) if key in self._homes else None

    def put(self, key: tuple[int, str], owed: Tensor) -> None:
        if key not in self._homes:
            self._homes[key] = HostTensor(self._host, owed, owed.shape[2])
        self._homes[key].send(owed, 0)

    def drop(self, key: tuple[int, str]) -> None:
        self._homes.pop(key, None)

    def keys(self) -> list[tuple[int, str]]:
        return list(self._homes)
