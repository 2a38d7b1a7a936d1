"""Forward hooks that a user has put on modules of the body, which run once for each pass over a part of the tokens.

What such a hook changes is part of the function, and runs as it is. What it keeps is not: the first pass is without gradient, and further
ones are of parts of a row, so a loss of it (feature distillation, a penalty on activations, a probe) would learn something else than in
plain training, without a word. So hooks are handed stand-ins for the values, which share their memory; a gradient that comes to one raises.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from hf_memtune.core.fingerprint import REQUIRE_GRAD
from hf_memtune.errors import InverseError

logger = logging.getLogger(__name__)
# Hooks of these gather parameters, choose adapters or record what a caller asked for; they keep nothing that a loss is taken of.
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "hf_memtune")


class HookWatch:
    """Over the hooks on the modules of one body. name: of the model, in messages."""

    def __init__(self, base: nn.Module, name: str):
        self._base, self._name = base, name
        self._probed: set[int] | None = None
        self._modules: list[tuple[str, nn.Module]] = []
        self.look()

    def look(self) -> None:
        """Before a call: which hooks there are. Of those that the probe has not seen it is told that they are unchecked."""
        found = [(name, module, _keys(module)) for name, module in _hooked(self._base)]
        self._modules = [(name, module) for name, module, keys in found if keys]
        if self._probed is None:
            return
        new = {name: fresh for name, _, keys in found if (fresh := keys - self._probed)}
        if new:
            self._probed.update(*new.values())
            logger.warning(
                "%s: forward hooks were put on %s after the method. They run once for each pass over a part of the tokens, and have not been checked "
                "to give a token the same whatever is beside it. Put them on before.",
                self._name, ", ".join(new),
            )  # fmt: skip

    def probed(self) -> None:
        """The hooks that are there have been checked."""
        self._probed = set().union(*(_keys(module) for _, module in self._modules))

    @contextmanager
    def handing_on(self) -> Iterator[None]:
        """While open, as long as a pass runs, hooks are handed stand-ins."""
        handles = [handle for name, module in self._modules for handle in _put_on(module, f"{self._name}: {name}")]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hooked(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with hooks; not of the body itself, around which hooks run once a call."""
    left, found = list(base._modules.values()), False
    while left and not found:  # a quarter of the time that names take
        if (module := left.pop()) is not None:
            own = module.__dict__
            found = bool(own["_forward_hooks"] or own["_forward_pre_hooks"])
            left.extend(own["_modules"].values())
    for name, module in base.named_modules() if found else ():
        if name and (module._forward_hooks or module._forward_pre_hooks):
            yield name, module


def _keys(module: nn.Module) -> set[int]:
    """Of the hooks that a user has put on a module."""
    return {key for hooks in (module._forward_pre_hooks, module._forward_hooks) for key, hook in hooks.items() if _is_of_user(hook)}


def _is_of_user(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.partition(".")[0] not in _LIBRARIES and not getattr(hook, "__name__", "").startswith(REQUIRE_GRAD)


def _put_on(module: nn.Module, name: str) -> list[RemovableHandle]:
    """Hooks before and behind those of the user, on inputs and on outputs."""
    inputs, outputs = _Handover(name), _Handover(name)
    return [
        module.register_forward_pre_hook(inputs.give_inputs, prepend=True, with_kwargs=True),
        module.register_forward_pre_hook(inputs.take_inputs, with_kwargs=True),
        module.register_forward_hook(outputs.give_output, prepend=True),
        module.register_forward_hook(outputs.take_output),
    ]


class _Handover:
    """Of the inputs, or of the outputs, of one module: given to hooks as stand-ins, and taken back."""

    def __init__(self, name: str):
        self._name = name
        self._handed: _Handed | None = None

    def give_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        return self._give((args, kwargs))

    def take_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        return self._take((args, kwargs))

    def give_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return self._give(output)

    def take_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return self._take(output)

    def _give(self, value: Any) -> Any:
        self._handed = _Handed(self._name, value)
        return self._handed.begin()

    def _take(self, value: Any) -> Any:
        handed, self._handed = self._handed, None
        return None if handed is None else handed.end(value)


class _Handed:
    """One value, of any structure, in the hands of hooks. name: of the module, in messages. is_part: whether its stand-ins are part of the
    function, since a hook has changed it, so that gradients go through them.
    """

    def __init__(self, name: str, value: Any):
        self.name, self.is_part = name, False
        self._value, self._is_live = value, torch.is_grad_enabled()
        leaves, self._spec = tree_flatten(value)
        self._own = [leaf if isinstance(leaf, Tensor) and leaf.is_floating_point() else None for leaf in leaves]
        with torch.enable_grad():
            self._leaves = [
                leaf if own is None else _StandIn.apply(self, [own.detach()], self._source(own)) for leaf, own in zip(leaves, self._own)
            ]
        self._versions = [None if own is None else own._version for own in self._own]

    def _source(self, own: Tensor) -> Tensor:
        return own if self._is_live and own.requires_grad else torch.zeros((), requires_grad=True)

    def begin(self) -> Any:
        """The stand-ins, in the structure of the value. Gradients are on until `end`: a hook computes as in plain training."""
        torch.set_grad_enabled(True)
        return tree_unflatten(self._leaves, self._spec)

    def end(self, value: Any) -> Any:
        """What goes on: the value that was given, or what hooks have made of it."""
        torch.set_grad_enabled(self._is_live)
        leaves, _ = tree_flatten(value)
        is_same = len(leaves) == len(self._leaves) and all(now is then for now, then in zip(leaves, self._leaves))
        is_same &= self._versions == [None if own is None else own._version for own in self._own]
        given, self._value = self._value, None
        self._own, self._leaves = [], []  # a stand-in that is kept has this in its graph
        if is_same:
            return given
        self.is_part = True
        return value if self._is_live else tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value)


class _StandIn(torch.autograd.Function):
    """(handed, [value], source) -> value, which autograd is not to take for a view: hooks may write into it."""

    @staticmethod
    def forward(ctx, handed, box, source):
        ctx.handed, ctx.shape = handed, source.shape
        return box.pop()

    @staticmethod
    def backward(ctx, gradient):
        handed: _Handed = ctx.handed
        if not handed.is_part:
            raise InverseError(
                f"{handed.name}: the loss depends on what a forward hook on this module has kept. It runs once for each pass over a part of the tokens, the "
                "first time without gradient, so that what is learned from it would be lost. Take the loss from what the model returns, or train "
                "without streaming and token seeking (activation checkpointing is exact here)."
            )
        return None, None, gradient if gradient.shape == ctx.shape else None
