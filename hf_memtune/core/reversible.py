"""Backward through a stack of reversible layers, which keeps the last pair of streams alone and rebuilds the others.

A forward pass makes one `Tape`. Between layers travel the values of the streams, to carry gradients, and the tape, which holds the
streams themselves; `EnterStreams` makes them, `LeaveStreams` saves the last pair, and in backward each layer takes the pair one layer back.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_memtune.core.coupling import Coupling, FloatArithmetic, HalfStep
from hf_memtune.core.first_run import FirstRun
from hf_memtune.core.fixed_point import FixedPointArithmetic
from hf_memtune.core.recompute import Arguments, Outputs, Parameters, Surroundings, leaves_like, made_by, views_of
from hf_memtune.errors import InverseError

Functions = dict[str, Callable[..., tuple[Tensor, tuple | None]]]
"""The functions a coupling names. Each maps (x, *args, **kwargs) to its value, like x in shape, and the tuple of what the layer returns
beside it, or None where that is nothing."""


@dataclass
class Tape:
    """The streams of one forward pass at its present place, and then of its backward pass at its.

    position: the number of layers that the streams have gone through. entered: the streams at the start, kept where `compares`.
    given: the values that go to the next layer, known but not held, and the versions they had.
    """

    arithmetic: FloatArithmetic | FixedPointArithmetic
    streams: tuple[Tensor, Tensor] | None = None
    position: int = 0
    compares: bool = False
    entered: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    given: list[tuple[ref, int]] = field(default_factory=list, repr=False)

    def give(self, newest: Tensor, older: Tensor) -> tuple[Tensor, Tensor]:
        """The values of the streams, as the layer after the present place must be given them."""
        self.given = [(ref(value), _version(value)) for value in (newest, older)]
        return newest, older

    def gave(self, values: Sequence[Tensor]) -> bool:
        """Whether these are the values that were given last, as they are: whatever else was done to them, the streams know nothing of."""
        if [_version(value) for value in values] != [version for _, version in self.given]:
            return False
        if all(known() is value for (known, _), value in zip(self.given, values)):
            return True
        makers = [made_by(value) for value in values]  # of what FSDP2 has put its own node behind
        return [(getattr(node, "place", None), number) for node, number in makers] == [(self.place, 0), (self.place, 1)]

    @property
    def place(self) -> tuple[int, int]:
        """Of which pass, and where in it."""
        return id(self), self.position

    def enter(self, hidden: Tensor) -> None:
        """Both streams start as the input of the first layer."""
        stream = self.arithmetic.enter(hidden)
        self.streams = (stream, stream)
        self.entered = self.streams if self.compares else None

    @property
    def present(self) -> tuple[Tensor, Tensor]:
        """The streams, from `enter` until the backward pass of the first layer."""
        assert self.streams is not None
        return self.streams

    def values(self) -> tuple[Tensor, Tensor]:
        """The streams in the dtype of the hidden states, as tensors of their own."""
        newest, older = (self.arithmetic.value(stream) for stream in self.present)
        return newest.detach(), older.detach()

    def start_error(self) -> float:
        """Largest difference between the rebuilt input and the true one, relative to the latter's size: 0 is exact, inf not a number."""
        assert self.entered is not None
        pairs = [(found.double(), true.double()) for found, true in zip(self.present, self.entered)]
        errors = [((found - true).norm() / true.norm().clamp_min(1e-30)).item() for found, true in pairs]
        return max(math.inf if math.isnan(error) else error for error in errors)


class EnterStreams(torch.autograd.Function):
    """h -> (h, h), as the arithmetic holds it, for the layers are to see what can be rebuilt. dL/dh is the sum over both.

    In fixed point the gradient goes straight through the rounding.
    """

    @staticmethod
    def forward(ctx, hidden, tape):
        ctx.set_materialize_grads(False)
        tape.enter(hidden.detach())
        ctx.place = tape.place
        return tape.values()

    @staticmethod
    @once_differentiable
    def backward(ctx, newest, older):
        return _added(newest, older), None


class LeaveStreams(torch.autograd.Function):
    """(newest, older) -> w_newest newest + w_older older. Saves the pair, from which backward starts."""

    @staticmethod
    def forward(ctx, newest, older, tape, weights):
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.weights, ctx.position = tape, weights, tape.position
        ctx.save_for_backward(*tape.streams)
        output = blended_output(tape.values(), weights)
        tape.streams = None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        if gradient is None:
            return None, None, None, None
        ctx.tape.streams, ctx.tape.position = ctx.saved_tensors, ctx.position
        return *(gradient if weight == 1 else gradient * weight for weight in ctx.weights), None, None


def blended_output(values: tuple[Tensor, Tensor], weights: tuple[float, float]) -> Tensor:
    """w_newest newest + w_older older."""
    terms = [value if weight == 1 else value * weight for value, weight in zip(values, weights) if weight]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


@dataclass
class LayerRun:
    """One call of one layer, and all that backward needs to run it again but tensors.

    name: of the layer. extras: of the run, what the layer returned beside its hidden states.
    """

    coupling: Coupling
    functions: Functions
    tape: Tape
    position: int
    arguments: Arguments
    parameters: Parameters
    device: torch.device
    name: str = "a layer"
    surroundings: list[Surroundings] = field(default_factory=list)
    first_runs: list[FirstRun] = field(default_factory=list)
    extras: Outputs | None = None
    extras_half: int | None = None

    def forward(self, tensors: Sequence[Tensor], newest: Tensor) -> list[Tensor | None]:
        """The half steps, on the tape's streams. newest: what stands for them in the graph. Returns what each has lost."""
        lost = [self._advance(number, half, tensors, newest) for number, half in enumerate(self.coupling.halves)]
        self.tape.streams = self.coupling.settled(self.tape.present)
        self.tape.position = self.position + 1
        return lost

    def _advance(self, number: int, half: HalfStep, tensors: Sequence[Tensor], newest: Tensor) -> Tensor | None:
        """One half step. Returns what it has lost; the graph of its update ends here."""
        streams, surroundings = list(self.tape.present), Surroundings(self.device)
        source, live, first = self.tape.arithmetic.value(streams[half.source]), tensors, None
        if torch.is_grad_enabled():
            first = FirstRun(self.name, self.parameters.tensors)
            # the first half's parameters are what the second half's source comes from
            source, live = first.entry(source, [newest, *self.parameters.tensors]), first.entries(tensors)
        update, extras = self._update(half, source, live)
        surroundings.settle()
        self.surroundings.append(surroundings)
        if extras is not None:
            self.extras, self.extras_half = Outputs(extras, live), number
        if first is not None:
            self.first_runs.append(first)
            first.look([update, *(self.extras.tensors if extras is not None and self.extras is not None else ())])
        streams[half.target], lost = self.tape.arithmetic.blend(streams[half.target], half.scale, update.detach())
        self.tape.streams = (streams[0], streams[1])
        return lost

    def backward(self, gradients: Sequence[Tensor], extras: Sequence[Tensor], tensors: Sequence[Tensor], lost: Sequence[Tensor | None]):
        """The half steps in reverse. Takes the gradients of both streams (newest, older), which it returns for the layer's input,
        and those of the tensors and parameters."""
        streams = list(self.coupling.settled(self.tape.present))
        self.tape.streams = None  # each is let go when the one before it is there
        cotangents = list(self.coupling.settled(tuple(gradients)))
        leaves = leaves_like(tensors)
        wanted = [*(leaf for leaf in leaves if leaf.requires_grad), *self.parameters.tensors]
        sums: list[Tensor | None] = [None] * len(wanted)
        for number in reversed(range(len(self.coupling.halves))):
            half = self.coupling.halves[number]
            own_extras = extras if number == self.extras_half else ()
            found = self._reverse(number, half, streams, cotangents, leaves, wanted, own_extras, lost[number])
            sums = [_added(total, part) for total, part in zip(sums, found)]
        self.tape.streams, self.tape.position = (streams[0], streams[1]), self.position
        by_leaf = iter(sums)
        of_tensors = [next(by_leaf) if leaf.requires_grad else None for leaf in leaves]
        return cotangents, of_tensors, list(by_leaf)

    def _reverse(self, number, half: HalfStep, streams, cotangents, leaves, wanted, extras, lost) -> Sequence[Tensor | None]:
        """One half step back: changes streams and cotangents in place, returns the gradients of what is wanted."""
        leaf = self.tape.arithmetic.value(streams[half.source]).detach().requires_grad_()
        with torch.enable_grad(), self.surroundings[number].restored():
            source, live = leaf.view_as(leaf), views_of(leaves)
            update, found_extras = self._update(half, source, live)
            # made last, and so first in backward: the sums are formed in the order in which plain autograd forms them
            passed_on = source.view_as(source)
        streams[half.target] = self.tape.arithmetic.unblend(streams[half.target], lost, half.scale, update.detach())
        gradient = cotangents[half.target].to(update.dtype)
        outputs, given = [update, passed_on], [gradient, cotangents[half.source]]
        for new, cotangent in zip(Outputs(found_extras or (), live).tensors, extras) if extras else ():
            if new.requires_grad and cotangent is not None:
                outputs, given = [*outputs, new], [*given, cotangent]
        with self.parameters.without_hooks():
            found = torch.autograd.grad(outputs, [leaf, *wanted], given, allow_unused=True)
        cotangents[half.source] = found[0]
        cotangents[half.target] = (gradient * half.scale).to(leaf.dtype)
        return found[1:]

    def check(self) -> None:
        """Raises InverseError where backward does not come to this layer from the one after it, or its parameters have changed."""
        if self.tape.streams is None or self.tape.position != self.position + 1:
            raise InverseError(
                f"backward came to reversible layer {self.position} with the streams of another place: the output of a layer in the "
                "middle of the stack was used past the layers after it. Take the loss from the end of the model alone."
            )
        self.parameters.check()

    def forget_values(self) -> None:
        """Drop the graph of the first run; what is kept says where outputs go."""
        if self.extras is not None:
            self.extras = self.extras.emptied()
        for run in self.first_runs:
            run.check()
        self.first_runs = []

    def _update(self, half: HalfStep, source: Tensor, live: Sequence[Tensor]) -> tuple[Tensor, tuple | None]:
        args, kwargs = self.arguments.call(live)
        found, extras = self.functions[half.function](source, *args, **kwargs)
        return half.update(found, source), extras


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None else total if part is None else total + part


class ReversibleLayer(torch.autograd.Function):
    """(newest, older) -> the pair after one layer, by the half steps of `coupling`. Equations there.

    Inputs beside the pair: every tensor among the layer's arguments, then its trainable parameters. Saved: the arguments and the bits
    that were lost, no stream. Backward rebuilds the pair before the layer from the one after it, with one run of each function,
    of which it takes the gradient too.
    """

    @staticmethod
    def forward(ctx, run, newest, older, *inputs):
        ctx.set_materialize_grads(False)  # zeros for what plain autograd leaves without a gradient would be trained on, by weight decay
        tensors = inputs[: len(inputs) - len(run.parameters.tensors)]
        with torch.enable_grad():  # kernels may be chosen by it, and backward runs with it
            lost = run.forward(tensors, newest)
        ctx.run, ctx.loses = run, [bits is not None for bits in lost]
        ctx.save_for_backward(*tensors, *(bits for bits in lost if bits is not None))
        extras = [] if run.extras is None else run.extras.tensors
        detached = [extra.detach() for extra in extras]
        ctx.mark_non_differentiable(*(new for new, extra in zip(detached, extras) if not extra.requires_grad))
        del extras
        run.forget_values()
        ctx.place = run.tape.place
        return *run.tape.values(), *detached

    @staticmethod
    @once_differentiable
    def backward(ctx, newest, older, *extras):
        if all(g is None for g in (newest, older, *extras)):
            return (None,) * len(ctx.needs_input_grad)
        run, saved = ctx.run, list(ctx.saved_tensors)
        run.check()
        tensors = saved[: len(saved) - sum(ctx.loses)]
        bits = iter(saved[len(tensors) :])
        lost = [next(bits) if loses else None for loses in ctx.loses]
        streams, of_tensors, of_parameters = run.backward((newest, older), extras, tensors, lost)
        return None, *streams, *of_tensors, *of_parameters


def run_layer(run: LayerRun, newest: Tensor, older: Tensor) -> tuple[Tensor, Tensor, tuple | None]:
    """One layer of the stack: the values of the new pair, and what the layer returns beside its hidden states.

    With gradient where it is enabled; without it, the same values.
    """
    tensors = run.arguments.take_tensors()
    if torch.is_grad_enabled():
        newest, older, *new = ReversibleLayer.apply(run, newest, older, *tensors, *run.parameters.tensors)
    else:
        run.forward(tensors, newest)
        (newest, older), new = run.tape.values(), [] if run.extras is None else run.extras.tensors
    newest, older = run.tape.give(newest, older)
    return newest, older, None if run.extras is None else run.extras.rebuilt(new, tensors)
