"""Send a model's attention through a pass, by transformers' own attention and mask interfaces.

No model code: the interfaces look up the functions by the name in `config._attn_implementation`. That name is set only
while a pass runs (and while activation checkpointing recomputes a part of it), so at every other time, evaluation and
saving included, the model is as it was.
"""

import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_memtune.architectures import Architecture, tables
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.methods.attention.hooked import HookWatch
from hf_memtune.methods.attention.model_pass import KernelFacts, Places
from hf_memtune.methods.attention.positions import at_temperature
from hf_memtune.methods.attention.spans import Span, additive
from hf_memtune.methods.attention.states import CacheTemplate, again
from hf_memtune.methods.layer_override import override_of
from hf_memtune.methods.overrides import forward_as, instance_attribute, not_checkpointing

_numbers = itertools.count()
OWN = "hf_memtune-"  # how the names begin that this package gives to functions of its own
# Kernels that take a boolean or an additive mask: chosen tokens, and a chunk whose attention does not go in pieces, have no other way to say who
# sees whom. What goes in pieces calls torch's fused kernels, flash attention among them (`core.attention_kernels`): a piece needs a backward with
# the output and the lse of all keys, which no attention function of transformers has.
_MASKED_KERNELS = ("sdpa", "eager")
# What the others compute, sdpa computes with a mask. By name of transformers, or of a repository of kernels on the hub.
_OTHER_KERNELS = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


class Pass(Protocol):
    """What the router asks of a pass. `stack` is set to the name of the stack that is running. spans: its tokens, by stack."""

    stack: str
    spans: dict[str, Span]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, attention: Callable, kwargs: dict): ...

    def mask(self, mask_function: Callable, finish: Callable[[Tensor], Tensor], may_skip: bool = True) -> Tensor | None: ...


class Router:
    """Registers one attention function and one mask function for one model, and activates them pass by pass.

    places: where in the model each attention module stands. calls: those that have yet to go backward, and need the functions. cache: how the
    body's cache looks, where layers are followed through it; set by the probe. packs: whether the body's masks tell sequences of a row apart by
    positions that begin anew; set by the probe. makes_masks: whether masks are made in full even where attention
    could go piece by piece, for layers that change what they are given; set by the probe. told_of: attention modules of which a warning was given.
    hooks: those of a user on modules of the body.
    """

    def __init__(self, architecture: Architecture):
        self.architecture, self.places = architecture, Places(architecture)
        self.calls: weakref.WeakSet = weakref.WeakSet()
        self.told_of: set[int] = set()
        self.hooks = HookWatch(architecture.base, architecture.name)
        self.name = f"{OWN}{next(_numbers)}"
        self.active: Pass | None = None
        self.makes_masks, self.packs = False, True
        self._kernels: dict[int, str] = {}
        self._running_again: list[nn.Module] | None = None  # modules that may run a second time for backward
        self.follow_by(None)
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
    def kernel_facts(self) -> KernelFacts:
        """Of the decoder; of hand-written attention nobody knows."""
        by_hand = self.cache is not None and bool(self.cache.by_hand)
        knows_causal = self.kernel(self.architecture.base.config) == "sdpa" and not by_hand
        stands_in = not (by_hand or self.makes_masks or (self.cache is not None and self.cache.has_indices))
        return KernelFacts(knows_causal, knows_causal and stands_in, stands_in)

    @contextmanager
    def running(self, active: Pass, cache: Cache | None = None) -> Iterator[None]:
        """Route the model's attention through `active`; layers that run again for backward find it again then.

        cache: what the body is given, in which layers leave states; those that run again begin with the states they began with.
        """
        with ExitStack() as stack:
            stack.enter_context(self.routed(active))
            for module in self._modules():
                names = list(_checkpointing(module))
                if (
                    names
                    and cache is not None
                    and (isinstance(module, GradientCheckpointingLayer) or tables.CHECKPOINTED in module._modules)
                ):
                    inner = module._modules.get(tables.CHECKPOINTED) or module.forward
                    stack.enter_context(forward_as(module, partial(self._checkpointed_with_states, active, module, inner)))
                for name in names:
                    again = partial(self._checkpoint_with, active, getattr(module, name))
                    stack.enter_context(instance_attribute(module, name, again))
                if (override := override_of(module)) is not None:
                    if cache is not None:
                        raise _two_levels_and_states(self.architecture)
                    stack.enter_context(instance_attribute(override, "again_within", partial(self.routed, active)))
            if cache is not None:
                stack.enter_context(not_checkpointing(self.architecture.base))  # layers that do it themselves drop the cache
            if self.architecture.is_encoder_decoder:
                for name, part in self.architecture.stacks.items():
                    entering = part.module.register_forward_pre_hook(partial(_enter_stack, active, name))
                    stack.callback(entering.remove)
            yield

    def call_begins(self) -> None:
        """What may checkpoint its activations, and has hooks, is looked up anew, once a call: going through all modules takes longer than a small
        chunk."""
        self._running_again = None
        self.hooks.look()

    def _modules(self) -> list[nn.Module]:
        if self._running_again is None:
            every = self.architecture.base.modules()
            self._running_again = [module for module in every if _may_run_again(module)]
        return self._running_again

    @contextmanager
    def plain(self) -> Iterator[None]:
        """For passes of a probe that are the model's own: sdpa in place of flash attention where weights are in float32, which flash takes under
        autocast alone, as they may be in training."""
        wide = next((p.dtype for p in self.architecture.base.parameters() if p.is_floating_point()), None) in (torch.float32, torch.float64)
        with ExitStack() as stack:
            for config in self._configs if wide else ():
                if "flash" in (config._attn_implementation_internal or ""):
                    stack.enter_context(instance_attribute(config, "_attn_implementation_internal", "sdpa"))
            yield

    @contextmanager
    def routed(self, active: Pass) -> Iterator[None]:
        """`running` for a part of the body, which checkpoints nothing."""
        previous, self.active = self.active, active
        names = [(c, c._attn_implementation_internal) for c in self._configs]
        for config, _ in names:
            config._attn_implementation_internal = self.name
        self._kernels = {id(c): name for c, name in names} if previous is None else self._kernels
        try:
            with self.hooks.handing_on() if previous is None else nullcontext():
                yield
        finally:
            self.active = previous
            for config, name in names:
                config._attn_implementation_internal = name

    def _checkpoint_with(self, active: Pass, checkpointing: Callable, function: Callable, *args, **kwargs):
        def again(*args, **kwargs):
            with self.routed(active):
                return function(*args, **kwargs)

        return checkpointing(again, *args, **kwargs)

    def _checkpointed_with_states(self, active: Pass, layer: nn.Module, forward: Callable, *args, **kwargs):
        """In place of a layer that is checkpointed: what it leaves in the cache keeps its graph, and a second run leaves nothing there."""
        beginnings = {id(value): again(value) for value in (*args, *kwargs.values()) if isinstance(value, (Cache, EncoderDecoderCache))}
        runs = itertools.count()

        def run(*args, **kwargs):
            if next(runs):
                args = tuple(beginnings.get(id(value), value) for value in args)
                kwargs = {name: beginnings.get(id(value), value) for name, value in kwargs.items()}
            with self.routed(active), not_checkpointing(layer):
                return forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    def kernel(self, config) -> str:
        """The attention implementation that a pass uses for a model configured with another one."""
        configured = self._kernels.get(id(config), "sdpa") if self.active else config._attn_implementation
        if configured in _MASKED_KERNELS:
            return configured
        if not _is_exact(configured):
            raise UnsupportedModelError(
                f"{self.architecture.name}: attn_implementation: got {configured!r}, a function that hf_memtune does not know, in whose place it "
                "would run another one. Expected sdpa, eager, or flash or flex attention as transformers has them. Load the model with "
                "attn_implementation='sdpa', if that is the same attention, or train with activation checkpointing alone."
            )
        return "sdpa"

    def _attention(self, module, query, key, value, attention_mask=None, **kwargs):  # afmoe gives the mask by its name
        kernel = self.kernel(module.config)
        if kernel == "sdpa" and kwargs.get("s_aux") is not None and (configured := self._kernels.get(id(module.config))) != "sdpa":
            raise UnsupportedModelError(
                f"{self.architecture.name}: attn_implementation: got {configured!r} on a model with attention sinks, which sdpa, that would run in its "
                "place, does not know. Load the model with attn_implementation='eager'."
            )
        attention = _eager_attention(module) if kernel == "eager" else ALL_ATTENTION_FUNCTIONS[kernel]
        if kernel == "sdpa" and kwargs.get("position_bias") is None and _is_grouped(module, query, key):
            attention = partial(_by_group, attention)
        attention_mask = _without_unchosen(module, attention_mask, kwargs)
        assert self.active is not None, "the name of these functions is set only while a pass runs"
        query = at_temperature(module, query, self.active.spans[self.active.stack])
        if id(module) in self._extended:  # the keys and values of earlier tokens are there already
            return attention(module, query, key, value, attention_mask, **kwargs)
        return self.active.attend(module, query, key, value, attention_mask, attention, kwargs)

    def follow_by(self, cache: CacheTemplate | None) -> None:
        """Let layers be followed through a cache that looks like this one; None: through attention alone."""
        self.cache = cache
        layers = self.architecture.decoder.layers
        by_hand = cache.by_hand if cache is not None else ()
        self._extended = {id(module) for number in by_hand for module in layers[number].modules()}  # given earlier tokens by the cache

    def _mask(self, *args, batch_size, mask_function, config, dtype=torch.float32, allow_is_causal_skip=True, **kwargs):
        assert self.active is not None
        hidden = -torch.inf if self.kernel(config) == "sdpa" and not self._extended else torch.finfo(dtype).min
        mask = self.active.mask(mask_function, partial(additive, dtype=dtype, hidden=hidden), allow_is_causal_skip)
        return mask.expand(batch_size, -1, -1, -1) if self._extended and mask is not None else mask  # hand-written code looks at its shape


def _is_exact(kernel: str | None) -> bool:
    """Whether a kernel computes plain softmax attention, so that another one may take its place. None: the model has no interface."""
    if kernel is None or kernel in _OTHER_KERNELS or kernel.startswith(OWN):
        return True
    return "/" in kernel and any(word in kernel.lower() for word in ("flash", "sdpa", "flex"))


def _may_run_again(module: nn.Module) -> bool:
    """Whether anything is set by which a module would checkpoint its activations, be that on or off, or run by another forward."""
    own = vars(module)
    return own.get("_gradient_checkpointing_func") is not None or tables.CHECKPOINTED in module._modules or "forward" in own


def _checkpointing(module: nn.Module) -> Iterator[str]:
    """Names of the functions with which a module checkpoints activations: transformers' own, and that of torch's wrapper around layers."""
    if vars(module).get("_gradient_checkpointing_func") is not None and getattr(module, "gradient_checkpointing", False):
        yield "_gradient_checkpointing_func"
    if tables.CHECKPOINTED in module._modules and "checkpoint_fn" in vars(module):
        yield "checkpoint_fn"


def _two_levels_and_states(architecture: Architecture) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{architecture.name}: got layers that are reversible, or checkpointed on two levels, together with sequence_chunk_size. This model hands "
        "states from chunk to chunk, which such layers do not. Set activation_checkpointing with checkpoint_levels=1."
    )


def _weakly(method: Callable) -> Callable:
    """A function that calls a bound method without keeping its object alive."""
    reference = weakref.WeakMethod(method)

    def call(*args, **kwargs):
        found = reference()
        assert found is not None, "the router unregisters its functions when it goes"
        return found(*args, **kwargs)

    return call


def _unregister(name: str) -> None:
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def _enter_stack(active: Pass, name: str, module, args) -> None:
    active.stack = name


def _eager_attention(module: nn.Module) -> Callable:
    """The eager attention of the model itself: Gemma2's softcap and the like live there."""
    homes = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)  # FSDP2 puts a class of its own before the model's
    found = next((home.eager_attention_forward for home in homes if home is not None and hasattr(home, "eager_attention_forward")), None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} is configured for eager attention but {type(module).__module__} has no "
            "eager_attention_forward. Load the model with attn_implementation='sdpa'."
        )
    return found


def _without_unchosen(module: nn.Module, mask: Tensor | None, kwargs: dict) -> Tensor | None:
    """The mask of a layer that chooses the keys that a query may look at.

    Where the name of the attention function is not one of its own, such a layer leaves it to the function: `indices`, (B, S, chosen).
    """
    if kwargs.get("block_indices") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} chooses blocks of keys to attend to (block_indices), and hides the others in a way of its own, which no pass "
            f"over a part of the tokens follows. {tables.REMEDY}"
        )
    indices = kwargs.pop("indices", None)
    if indices is None or mask is None:
        return mask
    unchosen = indices.new_ones((*indices.shape[:2], mask.shape[-1]), dtype=torch.bool).scatter(-1, indices.long(), False)
    return mask.masked_fill(unchosen[:, None], torch.finfo(mask.dtype).min)


def _is_grouped(module: nn.Module, query: Tensor, key: Tensor) -> bool:
    return query.shape[1] != key.shape[1] and getattr(module, "num_key_value_groups", 1) > 1


def _by_group(attention: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs):
    """Grouped-query attention one query of each group at a time.

    The kernels take no mask together with grouped heads, and the way around it, repeating keys and values, costs as many
    copies of them as a group has queries. Query head h reads key head h // groups: one strided slice of the queries a turn.
    """
    if mask is None:
        return attention(module, query, key, value, mask, **kwargs)
    rows, heads, length, channels = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, length, channels)
    single = SimpleNamespace(num_key_value_groups=1, is_causal=getattr(module, "is_causal", True), training=module.training)
    outputs = [attention(single, queries, key, value, mask, **kwargs)[0] for queries in grouped.unbind(2)]
    return torch.stack(outputs, dim=3).flatten(2, 3), None
