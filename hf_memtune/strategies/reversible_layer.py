"""One layer of a model in its reversible form: an override of its forward, around which transformers' own loop runs as it is.

Between layers travels a plain tuple (newest, older, tape) in the place of the hidden states: a class of its own would be taken apart by
wrappers that look for tensors in arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hf_memtune.architectures.layouts import Layout
from hf_memtune.core.coupling import Coupling, FloatArithmetic
from hf_memtune.core.fixed_point import FixedPointArithmetic
from hf_memtune.core.recompute import Arguments, Parameters
from hf_memtune.core.reversible import EnterStreams, LayerRun, LeaveStreams, Tape, blended_output, run_layer
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.strategies.adapters import ADAPTERS, Switch
from hf_memtune.strategies.overrides import forwards_as, not_checkpointing


@dataclass
class ReversibleStack:
    """What the reversible layers of one stack share.

    names: of these layers. weights: of the newest and the older stream in what the stack hands on. fraction_bits: None for float.
    compared: (tape, input) of the passes whose inverse is being looked at; None: of none. headroom_bits: the fewest so far.
    """

    names: Sequence[str]
    coupling: Coupling
    weights: tuple[float, float]
    fraction_bits: int | None
    switch: Switch
    layout: Layout | None = None
    compared: list[tuple[Tape, Tensor]] | None = field(default=None, repr=False)
    headroom_bits: float | None = None

    def start(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tape]:
        """The pair of streams, both of them the input of the first layer."""
        is_float = self.fraction_bits is None
        arithmetic = FloatArithmetic(hidden.dtype) if is_float else FixedPointArithmetic(hidden.dtype, self.fraction_bits)
        tape = Tape(arithmetic, compares=self.compared is not None)
        if self.compared is not None:
            hidden = hidden.detach().requires_grad_()
            self.compared.append((tape, hidden))
        if torch.is_grad_enabled():
            return *EnterStreams.apply(hidden, tape), tape
        tape.enter(hidden)
        return *tape.values(), tape

    def finish(self, newest: Tensor, older: Tensor, tape: Tape) -> Tensor:
        """What the layers after the stack get."""
        headroom = tape.arithmetic.check(len(self.coupling.halves), self.names)
        if headroom is not None:
            self.headroom_bits = headroom if self.headroom_bits is None else min(headroom, self.headroom_bits)
        if torch.is_grad_enabled():
            return LeaveStreams.apply(newest, older, tape, self.weights)
        return blended_output((newest, older), self.weights)


class ReversibleInStack:
    """Runs in place of the forward of one layer. `earlier`: an override of that forward which was there before, or None."""

    def __init__(self, layer: nn.Module, position: int, stack: ReversibleStack):
        self.layer, self.position, self.stack = layer, position, stack
        self.earlier = vars(layer).get("forward")

    def forward(self, *args, **kwargs):
        """As the layer's own, but hidden states and the first output may be the pair and its tape."""
        if not self.stack.switch.is_on:
            return self._original(*args, **kwargs)
        args, kwargs = (tuple(args), dict(kwargs)) if args else ((kwargs.pop("hidden_states"),), dict(kwargs))
        newest, older, tape = self._received(args[0])
        args, kwargs = self._arguments(args[1:], kwargs)
        functions = {"layer": self._whole, "adapter": self._adapter, "attention": self._attention, "mlp": self._mlp}
        run = LayerRun(
            self.stack.coupling, functions, tape, self.position, Arguments(args, kwargs), Parameters([self.layer]), newest.device
        )
        newest, older, extras = run_layer(run, newest, older)
        is_last = self.position + 1 == len(self.stack.names)
        hidden = self.stack.finish(newest, older, tape) if is_last else (newest, older, tape)
        return hidden if extras is None else (hidden, *extras)

    def _received(self, hidden: Any) -> tuple[Tensor, Tensor, Tape]:
        if self.position == 0 and isinstance(hidden, Tensor):
            return self.stack.start(hidden)
        if self.position and isinstance(hidden, tuple) and isinstance(hidden[-1], Tape) and hidden[-1].position == self.position:
            return hidden
        raise UnsupportedModelError(
            f"{self.stack.names[self.position]} was not given what the layer before it returned, as it is: between the layers of this "
            "model something happens to the hidden states. Train it with activation checkpointing instead."
        )

    def _arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Where backward may run the layer again: without caches, which it would write to again, found by type."""
        if not torch.is_grad_enabled():
            return args, kwargs
        if kwargs.get("output_attentions"):
            raise UnsupportedModelError(
                f"{self.stack.names[self.position]}: got output_attentions=True, expected False: attention weights would come from inside "
                "reversible layers, without a gradient."
            )
        kwargs = {name: self._no_cache(value) for name, value in kwargs.items()}
        return tuple(map(self._no_cache, args)), kwargs | ({"use_cache": False} if "use_cache" in kwargs else {})

    def _no_cache(self, value: Any) -> Any:
        if not isinstance(value, Cache):
            return value
        if value.get_seq_length():
            raise UnsupportedModelError(
                f"{self.stack.names[self.position]}: got a cache with {value.get_seq_length()} tokens in training, expected none (prefix "
                "tuning makes one). Use adapters or LoRA inside the layers."
            )
        return None

    # -- the functions of the coupling

    def _original(self, *args, **kwargs):
        return self.earlier(*args, **kwargs) if self.earlier is not None else type(self.layer).forward(self.layer, *args, **kwargs)

    def _whole(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, tuple | None]:
        if getattr(self.layer, "gradient_checkpointing", False):
            with not_checkpointing(self.layer):
                return self._parted(self._original(x, *args, **kwargs))
        return self._parted(self._original(x, *args, **kwargs))

    def _parted(self, output: Tensor | tuple) -> tuple[Tensor, tuple | None]:
        return (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, None)

    def _adapter(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        return getattr(self.layer, ADAPTERS)["coupling"](x), None

    def _attention(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, tuple | None]:
        """The layer up to its MLP, which does nothing."""
        quiet = self.stack.layout.quieted(self.layer, self.stack.layout.without_mlp)
        with self.stack.switch.only("attention"), forwards_as(quiet):
            return self._whole(x, *args, **kwargs)

    def _mlp(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        """The layer from its MLP on: attention does nothing. What it returns beside is that of the other half."""
        quiet = self.stack.layout.quieted(self.layer, self.stack.layout.without_attention)
        with self.stack.switch.only("mlp"), forwards_as(quiet):
            return self._whole(x, *args, **kwargs)[0], None
