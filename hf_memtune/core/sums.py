"""Sums of parameters' gradients over the parts of a backward pass, handed to autograd once, when they are whole.

While parts go backward, the trained parameters of a module are replaced by aliases: leaves of the same memory, whose `.grad` is the sum.
So no hook of a parameter fires before its gradient is whole, and then every hook fires once: those of DistributedDataParallel, of
optimizers that step in backward, and the user's own.

ONE SUM. Autograd would add what it is handed to a `.grad` that is there from an earlier micro-batch: two tensors of the size of every
parameter at once. Where it is safe, the alias therefore takes that `.grad` as its own, and autograd is handed nothing; or a zero without
memory, where a hook waits for the accumulation (two such zeros, of two calls in one backward pass, autograd adds to one with memory). It is not safe where somebody looks at the gradient before it is accumulated (a hook on the parameter, or on its node in the graph), or
where nothing is accumulated (torch.autograd.grad, or a parameter that was frozen since the call).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hf_memtune._compat import accumulates, has_hooks
from hf_memtune.core.places import Place, in_place, places_of


class GradientSums:
    """The trained parameters of `module` (buffers that require grad are some, too), in a fixed order, their aliases, and the sums.

    parameters: what autograd is to be told of. Made when the module is called: its parts run on the tensors that it has then.
    """

    def __init__(self, module: nn.Module):
        found = places_of(module)
        self.parameters: list[Tensor] = list({id(tensor): tensor for _, _, tensor in found if tensor.requires_grad}.values())
        self._aliases = {id(p): nn.Parameter(p.detach(), requires_grad=True) for p in self.parameters}
        self._found = found
        self._places: list[Place] = [(entries, name, self._aliases.get(id(tensor), tensor)) for entries, name, tensor in found]
        self._shared: set[int] = set()

    def alias(self, parameter: Tensor) -> nn.Parameter:
        """What stands for a parameter while parts run."""
        return self._aliases[id(parameter)]

    def standing_in(self) -> AbstractContextManager[None]:
        """While open, the module runs on the aliases, and on what else it had when it was called."""
        return in_place(self._places)

    def as_called(self) -> AbstractContextManager[None]:
        """While open, the module runs on what it had when it was called."""
        return in_place(self._found)

    def begin(self, nodes: Sequence[Any]) -> None:
        """Before the first part goes backward. nodes: of each parameter, what autograd will hand its gradient to, or None."""
        for parameter, node in zip(self.parameters, nodes):
            if _adds_to_grad(parameter) and accumulates(node) and not has_hooks(node):
                self._aliases[id(parameter)].grad = parameter.grad
                self._shared.add(id(parameter))

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add to a sum what was found elsewhere; the gradient is not used by anyone else from then on, and may have no memory any more."""
        alias, is_expanded = self._aliases[id(parameter)], 0 in gradient.stride()
        if alias.grad is None:
            alias.grad = gradient.clone() if is_expanded else gradient
            return
        alias.grad.add_(gradient)
        if not is_expanded:
            gradient.set_(gradient.new_empty(0))  # type: ignore[call-overload]  # autograd itself holds it until all of backward is over

    def take(self) -> list[Tensor | None]:
        """When all parts have gone backward: what to hand to autograd, in the order of `parameters`."""
        return [self._taken(parameter) for parameter in self.parameters]

    def _taken(self, parameter: Tensor) -> Tensor | None:
        alias = self._aliases[id(parameter)]
        found, alias.grad = alias.grad, None
        if id(parameter) not in self._shared:
            return found
        assert found is not None  # a shared sum is that of a parameter with a gradient
        return found.new_zeros(()).expand(found.shape) if parameter._post_accumulate_grad_hooks else None


def _adds_to_grad(parameter: Tensor) -> bool:
    """Whether autograd would add a gradient to that which is there, of a parameter that is trained still, and nobody sees what is added."""
    if not parameter.is_leaf or not parameter.requires_grad or parameter._backward_hooks or (gradient := parameter.grad) is None:
        return False
    return gradient.layout == torch.strided and gradient.dtype == parameter.dtype and not gradient.requires_grad
