"""A loss that is wanted without its logits: in evaluation they would be the largest tensor by far, and nobody looks at them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from hf_memtune.core.logits import HeadOnDemand, LazyLogits
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.methods.method import describe_as_it_runs
from hf_memtune.methods.overrides import forward_as


@contextmanager
def logits_on_demand(model: nn.Module) -> Iterator[None]:
    """Calls of `model` without gradient make logits only where something reads them; their cross entropy is taken without.

    model: a transformers model, or a PEFT model around one, whose weights are whole on one device. Without a plain linear head of its own
    it is left as it is.
    """
    try:
        head = describe_as_it_runs(model).output_head
    except UnsupportedModelError:
        head = None
    if head is None:
        yield
        return
    with forward_as(head, partial(on_demand, head)):
        yield


def on_demand(head: nn.Linear, hidden: Tensor) -> Tensor:
    """What the head gives for hidden states of tokens (B, T, D), made when it is read; for those of rows (B, D) it is made at once."""
    forward = partial(type(head).forward, head)
    return LazyLogits.of(hidden, HeadOnDemand(forward, lambda: head.weight, head.bias)) if hidden.dim() == 3 else forward(hidden)
