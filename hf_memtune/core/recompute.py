"""Running a part of a forward pass a second time, in backward, so that it gives bit by bit what it gave the first time.

Alike must be: the arguments, the random numbers, autocast, and which inputs require grad, by which kernels are chosen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_memtune.core.rng import RandomTape
from hf_memtune.errors import InverseError

_RUN = "run"


def is_no_container(value: Any) -> bool:
    """A KV cache may be registered as a tree: taken apart, it would be put together again as a copy."""
    return not isinstance(value, (tuple, list, dict))


class Arguments:
    """Positional and keyword arguments of a call, taken apart: its tensors, nested ones too, and all the rest."""

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        self._leaves, self._spec = tree_flatten((args, kwargs), is_leaf=is_no_container)
        self._places = [place for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self._leaves[place] for place in self._places]
        for place in self._places:
            self._leaves[place] = None  # or tensors that backward may offload would be held here

    def take_tensors(self) -> list[Tensor]:
        """The tensors, held here no longer."""
        taken, self.tensors = self.tensors, []
        return taken

    def call(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with these tensors in the places of theirs."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors):
            leaves[place] = tensor
        return tree_unflatten(leaves, self._spec)


class Autocast:
    """The autocast of one run, of the processor and of `device`, for the run that repeats it."""

    def __init__(self, device: torch.device):
        kinds = dict.fromkeys(("cpu", device.type))
        self._states = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self._caches_casts = torch.is_autocast_cache_enabled()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """While open, autocast is as it was."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self._states:
                cast = torch.autocast(kind, dtype=dtype if enabled else None, enabled=enabled, cache_enabled=self._caches_casts)
                stack.enter_context(cast)
            yield


def forget_casts() -> None:
    """Between a run without gradient and one with it: autocast keeps casts of weights, and up to torch 2.9 uses those that were made without a
    gradient where one is wanted, so that the weights would learn nothing."""
    torch.clear_autocast_cache()


class Surroundings:
    """Random numbers and autocast of one run. Made before it; `settle` after it; `restored` around the second run."""

    def __init__(self, device: torch.device):
        self._autocast, self._tape = Autocast(device), RandomTape([device])
        self._tape.record(_RUN)

    def settle(self) -> None:
        """Keep no states (5 KB of the CPU's) where the run drew nothing."""
        self._tape.forget_if_still(_RUN)

    @contextmanager
    def restored(self) -> Iterator[None]:
        with self._autocast.restored(), self._tape.replaying(_RUN):
            yield


class Parameters:
    """The trainable parameters that a run uses: its backward needs them unchanged, as everyone's does."""

    def __init__(self, modules: Sequence[nn.Module]):
        unique = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        self.tensors = list(unique.values())
        self._versions = [p._version for p in self.tensors]

    def check(self) -> None:
        """Raises InverseError where one was changed in place, or frozen, since."""
        if [p._version for p in self.tensors] != self._versions:
            raise InverseError(
                "a parameter was changed in place between forward and backward, so the layer cannot be run again as it was. Take the "
                "optimizer's step after backward."
            )
        if not all(p.requires_grad for p in self.tensors):
            raise InverseError(
                "a parameter was frozen between forward and backward, as by switching to another adapter, so the layer cannot be run again as "
                "it was. Freeze or switch after backward."
            )

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """While open, no tensor hook of theirs fires: they fire where autograd is handed the gradients, and see them whole."""
        hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in self.tensors if p._backward_hooks]
        for own, _ in hooks:
            own.clear()  # torch holds the dictionary itself
        try:
            yield
        finally:
            for own, kept in hooks:
                own.update(kept)


def leaves_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Detached tensors that require grad where these do."""
    return [t.detach().requires_grad_() if t.requires_grad else t for t in tensors]


def views_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views where a gradient is wanted: autocast would keep its casts of leaves, alive until it ends."""
    return [t.view_as(t) if t.requires_grad else t for t in tensors]


def made_by(tensor: Tensor) -> tuple[Any, int]:
    """The node of autograd that a tensor is an output of, or None, and which one; looking through what FSDP2 puts before a module."""
    node, number = tensor.grad_fn, tensor.output_nr
    while type(node).__name__ == "RegisterPostBackwardFunctionBackward":  # it returns what it is given
        node, number = node.next_functions[number]  # type: ignore[union-attr]
    return node, number


class Outputs:
    """What a layer returns beside its hidden states, as (new tensors, how to put them together again with the caller's own).

    A tensor that the layer handed through is the caller's, whose gradient does not go through this layer.
    """

    def __init__(self, extras: tuple, arguments: Sequence[Tensor]):
        leaves, self._spec = tree_flatten(extras, is_leaf=is_no_container)
        self.tensors: list[Tensor] = []
        self._recipe: list[tuple[str, Any]] = [self._place(leaf, arguments) for leaf in leaves]

    def _place(self, leaf: Any, arguments: Sequence[Tensor]) -> tuple[str, Any]:
        if not isinstance(leaf, Tensor):
            return "rest", leaf
        for index, argument in enumerate(arguments):
            if leaf is argument:
                return "argument", index
        self.tensors.append(leaf)
        return "tensor", len(self.tensors) - 1

    def emptied(self) -> "Outputs":
        """Without the tensors and their graph; what `rebuilt` needs stays."""
        self.tensors = []
        return self

    def rebuilt(self, tensors: Sequence[Tensor], arguments: Sequence[Tensor]) -> tuple:
        """The extras, with these in the places of the new tensors and of the arguments."""
        sources: dict[str, Callable] = {"rest": lambda x: x, "argument": arguments.__getitem__, "tensor": tensors.__getitem__}
        return tree_unflatten([sources[kind](what) for kind, what in self._recipe], self._spec)
