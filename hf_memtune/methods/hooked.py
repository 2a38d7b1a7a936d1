"""Forward hooks that a user has put on modules of the body, which run once for each pass over a part of the tokens.

What such a hook changes is part of the function, and runs as it is. What it keeps is not: the first pass is without gradient, and further
ones are of parts of a row, so a loss of it (feature distillation, a penalty on activations, a probe) would learn something else than in
plain training, without a word. So hooks are handed stand-ins for the values, which share their memory; a gradient that comes to one raises.
"""

import logging
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hf_memtune.core.fingerprint import REQUIRE_GRAD
from hf_memtune.errors import InverseError
from hf_memtune.methods.attention.routing import Router

logger = logging.getLogger(__name__)
# Hooks of these gather parameters, choose adapters or record what a caller asked for; they keep nothing that a loss is taken of.
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "hf_memtune")


class HookWatch:
    """Over the hooks of one model, until `remove`. See the module."""

    def __init__(self, router: Router):
        self._router = router
        self._watched: dict[int, _Watched] = {}

    def look(self, probed: bool) -> None:
        """Watch hooks that are new. probed: whether the probe has seen them; of others it says that they are unchecked."""
        base, new = self._router.architecture.base, []
        for name, module in _hooked(base):
            keys = *_of_users(module._forward_pre_hooks), *_of_users(module._forward_hooks)
            before = self._watched.get(id(module))
            if before is not None and before.keys == keys:
                continue
            if before is not None:
                before.remove()
            if keys:
                self._watched[id(module)] = _Watched(module, f"{self._router.architecture.name}: {name}", self._router, keys)
                new.append(name)
        if new and not probed:
            logger.warning(
                "%s: forward hooks were put on %s after the method. They run once for each pass over a part of the tokens, and have not been checked "
                "to give a token the same whatever is beside it. Put them on before.",
                self._router.architecture.name, ", ".join(new),
            )  # fmt: skip

    def remove(self) -> None:
        """May be called twice."""
        for watched in self._watched.values():
            watched.remove()
        self._watched.clear()


def _hooked(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with hooks; not of the body itself, around which hooks run once a call."""
    left = [("", base)]
    while left:
        name, module = left.pop()
        if name and (module._forward_hooks or module._forward_pre_hooks):
            yield name, module
        left.extend((f"{name}.{inner}" if name else inner, child) for inner, child in module._modules.items() if child is not None)


def _of_users(hooks: dict[int, Any]) -> list[int]:
    return [key for key, hook in hooks.items() if _is_of_user(hook)]


def _is_of_user(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.partition(".")[0] not in _LIBRARIES and not getattr(hook, "__name__", "").startswith(REQUIRE_GRAD)


class _Watched:
    """One module: hooks before and behind those of the user, on its inputs and on its outputs."""

    def __init__(self, module: nn.Module, name: str, router: Router, keys: tuple[int, ...]):
        self.keys = keys
        inputs, outputs = _Handover(name, router), _Handover(name, router)
        self._handles = [
            module.register_forward_pre_hook(_Hook(inputs.give_inputs), prepend=True, with_kwargs=True),
            module.register_forward_pre_hook(_Hook(inputs.take_inputs), with_kwargs=True),
            module.register_forward_hook(_Hook(outputs.give_outputs), prepend=True),
            module.register_forward_hook(_Hook(outputs.take_outputs)),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Hook:
    """On this module alone: a copy of it, deep or pickled, has none."""

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __deepcopy__(self, memo: dict):
        return _no_hook

    def __reduce__(self):
        return _of_copies, ()


def _no_hook(*args) -> None:
    """What a copy has in its place."""


def _of_copies():
    return _no_hook


class _Handover:
    """Of the inputs, or of the outputs, of one module in the passes of a router: given to hooks as stand-ins, and taken back."""

    def __init__(self, name: str, router: Router):
        self._name, self._router = name, weakref.ref(router)
        self._handed: _Handed | None = None

    def give_inputs(self, module: nn.Module, args: tuple, kwargs: dict):
        return self._give((args, kwargs))

    def take_inputs(self, module: nn.Module, args: tuple, kwargs: dict):
        return self._take((args, kwargs))

    def give_outputs(self, module: nn.Module, args: tuple, output: Any):
        return self._give(output)

    def take_outputs(self, module: nn.Module, args: tuple, output: Any):
        return self._take(output)

    def _give(self, value: Any) -> Any:
        if not self._in_pass:
            return None
        self._handed = _Handed(self._name, value)
        return self._handed.begin()

    def _take(self, value: Any) -> Any:
        handed, self._handed = self._handed, None
        return None if handed is None else handed.end(value)

    @property
    def _in_pass(self) -> bool:
        router = self._router()
        return router is not None and router.active is not None


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
