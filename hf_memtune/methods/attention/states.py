"""What recurrent layers hand from chunk to chunk: the states of linear attention, state-space scans and convolutions over tokens.

They travel in transformers' own cache, whose layers are ours here. Recurrent layers begin with the states of the chunk before and leave
theirs. In a backward pass the states that a chunk begins with are leaves, and what it finds for them is what the chunk before it owes to
the states that it left. Attention that goes through transformers' interface is the passes' matter: its layers of the cache hand a chunk's
keys and values on as they are. Hand-written attention is given those of the tokens before here, by the pass that runs.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from hf_memtune.core.offload import HostMemory
from hf_memtune.core.store import alone

ARGUMENTS = ("past_key_values", "cache_params")
"""How bodies call their cache."""
_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)
_BOTH = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)


class _Recurrent(LinearAttentionLayer):
    """States that are replaced, where transformers' own are written over: autograd needs the old ones."""

    def lazy_initialization(self, conv_states=None, recurrent_states=None, state_idx=0, conv_kernel_size=None) -> None:
        if conv_states is not None:
            self.dtype, self.device = conv_states.dtype, conv_states.device
            self.conv_kernel_size[state_idx] = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self.is_conv_states_initialized[state_idx] = True
        if recurrent_states is not None:
            self.is_recurrent_states_initialized[state_idx] = True

    def update_conv_state(self, conv_states, state_idx=0, conv_kernel_size=None, **kwargs) -> Tensor:
        """The inputs of a convolution over the chunk, (B, channels, tokens), after the last ones of the chunk before."""
        if not self.is_conv_states_initialized[state_idx]:
            self.lazy_initialization(conv_states=conv_states, state_idx=state_idx, conv_kernel_size=conv_kernel_size)
        kernel, before = self.conv_kernel_size[state_idx] or 0, self.conv_states[state_idx]
        if before is not None and self.has_previous_state[state_idx]:
            conv_states = torch.cat([before, conv_states], dim=-1)
        else:
            self.has_previous_state[state_idx] = True
            conv_states = F.pad(conv_states, (max(0, kernel - conv_states.shape[-1]), 0))
        self.conv_states[state_idx] = conv_states[..., -kernel:]
        return conv_states

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs) -> Tensor:
        self.is_recurrent_states_initialized[state_idx] = True
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class _Attention(CacheLayerMixin):
    """Hands the keys and values of a chunk on. start: tokens of the row before the chunk. number: of the layer.

    running: the pass that has the keys and values of earlier tokens. extends: whether they are put before the chunk's own here, and not by
    the attention interface.
    """

    is_sliding = is_compileable = extends = False
    start = number = 0
    running: Any = None

    def lazy_initialization(self, key_states, value_states) -> None: ...

    def update(self, key_states, value_states, *args, **kwargs):
        return self.running.extended(self.number, key_states, value_states) if self.extends else (key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.start + query_length, 0

    def get_seq_length(self) -> int:
        return self.start

    def get_max_length(self) -> int:
        return -1


class _Indexed(_Attention):
    """Of attention that chooses its keys by further ones. indexer_position_ids: of the tokens before, where a model keeps them here."""

    indexer_position_ids: Tensor | None = None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        return self.running.indexed(self.number, indexer_key_states)


class _Both(_Recurrent, _Attention):  # type: ignore[override]  # transformers' own two bases are at odds over is_croppable
    """Of layers that have both side by side."""

    def __init__(self, number_of_states: int = 1):
        _Attention.__init__(self)
        _Recurrent.__init__(self, number_of_states)


class CacheTemplate:
    """How the cache of a body looks, learned from one that it made itself, after a few tokens.

    odd: of the first layer whose cache is of an unknown class, that class. by_hand: numbers of the layers whose attention does not go
    through the interface. crosses: whether the layers attend to an encoder as well, whose keys and values are made anew in every chunk.
    """

    def __init__(self, made: Cache | EncoderDecoderCache, crosses: bool = False):
        self.by_hand: set[int] = set()
        self._crosses = crosses
        made = made.self_attention_cache if isinstance(made, EncoderDecoderCache) else made
        self._cache = copy.copy(made)
        # of MiniMax: states in a list of the cache itself
        self._lists = [n for n, v in vars(made).items() if isinstance(v, list) and any(isinstance(entry, Tensor) for entry in v)]
        for name in self._lists:
            vars(self._cache)[name] = [None] * len(vars(made)[name])
        found = [(_known(layer), layer) for layer in made.layers]
        self.odd = next((type(layer).__name__ for kind, layer in found if kind is None), None)
        self._cache.layers = [_like(kind, layer) for kind, layer in found]
        for number, layer in enumerate(self._cache.layers):
            if isinstance(layer, _Attention):
                layer.number = number

    @property
    def has_states(self) -> bool:
        """Whether any layer has a state."""
        return bool(self._lists) or any(isinstance(layer, _Recurrent) for layer in self._cache.layers)

    @property
    def has_indices(self) -> bool:
        """Whether any layer chooses what it attends to by keys of its own."""
        return any(isinstance(layer, _Indexed) for layer in self._cache.layers)

    def has_state(self, number: int) -> bool:
        """Whether the layer with this number hands on a state, or nothing, and needs no attention to be followed."""
        if self._lists:
            return True
        return number < len(self._cache.layers) and isinstance(self._cache.layers[number], (_Recurrent, DummyLayer))

    @property
    def why_all_tokens(self) -> str:
        """Why a pass over some of the tokens is not enough."""
        if self.has_states:
            return "its layers hand a state on from token to token, which needs every token"
        if self.by_hand:
            return "its attention is written by hand, and takes the tokens that it is given for neighbours"
        return "its layers choose what they attend to among all tokens"

    def is_plain(self, number: int) -> bool:
        """Whether the layer with this number needs nothing of the cache."""
        if self._lists or number in self.by_hand or number >= len(self._cache.layers):
            return False
        return type(self._cache.layers[number]) in (_Attention, DummyLayer)

    def attends(self, number: int) -> bool:
        """Whether the layer with this number has keys and values."""
        return number < len(self._cache.layers) and isinstance(self._cache.layers[number], _Attention)

    def empty(self) -> Cache | EncoderDecoderCache:
        """For the first chunk of a row."""
        own = _copied(self._cache)
        return EncoderDecoderCache(own, Cache(layers=[_Attention() for _ in own.layers])) if self._crosses else own


class States:
    """The states of one call at the beginning of each of its chunks. template: None where the model has none; then nothing happens here.

    host: memory off the device where they are kept, or None.
    """

    def __init__(self, template: CacheTemplate | None, host: HostMemory | None = None):
        self.template = template
        self._host = host
        self._begins: dict[int, Cache] = {}
        self._leaves: list[Tensor] = []
        self._owed: list[Tensor | None] = []

    def __bool__(self) -> bool:
        return self.template is not None

    def begin(self, number: int, start: int, running: Any) -> Cache | None:
        """The cache for chunk `number`, whose first token is `start` of the row, in the pass that runs."""
        if self.template is None:
            return None
        cache = _copied(self._begins[number]) if number else self.template.empty()
        for layer in _own(cache).layers:
            if isinstance(layer, _Attention):
                layer.start, layer.running, layer.extends = start, running, layer.number in self.template.by_hand
        if self._host is not None and number:
            _replace(cache, lambda state: state.to(self._device, non_blocking=True))
        return cache

    def begin_live(self, number: int, start: int, running: Any) -> Cache | None:
        """As `begin`, with states that a gradient is found for."""
        cache = self.begin(number, start, running)
        if cache is not None:
            _replace(cache, lambda state: state.detach().requires_grad_())
            self._leaves = [holder[key] for holder, key in _slots(cache)]
        return cache

    def end(self, number: int, cache: Cache | None) -> None:
        """Keep what chunk `number` left for the next one."""
        if cache is None:
            return
        kept = _copied(cache)
        for layer in _own(kept).layers:
            if isinstance(layer, _Attention):
                layer.running = None  # the pass is over
        _replace(kept, lambda state: alone(state.detach()))
        if self._host is not None:
            _replace(kept, self._sent_home)
        self._begins[number + 1] = kept

    def roots(self, cache: Cache | None) -> tuple[list[Tensor], list[Tensor]]:
        """The states that a chunk left, and what the chunks after it found for them."""
        if cache is None:
            return [], []
        pairs = [(holder[key], owed) for (holder, key), owed in zip(_slots(cache), self._owed) if owed is not None]
        pairs = [(state, owed) for state, owed in pairs if state.requires_grad]
        return [state for state, _ in pairs], [owed for _, owed in pairs]

    def settle(self, number: int) -> None:
        """When a chunk has gone backward: what it found is owed by the one before it."""
        self._owed, self._leaves = [leaf.grad for leaf in self._leaves], []
        self._begins.pop(number, None)

    def tensors(self) -> list[Tensor]:
        """What is kept on the device."""
        if self._host is not None:
            return []
        kept = [holder[key] for cache in self._begins.values() for holder, key in _slots(cache)]
        return [*kept, *(owed for owed in self._owed if owed is not None)]

    def _sent_home(self, state: Tensor) -> Tensor:
        self._device = state.device
        assert self._host is not None
        return self._host.empty(tuple(state.shape), state.dtype, state.device).copy_(state, non_blocking=True)


def again(cache: Cache) -> Cache:
    """A cache that holds the same states, for a part of a model that runs once more with them."""
    return _copied(cache)


def _known(layer: Any) -> type | None:
    kinds: dict[type, type] = {LinearAttentionLayer: _Recurrent, DummyLayer: DummyLayer}
    for of in _ATTENTION:
        kinds[of] = _Attention
    for of in _BOTH:
        kinds[of] = _Both
    kinds[DynamicIndexedLayer] = _Indexed
    return kinds.get(type(layer))


def _like(kind: type | None, layer: Any) -> Any:
    if kind is None or kind is DummyLayer:
        return layer
    return kind(layer.number_of_states) if isinstance(layer, LinearAttentionCacheLayerMixin) else kind()


def _copied(cache: Cache | EncoderDecoderCache) -> Cache | EncoderDecoderCache:
    """A cache with the same tensors, of which either may be given others."""
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(_copied(cache.self_attention_cache), _copied(cache.cross_attention_cache))
    made = copy.copy(cache)
    for name, value in vars(cache).items():
        if isinstance(value, list):
            vars(made)[name] = list(value)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                vars(layer)[name] = dict(value)
    return made


def _slots(cache: Cache) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every state, always in the same order."""
    cache = _own(cache)
    for layer in cache.layers:
        if isinstance(layer, _Recurrent):
            for holder in (layer.conv_states, layer.recurrent_states):
                yield from ((holder, key) for key, state in holder.items() if state is not None)
    for name, value in vars(cache).items():
        if name != "layers" and isinstance(value, list):
            yield from ((value, key) for key, state in enumerate(value) if isinstance(state, Tensor))


def _own(cache: Cache | EncoderDecoderCache) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _replace(cache: Cache, function) -> None:
    for holder, key in list(_slots(cache)):
        holder[key] = function(holder[key])
