"""Two-level checkpointing of a model as it is: exact, for one forward more than checkpointing every layer. See core/two_level.py."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_memtune.architectures.stacks import layer_stacks, refuse_what_does_not_run_twice
from hf_memtune.core.recompute import Arguments, Parameters
from hf_memtune.core.two_level import LayerCall, run_layer
from hf_memtune.errors import ConfigError, UnsupportedModelError
from hf_memtune.methods.layer_override import LayerOverride, override_of


def checkpoint_in_two_levels(model: nn.Module, segment_layers: int | None = None) -> "TwoLevelHandle":
    """Checkpoint every stack of layers of `model`, a transformers model, possibly inside a PEFT model, on two levels.

    `restore()` of the handle that is returned takes it off again.
    segment_layers: layers between two inputs that are kept; None: the root of the number of layers, rounded up, which needs least.
    Raises ConfigError or UnsupportedModelError before the model is touched.
    """
    return TwoLevelHandle(model, segment_layers)


class TwoLevelHandle:
    """Two-level checkpointing on one model, until `restore()`, whether this object is kept or not."""

    def __init__(self, model: nn.Module, segment_layers: int | None = None):
        if segment_layers is not None and segment_layers < 1:
            raise ConfigError([f"segment_layers: got {segment_layers}, expected 1 or more, or None for the root of the number of layers."])
        refuse_what_does_not_run_twice(model)
        self.model, self.stacks = model, layer_stacks(model)
        for stack in self.stacks:
            if any(override_of(layer) for layer in stack.layers):
                raise UnsupportedModelError(
                    f"{stack.name}: its layers are reversible, or checkpointed on two levels, already. Call restore() of that handle."
                )
        self._changes = ExitStack()
        for stack in self.stacks:
            shape = StackShape(len(stack.layers), segment_layers or math.ceil(math.sqrt(len(stack.layers))))
            for position, layer in enumerate(stack.layers):
                override = CheckpointedInStack(layer, position, f"{stack.name}.{position}", shape)
                self._changes.callback(override.put_on())

    def restore(self) -> None:
        """Take every trace out of the model. May be called twice."""
        self._changes.close()


@dataclass(frozen=True)
class StackShape:
    """How many layers a stack has, and how many a segment."""

    layers: int
    segment_layers: int


class CheckpointedInStack(LayerOverride):
    """Runs in place of the forward of one layer of a checkpointed stack. Without gradient it is the layer itself."""

    def __init__(self, layer: nn.Module, position: int, name: str, shape: StackShape):
        super().__init__(layer, name)
        self.position, self.shape = position, shape

    def forward(self, *args, **kwargs):
        """As the layer's own."""
        if not (self.is_on and torch.is_grad_enabled()):
            self._require_filled(args, kwargs)
            return self._original(*args, **kwargs)
        hidden, args, kwargs = self._taken_apart(args, kwargs)
        call = LayerCall(
            self._bound(self._alike(self._whole)), Arguments(args, kwargs), Parameters([self.layer]), self.name, self._gathered
        )
        begins = self.position % self.shape.segment_layers == 0
        hidden, extras = run_layer(call, hidden, begins, goes_on=self.position + 1 < self.shape.layers)
        return hidden if extras is None else (hidden, *extras)

    def alone(self, *args, **kwargs):
        """One layer needs no checkpoints."""
        return self._original(*args, **kwargs)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """FSDP2 gathers a layer's parameters for its own forward and backward alone."""
        unit: Any = self.layer
        if not hasattr(unit, "unshard"):
            yield
            return
        unit.unshard()
        try:
            yield
        finally:
            unit.reshard()
