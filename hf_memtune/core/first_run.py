"""The first run of a part that runs again in backward: its own graph goes nowhere, and what would need it is refused.

A gradient that comes to the inside of a first run, as through an activation that a hook has kept and that was added to the loss, would end
there. And what is learned but is neither handed to the part nor a parameter of it gets none from the second run, whose gradients are
returned for those alone.
"""

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from hf_memtune.core.graph import leaf_of, nodes_behind
from hf_memtune.errors import InverseError, UnsupportedModelError


class FirstRun:
    """One first run of what is called `name`: `entry` for each tensor that goes in, `look` at what came out, and `check` when that is let go.

    learned: parameters whose gradients the second run returns.
    """

    def __init__(self, name: str, learned: Sequence[Tensor]):
        self._name = name
        self._known = {id(parameter) for parameter in learned}
        self._entries: list[Any] = []
        self._strangers: list[ref[Tensor]] = []

    def entry(self, value: Tensor, sources: Sequence[Tensor]) -> Tensor:
        """A tensor of these values that requires grad. sources: what a gradient that comes to it would have to go on to."""
        if any(source.requires_grad for source in sources):
            entered = _Entry.apply(self._name, value.detach(), *sources)
        else:
            leaf = value.detach().requires_grad_()
            entered = leaf.view_as(leaf)
        self._entries.append(entered.grad_fn)
        return entered

    def entries(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """In the places of those that require grad, their entries."""
        return [self.entry(tensor, [tensor]) if tensor.requires_grad else tensor for tensor in tensors]

    def look(self, outputs: Sequence[Tensor]) -> None:
        """Note what the outputs come from that is learned and is neither an entry nor `learned`."""
        for node in nodes_behind(outputs, known=self._entries):
            if isinstance(node, _Entry._backward_cls):
                raise self._stranger("what was computed inside of another layer")
            leaf = leaf_of(node)
            if leaf is not None and id(leaf) not in self._known:
                self._strangers.append(ref(leaf))

    def check(self) -> None:
        """Raises UnsupportedModelError where what was noted outlives the graph of the run: leaves that the run itself made are gone by now."""
        for stranger in self._strangers:
            if (tensor := stranger()) is not None:
                raise self._stranger(f"a tensor of shape {tuple(tensor.shape)} that requires grad")

    def _stranger(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._name}: what it returns depends on {what} and is neither an argument nor a parameter of it (a hook may use it, or a part of the layer "
            "is an FSDP2 unit of its own), whose gradient a layer that runs twice by itself would lose. Make it an nn.Parameter of a module inside "
            "of this layer (and the layer one unit), or train with activation checkpointing instead (--activation_checkpointing)."
        )


class _Entry(torch.autograd.Function):
    """(name, value, *sources) -> value, in a graph that backward must not go through, whichever gradient is asked for."""

    @staticmethod
    def forward(ctx, name, value, *sources):
        ctx.name = name
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        raise InverseError(
            f"{ctx.name}: the loss depends on something from inside of this layer (router logits, attention weights, or what a hook has kept), "
            "which runs again in backward, so that the gradient would be lost. Take the loss from what the layers return, set "
            "output_router_logits=False (with trl: router_aux_loss_coef=0.0), or train with activation checkpointing instead (--activation_checkpointing)."
        )
