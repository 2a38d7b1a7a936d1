"""The linear head in one call of a model, from the body's output to the loss."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_memtune.core.head_call import HeadOnDemand
from hf_memtune.core.logits import LazyLogits
from hf_memtune.core.places import Place, in_place


class Head:
    """One call of the model: its inputs, and what the body leaves for the head.

    inputs: keyword arguments of the call. matrix: what the head is to use in place of its weight, once, where the body's backward waits for
    the gradient of a matrix that both share.
    """

    def __init__(self, linear: nn.Linear | None, inputs: dict[str, Any]):
        self.linear, self.inputs = linear, inputs
        self.matrix: Tensor | None = None

    def logits(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Logits of hidden states (B, T, D), made when they are needed. forward: the head's own."""
        return LazyLogits.of(hidden, self.of(forward))

    def of(self, forward: Callable[[Tensor], Tensor]) -> HeadOnDemand:
        """What makes the logits, and takes their loss. forward: the head's own."""
        return HeadOnDemand(self.bound(forward), self.weight, self.there.bias)

    def bound(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The head's own forward, on the tensors that the head has now, whenever it runs."""
        entries = self.there._parameters
        return partial(_on, [(entries, name, tensor) for name, tensor in entries.items() if tensor is not None], forward)

    def weight(self) -> Tensor:
        """(V, D). The second to ask is given the parameter itself: a gradient that two add to cannot be written into."""
        matrix, self.matrix = self.matrix, None
        return self.there.weight if matrix is None else matrix

    @property
    def there(self) -> nn.Linear:
        """The linear head, of a model that has a plain one."""
        assert self.linear is not None, "a model without a plain linear head makes its own logits"
        return self.linear


def _on(places: Sequence[Place], forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    with in_place(places):
        return forward(hidden)
