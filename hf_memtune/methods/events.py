"""What a method tells of a call of the model, to whoever listens: ledgers, logs, checks. Listeners replace nothing of it."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

Stored = Callable[[], Iterable[Tensor]]


class Listener:
    """Hears what happens on a model; what it does not override, it does not hear."""

    def context_begins(self, stored: Stored) -> None:
        """The pass over all tokens without gradient begins. stored: gives the keys and values, and sums of their gradients, on the device."""

    def context_ends(self) -> None:
        """What comes now is the model's forward pass again."""

    def chunk_ends(self) -> None:
        """A chunk of a stream has gone backward: what is owed to earlier ones is now among what is stored."""

    def counted(self, **counts: Tensor | int) -> None:
        """Tokens of a call, as they become known, and only once: seen, kept, learned (kept ones with a label), recomputed (in a stream)."""

    def shaped(self, chunks: int, rows: Any) -> None:
        """Of a call: chunks that go backward apart, and the rows (`attention.spans.Rows`) of its outputs."""

    def chosen(self, selection: Any) -> None:
        """The tokens of a call that are kept, a Selection by stack."""

    def loss_of_kept(self) -> None:
        """The loss of a call is the mean over its kept tokens: neither that of all tokens, nor an estimate of it."""


class Listeners:
    """Those who listen to one method."""

    def __init__(self):
        self._all: list[Listener] = []

    def add(self, listener: Listener) -> Callable[[], None]:
        """Returns what takes the listener away again."""
        self._all.append(listener)
        return lambda: self._all.remove(listener) if listener in self._all else None

    def tell(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Call the method `event` of every listener."""
        for listener in self._all:
            getattr(listener, event)(*args, **kwargs)
