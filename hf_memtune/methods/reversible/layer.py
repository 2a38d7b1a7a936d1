"""One layer of a model in its reversible form: an override of its forward, around which transformers' own loop runs as it is.

Between layers travels a plain tuple (newest, older, tape) in the place of the hidden states: a class of its own would be taken apart by
wrappers that look for tensors in arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_memtune._compat import is_fake
from hf_memtune.architectures.layouts import Layout
from hf_memtune.core.coupling import Coupling, FloatArithmetic
from hf_memtune.core.fixed_point import FixedPointArithmetic
from hf_memtune.core.recompute import Arguments, Parameters
from hf_memtune.core.reversible import EnterStreams, Functions, LayerRun, LeaveStreams, Tape, blended_output, run_layer
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.methods.layer_override import LayerOverride
from hf_memtune.methods.overrides import evaluating, forwards_as
from hf_memtune.methods.reversible.adapters import Switch, adapters_of

HALVES_ALLOWED = 0.05  # of what a layer adds: rounding; both halves do what the layer does, in its order


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
        bits, dtype = self.fraction_bits, hidden.dtype
        tape = Tape(FloatArithmetic(dtype) if bits is None else FixedPointArithmetic(dtype, bits), compares=self.compared is not None)
        if self.compared is not None:
            hidden = hidden.detach().requires_grad_()
            self.compared.append((tape, hidden))
        if torch.is_grad_enabled():
            return *tape.give(*EnterStreams.apply(hidden, tape)), tape
        tape.enter(hidden)
        return *tape.give(*tape.values()), tape

    def finish(self, newest: Tensor, older: Tensor, tape: Tape) -> Tensor:
        """What the layers after the stack get."""
        headroom = tape.arithmetic.check(len(self.coupling.halves), self.names)
        if headroom is not None:
            self.headroom_bits = headroom if self.headroom_bits is None else min(headroom, self.headroom_bits)
        if torch.is_grad_enabled():
            return LeaveStreams.apply(newest, older, tape, self.weights)
        return blended_output((newest, older), self.weights)


class ReversibleInStack(LayerOverride):
    """Runs in place of the forward of one reversible layer."""

    def __init__(self, layer: nn.Module, position: int, stack: ReversibleStack):
        super().__init__(layer, stack.names[position])
        self.position, self.stack = position, stack
        self._is_in_halves = False  # not looked at yet

    def forward(self, *args, **kwargs):
        """As the layer's own, but hidden states and the first output may be the pair and its tape."""
        if not (self.is_on and self.stack.switch.is_on):
            return self._original(*args, **kwargs)
        hidden, args, kwargs = self._taken_apart(args, kwargs)
        newest, older, tape = self._received(hidden)
        functions = {name: self._bound(self._alike(function)) for name, function in self.functions.items()}
        run = LayerRun(
            self.stack.coupling, functions, tape, self.position, Arguments(args, kwargs), Parameters([self.layer]), newest.device, self.name
        )
        newest, older, extras = run_layer(run, newest, older)
        is_last = self.position + 1 == len(self.stack.names)
        hidden = self.stack.finish(newest, older, tape) if is_last else (newest, older, tape)
        return hidden if extras is None else (hidden, *extras)

    def _received(self, hidden: Any) -> tuple[Tensor, Tensor, Tape]:
        if self.position == 0 and isinstance(hidden, Tensor):
            return self.stack.start(hidden)
        if self.position and isinstance(hidden, tuple) and isinstance(hidden[-1], Tape) and hidden[-1].position == self.position:
            if hidden[-1].gave(hidden[:-1]) and not (torch.is_grad_enabled() and self.layer._backward_hooks):
                return hidden
        raise UnsupportedModelError(
            f"{self.name} was not given what the layer before it returned, as it is, or has a full backward hook, which sees no hidden states "
            "here: something is done to the hidden states between layers that are reversible. Put hooks that do it on modules inside of the "
            "layers, or train with two-level checkpointing instead (--checkpoint_levels 2)."
        )

    # -- the functions of the coupling

    @property
    def functions(self) -> Functions:
        """Every function that a coupling may name."""
        return {"layer": self._whole, "adapter": self._adapter, "attention": self._attention, "mlp": self._mlp}

    @property
    def _layout(self) -> Layout:
        """Of the layers, where the coupling takes them apart."""
        assert self.stack.layout is not None
        return self.stack.layout

    def _adapter(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        return adapters_of(self.layer)["coupling"](x), None

    def _attention(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, tuple | None]:
        """The layer up to its MLP, which does nothing."""
        # without gradient nothing is learned, and there may be a cache, to be written to once
        if torch.is_grad_enabled() and not (self._is_in_halves or is_fake(x)):
            self._require_halves(x, args, kwargs)
            self._is_in_halves = True
        return self._first_half(x, *args, **kwargs)

    def _first_half(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, tuple | None]:
        quiet = self._layout.quieted(self.layer, self._layout.without_mlp)
        with self.stack.switch.only("attention"), forwards_as(quiet):
            return self._whole(x, *args, **kwargs)

    def _mlp(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        """The layer from its MLP on: attention does nothing. What it returns beside is that of the other half."""
        quiet = self._layout.quieted(self.layer, self._layout.without_attention)
        with self.stack.switch.only("mlp"), forwards_as(quiet):
            return self._whole(x, *args, **kwargs)[0], None

    @torch.no_grad()
    def _require_halves(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise UnsupportedModelError where the MLP after the attention is not the layer: it has modules that its layout does not know of."""
        with evaluating(self.layer), self.stack.switch.only("attention", "mlp"):
            expected = self._whole(x, *args, **kwargs)[0]
            try:
                found = self._mlp(self._first_half(x, *args, **kwargs)[0], *args, **kwargs)[0]
            except (TypeError, AttributeError, ValueError, IndexError) as error:
                problem = f"fails: {error}"
            else:
                off, change = ((a - b).double().norm().item() for a, b in ((found, expected), (expected, x)))
                problem = f"is off by {off / change:.0%} of what the layer adds" if off > HALVES_ALLOWED * change else ""
        if problem:
            raise UnsupportedModelError(
                f"{self.name}: {type(self.layer).__name__} is not its attention and then its MLP, as reversible=meft3 takes it apart: that "
                f"{problem}. Use centred, meft1 or meft2."
            )
