"""The account of one training step: every storage, from its first byte to its last, in a phase and a category.

What a storage is, is often known only after it was made (a gradient is a gradient when backward is over), so births and deaths are written
into a log, and the account is read from it when the step is over: see `account_of`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_memtune.methods.events import Listener
from hf_memtune.methods.method import Method

from .account import MemoryAccount
from .flops import flops_of
from .ledger import Trackable, tensors_of
from .live import LiveBytes
from .log import Log, account_of
from .residents import Resident, gradients, optimizer_state, residents, vocabulary_of

# What a storage is when it could be several of these; see CATEGORIES.
_RANK = {
    name: rank
    for rank, name in enumerate(
        ["temporaries", "saved_activations", "logits", "stored_kv", "batch", "gradients", "optimizer_state", "weights"]
    )
}


class StepLedger(LiveBytes):
    """Live bytes of a training step of `model`, by phase and category. Real and fake tensors, any device.

    >>> with StepLedger(model, optimizer=optimizer, batch=inputs) as ledger:
    ...     model(**inputs).loss.backward()
    ...     optimizer.step()
    >>> ledger.account().peak_bytes

    Weights, gradients, optimizer state and batch are counted from the beginning, whatever is made meanwhile from its birth. The phases
    are told by hooks on the model and the optimizer, which go when the ledger closes; `phase` sets one by hand.

    Args:
        model: what is called in the forward pass, with all its wrappers.
        optimizer: a torch optimizer (of accelerate's wrapper, the one inside), or None: then there is no optimizer phase.
        batch: the tensors of all micro-batches.
        vocab_size: values of a token's logits; None: that of the model's config, if it has one.
        names: whether storages are named by the module that makes them, which takes two hooks a module.

    Attributes:
        log: what happened, for `account` and for `memory.depth`.
        flops: floating point operations of matrix products, attention and convolutions so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        batch: Trackable = (),
        vocab_size: int | None = None,
        names: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.optimizer, self.batch, self.names = model, optimizer, batch, names
        self._vocab_size = vocab_size or vocabulary_of(model)
        self.log, self.flops = Log(), 0
        self._phase: str | None = None  # None: before the step, when what is there already is counted
        self._by_hand = False
        self._stored: list[weakref.WeakMethod] = []
        self._where: list[str] = []
        self._undo = ExitStack()

    # -- opened around a step

    def __enter__(self) -> StepLedger:
        self._count_residents()
        self._phase = "forward"
        self.log.turn("forward")
        handle = self.model.register_forward_pre_hook(lambda *_: self._turn_to("forward"))
        self._undo.callback(handle.remove)
        if self.optimizer is not None:
            self._undo.callback(self.optimizer.register_step_pre_hook(lambda *_: self._before_optimizer()).remove)
            self._undo.callback(self.optimizer.register_step_post_hook(lambda *_: self._after_optimizer()).remove)
        if self.names:
            self._name_modules()
        return super().__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self._undo.close()
        self._mark_all(residents(self.model, self.optimizer, self.batch))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """While open, everything that is made is of this phase."""
        before, by_hand = self._phase, self._by_hand
        self._turn_to(name)
        self._by_hand = True
        try:
            yield
        finally:
            self._by_hand = by_hand
            self._turn_to(before)

    def watch(self, method: Method) -> None:
        """Be told of the context passes of a method, and of the keys and values it stores. Forgotten when the ledger closes."""
        self._undo.callback(method.listeners.add(_Passes(self)))

    def context_begins(self, stored: Callable[[], Iterable[Tensor]]) -> None:
        """What is made from here on is of the context pass; `stored`, a method of a call, gives what it leaves behind."""
        self._stored.append(weakref.WeakMethod(stored))  # or a call would live as long as the ledger, and what it stored
        self._turn_to("context_pass")

    def context_ends(self) -> None:
        """What is made from here on is of the forward pass again."""
        self._turn_to("forward")

    def chunk_ends(self) -> None:
        """Sums of gradients may be among what is stored now, which are gone when backward is over."""
        self._mark_stored()

    def stretch_at(self, module: nn.Module) -> None:
        """Begin a new stretch of the log whenever `module`, the first layer of a stack, is entered: see `memory.depth`."""
        handle = module.register_forward_pre_hook(lambda *_: self.log.turn(self._phase))
        self._undo.callback(handle.remove)

    def account(self, tensors: int = 20, points: int = 400) -> MemoryAccount:
        """The account of what happened while the ledger was open. tensors, points: how many of each are kept at most."""
        found = account_of(self.log, tensors, points)
        assert self.log.is_whole(self.current_bytes), "the log and the count of live bytes differ"
        return found

    # -- phases

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if torch._C._current_graph_task_id() != -1 and self._phase != "backward":
            self._turn_to("backward")
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is not NotImplemented:
            self.flops += flops_of(func, args, kwargs or {}, out)
        return out

    def _turn_to(self, phase: str) -> None:
        if self._by_hand or phase == self._phase:
            return
        if phase == "backward":
            self.log.promote_living(_of_forward, "saved_activations")
        self._mark_stored()
        self._phase = phase
        self.log.turn(phase)

    def _before_optimizer(self) -> None:
        self._mark_all(gradients(self.model))
        self._turn_to("optimizer")

    def _after_optimizer(self) -> None:
        self._mark_all(optimizer_state(self.model, self.optimizer))
        self._turn_to("backward")  # what comes after it, to the end of the step: nothing is made there

    # -- categories

    def mark(self, category: str, tree: Trackable, name: str | None = None) -> None:
        """Say what existing storages are; one that is something of a higher rank already stays that.

        Raises:
            TypeError: ``tree`` holds something that is no tensor, module or iterable of them.
        """
        for tensor in tensors_of(tree):
            record = self._known.get(id(tensor.untyped_storage()))
            if record is not None and _RANK[category] > _RANK[record.category]:
                record.category, record.where = category, name or record.where

    def _count_residents(self) -> None:
        for _, _, tensor in residents(self.model, self.optimizer, self.batch):
            self._count(tensor)
        self._mark_all(residents(self.model, self.optimizer, self.batch))

    def _mark_all(self, found: Iterable[Resident]) -> None:
        for category, name, tensor in found:
            self.mark(category, tensor, name)

    def _mark_stored(self) -> None:
        self._stored = [stored for stored in self._stored if stored() is not None]
        for stored in self._stored:
            self.mark("stored_kv", stored()())

    # -- the log

    def _enter_storage(self, storage: torch.UntypedStorage, tensor: Tensor, op: Any, baseline_bytes: int) -> None:
        if (before := self._known.get(id(storage))) is not None:
            self.log.death(before)  # a resize: its bytes were taken off the count already
        super()._enter_storage(storage, tensor, op, baseline_bytes)
        record = self._known[id(storage)]
        record.category, record.where, record.phase = "temporaries", self._where[-1] if self._where else None, self._phase
        if before is not None:
            record.category, record.where, record.phase = before.category, before.where, before.phase
        elif self._vocab_size is not None and tensor.is_floating_point() and tensor.shape[-1:] == (self._vocab_size,):
            record.category = "logits"
        self.log.birth(record)

    def _died(self, record: Any) -> None:
        if self._known.get(record.key) is record:
            self.log.death(record)
        super()._died(record)

    # -- names

    def _name_modules(self) -> None:
        for name, module in self.model.named_modules():
            enter, leave = partial(self._entered, name or type(module).__name__), self._left
            self._undo.callback(module.register_forward_pre_hook(enter).remove)
            self._undo.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _entered(self, name: str, *_: Any) -> None:
        self._where.append(name)

    def _left(self, *_: Any) -> None:
        if self._where:
            self._where.pop()


class _Passes(Listener):
    """Tells a ledger what a method tells."""

    def __init__(self, ledger: StepLedger):
        self.context_begins, self.context_ends, self.chunk_ends = ledger.context_begins, ledger.context_ends, ledger.chunk_ends


def _of_forward(record: Any) -> bool:
    """Outputs of all tokens, which a context pass leaves, too."""
    return record.category == "temporaries" and record.phase in ("forward", "context_pass")
