"""One call with token_gradient=cut: all tokens run forward without gradient, the kept ones again, with gradient, among them.

Keys and values of the tokens that are not kept are constants, and so are their outputs: the gradients equal those of a full run in which
they are detached. The context pass runs without dropout.

Shape legend: B rows of a batch, T tokens in a row, S kept tokens, D hidden size.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from hf_memtune.core.recompute import forget_casts
from hf_memtune.core.selection import Selection
from hf_memtune.core.store import KeyValueStore, place
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.context import context_pass
from hf_memtune.methods.attention.outputs import BodyOutputs
from hf_memtune.methods.attention.passes import FocusPass
from hf_memtune.methods.attention.positions import at_positions
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.attention.states import States
from hf_memtune.methods.repeated import RepeatedCall
from hf_memtune.methods.seeking.choice import Choice
from hf_memtune.methods.seeking.last_block import LastBlock
from hf_memtune.methods.tied import tied_matrix


class ChosenCall(RepeatedCall):
    """A call whose tokens are chosen. records: what its pass over all tokens leaves for scores. chunk: tokens of a row that this ran at a time."""

    choice: Choice
    records: Records
    chunk: int

    def let_go_of_scores(self) -> None:
        """When tokens are chosen: before those that are kept need the memory."""
        self.records.clear()
        self.choice.block = self.choice.scores = None

    def choose_by(self, gradient: Tensor | None) -> None:
        """In backward, by dL/dhidden (B, T, D). Where tokens were chosen already it was for another loss of the same call: they are chosen again."""
        with self.autocast.restored(), self.sums.as_called():
            if self.choice.selection is not None:
                self.choice = _chosen_again(self)
            self.choice.by_gradient(gradient)


class DitchedCall(ChosenCall):
    """chunk: tokens of a row that go through the context pass at a time. records: what it leaves for scores.

    matrix: after `focus`, what the head is to use in place of its weight, where it shares that with the embedding; else None.
    gives_encoded: whether the last of the outputs is that of an encoder, which ran with the call.
    """

    def __init__(self, router: Router, call: BodyCall, choice: Choice, chunk: int, records: Records):
        super().__init__(router, call)
        self.choice, self.chunk, self.records = choice, chunk, records
        self.matrix: Tensor | None = None
        self.gives_encoded = False
        self._store: KeyValueStore | None = KeyValueStore()

    @property
    def store(self) -> KeyValueStore:
        """Keys and values of all tokens, until `focus` takes them."""
        assert self._store is not None
        return self._store

    def stored(self) -> list[Tensor]:
        """Keys and values that are kept for the pass to come."""
        return [] if self._store is None else self._store.tensors()

    def run_context(self) -> None:
        """The pass over all tokens."""
        states = States(self.router.cache)
        chunks = self.call.chunks(self.chunk, self.router.cache)
        context_pass(self.router, self.call, self.store, self.records, chunks, chunks.count, states, self.outputs)
        self.choice.block = LastBlock(self.router, self.call, self.records, self.store, self.chunk)
        self.choice.block.known = self.outputs.tensors[0]

    def take_outputs(self) -> list[Tensor]:
        """Of all tokens; and the output of an encoder that ran with the call."""
        if self.choice.block is not None:
            self.choice.block.known = None  # or it would live until backward, whoever reads the outputs
        encoded, self.outputs.encoded = self.outputs.encoded, None
        self.gives_encoded = encoded is not None
        found = super().take_outputs()
        return found if encoded is None else [*found, encoded]

    def focus(self, live: bool) -> Any:
        """The body's output for the kept tokens, with gradient. live: to the model's own parameters and inputs, in forward."""
        if not live:
            return self._focus(live)
        self.unchanged.check()  # the loss may be taken after the call
        with self.sums.as_called():
            return self._focus(live)

    def _focus(self, live: bool) -> Any:
        if self._store is None:  # one loss has had them: a further one of the same call finds them again
            self._store = KeyValueStore()
            self.outputs = BodyOutputs(self.call)
            self.records = Records({}, wanted=False)
            with self.autocast.restored():  # backward may run outside of it
                self.run_context()
            self.outputs.tensors, self.outputs.encoded = [], None
        self.let_go_of_scores()
        store, self._store = self.store, None  # the graph alone holds it now, and lets go of it layer by layer
        spans = self.call.spans_of(self.choice.made)
        forget_casts()
        running = FocusPass(spans, store, self.router.places)
        with ExitStack() as stack:
            tied = stack.enter_context(tied_matrix(self.router.architecture)) if live else None
            stack.enter_context(self.autocast.restored())
            stack.enter_context(self.router.running(running))
            stack.enter_context(at_positions(self.router.architecture, self.call, spans))
            output = self.call.forward(**self.call.at(spans, running, live))
        self.matrix = None if tied is None else tied.of_head()
        return output

    def placed(self, tensors: list[Tensor], output: Any) -> list[Tensor]:
        """Outputs of all tokens, (B, T, ...) each, in which those of the kept ones are live."""
        selection = self.choice.decoder
        valid = selection.valid if selection.is_ragged else None
        live = self.outputs.by_row(output)
        found = [
            place(whole[:, None], part[:, None], selection.index, valid)[:, 0] for whole, part in zip(self.outputs.as_rows(tensors), live)
        ]
        return self.outputs.as_returned(found)

    def _run_again(self, cotangents: list[Tensor | None]) -> None:
        """The kept tokens, of whose part in the loss the gradients are; chosen now, if they were not before the loss was taken."""
        of_encoder = cotangents.pop() if self.gives_encoded else None
        if cotangents[0] is not None or self.choice.selection is None:  # else it is a loss of router logits beside the one that chose
            self.choose_by(cotangents[0])
        with torch.enable_grad(), self.sums.standing_in():
            output = self.focus(live=False)
            span = self.call.decoder.kept(self.choice.decoder)
            tensors, gradients = self.outputs.roots(output, cotangents, span)
            gradients = [_weighted(gradient, self.choice.decoder) for gradient in gradients]
            if of_encoder is not None and output.encoder_last_hidden_state.requires_grad:
                selection = self.choice.made["encoder"]
                tensors.append(output.encoder_last_hidden_state)
                gradients.append(_weighted(selection.gather(of_encoder, fill=0), selection))
            del output
            torch.autograd.backward(tensors, gradients)


def _weighted(gradient: Tensor, selection: Selection) -> Tensor:
    """Gradient of the kept tokens, (B, S, ...), for what they stand for."""
    if selection.weight is None:
        return gradient
    return gradient * selection.weight.reshape(*gradient.shape[:2], *[1] * (gradient.dim() - 2)).to(gradient.dtype)


def _chosen_again(run: ChosenCall) -> Choice:
    """A choice for another loss of the same call; with a pass over all tokens if scores want one."""
    choice, records = run.choice.again(), Records(run.records.context_modules, run.records.wanted)
    if records.wanted:
        DitchedCall(run.router, run.call, choice, run.chunk, records).run_context()
    else:
        choice.block = LastBlock(run.router, run.call, records, KeyValueStore(), run.chunk)
    return choice
