"""The peak of live bytes, counted storage by storage, on any device and without one.

The idea (a dispatch mode that watches storages through weak references) is that of
``torch.distributed._tools.mem_tracker.MemTracker``, which crashes on frozen parameters and so on every LoRA model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_memtune.core.logits import LazyLogits

from .ledger import Entry, Trackable, tensors_of

_DEVICE = torch.ops.prim.device.default
# torch.tensor(...) makes its storage below dispatch and hands it to this op: the input is new, not an old acquaintance.
_LIFT_FRESH = torch.ops.aten.lift_fresh.default
_SNAPSHOT_GROWTH = 1.01


class _Storage(weakref.ref):
    """A weak reference to a storage, with what the ledger knows of it. Its bytes never change: a resize makes a new one.

    category, where and phase are for `StepLedger`, and not set here.
    """

    __slots__ = ("key", "size_bytes", "baseline_bytes", "counted_bytes", "shape", "dtype", "op", "category", "where", "phase")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage made while the mode is on, from its creation to its death.

    >>> with LiveBytes() as live:
    ...     model(**batch).loss.backward()
    >>> live.peak_bytes

    Runs on real tensors and, entered inside ``FakeTensorMode`` (model and batch made inside it too), on fake ones: then
    an 8B model is traced without its memory. Backward, ``torch.utils.checkpoint`` and ``torch.no_grad`` are all seen.
    Views and in-place results count nothing new, and a storage counts until nothing, autograd included, holds it, also
    after the mode is left.

    Storages older than the mode (weights, inputs) are the baseline and count 0 until ``track`` adds them. The death of
    a baseline storage is not subtracted.

    A resized storage is recounted when an op next returns a tensor on it: at once for ``Tensor.resize_``, later for
    ``UntypedStorage.resize_``, which no dispatch mode sees. A baseline storage counts what it has grown since first
    seen.

    Not seen, because below dispatch:

    - temporaries and workspaces inside one kernel, composite C++ kernels and ``torch.compile``'d code included;
    - the allocator: its rounding (512 bytes a block on CUDA), its cache, its fragmentation. ``peak_bytes`` is what the
      tensors need, so a floor to ``torch.cuda.max_memory_allocated``;
    - wrapper subclasses (DTensor), whose inner storages are not looked at. Logits on demand are no exception for long: they count
      nothing until they are made, and then what is made.

    Args:
        snapshot: also keep what was alive at the peak, for ``peak_entries``. Retaken when the peak has grown by more
            than 1 %, so it may lack up to 1 % of ``peak_bytes``; taking it at every new peak would be quadratic.

    Attributes:
        current_bytes: bytes alive now.
        peak_bytes: the largest ``current_bytes`` since the start or the last ``reset_peak``.
    """

    supports_higher_order_operators = True

    def __init__(self, snapshot: bool = False) -> None:
        super().__init__()
        self.current_bytes = self.peak_bytes = 0
        self._snapshot = snapshot
        self._snapshot_bytes = 0
        self._at_peak: list[_Storage] = []
        self._known: dict[int, _Storage] = {}
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, storages that are made are left out, as if they were older than the mode: of memory that is counted apart."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def reset_peak(self) -> None:
        """Start the peak again from what is alive now."""
        self.peak_bytes = self._snapshot_bytes = 0
        self._at_peak = []
        self._raise_peak()

    def track(self, tree: Trackable) -> None:
        """Count existing storages as well: of tensors, of modules' parameters and buffers, and of their gradients.

        Raises:
            TypeError: ``tree`` holds something else.
        """
        for tensor in tensors_of(tree):
            self._count(tensor)
            if tensor.is_leaf and tensor.grad is not None:
                self._count(tensor.grad)

    @property
    def live_entries(self) -> list[Entry]:
        """The counted storages alive now, largest first; the bytes add up to ``current_bytes``."""
        return _entries(list(self._known.values()))

    @property
    def peak_entries(self) -> list[Entry]:
        """The counted storages alive at the peak, largest first.

        Raises:
            RuntimeError: made without ``snapshot=True``.
        """
        if not self._snapshot:
            raise RuntimeError("peak_entries were not kept: make the ledger with LiveBytes(snapshot=True)")
        return _entries(self._at_peak)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(kind, LazyLogits) for kind in types):
            return NotImplemented  # they answer first; what they make meanwhile comes here, and they hold no memory themselves
        if func is _DEVICE and (device := getattr(args[0], "fake_device", None)) is not None:
            return device  # of a fake tensor, for which torch asks more often than for all else together
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._is_paused:
            return out
        if isinstance(out, Tensor):
            self._see(out, func, args, kwargs)
        elif isinstance(out, (tuple, list)):
            for tensor in _tensors(out):
                self._see(tensor, func, args, kwargs)
        return out

    def _see(self, tensor: Tensor, func: Any, args: tuple, kwargs: dict) -> None:
        storage = tensor.untyped_storage()
        known = self._known.get(id(storage))
        if known is None:
            size_bytes = storage.nbytes()
            # Asked of the storages, for schemas do not always tell: aten._unsafe_view returns its input's unannounced.
            old = func is not _LIFT_FRESH and _is_on_any(storage, (args, kwargs.values()))
            self._enter_storage(storage, tensor, func, size_bytes if old else 0)
        elif known.size_bytes != storage.nbytes():
            self.current_bytes -= known.counted_bytes
            self._enter_storage(storage, tensor, func, known.baseline_bytes)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._known.get(id(storage))
        if known is None or known.baseline_bytes:
            self.current_bytes -= known.counted_bytes if known is not None else 0
            self._enter_storage(storage, tensor, None, 0)

    def _enter_storage(self, storage: torch.UntypedStorage, tensor: Tensor, op: Any, baseline_bytes: int) -> None:
        record = _Storage(storage, self._died)
        record.key, record.size_bytes, record.baseline_bytes = id(storage), storage.nbytes(), baseline_bytes
        record.counted_bytes = max(0, record.size_bytes - baseline_bytes)
        record.shape, record.dtype, record.op = tensor.shape, tensor.dtype, op
        self._known[record.key] = record
        self.current_bytes += record.counted_bytes
        if self.current_bytes > self.peak_bytes:
            self._raise_peak()

    def _died(self, record: _Storage) -> None:
        # A record replaced after a resize may still be held by the snapshot, and is then called back as well.
        if self._known.get(record.key) is record:
            del self._known[record.key]
            self.current_bytes -= record.counted_bytes

    def _raise_peak(self) -> None:
        self.peak_bytes = self.current_bytes
        if self._snapshot and self.peak_bytes > _SNAPSHOT_GROWTH * self._snapshot_bytes:
            self._snapshot_bytes = self.peak_bytes
            self._at_peak = list(self._known.values())


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples and lists. By hand, because pytree's flatten costs more than all the rest."""
    for item in tree:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (tuple, list)):
            yield from _tensors(item)


def _is_on_any(storage: torch.UntypedStorage, trees: tuple) -> bool:
    return any(tensor.untyped_storage() is storage for tree in trees for tensor in _tensors(tree))


def _entries(records: list[_Storage]) -> list[Entry]:
    counted = sorted((r for r in records if r.counted_bytes), key=lambda r: r.counted_bytes, reverse=True)
    return [Entry(r.counted_bytes, tuple(r.shape), r.dtype, str(r.op) if r.op is not None else None) for r in counted]
