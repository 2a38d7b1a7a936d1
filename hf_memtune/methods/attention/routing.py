"""Send a model's attention through a pass, by transformers' own attention and mask interfaces.

No model code: the interfaces look up the functions by the name in `config._attn_implementation`. That name is set only
while a pass runs (and while activation checkpointing recomputes a part of it), so at every other time, evaluation and
saving included, the model is as it was.
"""

import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_memtune.architectures import Architecture, tables
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.methods.attention.passes import Places
from hf_memtune.methods.attention.positions import at_temperature
from hf_memtune.methods.attention.spans import Span
from hf_memtune.methods.layer_override import override_of
from hf_memtune.methods.overrides import instance_attribute

_numbers = itertools.count()
# Kernels that take a boolean or an additive mask. Others (flash, flex) know no mask for a subset of the queries.
_MASKED_KERNELS = ("sdpa", "eager")


class Pass(Protocol):
    """What the router asks of a pass. `stack` is set to the name of the stack that is running. spans: its tokens, by stack."""

    stack: str
    spans: dict[str, Span]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, attention: Callable, kwargs: dict): ...

    def mask(self, mask_function: Callable, finish: Callable[[Tensor], Tensor]) -> Tensor | None: ...


class Router:
    """Registers one attention function and one mask function for one model, and activates them pass by pass.

    places: where in the model each attention module stands. calls: those that have yet to go backward, and need the functions.
    """

    def __init__(self, architecture: Architecture):
        self.architecture, self.places = architecture, Places(architecture)
        self.calls: weakref.WeakSet = weakref.WeakSet()
        self.name = f"hf_memtune-{next(_numbers)}"
        self.active: Pass | None = None
        self._configs = architecture.configs()  # looked up once: a recompute must not walk every module again
        # weakly, and with a finalizer: the interfaces live as long as the process, and must not keep a dropped model alive
        AttentionInterface.register(self.name, _weakly(self._attention))
        AttentionMaskInterface.register(self.name, _weakly(self._mask))
        self._unregister = weakref.finalize(self, _unregister, self.name)

    def close(self) -> None:
        """Take the two functions out of the interfaces again; where a call has yet to go backward, when that is gone."""
        if not self.calls:
            self._unregister()

    @property
    def kernel_knows_causal(self) -> bool:
        """Whether the attention kernel applies a causal mask by itself where it is given none."""
        return self.kernel(self.architecture.base.config) == "sdpa"

    @contextmanager
    def running(self, active: Pass) -> Iterator[None]:
        """Route the model's attention through `active`; layers that run again for backward find it again then."""
        with ExitStack() as stack:
            stack.enter_context(self._routed(active))
            for module in self.architecture.base.modules():
                for name in _checkpointing(module):
                    again = partial(self._checkpoint_with, active, getattr(module, name))
                    stack.enter_context(instance_attribute(module, name, again))
                if (override := override_of(module)) is not None:
                    stack.enter_context(instance_attribute(override, "again_within", partial(self._routed, active)))
            if self.architecture.is_encoder_decoder:
                for name, part in self.architecture.stacks.items():
                    entering = part.module.register_forward_pre_hook(partial(_enter_stack, active, name))
                    stack.callback(entering.remove)
            yield

    @contextmanager
    def _routed(self, active: Pass) -> Iterator[None]:
        previous, self.active = self.active, active
        names = [(c, c._attn_implementation_internal) for c in self._configs]
        for config, _ in names:
            config._attn_implementation_internal = self.name
        self._kernels = {id(c): name for c, name in names} if previous is None else self._kernels
        try:
            yield
        finally:
            self.active = previous
            for config, name in names:
                config._attn_implementation_internal = name

    def _checkpoint_with(self, active: Pass, checkpointing: Callable, function: Callable, *args, **kwargs):
        def again(*args, **kwargs):
            with self._routed(active):
                return function(*args, **kwargs)

        return checkpointing(again, *args, **kwargs)

    def kernel(self, config) -> str:
        """The attention implementation that a pass uses for a model configured with another one."""
        configured = self._kernels.get(id(config), "sdpa") if self.active else config._attn_implementation
        return configured if configured in _MASKED_KERNELS else "sdpa"

    def _attention(self, module, query, key, value, attention_mask=None, **kwargs):  # afmoe gives the mask by its name
        kernel = self.kernel(module.config)
        attention = _eager_attention(module) if kernel == "eager" else ALL_ATTENTION_FUNCTIONS[kernel]
        if kernel == "sdpa" and attention_mask is not None and _is_grouped(module, query, key):
            attention = partial(_by_group, attention)
        query = at_temperature(module, query, self.active.spans[self.active.stack])
        return self.active.attend(module, query, key, value, attention_mask, attention, kwargs)

    def _mask(self, *args, mask_function, config, dtype=torch.float32, **kwargs):
        hidden = -torch.inf if self.kernel(config) == "sdpa" else torch.finfo(dtype).min
        return self.active.mask(mask_function, partial(_additive, dtype=dtype, hidden=hidden))


def _checkpointing(module: nn.Module) -> Iterator[str]:
    """Names of the functions with which a module checkpoints activations: transformers' own, and that of torch's wrapper around layers."""
    if vars(module).get("_gradient_checkpointing_func") is not None and getattr(module, "gradient_checkpointing", False):
        yield "_gradient_checkpointing_func"
    if tables.CHECKPOINTED in module._modules and "checkpoint_fn" in vars(module):
        yield "checkpoint_fn"


def _weakly(method: Callable) -> Callable:
    """A function that calls a bound method without keeping its object alive."""
    reference = weakref.WeakMethod(method)

    def call(*args, **kwargs):
        return reference()(*args, **kwargs)

    return call


def _unregister(name: str) -> None:
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def _additive(visible: Tensor, dtype: torch.dtype, hidden: float) -> Tensor:
    """The mask the kernels add. Made once a pass: from a boolean one they would make it again in every layer.

    Its rows lie 8 elements apart or a multiple of that, without which CUDA's memory-efficient kernel copies it in every call.
    """
    keys = visible.shape[-1]
    room = torch.full((*visible.shape[:-1], -(-keys // 8) * 8), hidden, dtype=dtype, device=visible.device)
    return room[..., :keys].masked_fill_(visible, 0)


def _enter_stack(active: Pass, name: str, module, args) -> None:
    active.stack = name


def _eager_attention(module: nn.Module) -> Callable:
    """The eager attention of the model itself: Gemma2's softcap and the like live there."""
    homes = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)  # FSDP2 puts a class of its own before the model's
    found = next((home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward")), None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} is configured for eager attention but {type(module).__module__} has no "
            "eager_attention_forward. Load the model with attn_implementation='sdpa'."
        )
    return found


def _is_grouped(module: nn.Module, query: Tensor, key: Tensor) -> bool:
    return query.shape[1] != key.shape[1] and getattr(module, "num_key_value_groups", 1) > 1


def _by_group(attention: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs):
    """Grouped-query attention one query of each group at a time.

    The kernels take no mask together with grouped heads, and the way around it, repeating keys and values, costs as many
    copies of them as a group has queries. Query head h reads key head h // groups: one strided slice of the queries a turn.
    """
    rows, heads, length, channels = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, length, channels)
    single = SimpleNamespace(num_key_value_groups=1, is_causal=getattr(module, "is_causal", True), training=module.training)
    outputs = [attention(single, queries, key, value, mask, **kwargs)[0] for queries in grouped.unbind(2)]
    return torch.stack(outputs, dim=3).flatten(2, 3), None
