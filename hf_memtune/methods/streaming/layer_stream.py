"""The exact backward pass of a causal model in a stream, layer by layer: each layer's chunks, from the last to the first.

1. Forward: a layer runs for all chunks, from first to last, without gradient, then the next one. Kept are the inputs of the layers but the
   first, as by activation checkpointing; keys and values live as long as their layer runs.
2. Backward: dL/dhidden of all tokens is given. Of a layer, from the last to the first, the keys and values of its chunks are made again,
   up to where it attends, and then its chunks run with gradient from the last to the first, as in `ChunkStream`.

The activations of one chunk in one layer are alive at a time, and keys, values and their gradients of one layer. Cost: that of activation
checkpointing, and the projections of keys and values once more; a stream by chunks in which layers are checkpointed runs each of them a
third time. The body runs around the layers as it is, on a chunk at a time, with layers that hand on what they are given. StreamBP (arXiv
2506.03077) goes layer by layer too. Shape legend: B rows of a batch, T tokens in a row, S tokens of a chunk, D hidden size.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hf_memtune.architectures import Architecture
from hf_memtune.architectures.tables import OF_TRL
from hf_memtune.core.owed import OwedGradients
from hf_memtune.core.recompute import forget_casts
from hf_memtune.core.rows import RowTensor
from hf_memtune.core.store import KeyValueStore
from hf_memtune.errors import MemTuneError, UnsupportedModelError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.passes import ChunkPass, ContextPass, KeysPass, Made, StreamPass
from hf_memtune.methods.attention.positions import at_positions
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.attention.spans import Span
from hf_memtune.methods.overrides import instance_attribute, not_checkpointing
from hf_memtune.methods.streaming.chunk_stream import ChunkStream, Means, require_seeing

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
BY_CHUNKS = "Set stream_order=chunks: activation_checkpointing then works inside of each chunk."


@dataclass
class Around:
    """What the body does with one chunk around its layers.

    running: the pass it ran in. hidden: (B, S, D), what the first layer is given. calls: of each layer, the other arguments.
    output: what the body made of what its last layer was said to return.
    """

    running: ChunkPass
    span: Span
    hidden: Tensor | None = None
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    output: Any = None

    def entry(self) -> Tensor:
        """What the first layer is given, held here no longer: what the other layers need is the rest."""
        hidden, self.hidden, self.output = self.hidden, None, None
        assert hidden is not None, "the body ran its first layer"
        return hidden


class LayerStream(ChunkStream):
    """One call of a model's body on its way, layer by layer: a `core.replay.Replay`.

    returns_tuple: whether the layers return one, whose first entry are the hidden states.
    """

    def __init__(self, means: Means, call: BodyCall, returns_tuple: bool = False):
        super().__init__(means, call, keeps_last=False)
        if wants_router_logits(call):
            raise MemTuneError(
                f"output_router_logits=True with stream_order=layers{OF_TRL}: they are noted while the body runs, whose layers run by themselves "
                f"here. {BY_CHUNKS}"
            )
        architecture = self.router.architecture
        self.layers = architecture.decoder.layers
        self.returns_tuple = returns_tuple
        self._learns_around = bool(call.inputs) or _learns_outside(architecture)
        self._first = 0  # the first layer that goes backward
        self._attending: list[set[int]] = []  # of each layer, its attention modules to its own stack
        self._kept: dict[int, RowTensor] = {}  # inputs of layers, (B, T, D) each, but the first's, which the body makes again

    def _new_stores(self) -> tuple[KeyValueStore, OwedGradients]:
        """On the device: they are of one layer."""
        return KeyValueStore(), OwedGradients(self.means.sums_dtype)

    def stored(self) -> list[Tensor]:
        return [*super().stored(), *(tensor for kept in self._kept.values() for tensor in kept.tensors())]

    # -- forward

    def run_forward(self, records: Records) -> None:
        """All layers without gradient, each for all chunks."""
        with torch.no_grad(), not_checkpointing(self.router.architecture.base):
            self._first = self._first_that_learns()
            seen = []
            for number in range(self.count):
                self.tape.record(("before", number))
                seen.append(self._around(self._context(number)))
                self.tape.forget_if_still(("before", number))
                self._layer_forward(0, number, seen[-1], seen[-1].entry())
            self._layer_done(0)
            for layer in range(1, len(self.layers)):
                for number, around in enumerate(seen):
                    self._layer_forward(layer, number, around, self._input(layer, around.span))
                self._layer_done(layer)
        forget_casts()
        self._require_kept()

    def _first_that_learns(self) -> int:
        """The first layer that is trained, or is given something that is learned before it; the last one, if only what follows it learns.

        What is learned around the layers may stand before or after them. Only the graph that the body makes tells which.
        """
        trained = (number for number, layer in enumerate(self.layers) if any(p.requires_grad for p in layer.parameters()))
        first = next(trained, len(self.layers) - 1)
        if not first or not self._learns_around:
            return first
        with torch.enable_grad(), self.tape.replaying("where it learns"):  # what is drawn here is drawn again
            around = self._around(self._context(0))
        own = {id(leaf) for leaf in self.call.leaves}
        given = [(around.hidden, around.calls[0]), *around.calls[1:first]]
        learned = (number for number, values in enumerate(given) if any(_is_learned(value, own) for value in tree_leaves(values)))
        return next(learned, first)

    def _layer_forward(self, layer: int, number: int, around: Around, hidden: Tensor) -> None:
        self.tape.record((layer, number))
        hidden = self._run_layer(layer, around, hidden)
        self.tape.forget_if_still((layer, number))
        if layer + 1 == len(self.layers):
            self.tape.record(("after", number))
            self.outputs.put(self._around(self._context(number), instead=hidden).output, around.span)
            self.tape.forget_if_still(("after", number))
            return
        if layer + 1 not in self._kept:
            self._kept[layer + 1] = RowTensor(hidden, self.rows.length, self.means.host)
        self._kept[layer + 1].put(hidden, around.span.first)

    def _layer_done(self, layer: int) -> None:
        self._attending.append({key for key in self.store.keys() if self.router.places.stack_of_key(key) == "decoder"})
        self.store.clear()
        if layer < self._first:
            self._kept.pop(layer, None)
            self._drop_attention(layer)

    def _drop_attention(self, layer: int) -> None:
        if self.kept_attention is not None:
            for key in self._attending[layer]:
                self.kept_attention.drop(key)

    # -- backward

    def _all_go_backward(self, cotangents: list[Tensor | None]) -> None:
        with not_checkpointing(self.router.architecture.base), torch.no_grad():
            seen = []
            for number in range(self.count):
                with self.autocast.restored(), self.tape.replaying(("before", number)), torch.set_grad_enabled(self._learns_around):
                    seen.append(self._around(self._stream(number)))
                self._require_constants(seen[-1])
                seen[-1].entry()  # with its graph: let go of it
            arriving: RowTensor | None = None
            for layer in reversed(range(self._first, len(self.layers))):
                self._make_keys(layer, seen)
                reached = [self._layer_backward(layer, n, seen[n], cotangents, arriving) for n in reversed(range(self.count))]
                self.store.clear()
                self._drop_attention(layer)
                arriving = self._kept.pop(layer, None)  # its inputs no more, but their gradient
                if not any(reached):
                    break

    def _make_keys(self, layer: int, seen: list[Around]) -> None:
        """Keys and values of all chunks but the last, which stores its own when it runs."""
        if not self._attending[layer]:
            return
        with self.autocast.restored():  # around all chunks: weights are cast once
            for number, around in enumerate(seen[:-1]):
                hidden = self._input(layer, around.span) if layer else self._entry(number)
                with self.tape.replaying((layer, number)):
                    self._run_layer(layer, around, hidden, KeysPass(around.running, self._attending[layer]))

    def _layer_backward(self, layer: int, number: int, around: Around, cotangents: list[Tensor | None], arriving: RowTensor | None) -> bool:
        """One chunk of one layer. arriving: dL/d(its output), None for the last layer. dL/d(its input) takes the place of its input.

        Returns whether there is any.
        """
        forget_casts()
        span = around.span
        leaf = self._input(layer, span).requires_grad_(layer > self._first) if layer else None
        with torch.enable_grad(), self.autocast.restored():
            entry = self._entry(number, self._learns_around) if leaf is None else leaf.view_as(leaf)
            with self.tape.replaying((layer, number)):
                hidden = self._run_layer(layer, around, entry)
            if layer + 1 == len(self.layers):
                with self.tape.replaying(("after", number)):
                    output = self._around(self._stream(number), instead=hidden).output
                tensors, gradients = self.outputs.roots(output, cotangents, span)
                assert isinstance(around.running, StreamPass)  # as in backward
                require_seeing(around.running.blind, gradients)
                self.tokens_run += span.index.shape[1] * self.rows.batch
            else:
                assert arriving is not None
                # of the first layer that goes backward, nothing may have been learned in this call: adapters that are not used
                tensors, gradients = ([hidden], [arriving.get(span.first, span.index.shape[1])]) if hidden.requires_grad else ([], [])
            del hidden, entry
        if tensors:
            torch.autograd.backward(tensors, gradients)
        self.means.listeners.tell("chunk_ends")
        if leaf is None or not leaf.requires_grad:
            return False
        self._kept[layer].put(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, span.first)
        return leaf.grad is not None

    def _entry(self, number: int, learns: bool = False) -> Tensor:
        """What the first layer is given of a chunk, made again by the body. learns: with what may be learned before the first layer."""
        with self.tape.replaying(("before", number)), torch.set_grad_enabled(learns):
            hidden = self._around(self._stream(number)).entry()
        return hidden if learns else hidden.detach()

    def _require_constants(self, around: Around) -> None:
        """Arguments of layers may be learned only where they are the caller's own."""
        own = {id(leaf) for leaf in self.call.leaves}
        for layer, call in enumerate(around.calls):
            if any(isinstance(value, Tensor) and value.requires_grad and id(value) not in own for value in tree_leaves(call)):
                raise UnsupportedModelError(
                    f"{self.router.architecture.name}: layer {layer} is given something that is learned beside its hidden states, whose "
                    f"gradient would be lost. {BY_CHUNKS}"
                )

    def _input(self, layer: int, span: Span) -> Tensor:
        """Of any layer but the first."""
        return self._kept[layer].get(span.first, span.index.shape[1])

    # -- a layer, and the body around the layers

    def _run_layer(self, layer: int, around: Around, hidden: Tensor, running: ChunkPass | None = None) -> Tensor:
        """What a layer makes of (B, S, D), in the pass of the body around it, or another."""
        args, kwargs = around.calls[layer]
        running = running or around.running
        running.stack = "decoder"
        with self.router.routed(running), at_positions(self.router.architecture, self.call, running.spans):
            try:
                output = self.layers[layer](hidden, *args, **kwargs)
            except Made:
                return hidden
            finally:
                running.forget_masks()
        return output[0] if isinstance(output, tuple) else output

    def _spans(self, number: int) -> dict[str, Span]:
        return self.call.spans(self.rows.chunk(*self.chunks.bounds(number)))

    def _context(self, number: int) -> ContextPass:
        return ContextPass(
            self._spans(number), self.store, self.router.places, Records({}, wanted=False), self.router.kernel_facts, self.kept_attention
        )

    def _stream(self, number: int) -> StreamPass:
        return self._pass(self._spans(number), stores=number + 1 == self.count)

    @property
    def _is_alone(self) -> bool:
        """Whether the row is one chunk."""
        return self.count == 1

    def _around(self, running: ChunkPass, instead: Tensor | None = None) -> Around:
        """The body on one chunk, with layers that do nothing. instead: what the last of them returns."""
        around = Around(running, running.spans["decoder"])
        with self.router.running(running), at_positions(self.router.architecture, self.call, running.spans):
            with self._layers_as(around, instead):
                around.output = self.call.forward(**self.call.at(running.spans, running))
        return around

    @contextmanager
    def _layers_as(self, around: Around, instead: Tensor | None) -> Iterator[None]:
        travelling: list[Tensor] = []

        def handing_on(layer: int, *args, **kwargs):
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if travelling and hidden is not travelling[-1]:
                raise UnsupportedModelError(
                    f"{self.router.architecture.name}: layer {layer} is not given what the layer before it returned, as it is: between "
                    f"its layers something happens to the hidden states. {BY_CHUNKS}"
                )
            if layer != len(around.calls):
                raise UnsupportedModelError(
                    f"{self.router.architecture.name}: its body runs layer {layer} where layer {len(around.calls)} was expected. {BY_CHUNKS}"
                )
            if not travelling:
                around.hidden = hidden
            around.calls.append((args, kwargs))
            is_last = layer + 1 == len(self.layers)
            travelling.append(instead if is_last and instead is not None else hidden)
            return (travelling[-1],) if self.returns_tuple else travelling[-1]

        with ExitStack() as stack:
            for number, module in enumerate(self.layers):
                stack.enter_context(instance_attribute(module, "forward", partial(handing_on, number)))
                for name in _HOOKS:  # they belong to a run of the layer
                    stack.enter_context(instance_attribute(module, name, OrderedDict()))
            yield


def _learns_outside(architecture: Architecture) -> bool:
    """Whether anything of the body but the layers of its decoder is trained."""
    inside = {id(p) for layer in architecture.decoder.layers for p in layer.parameters()}
    return any(p.requires_grad and id(p) not in inside for p in architecture.base.parameters())


def _is_learned(value: Any, own: set[int]) -> bool:
    """Whether a gradient is wanted of a value: not of a leaf that a hook has made of a constant (`enable_input_require_grads`)."""
    return isinstance(value, Tensor) and value.requires_grad and (not value.is_leaf or id(value) in own)


def wants_router_logits(call: BodyCall) -> bool:
    """Whether the body is to return them, which it notes while its layers run."""
    name = "output_router_logits"
    return bool(call.arguments.get(name, getattr(call.architecture.base.config, name, False)))
