"""The last block of a model alone, on inputs that a context pass has recorded.

The model's own loop runs, with every block before the last one handing its input on and the last one given the recorded input: embeddings
are computed for their shape alone, masks, rotary angles and the final norm by the model itself.

Shape legend: B rows of a batch, T tokens in a row, S tokens of a chunk, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from hf_memtune.core.owed import OwedGradients
from hf_memtune.core.store import KeyValueStore
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.passes import StreamPass, WholePass
from hf_memtune.methods.attention.positions import at_positions
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.attention.spans import Span
from hf_memtune.methods.layer_override import override_of
from hf_memtune.methods.overrides import forward_as, forwards_as

Cotangent = Callable[[Tensor, int], Tensor]
"""Maps last hidden states (B, S, D) of the tokens from some position on to the gradient of a loss with respect to them, (B, S, D)."""


class LastBlock:
    """Of one call of the body. chunk: tokens of a row that ran at a time in the context pass; all of them where it ran whole.

    known: (B, T, D), what came out of the decoder, as long as somebody has it anyway: then nothing runs for it; else None.
    """

    def __init__(self, router: Router, call: BodyCall, records: Records, store: KeyValueStore, chunk: int):
        self.router, self.call, self.records, self.store, self.chunk = router, call, records, store, chunk
        self.architecture = router.architecture
        self.known: Tensor | None = None

    @torch.no_grad()
    def output(self, stack: str = "decoder") -> Tensor:
        """(B, T, D): what comes out of a stack."""
        if stack == "decoder" and self.known is not None:
            return self.known
        if self._is_whole:
            leaves = {name: torch.cat(chunks, dim=1) for name, chunks in self.records.hidden.items()}
            return self._encoder_output(leaves) if stack == "encoder" else self._whole(leaves)
        return torch.cat([self._chunk(span, hidden.detach(), OwedGradients()) for span, hidden in self._chunks()], dim=1)

    @torch.enable_grad()
    def gradients(self, cotangent: Cotangent) -> dict[str, Tensor]:
        """dL/d(input of the last block), (B, T, D) for each stack."""
        if self._is_whole:
            leaves = {name: torch.cat(parts, dim=1).requires_grad_() for name, parts in self.records.hidden.items()}
            output = self._whole(leaves)
            found = torch.autograd.grad(output, list(leaves.values()), cotangent(output.detach(), 0), allow_unused=True)
            return {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(leaves, found)}
        # from last to first: what later chunks owe to a chunk's keys and values is complete when its turn comes
        gradient: list[Tensor] = []
        owed = OwedGradients()
        for span, hidden in reversed(list(self._chunks())):
            leaf = hidden.detach().requires_grad_()
            output = self._chunk(span, leaf, owed)
            gradient += torch.autograd.grad(output, leaf, cotangent(output.detach(), span.first))
        return {"decoder": torch.cat(gradient[::-1], dim=1)}

    @property
    def lengths(self) -> list[int]:
        """Tokens of the chunks that the last block runs on, in order."""
        return [self.call.decoder.length] if self._is_whole else [hidden.shape[1] for hidden in self.records.hidden["decoder"]]

    @property
    def _is_whole(self) -> bool:
        return self.chunk >= self.call.decoder.length

    def _chunks(self) -> Iterator[tuple[Span, Tensor]]:
        start = 0  # chunks are not all of one length: see Chunks
        for hidden in self.records.hidden["decoder"]:
            yield self.call.decoder.chunk(start, start + hidden.shape[1]), hidden
            start += hidden.shape[1]

    def _chunk(self, span: Span, hidden: Tensor, owed: OwedGradients) -> Tensor:
        """(B, S, D): the last block's output for a chunk, differentiable where its input is."""
        spans = self.call.spans(span)
        tail = StreamPass(spans, self.store, self.router.places, self.router.kernel_facts, owed)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(hidden.requires_grad))
            stack.enter_context(at_positions(self.architecture, self.call, spans))
            stack.enter_context(self.router.running(tail))
            stack.enter_context(only_last_block(self.architecture.decoder.layers, hidden))
            return self.call.forward(**self.call.at(spans, tail)).last_hidden_state

    def _whole(self, leaves: dict[str, Tensor]) -> Tensor:
        """(B, T, D): all tokens at once, through the model's own attention."""
        whole = self._whole_pass()
        arguments = self.call.arguments | self.call.at(whole.spans, whole)
        if self.architecture.is_encoder_decoder and self.call.encoded is None:
            arguments["encoder_outputs"] = (self._encoder_output(leaves),)
        with self.router.running(whole), only_last_block(self.architecture.decoder.layers, leaves["decoder"]):
            return self.call.forward(**arguments).last_hidden_state

    def _encoder_output(self, leaves: dict[str, Tensor]) -> Tensor:
        """The encoder's last block, from its recorded input, so that the decoder's gradient reaches it."""
        stack = self.architecture.stacks["encoder"]
        with self.router.running(self._whole_pass()), only_last_block(stack.layers, leaves["encoder"]):
            return stack.module(**self.call.encoder_arguments()).last_hidden_state

    def _whole_pass(self) -> WholePass:
        return WholePass(self.call.spans(), self.store, self.router.places, self.router.kernel_facts)


def _hand_on(hidden_states: Tensor, *args, **kwargs) -> Tensor:
    return hidden_states


def _starting_from(forward: Callable, hidden: Tensor) -> Callable:
    def run(hidden_states: Tensor, *args, **kwargs):
        return forward(hidden, *args, **kwargs)

    return run


@contextmanager
def only_last_block(layers: nn.ModuleList, hidden: Tensor) -> Iterator[None]:
    """While open, the stack `layers` computes its last block alone, on `hidden` (B, S, D)."""
    last = layers[-1]
    forward = last.forward if (override := override_of(last)) is None else override.alone
    with forwards_as((layer, _hand_on) for layer in layers[:-1]), forward_as(last, _starting_from(forward, hidden)):
        yield
