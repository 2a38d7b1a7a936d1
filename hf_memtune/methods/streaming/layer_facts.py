"""Before the first step: can the layers of this very model run by themselves, chunk by chunk, with its body around them?"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_memtune.architectures import Architecture, is_sharded
from hf_memtune.core.store import KeyValueStore
from hf_memtune.errors import MemTuneError, UnsupportedModelError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.passes import ContextPass
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.layer_override import override_of
from hf_memtune.methods.overrides import evaluating, forwards_as
from hf_memtune.methods.streaming.chunk_stream import Means
from hf_memtune.methods.streaming.layer_stream import BY_CHUNKS, LayerStream
from hf_memtune.methods.verify import explained, probe_batch
from hf_memtune.methods.verify_stream import CHUNK, problem_of

logger = logging.getLogger(__name__)
MOST = 1.25  # share of what chunks keep up to which layers are taken by themselves: a tenth to a quarter less time (results/speed.jsonl)


@dataclass(frozen=True)
class Layers:
    """What a stream by layers has to know of a model.

    return_tuple: whether the decoder's layers return a tuple that begins with the hidden states; else they return these alone.
    share: bytes of a token's inputs of layers, which are kept by layers, in those of its keys, values and their gradients, which are by chunks.
    """

    return_tuple: bool
    share: float


def layers_of(router: Router, check: bool, asked: str | None) -> Layers | None:
    """What a stream by layers has to know of the model; None where there will be none.

    check: whether to compare its gradient with that of plain backpropagation, too. asked: the order that was asked for.
    Raises UnsupportedModelError for a model whose layers cannot run by themselves, where that was asked for.
    """
    if asked == "layers":
        return _found(router, check)
    if asked == "chunks" or not all_checkpointing(router.architecture):
        return None
    try:
        found = _found(router, check)
    except MemTuneError as error:
        logger.info("%s Its rows go through all layers chunk by chunk.", error)
        return None
    return found if found.share <= MOST else None


def all_checkpointing(architecture: Architecture) -> bool:
    """Whether every layer of the decoder is checkpointed by transformers, in the way that keeps its input on the device."""
    return all(
        isinstance(layer, GradientCheckpointingLayer)
        and layer.gradient_checkpointing
        and getattr(found := vars(layer).get("_gradient_checkpointing_func"), "func", found) is checkpoint
        for layer in architecture.decoder.layers
    )


def _found(router: Router, check: bool) -> Layers:
    architecture = router.architecture
    _require_own_layers(router)
    with torch.no_grad(), evaluating(architecture.head_model), explained(architecture):
        call = BodyCall(architecture, architecture.base.forward, (), probe_batch(architecture))
        found = _noted(router, call)
        problem = problem_of(router, call, partial(_stream, router, found)) if check else None
    if problem is not None:
        raise UnsupportedModelError(f"{architecture.name} {problem}. {BY_CHUNKS}")
    return found


def _stream(router: Router, layers: Layers, call: BodyCall) -> LayerStream:
    return LayerStream(Means(router, CHUNK), call, layers.return_tuple)


def _require_own_layers(router: Router) -> None:
    architecture = router.architecture
    problem = None
    if is_sharded(architecture.base):
        problem = "its parameters are sharded by FSDP2, which gathers them for a run of the whole body"
    elif router.cache is not None:
        problem = "its layers hand on states, or keys and values, in a cache of their own"
    elif any(override_of(layer) is not None for layer in architecture.decoder.layers):
        problem = "its layers are reversible, or checkpointed on two levels"
    if problem is not None:
        raise UnsupportedModelError(f"{architecture.name}: got stream_order=layers, but {problem}. {BY_CHUNKS}")


def _noted(router: Router, call: BodyCall) -> Layers:
    """Of a run of the body. Raises UnsupportedModelError where its layers return tensors beside the hidden states."""
    architecture, store = router.architecture, KeyValueStore()
    running = ContextPass(call.spans(), store, router.places, Records({}), router.kernel_facts)
    found, widths = [], []

    def noting(forward: Callable, *args, **kwargs):
        output = forward(*args, **kwargs)
        found.append(isinstance(output, tuple))
        widths.append((output[0] if isinstance(output, tuple) else output).shape[-1])
        if isinstance(output, tuple) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(output[1:])):
            raise UnsupportedModelError(f"{architecture.name}: its layers return more than hidden states. {BY_CHUNKS}")
        return output

    layers = architecture.decoder.layers
    with forwards_as([(layer, partial(noting, layer.forward)) for layer in layers]), router.running(running):
        architecture.base(**call.at(running.spans, running))
    if len(found) != len(layers) or len(set(found)) != 1:
        raise UnsupportedModelError(
            f"{architecture.name}: {len(found)} calls of its {len(layers)} layers in one of its body, or layers that do not return alike. {BY_CHUNKS}"
        )
    own = [key for key in store.keys() if router.places.stack_of_key(key) == "decoder"]
    stored = sum(part.numel() for key in own for part in store.prefix(key, call.decoder.length)) / call.decoder.length
    return Layers(found[0], sum(widths) / max(2 * stored, 1))
