"""What overrides of the forward of one layer in a stack have in common, with transformers' own loop around it as it is.

The override is a bound method of an object that holds the layer, so that a deep copy of the model has overrides of its own.
"""

from collections import UserDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hf_memtune.architectures.tables import OF_TRL
from hf_memtune.core.fingerprint import Alike
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.methods.overrides import not_checkpointing, set_on_instance

_LEFT_EMPTY = "_left_empty_by_layers_that_run_twice"  # on a cache: their names


class LayerOverride:
    """Runs in place of the forward of one layer.

    earlier: an override of that forward which was there before, or None. again_within: makes a context around the layer; the one that
    is set when it runs forward is entered again when it runs for backward. is_on: until it is taken off.
    """

    def __init__(self, layer: nn.Module, name: str):
        self.layer, self.name = layer, name
        self.earlier = vars(layer).get("forward")
        self.again_within: Callable[[], AbstractContextManager] = nullcontext
        self.is_on = True

    def put_on(self) -> Callable[[], None]:
        """Returns what takes it off. Where somebody has put another forward over this one by then, that one stays, and finds the layer
        itself through this."""
        put_back = set_on_instance(self.layer, "forward", self.forward)

        def take_off() -> None:
            self.is_on = False
            if _own_override(self.layer) is self:
                put_back()

        return take_off

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the layer's own."""
        raise NotImplementedError

    def alone(self, *args, **kwargs):
        """In place of the layer where it runs without those before it."""
        return self.forward(*args, **kwargs)

    def _bound(self, function: Callable) -> Callable:
        """`function` within the context that is set at present."""
        return partial(_within, self.again_within, function)

    def _alike(self, function: Callable) -> Callable:
        """`function`, which raises InverseError where it runs again and the layer is not as it was the first time."""
        return Alike(self.layer, self.name, function) if torch.is_grad_enabled() else function

    def _taken_apart(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple, dict[str, Any]]:
        """The hidden states, or what travels in their place, and the other arguments."""
        kwargs = dict(kwargs)
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        return hidden, *self._arguments(args, kwargs)

    def _arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Where backward may run the layer again: without caches, which it would write to again, found by type."""
        self._require_filled(args, kwargs)
        if not torch.is_grad_enabled():
            return args, kwargs
        for key, what, by in (("output_attentions", "attention weights", ""), ("output_router_logits", "the logits of routers", OF_TRL)):
            if kwargs.get(key):
                raise UnsupportedModelError(
                    f"{self.name}: got {key}=True, expected False: {what} would come from inside layers that run twice, without a gradient. "
                    f"Set {key}=False{by}, or train with activation checkpointing instead (--activation_checkpointing)."
                )
        kwargs = {name: self._no_cache(value) for name, value in kwargs.items()}
        return tuple(map(self._no_cache, args)), kwargs | ({"use_cache": False} if "use_cache" in kwargs else {})

    def _no_cache(self, value: Any) -> Any:
        if not isinstance(value, Cache):
            return value
        if tokens := _tokens_in(value):
            raise UnsupportedModelError(
                f"{self.name}: got a cache with {tokens} tokens in a call with gradient, expected none, for a layer that runs twice would write to it "
                "twice. In place of prefix tuning, which makes one, use adapters or LoRA inside the layers; where the model fills it by itself, set "
                "use_cache=False; where nothing is learned, call the model inside of torch.no_grad()."
            )
        vars(value).setdefault(_LEFT_EMPTY, set()).add(self.name)
        return None

    def _require_filled(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuse a cache that this layer has left empty: the model hands it out, and a later call with it would not see the tokens before."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache) and self.name in vars(value).get(_LEFT_EMPTY, ()):
                raise UnsupportedModelError(
                    f"{self.name}: got a cache that it left empty in an earlier call, which was one with gradient: tokens of that call would not be "
                    "seen. Make the calls whose cache is used again inside of torch.no_grad()."
                )

    def _original(self, *args, **kwargs):
        return self.earlier(*args, **kwargs) if self.earlier is not None else type(self.layer).forward(self.layer, *args, **kwargs)

    def _whole(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, tuple | None]:
        boards = [(value, len(value)) for value in (*args, *kwargs.values()) if isinstance(value, UserDict)]
        with not_checkpointing(self.layer) if getattr(self.layer, "gradient_checkpointing", False) else nullcontext():
            output = self._original(x, *args, **kwargs)
        if any(len(board) != before for board, before in boards):
            raise UnsupportedModelError(
                f"{self.name} leaves tensors for other layers outside of what it returns, whose gradient a layer that runs twice by itself would "
                "lose. Train this model with activation checkpointing instead (--activation_checkpointing)."
            )
        return self._parted(output)

    def _parted(self, output: Tensor | tuple) -> tuple[Tensor, tuple | None]:
        return (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, None)


def override_of(layer: nn.Module) -> LayerOverride | None:
    """The override that a layer has at present, and that is on."""
    found = _own_override(layer)
    return found if found is not None and found.is_on else None


def _own_override(layer: nn.Module) -> LayerOverride | None:
    found = getattr(vars(layer).get("forward"), "__self__", None)
    return found if isinstance(found, LayerOverride) else None


def _tokens_in(cache: Cache) -> int:
    """How many tokens a cache holds; of states of recurrent layers alone, which do not count them: whether there are any."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return int(cache.has_previous_state())


def _within(context: Callable[[], AbstractContextManager], function: Callable, *args, **kwargs) -> Any:
    with context():
        return function(*args, **kwargs)
