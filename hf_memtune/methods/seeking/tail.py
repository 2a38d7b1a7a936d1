"""Run only the last block of a model on inputs that a context pass has recorded.

The model's own loop runs, with every block before the last one handing its input on and the last one given the recorded
input: embeddings are computed for their shape alone, masks, rotary angles and the final norm by the model itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from hf_memtune.methods.layer_override import override_of
from hf_memtune.methods.overrides import forward_as, forwards_as


def _hand_on(hidden_states: Tensor, *args, **kwargs) -> Tensor:
    return hidden_states


def _starting_from(forward: Callable, hidden: Tensor) -> Callable:
    def run(hidden_states: Tensor, *args, **kwargs):
        return forward(hidden, *args, **kwargs)

    return run


@contextmanager
def only_last_block(layers: nn.ModuleList, hidden: Tensor) -> Iterator[None]:
    """While open, the stack `layers` computes its last block alone, on `hidden` (B, S, D)."""
    last = layers[-1]
    forward = last.forward if (override := override_of(last)) is None else override.alone
    with forwards_as((layer, _hand_on) for layer in layers[:-1]), forward_as(last, _starting_from(forward, hidden)):
        yield
