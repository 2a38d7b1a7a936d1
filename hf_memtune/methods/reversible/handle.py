"""Reversible layers in a pre-trained model: `make_reversible(model, config)` puts them in, `handle.restore()` takes them out.

Couplings: MEFT (arXiv 2306.00477), and the centred one, which keeps what the model computes: see core/coupling.py.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from hf_memtune.architectures.layouts import Layout
from hf_memtune.architectures.stacks import (
    LayerStack,
    layer_stacks,
    refuse_several_devices,
    refuse_what_does_not_run_twice,
    unwrapped,
)
from hf_memtune.core import coupling
from hf_memtune.errors import ConfigError, MemTuneError, UnsupportedModelError
from hf_memtune.methods.layer_override import override_of
from hf_memtune.methods.reversible.adapters import (
    ADAPTERS,
    Switch,
    freeze_but,
    head_parameters,
    places_of,
    put_adapters,
    refuse_adapters_without_a_wrapper,
    trained_parameters,
)
from hf_memtune.methods.reversible.layer import ReversibleInStack, ReversibleStack
from hf_memtune.methods.reversible.start import StartReport, look_at_start
from hf_memtune.settings.protocol import filled_in, no_effect
from hf_memtune.settings.reversible import ReversibleConfig

# SmolLM2-135M, whose states reach 22,700, loses as much by 12 bits as by 14, and keeps 4 of head-room
POST_NORM_FRACTION_BITS, PRE_NORM_FRACTION_BITS = 20, 12


def make_reversible(model: nn.Module, config: ReversibleConfig) -> "ReversibleHandle":
    """Couple the layers of `model`, a transformers model, possibly inside a PEFT model, into reversible ones, and add adapters.

    With adapters, everything else but the head is frozen. `restore()` of what is returned takes both out. Raises UnsupportedModelError or
    ConfigError before the model is touched. In float numerics a warning states the expected error of the inverse.
    """
    return ReversibleHandle(model, config)


class ReversibleHandle:
    """Reversible layers on one model, until `restore()`, whether this object is kept or not.

    model; config: the settings, filled; stacks: what was found to couple; switch: see `off`.
    """

    def __init__(self, model: nn.Module, config: ReversibleConfig):
        if config.reversible == "none":
            raise ConfigError(["reversible: got 'none', expected a coupling, such as centred."])
        self.model, self.config, self.switch = model, config.filled(), Switch()
        refuse_what_does_not_run_twice(model)
        refuse_several_devices(model)
        if self.config.adapter_rank:
            refuse_adapters_without_a_wrapper(model)
        self.stacks = layer_stacks(model)
        self._counts = [self._count(stack) for stack in self.stacks]
        self.shared = [self._shared(stack, count) for stack, count in zip(self.stacks, self._counts)]
        self._warn()
        self._changes: ExitStack | None = ExitStack()
        try:
            self._install(self._changes)
        except BaseException:
            self.restore()
            raise

    # -- what users do

    def restore(self) -> None:
        """Take every trace out of the model: parameters, names and flags are as before. May be called twice."""
        if self._changes is not None:
            self._changes.close()
            self._changes = None

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model as it was before, without coupling and adapters, for as long as the context is open."""
        with self.switch.off():
            yield

    def verify(self, batch: dict[str, Tensor]) -> StartReport:
        """What the coupling changes, and whether its inverse holds on this device, measured on one batch of the model's inputs."""
        self._require_installed()
        return look_at_start(self, batch)

    @property
    def headroom_bits(self) -> float | None:
        """Smallest number of bits that were left before overflow in any pass so far; None in float numerics."""
        found = [shared.headroom_bits for shared in self.shared if shared.headroom_bits is not None]
        return min(found, default=None)

    @property
    def adapters(self) -> dict[str, Tensor]:
        """The parameters of all adapters by their names in the transformers model, not copied."""
        self._require_installed()
        return {name: p.detach() for name, p in unwrapped(self.model).named_parameters() if ADAPTERS in name.split(".")}

    @property
    def trained(self) -> dict[str, Tensor]:
        """All that this strategy trains, by names in the transformers model, not copied: adapters, and the head where it is trained."""
        self._require_installed()
        trained = {id(p) for p in trained_parameters(self.model, self.stacks, self.config)}
        return {name: p.detach() for name, p in unwrapped(self.model).named_parameters() if id(p) in trained}

    def load(self, state: dict[str, Tensor]) -> None:
        """Put in what `trained` gave. Raises MemTuneError, and changes nothing, where names or shapes do not match."""
        own = self.trained
        shapes, given = ({name: tuple(value.shape) for name, value in each.items()} for each in (own, state))
        if wrong := sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name)):
            raise MemTuneError(
                f"{len(wrong)} of {len(shapes)} trained tensors do not match, first {wrong[0]}: got {given.get(wrong[0])}, expected "
                f"{shapes.get(wrong[0])}. Make the model reversible with the settings they were trained with."
            )
        for name, value in own.items():
            value.copy_(state[name])

    # -- putting in

    def _count(self, stack: LayerStack) -> int:
        count = self.config.reversible_layers or len(stack.layers)
        if count > len(stack.layers):
            raise UnsupportedModelError(
                f"{stack.name}: got reversible_layers={count}, expected 2 to {len(stack.layers)}, the number of its layers."
            )
        return count

    def _shared(self, stack: LayerStack, count: int) -> ReversibleStack:
        names = [f"{stack.name}.{number}" for number in range(count)]
        bits = self.config.reversible_fraction_bits
        if bits is None:
            bits = POST_NORM_FRACTION_BITS if stack.is_post_norm else PRE_NORM_FRACTION_BITS
        bits = None if self.config.reversible_numerics == "float" else bits
        return ReversibleStack(names, self._coupling(stack), self._weights(stack), bits, self.switch, self._layout(stack))

    def _coupling(self, stack: LayerStack) -> coupling.Coupling:
        scale = filled_in(self.config.reversible_scale)
        if self.config.reversible == "centred":
            return coupling.centred(scale, stack.is_post_norm)
        made = {"meft1": coupling.meft1, "meft2": coupling.meft2, "meft3": coupling.meft3}[self.config.reversible]
        return made(scale, filled_in(self.config.reversible_beta))

    def _weights(self, stack: LayerStack) -> tuple[float, float]:
        paper = "newest" if self.config.reversible == "centred" else "mean" if stack.is_post_norm else "sum"
        factor = self.config.reversible_scale
        if self.config.reversible == "meft2":  # whose small factor is the other one
            factor = self.config.reversible_beta
        return {"newest": (1.0, 0.0), "mean": (0.5, 0.5), "sum": (1.0, filled_in(factor))}[self.config.reversible_output or paper]

    def _layout(self, stack: LayerStack) -> Layout | None:
        if self.config.reversible == "meft3":
            return stack.halves()
        return stack.layout("an adapter") if self.config.adapter_rank else None

    def _warn(self) -> None:
        """Of a head that is to be trained and will not be; and in float numerics, of what the inverse will be off by."""
        if self.config.train_head and self.config.adapter_rank and not head_parameters(unwrapped(self.model)):
            reason = f"with {type(unwrapped(self.model)).__name__}, whose head has no weights of its own: they are those of the embeddings, which are frozen"
            warnings.warn(no_effect("train_head", reason), stacklevel=4)
        self._warn_of_float()

    def _warn_of_float(self) -> None:
        """From depth, factors and mantissa."""
        if self.config.reversible_numerics != "float":
            return
        divisor, depth = filled_in(self.config.reversible_scale) * (self.config.reversible_beta or 1.0), max(self._counts)
        seen = unwrapped(self.model).dtype
        held = torch.float64 if seen == torch.float64 else torch.float32
        error, flipped = (coupling.expected_error(depth, divisor, dtype=dtype) for dtype in (held, seen))
        worse = f"; up to {flipped:.0e} where a rounding to the {_bits(seen)} of {_name(seen)} flips" if seen != held else ""
        warnings.warn(
            f"reversible_numerics=float: the inverse of a layer divides rounding errors by {divisor:g}, so after {depth} layers the "
            f"activations that gradients are computed from are off by about {error:.0e} of their size ({_name(held)} streams, "
            f"{_bits(held)}{worse}). Use reversible_numerics=exact, or fewer reversible_layers.",
            stacklevel=5,
        )

    def _install(self, changes: ExitStack) -> None:
        for stack in self.stacks:
            if any(override_of(layer) for layer in stack.layers):
                raise UnsupportedModelError(
                    f"{stack.name}: its layers are reversible already, or checkpointed on two levels. Call restore() of that handle."
                )
        # callbacks and no context managers, which would end, and take the layers out, when the handle is dropped
        for stack, shared in zip(self.stacks, self.shared):
            for number, layer in enumerate(stack.layers if self.config.adapter_rank else ()):
                places = places_of(self.config.reversible, number < len(shared.names))
                put_adapters(layer, filled_in(shared.layout), self.config, places, self.switch, changes)
            for position in range(len(shared.names)):
                layer = stack.layers[position]
                changes.callback(ReversibleInStack(layer, position, shared).put_on())
        if self.config.adapter_rank:
            freeze_but(self.model, trained_parameters(self.model, self.stacks, self.config), changes)

    def _require_installed(self) -> None:
        if self._changes is None:
            raise MemTuneError("the reversible layers were taken out of this model: call make_reversible again.")


def _bits(dtype: torch.dtype) -> str:
    """Of the mantissa, the leading one included."""
    return f"{1 - int(math.log2(torch.finfo(dtype).eps))} bits"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
