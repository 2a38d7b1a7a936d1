"""The exact backward pass of a causal model in a stream: chunks of tokens, each recomputed with gradient, from the last to the first.

1. Forward: the chunks run from first to last without gradient; their keys and values are stored. The last one runs with gradient, and
   keeps its graph: it would be the first to run again.
2. Backward: dL/dhidden of all tokens is given. Each chunk runs again, with gradient, from the last to the first. Its queries attend to
   what is stored; what it finds for the keys and values of the tokens before it is booked as owed to them (`core.owed`), and enters when
   their chunk's turn comes.

The activations of one chunk are alive at a time. Cost: a forward pass more than plain training, less the last chunk's. The recurrence is
known: SeCO (arXiv 2505.16710), OOMB (arXiv 2602.02108), StreamBP (arXiv 2506.03077).
Shape legend: B rows of a batch, T tokens in a row, D hidden size.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hf_memtune.architectures import Architecture
from hf_memtune.core.kept_attention import KeptAttention
from hf_memtune.core.offload import HostMemory, OffloadedStore, OffloadedSums
from hf_memtune.core.owed import OwedGradients
from hf_memtune.core.recompute import forget_casts
from hf_memtune.core.rng import RandomTape
from hf_memtune.core.selection import Selection
from hf_memtune.core.store import KeyValueStore
from hf_memtune.errors import MemTuneError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.context import context_pass
from hf_memtune.methods.attention.passes import StreamPass
from hf_memtune.methods.attention.positions import at_positions
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.attention.spans import Span
from hf_memtune.methods.attention.states import States
from hf_memtune.methods.events import Listeners
from hf_memtune.methods.layer_override import override_of
from hf_memtune.methods.repeated import RepeatedCall
from hf_memtune.methods.streaming.embedding import rows_summed_in_place
from hf_memtune.methods.tied import is_tied

logger = logging.getLogger(__name__)
_SEES_NOTHING = (
    "the loss reads what the model makes of padding that sees no token. Eager attention lets it see the whole row, later tokens included, "
    "which a stream has not got. Pad rows on the right, or give no label to the first token of a row that is padded on the left "
    "(labels[:, 1:][attention_mask[:, :-1] == 0] = -100), or load the model with attn_implementation='sdpa'."
)
CONTEXT_TOKENS = 512  # of a row, for which the context pass may take several chunks at once: small matrix products are slow


def require_seeing(blind: Tensor | None, gradients: Sequence[Tensor]) -> None:
    """Raises MemTuneError where a gradient, (B, S, D) each, comes to tokens that see none. blind: (B, S) bool, these tokens; None: there are none."""
    if blind is not None and any(bool((g != 0).flatten(2).any(-1).logical_and(blind).any()) for g in gradients):
        raise MemTuneError(_SEES_NOTHING)


@dataclass(frozen=True)
class Means:
    """What streams of a model run with.

    host: memory off the device, where keys and values are to be kept there, else None. sums_dtype: of what chunks owe to one another;
    None: as it comes. keeps_attention: whether what attention gave in forward is kept for backward. shares_head: whether a head is there that hands the gradient of a matrix it shares with the embedding to the stream.
    listeners: who is told when a chunk has gone backward.
    """

    router: Router
    chunk: int
    host: HostMemory | None = None
    sums_dtype: torch.dtype | None = None
    keeps_attention: bool = False
    shares_head: bool = False
    listeners: Listeners = field(default_factory=Listeners)


@dataclass(frozen=True)
class Ran:
    """A chunk that ran with gradient: its tokens, what the body returned, and the cache with the states that it left."""

    span: Span
    output: Any
    cache: Cache | None


class ChunkStream(RepeatedCall):
    """One call of a model's body on its way.

    keeps_last: whether the last chunk runs with gradient in forward. tokens_run: in backward, over all rows.
    """

    leaves_out = False  # whether some tokens may not run in backward

    def __init__(self, means: Means, call: BodyCall, keeps_last: bool = True):
        super().__init__(means.router, call)
        self.means, self.rows, self.chunk = means, call.decoder, means.chunk
        self.states = States(self.router.cache, means.host)
        self.chunks = call.chunks(self.chunk, self.router.cache)
        self.store, self.owed = self._new_stores()
        self.tape = RandomTape({p.device for p in self.router.architecture.head_model.parameters()})
        self._matrix = _tied_matrix(self.router.architecture, self.sums.parameters) if means.shares_head else None
        self.count, self.tokens_run = self.chunks.count, 0
        # a chunk that is the whole row attends in the model's own way
        self.kept_attention = KeptAttention(means.host) if means.keeps_attention and self.count > 1 else None
        self._keeps_last = keeps_last and not self.leaves_out
        self._last: Ran | None = None
        self._blind: Tensor | None = None  # of the chunk that ran last: see StreamPass

    def _new_stores(self) -> tuple[KeyValueStore, OwedGradients]:
        """For keys and values, and for what chunks owe to them."""
        host, dtype = self.means.host, self.means.sums_dtype
        if host is None:
            return KeyValueStore(), OwedGradients(dtype)
        return OffloadedStore(host), OwedGradients(dtype, OffloadedSums(host))

    # -- forward

    def run_forward(self, records: Records) -> None:
        """All chunks without gradient, but the last one, where that keeps its graph: see `run_last`."""
        last = self.count - 1
        together = 1 if records.wanted else self._chunks_together()
        until = last if self._keeps_last else self.count
        context_pass(
            self.router,
            self.call,
            self.store,
            records,
            self.chunks,
            until,
            self.states,
            self.outputs,
            self.tape,
            together,
            self.kept_attention,
        )
        self._require_kept()

    def _require_kept(self) -> None:
        """Refuse a call of which no attention was kept; warn of modules whose attention was not, once of each."""
        if self.kept_attention is None:
            return
        name = self.router.architecture.name
        own = "its own kernel computes it, as it does with dropout, a bias of positions, soft-capped scores or sinks"
        if self.kept_attention.is_empty:
            raise MemTuneError(
                f"{name}: keep_attention_outputs: got True, but no attention of this call could be kept: {own}. Leave keep_attention_outputs out."
            )
        if new := self.kept_attention.left_out - self.router.told_of:
            self.router.told_of |= new
            names = [path for path, module in self.router.architecture.base.named_modules() if id(module) in new]
            logger.warning(
                "%s: keep_attention_outputs: the attention of %s is computed again in backward: %s.", name, ", ".join(names), own
            )

    def run_last(self) -> None:
        """The last chunk, with gradient, where it keeps its graph: it would be the first to run again."""
        if self._keeps_last:
            with self.sums.standing_in(), self._summed_rows():
                self._last = self._run(self.count - 1, self.rows.chunk(*self.chunks.bounds(self.count - 1)), stores=True)
            self.outputs.put(self._last.output, self._last.span)

    def take_outputs(self) -> list[Tensor]:
        """Of all tokens; and the matrix for the head to use, where it shares its gradient."""
        found = super().take_outputs()
        return found if self._matrix is None else [*found, self._matrix.view_as(self._matrix)]

    @property
    def shares_matrix(self) -> bool:
        """Whether the last of its outputs is the matrix that embedding and head share, for the head to use."""
        return self._matrix is not None

    def stored(self) -> list[Tensor]:
        """Keys and values, sums of their gradients, and attention that is kept, on the device."""
        attended = [] if self.kept_attention is None else self.kept_attention.tensors()
        return [*self.store.tensors(), *attended, *self.owed.tensors(), *self.states.tensors()]

    def _chunks_together(self) -> int:
        """Chunks of the context pass that need no more bytes at once than one needs with gradient, up to CONTEXT_TOKENS.

        Without gradient the intermediates of one layer are alive, with it those of all layers from the first that is trained. Where it is
        not so (activation checkpointing, reversible layers, chunks of which few tokens run), one at a time.
        """
        base = self.router.architecture.base
        if (
            self.states
            or self.leaves_out
            or any(getattr(m, "gradient_checkpointing", False) or override_of(m) is not None for m in base.modules())
        ):
            return 1
        return max(1, min(CONTEXT_TOKENS // self.chunk, layers_with_gradient(self.router.architecture) // 4))

    # -- backward

    def _run_again(self, cotangents: list[Tensor | None]) -> None:
        """Every chunk runs and goes backward by itself."""
        if self._matrix is not None and (of_head := cotangents.pop()) is not None:
            self.sums.add(self._matrix, of_head)
            del of_head
        cotangents = self.going(cotangents)
        with torch.enable_grad(), self.sums.standing_in(), self._summed_rows():
            self._all_go_backward(cotangents)

    def _all_go_backward(self, cotangents: list[Tensor | None]) -> None:
        for number in reversed(range(self.count)):
            self._go_backward(number, cotangents)

    def going(self, cotangents: list[Tensor | None]) -> list[Tensor | None]:
        """The gradient of the outputs to go backward with, of the one that was given."""
        return cotangents

    def _go_backward(self, number: int, cotangents: list[Tensor | None]) -> None:
        span = self._span(number)
        if span is None:
            return
        forget_casts()
        ran, self._last = self._last, None
        if ran is None:
            with self.autocast.restored(), self.tape.replaying(number):  # what goes backward does so without, as after any forward
                ran = self._run(number, span, stores=False)
        tensors, gradients = self.outputs.roots(ran.output, cotangents, span)
        require_seeing(self._blind, gradients)
        states, owed = self.states.roots(ran.cache)
        del ran
        self.tokens_run += span.index.shape[1] * self.rows.batch if span.selection is None else sum(span.selection.counts)
        torch.autograd.backward([*tensors, *states], [*gradients, *owed])
        self.states.settle(number)
        self.means.listeners.tell("chunk_ends")

    def _run(self, number: int, span: Span, stores: bool) -> "Ran":
        """One chunk with gradient."""
        spans = self.call.spans(span)
        running = self._pass(spans, stores)
        cache = self.states.begin_live(number, self.chunks.bounds(number)[0], running)
        with self.router.running(running, cache), at_positions(self.router.architecture, self.call, spans):
            output = self.call.forward(**self.call.at(spans, running, cache=cache))
        self._blind = running.blind
        return Ran(span, output, cache)

    def _pass(self, spans: dict[str, Span], stores: bool) -> StreamPass:
        """Of one chunk, with gradient. stores: whether its keys and values are not stored yet."""
        places, facts = self.router.places, self.router.kernel_facts
        return StreamPass(spans, self.store, places, facts, self.owed, stores, self._is_alone, self.kept_attention)

    @property
    def _is_alone(self) -> bool:
        """Whether the row is one chunk, for which nobody will ask again."""
        return self.count == 1 and self._keeps_last and self.means.host is None

    @contextmanager
    def _summed_rows(self) -> Iterator[None]:
        with ExitStack() as stack:
            embedding = self.router.architecture.base.get_input_embeddings()
            if isinstance(embedding, nn.Embedding) and embedding.weight.requires_grad:
                stack.enter_context(rows_summed_in_place(embedding))
            yield

    # -- which tokens of a chunk run

    def wanted(self, start: int, stop: int) -> Tensor:
        """Where tokens may be left out: which of a chunk's run, (B, stop - start) bool."""
        raise NotImplementedError

    def _span(self, number: int) -> Span | None:
        """The tokens of a chunk that run; None where none does."""
        start, stop = self.chunks.bounds(number)
        if not self.leaves_out:
            return self.rows.chunk(start, stop)
        kept = self.wanted(start, stop)
        counts = kept.sum(1).tolist()
        if not any(counts):
            return None
        if min(counts) == stop - start:
            return self.rows.chunk(start, stop)
        order = kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : max(counts)]
        index = order.sort(dim=1).values
        selection = Selection(index + start, kept.gather(1, index), tuple(counts), self.rows.length)
        return self.rows.kept_of_chunk(selection, start, stop)


def _tied_matrix(architecture: Architecture, trained: Sequence[Tensor]) -> Tensor | None:
    """The matrix that the embedding of one stack and the head share, if it is trained, as a parameter of the body."""
    if not is_tied(architecture):
        return None
    return next((parameter for parameter in trained if parameter is architecture.head.weight), None)


def layers_with_gradient(architecture: Architecture) -> int:
    """Layers of the decoder that a gradient goes through: those above the embedding, or the first layer, that is trained."""
    layers = architecture.decoder.layers
    if any(p.requires_grad for p in architecture.base.get_input_embeddings().parameters()):
        return len(layers)
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return len(layers) - trained.index(True) if any(trained) else 0
