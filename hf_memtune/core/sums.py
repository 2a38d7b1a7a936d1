"""Sums of parameters' gradients over the parts of a backward pass, handed to autograd once, when they are whole.

While parts go backward, the trained parameters of a module are replaced by aliases: leaves of the same memory, whose `.grad` is the sum.
So no hook of a parameter fires before its gradient is whole, and then every hook fires once: those of DistributedDataParallel, of
optimizers that step in backward, and the user's own.

ONE SUM. Autograd would add what it is handed to a `.grad` that is there from an earlier micro-batch: two tensors of the size of every
parameter at once. Where it is safe, the alias therefore takes that `.grad` as its own, and autograd is handed a zero without memory.
It is not safe where somebody looks at the gradient before it is accumulated (a hook on the parameter), or where nothing is accumulated
(torch.autograd.grad).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_memtune._compat import accumulates


class GradientSums:
    """The trained parameters of `module`, in a fixed order, their aliases, and the sums.

    parameters: what autograd is to be told of.
    """

    def __init__(self, module: nn.Module):
        self._slots = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None and p.requires_grad]
        self.parameters: list[nn.Parameter] = list({id(p): p for _, _, p in self._slots}.values())
        self._aliases = {id(p): nn.Parameter(p.detach(), requires_grad=True) for p in self.parameters}
        self._shared: set[int] = set()

    def alias(self, parameter: nn.Parameter) -> nn.Parameter:
        """What stands for a parameter while parts run."""
        return self._aliases[id(parameter)]

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """While open, the module runs on the aliases."""
        for module, name, parameter in self._slots:
            module._parameters[name] = self._aliases[id(parameter)]
        try:
            yield
        finally:
            for module, name, parameter in self._slots:
                module._parameters[name] = parameter

    def begin(self, nodes: Sequence[Any]) -> None:
        """Before the first part goes backward. nodes: of each parameter, what autograd will hand its gradient to, or None."""
        for parameter, node in zip(self.parameters, nodes):
            if parameter.grad is not None and not parameter._backward_hooks and _is_plain(parameter) and accumulates(node):
                self._aliases[id(parameter)].grad = parameter.grad
                self._shared.add(id(parameter))

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
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

    def _taken(self, parameter: nn.Parameter) -> Tensor | None:
        alias = self._aliases[id(parameter)]
        found, alias.grad = alias.grad, None
        if id(parameter) not in self._shared:
            return found
        assert found is not None  # a shared sum is that of a parameter with a gradient
        return found.new_zeros(()).expand(found.shape)


def _is_plain(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.layout == torch.strided and gradient.dtype == parameter.dtype and not gradient.requires_grad
