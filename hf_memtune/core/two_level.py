"""Checkpointing on two levels: of L layers, the inputs of every m-th are kept (m about sqrt(L)); in backward, a segment of m layers runs
again to find the inputs of its layers, and each layer once more with gradient. After Chen et al. 2016 (arXiv 1604.06174), section 4.

Memory: L / m + m inputs of layers and the activations of one layer, against L inputs with a checkpoint a layer; one forward more.

A layer goes on with the segment of the one before it where it is given the very output of that layer, and begins one of its own otherwise:
whatever is done to the hidden states between two layers is plain autograd's, for one more input that is kept.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_memtune.core.first_run import FirstRun
from hf_memtune.core.recompute import Arguments, Outputs, Parameters, Surroundings, leaves_like, made_by, views_of


@dataclass
class LayerCall:
    """One call of one layer, function(x, *args, **kwargs) -> (output, what else it returns or None), and what another needs but tensors.

    name: of the layer. gathered: context in which the layer's parameters are whole, for runs in the backward of another layer.
    """

    function: Callable[..., tuple[Tensor, tuple | None]]
    arguments: Arguments
    parameters: Parameters
    name: str = "a layer"
    gathered: Callable[[], AbstractContextManager] = nullcontext
    surroundings: Surroundings | None = None
    extras: Outputs | None = None

    def first(self, run: FirstRun, hidden: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Output and new extras, detached; with gradient enabled, since kernels may be chosen by it."""
        live = run.entries(tensors)
        self.surroundings = Surroundings(hidden.device)
        output, extras = self._run(run.entry(hidden, [hidden]), live)
        self.surroundings.settle()
        self.extras = None if extras is None else Outputs(extras, live)
        new = [] if self.extras is None else self.extras.tensors
        run.look([output, *new])
        return output.detach(), new

    def again(self, source: Tensor, live: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As the first time, with its graph."""
        assert self.surroundings is not None
        with torch.enable_grad(), self.surroundings.restored():
            output, extras = self._run(source, live)
        return output, [] if extras is None else Outputs(extras, live).tensors

    def output(self, hidden: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """As the first time, detached; the graph of the run ends here."""
        self.parameters.check()
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad(), self.gathered():
            return self.again(leaf.view_as(leaf), views_of(leaves_like(tensors)))[0].detach()

    def _run(self, hidden: Tensor, live: Sequence[Tensor]) -> tuple[Tensor, tuple | None]:
        args, kwargs = self.arguments.call(live)
        return self.function(hidden, *args, **kwargs)


@dataclass
class Segment:
    """The calls of the layers of one segment of one forward pass, and, while it goes backward, their inputs."""

    calls: list[LayerCall] = field(default_factory=list)
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def input_of(self, index: int, boundary: Tensor, tensors: Sequence[Sequence[Tensor]]) -> Tensor:
        """The input of a layer: as found already for the layer after it, or found now with those of the layers before it."""
        if index and index not in self.inputs:
            hidden = boundary
            for number in range(index):
                hidden = self.inputs[number + 1] = self.calls[number].output(hidden, tensors[number])
        return self.inputs.pop(index) if index else boundary


@dataclass(frozen=True)
class Passing:
    """What a layer leaves for the next one: the segment, its first input, the tensors of its calls so far, and the version of its output."""

    segment: Segment
    boundary: Tensor
    tensors: tuple[tuple[Tensor, ...], ...] = ()
    version: int = 0


class TwoLevelLayer(torch.autograd.Function):
    """h -> layer(h), exactly: dL/dh, and those of the tensors among its arguments and of its parameters, by autograd of a second run.

    Saved: the input of the segment's first layer, the same tensor for all of them, and the arguments of the calls up to this one.
    """

    @staticmethod
    def forward(ctx, passing, goes_on, hidden, *inputs):
        segment, index = passing.segment, len(passing.tensors)
        call = segment.calls[index]
        ctx.set_materialize_grads(False)  # zeros for what plain autograd leaves without a gradient would be trained on, by weight decay
        tensors = inputs[: len(inputs) - len(call.parameters.tensors)]
        run = FirstRun(call.name, call.parameters.tensors)
        with torch.enable_grad():
            output, extras = call.first(run, hidden, tensors)
        known = (*passing.tensors, tensors)
        ctx.segment, ctx.index, ctx.counts = segment, index, [len(each) for each in known]
        boundary = hidden if index == 0 else passing.boundary
        ctx.save_for_backward(boundary, *(tensor for each in known for tensor in each))
        ctx.passing = Passing(segment, boundary, known, output._version) if goes_on else None
        detached = [extra.detach() for extra in extras]
        ctx.mark_non_differentiable(*(new for new, extra in zip(detached, extras) if not extra.requires_grad))
        if call.extras is not None:
            call.extras.emptied()
        del extras
        run.check()
        return output, *detached

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *extra_gradients):
        ctx.passing = None
        if all(g is None for g in (gradient, *extra_gradients)):
            return (None,) * len(ctx.needs_input_grad)
        boundary, *flat = ctx.saved_tensors
        tensors = [[flat.pop(0) for _ in range(count)] for count in ctx.counts]
        call = ctx.segment.calls[ctx.index]
        call.parameters.check()
        leaf = ctx.segment.input_of(ctx.index, boundary, tensors).detach().requires_grad_()
        leaves = leaves_like(tensors[ctx.index])
        with torch.enable_grad():
            output, extras = call.again(leaf.view_as(leaf), views_of(leaves))
        wanted = [leaf, *(t for t in leaves if t.requires_grad), *call.parameters.tensors]
        given = [(new, g) for new, g in zip([output, *extras], [gradient, *extra_gradients]) if new.requires_grad and g is not None]
        outputs, cotangents = zip(*given)
        with call.parameters.without_hooks():
            found = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
        return None, None, next(found), *(next(found) if t.requires_grad else None for t in leaves), *found


def run_layer(call: LayerCall, hidden: Tensor, begins: bool = False, goes_on: bool = True) -> tuple[Tensor, Any]:
    """One layer with gradient: its output, and what it returns beside its hidden states, or None.

    begins: a new segment, whatever came before. goes_on: the output may be the input of another layer of the segment.
    """
    found = _taken_passing(hidden)
    passing = Passing(Segment(), hidden) if begins or found is None else found
    tensors = call.arguments.take_tensors()
    passing.segment.calls.append(call)
    output, *new = TwoLevelLayer.apply(passing, goes_on, hidden, *tensors, *call.parameters.tensors)
    return output, None if call.extras is None else call.extras.rebuilt(new, tensors)


def _taken_passing(hidden: Tensor) -> Passing | None:
    """What the layer before left, where `hidden` is what it returned, as it is. Its node holds that no longer: the next may take its time."""
    node, number = made_by(hidden)
    passing = getattr(node, "passing", None) if number == 0 else None
    if passing is not None:
        node.passing = None
    return passing if passing is not None and passing.version == hidden._version else None
