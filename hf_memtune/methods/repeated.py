"""One call of a model's body that goes backward by running again: what a stream, and a pass over chosen tokens, have in common."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_memtune.core.recompute import Autocast
from hf_memtune.core.sums import GradientSums
from hf_memtune.core.unchanged import Unchanged
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.outputs import BodyOutputs
from hf_memtune.methods.attention.routing import Router


class RepeatedCall:
    """A `core.replay.Replay`. Made before the body runs for the first time.

    inputs: the tensors of the call that require grad, then the trained parameters. outputs: of all tokens, as passes find them. sums: adds up
    the gradients of the parameters. unchanged: what has to be as it was whenever the body runs again. autocast: that of the call, for the same.
    """

    def __init__(self, router: Router, call: BodyCall):
        self.router, self.call = router, call
        router.calls.add(self)
        base = router.architecture.base
        self.unchanged = Unchanged(base, router.architecture.name)
        self.sums = self._new_sums(base)
        self.inputs: list[Tensor] = [*call.inputs, *self.sums.parameters]
        self.outputs = BodyOutputs(call)
        self.autocast = Autocast(call.decoder.positions.device)

    def _new_sums(self, base: nn.Module) -> GradientSums:
        """What sums gradients of parameters over all that runs again, and hands them to autograd."""
        return GradientSums(base)

    def take_outputs(self) -> list[Tensor]:
        """Those of all tokens, in the shapes of the body's own. The call is over: from now on nothing may change."""
        self.unchanged.settle({**self.call.given, "encoder_outputs": self.call.encoder_output})
        return self.outputs.take()

    def backward(self, cotangents: Sequence[Tensor | None], nodes: Sequence[Any]) -> list[Tensor | None]:
        """Gradients of `inputs`."""
        self.unchanged.check()
        self.router.call_begins()  # checkpointing may have been turned on since
        return self._gradients(list(cotangents), nodes)

    def _gradients(self, cotangents: list[Tensor | None], nodes: Sequence[Any]) -> list[Tensor | None]:
        self.sums.begin(nodes[len(self.call.inputs) :])
        self._run_again(cotangents)
        return [*(leaf.grad for leaf in self.call.leaves), *self.sums.take()]

    def _run_again(self, cotangents: list[Tensor | None]) -> None:
        """Run with gradient, on what stands in for inputs and parameters, and go backward: their sums are then complete."""
        raise NotImplementedError
