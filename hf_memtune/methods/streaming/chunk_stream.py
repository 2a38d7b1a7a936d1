"""The exact backward pass of a causal model in a stream: chunks of tokens, each recomputed with gradient, from the last to the first.

1. The context pass runs the chunks from first to last without gradient and stores keys and values.
2. Each chunk then runs again, with gradient, from the last to the first. Its queries attend to what is stored; what it finds for the
   keys and values of the tokens before it is booked as owed to them (`core.owed`), and enters when their chunk's turn comes.

The activations of one chunk are alive at a time. Cost: a forward pass more than plain training, less the last chunk's.
Shape legend: B rows of a batch, T tokens in a row, S tokens of a turn, D hidden size.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_memtune.architectures import Architecture
from hf_memtune.core.offload import OffloadedStore, OffloadedSums
from hf_memtune.core.owed import Joined, OwedGradients
from hf_memtune.core.rng import RandomTape
from hf_memtune.core.selection import Selection
from hf_memtune.core.store import KeyValueStore
from hf_memtune.errors import MemTuneError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.context import context_pass
from hf_memtune.methods.layer_override import override_of
from hf_memtune.methods.overrides import forward_as
from hf_memtune.methods.attention.passes import Records, StreamPass
from hf_memtune.methods.attention.positions import at_positions
from hf_memtune.methods.attention.spans import Span

if TYPE_CHECKING:
    from hf_memtune.methods.installed import InstalledStrategy

CONTEXT_TOKENS = 512  # of a row, for which the context pass may take several chunks at once: small matrix products are slow
NOT_BACKWARD = "the loss of a turn has not gone backward before the next began, which must know what it owes to earlier tokens."

Wanted = Callable[[int, int, Tensor | None], Tensor]
"""Maps a chunk [start, stop) and what is owed to its tokens' keys and values, (B, stop) or None, to which of them run: (B, stop - start) bool."""


def chunk_count(length: int, chunk: int) -> int:
    return math.ceil(length / chunk)


def _layers_with_gradient(architecture: Architecture) -> int:
    """Layers of the decoder that a gradient goes through: those above the embedding, or the first layer, that is trained."""
    layers = architecture.decoder.layers
    if any(p.requires_grad for p in architecture.base.get_input_embeddings().parameters()):
        return len(layers)
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return len(layers) - trained.index(True) if any(trained) else 0


class ChunkStream:
    """One batch on its way through the model. `run` is to be called `chunk_count` times, or less where tokens are skipped.

    wanted: which tokens of a chunk run at all; None: all of them (exact). encoded: the output of the encoder, where there is one, for
    all chunks but the last to run.
    """

    def __init__(self, strategy: "InstalledStrategy", call: BodyCall, chunk: int, wanted: Wanted | None = None):
        self.strategy, self.call, self.chunk, self.wanted = strategy, call, chunk, wanted
        self.rows = call.rows["decoder"]
        if strategy.config.kv_offload:
            self.store, self.owed = OffloadedStore(strategy.host), OwedGradients(strategy.sums_dtype, OffloadedSums(strategy.host))
        else:
            self.store, self.owed = KeyValueStore(), OwedGradients(strategy.sums_dtype)
        self.tape = RandomTape({p.device for p in strategy.architecture.head_model.parameters()})
        self.tokens_run = 0
        self._next, self._stored = chunk_count(self.rows.length, chunk) - 1, 0
        self.encoded: Tensor | None = None

    @property
    def is_done(self) -> bool:
        return self._next < 0

    @property
    def is_last(self) -> bool:
        """Whether the next chunk to run is the first of the row, with which the batch is done."""
        return self._next == 0

    def store_context(self, records: Records, last_too: bool = False, keep_output: bool = False) -> Tensor | None:
        """The context pass. The last chunk needs none, since it stores its keys and values itself, unless `last_too`."""
        self._encode()
        self._stored = self._next + int(last_too)
        together = 1 if records.wanted else self._chunks_together()
        return context_pass(
            self.strategy, self.call, self.store, records, self.chunk, range(self._stored), self.tape, keep_output, self.encoded, together
        )

    def _chunks_together(self) -> int:
        """Chunks of the context pass that need no more bytes at once than one needs with gradient, up to CONTEXT_TOKENS.

        Without gradient the intermediates of one layer are alive, with it those of all layers from the first that is trained. Where it is
        not so (activation checkpointing, reversible layers, chunks of which few tokens run), one at a time.
        """
        base = self.strategy.architecture.base
        if self.wanted is not None or any(getattr(m, "gradient_checkpointing", False) or override_of(m) is not None for m in base.modules()):
            return 1
        return max(1, min(CONTEXT_TOKENS // self.chunk, _layers_with_gradient(self.strategy.architecture) // 4))

    def skip(self, first_turn: bool = False) -> None:
        """Pass over chunks of which no token is wanted. The row's first chunk always runs: processes meet there."""
        while self.wanted is not None and self._next > int(first_turn) and not bool(self._wanted_of_next().any()):
            self._next -= 1

    def run(self) -> tuple[Span, Any]:
        """Run the next chunk with gradient. Returns its tokens, and what the body gave for them."""
        if self.is_done:
            raise MemTuneError("all chunks of this step have run: open a step for each batch, and go through its turns once.")
        if self.owed.is_awaited:
            raise MemTuneError(NOT_BACKWARD)
        number, self._next = self._next, self._next - 1
        stores = number >= self._stored
        alone = self._stored == 0 and not self.strategy.config.kv_offload  # the row is one chunk, and no pass has stored it
        span = self._span(number)
        torch.clear_autocast_cache()  # casts of weights that were made without gradient must not be used where one is wanted
        running = StreamPass(
            {**{name: rows.whole() for name, rows in self.call.rows.items()}, "decoder": span},
            self.store, self.strategy.places, self.strategy.kernel_knows_causal, self.owed, stores, alone,
        )
        if stores:
            output = self._forward(running, is_last=number == 0)
        else:
            with self.tape.replaying(number):
                output = self._forward(running, is_last=number == 0)
        self.tokens_run += span.index.shape[1] * self.rows.batch if span.selection is None else sum(span.selection.counts)
        return span, output

    def _forward(self, running: StreamPass, is_last: bool):
        architecture = self.strategy.architecture
        with ExitStack() as stack:
            if architecture.is_encoder_decoder and is_last:  # it goes backward once, with what all chunks owe to its output
                encoder = architecture.stacks["encoder"].module
                stack.enter_context(forward_as(encoder, self._joining(encoder.forward)))
            stack.enter_context(at_positions(architecture, self.call, running.spans))
            stack.enter_context(self.strategy.running(running))
            return self.call.forward(**self.call.at(running.spans, None if is_last else self.encoded))

    def _encode(self) -> None:
        """The encoder's output, without gradient, for all chunks but the last to run."""
        architecture = self.strategy.architecture
        if not architecture.is_encoder_decoder or self.is_last:
            return
        self.tape.record("encoder")
        spans = {name: rows.whole() for name, rows in self.call.rows.items()}
        running = StreamPass(spans, self.store, self.strategy.places, self.strategy.kernel_knows_causal, self.owed)
        with torch.no_grad(), self.strategy.running(running):
            encoded = architecture.stacks["encoder"].module(**self.call.encoder_arguments()).last_hidden_state
        self.encoded = encoded.requires_grad_()

    def _joining(self, forward: Callable) -> Callable:
        def run(*args, **kwargs):
            self.tape.replay("encoder")
            output = forward(*args, **kwargs)
            if self.encoded is not None:
                output.last_hidden_state = Joined.apply(output.last_hidden_state, self.encoded.grad)
                self.encoded = None
                self.tape.replay(0)
            return output

        return run

    # -- which tokens of a chunk run

    def _bounds(self, number: int) -> tuple[int, int]:
        return number * self.chunk, min((number + 1) * self.chunk, self.rows.length)

    def _wanted_of_next(self) -> Tensor:
        start, stop = self._bounds(self._next)
        return self.wanted(start, stop, self.owed.mass(stop))

    def _span(self, number: int) -> Span:
        start, stop = self._bounds(number)
        if self.wanted is None:
            return self.rows.chunk(start, stop)
        kept = self.wanted(start, stop, self.owed.mass(stop))
        counts = kept.sum(1).tolist()
        if min(counts) == stop - start:
            return self.rows.chunk(start, stop)
        order = kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : max(1, *counts)]
        index = order.sort(dim=1).values
        selection = Selection(index + start, kept.gather(1, index), tuple(counts), self.rows.length)
        return self.rows.kept_of_chunk(selection, start, stop)
