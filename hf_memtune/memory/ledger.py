"""What autograd keeps for backward, in bytes.

``SavedBytes`` counts what is saved; ``hf_memtune.memory.live.LiveBytes`` counts everything that is alive. The first
says which tensor to stop saving, the second what a step needs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_memtune.core.logits import LazyLogits


class Entry(NamedTuple):
    """One storage of a ledger, described by the tensor through which the ledger first saw it."""

    storage_bytes: int  # the whole storage, not the view
    shape: tuple[int, ...]
    dtype: torch.dtype
    op: str | None  # the op that made the tensor, where known


Trackable = Tensor | nn.Module | Iterable["Tensor | nn.Module"]


def tensors_of(tree: Trackable) -> Iterator[Tensor]:
    """The tensor itself; of a module its parameters and buffers; of an iterable those of its members.

    Raises:
        TypeError: a member is none of these.
    """
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, nn.Module):
        yield from tree.parameters()
        yield from tree.buffers()
    elif isinstance(tree, Iterable) and not isinstance(tree, (str, bytes)):
        for member in tree:
            yield from tensors_of(member)
    else:
        raise TypeError(f"expected a tensor, a module or an iterable of them, got {type(tree).__name__}")


class _Record(weakref.ref):
    """A weak reference to a storage: it knows how often the storage is saved now, without keeping it alive."""

    __slots__ = ("key", "storage_bytes", "holds")


class _Saved:
    """What autograd holds in place of a saved tensor; its death is the release of that tensor."""

    __slots__ = ("tensor", "version", "releases")

    def __init__(self, tensor: Tensor, releases: list[tuple[SavedBytes, _Record]]) -> None:
        # Without detach an op that saves its own output would hold itself: output -> grad_fn -> output, never freed.
        # The detached tensor shares the version counter.
        self.tensor = tensor.detach()
        self.version = tensor._version
        self.releases = releases

    def unpack(self) -> Tensor:
        # Autograd leaves this check out once hooks are installed, and gradients would be wrong without a word.
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of {self.tensor.dtype} {tuple(self.tensor.shape)} needed for backward was modified in place "
                f"after it was saved: got version {self.tensor._version}, expected version {self.version}"
            )
        return self.tensor

    def __del__(self) -> None:
        for ledger, record in self.releases:
            ledger._release(record)


class SavedBytes:
    """Counts the bytes autograd saves for backward while the context is open, each storage once.

    >>> with SavedBytes(exclude=model) as saved:
    ...     loss = model(**batch).loss
    >>> saved.total_bytes, saved.entries[:5]

    A saved tensor is charged with its whole storage (``untyped_storage().nbytes()``), not with the bytes of the view: a
    saved ``x[:1]`` keeps all of ``x``. Two saved views of one storage count once. Works on real and on fake tensors.

    Not counted:

    - logits on demand (`hf_memtune.core.logits`), which hold no memory until they are made;
    - storages of ``exclude``, taken when the context is entered (weights are saved too, but cost nothing more);
    - tensors kept as a ctx attribute, in a closure or on a module: they escape every saved-tensor hook. Pass them to
      ``save_for_backward``;
    - what other hooks take over, for in PyTorch only the innermost hooks run. ``torch.utils.checkpoint`` with
      ``use_reentrant=False`` installs such hooks: of a checkpointed function the positional tensor arguments are
      counted and nothing else, neither its keyword arguments and closure nor what backward recomputes. ``LiveBytes``
      sees all of that. Reentrant checkpointing saves the same arguments, and its recomputation is counted if backward
      runs inside the context.

    ``SavedBytes`` inside ``SavedBytes`` is counted by both. Entered inside a checkpointed function or ``save_on_cpu``,
    it suspends their hooks, as any hooks do.

    Args:
        exclude: a tensor, a module (its parameters and buffers) or an iterable of these.

    Attributes:
        total_bytes: bytes of all distinct storages saved so far; never falls.
        current_bytes: bytes of the storages saved now; falls when backward releases them, also after the context is
            left.
        peak_bytes: the largest ``current_bytes`` so far.
    """

    _open = threading.local()  # hooks are per thread too

    def __init__(self, exclude: Trackable = ()) -> None:
        self.total_bytes = self.current_bytes = self.peak_bytes = 0
        self._exclude = exclude if isinstance(exclude, (Tensor, nn.Module)) else tuple(exclude)
        self._excluded: dict[int, weakref.ref] = {}
        self._records: dict[int, _Record] = {}
        self._entries: list[Entry] = []
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None

    @property
    def entries(self) -> list[Entry]:
        """Every distinct storage saved so far, largest first; the bytes add up to ``total_bytes``."""
        return sorted(self._entries, key=lambda entry: entry.storage_bytes, reverse=True)

    def __enter__(self) -> SavedBytes:
        if self._hooks is not None:
            raise RuntimeError("this SavedBytes is open already: use a second one for nested counting")
        storages = [tensor.untyped_storage() for tensor in tensors_of(self._exclude)]
        # id() identifies a storage only while it lives, so each id comes with a weak reference that is asked.
        self._excluded = {id(storage): weakref.ref(storage) for storage in storages}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _Saved.unpack)
        self._hooks.__enter__()
        self._stack().append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack().remove(self)
        self._hooks.__exit__(*exc_info)
        self._hooks = None

    def _stack(self) -> list[SavedBytes]:
        return self._open.__dict__.setdefault("ledgers", [])

    def _pack(self, tensor: Tensor) -> _Saved:
        # Our hooks hide those of the ledgers around us, so they are told here.
        releases = [(ledger, record) for ledger in self._stack() if (record := ledger._hold(tensor)) is not None]
        return _Saved(tensor, releases)

    def _hold(self, tensor: Tensor) -> _Record | None:
        if isinstance(tensor, LazyLogits):
            return None
        storage = tensor.untyped_storage()
        excluded = self._excluded.get(id(storage))
        if excluded is not None and excluded() is storage:
            return None
        record = self._records.get(id(storage)) or self._enter_storage(storage, tensor)
        record.holds += 1
        if record.holds == 1:
            self.current_bytes += record.storage_bytes
            self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        return record

    def _enter_storage(self, storage: torch.UntypedStorage, tensor: Tensor) -> _Record:
        records = self._records  # not self: a storage outliving the ledger should not keep it
        record = _Record(storage, lambda dead: records.pop(dead.key, None))
        record.key, record.storage_bytes, record.holds = id(storage), storage.nbytes(), 0
        records[record.key] = record
        op = tensor.grad_fn.name() if tensor.grad_fn is not None else None
        self._entries.append(Entry(record.storage_bytes, tuple(tensor.shape), tensor.dtype, op))
        self.total_bytes += record.storage_bytes
        return record

    def _release(self, record: _Record) -> None:
        record.holds -= 1
        if record.holds == 0:
            self.current_bytes -= record.storage_bytes
