"""One training step of token seeking: context pass, selection, and then the kept tokens, inside calls of the model.

Shape legend: B rows of a batch, T tokens in a row, S selected tokens, D hidden size, V classes.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_memtune.architectures import Task
from hf_memtune.core.loss import IGNORED
from hf_memtune.core.sampling import sample
from hf_memtune.core.selection import Selection, select
from hf_memtune.core.store import KeyValueStore, place
from hf_memtune.errors import MemTuneError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.streaming.chunk_stream import ChunkStream
from hf_memtune.methods.attention.context import context_pass
from hf_memtune.methods.seeking.forced import forced_tokens
from hf_memtune.methods.model_step import ModelStep
from hf_memtune.methods.overrides import evaluating
from hf_memtune.methods.attention.passes import FocusPass, Records
from hf_memtune.methods.attention.positions import at_positions
from hf_memtune.methods.seeking.token_scores import TokenScores

if TYPE_CHECKING:
    from hf_memtune.methods.seeking.token_seeking import TokenSeeking


class SeekingStep(ModelStep):
    """The state of one step. Made by `TokenSeeking.step`; `selection` is filled in when the model is called."""

    def __init__(self, seeking: "TokenSeeking", inputs: dict[str, Any], label_smoothing: float, whole_logits: bool, scores=None):
        super().__init__(seeking, inputs, label_smoothing, whole_logits)
        self.seeking, self.precomputed = seeking, scores
        self.selection: dict[str, Selection] = {}
        self.values: dict[str, Tensor] = {}
        self.tokens_seen: Tensor | int = 0
        self.inspection: dict[str, dict[str, Tensor]] | None = None
        self._store: KeyValueStore | None = None
        self._passed: dict[int, Tensor] = {}  # by chunk, the gradient mass of tokens whose turn has come, (B, 1)

    def begin(self, call: BodyCall) -> None:
        if self._labels_are_rows:
            call.rows["decoder"] = replace(call.rows["decoder"], labelled_until=_up_to_last_label(self.target))
        if self.config.streams:
            self.stream = ChunkStream(self.seeking, call, self.config.stream_chunk_size, self._wanted if self._skips else None)
        scores = self._score(call)
        self.selection = self._select(call, scores)
        self.tokens_seen = sum(rows.real_tokens() for rows in call.rows.values())
        if self.inspection is not None:
            self._inspect(call, scores)
            raise Inspected
        scores.records.clear()
        self._store = scores.store
        if self.stream is not None:
            self._begin_stream(self.selection["decoder"])

    def stored(self) -> list[Tensor]:
        return super().stored() if self.stream is not None or self._store is None else self._store.tensors()

    def next_turn(self, call: BodyCall):
        if self.stream is None:
            output = self._focus_pass(call, self._store, self._context_output)
            self._store = None  # the graph alone holds it now, and lets go of it layer by layer
            return output
        return self.stream_turn(self.learned_target, self._weight)

    def _score(self, call: BodyCall) -> TokenScores:
        """The pass over all tokens without gradient, and the scores to come of it."""
        length = call.rows["decoder"].length
        causal = self.seeking.facts.is_causal or self.stream is not None
        chunk = min(self.config.stream_chunk_size or self.config.context_chunk_size, length) if causal else length
        reads = self.inspection is not None or (self.precomputed is None and self.seeking.scorer.reads_model)
        records = Records(self.seeking.context_modules, wanted=reads)
        per_row = not self.architecture.task.loss_per_token
        if self.stream is None:
            store, chunks = KeyValueStore(), range(-(-length // chunk))
            found = context_pass(self.seeking, call, store, records, chunk, chunks, keep_output=per_row)
        else:
            store, found = self.stream.store, self.stream.store_context(records, last_too=True)
        self._context_output = found
        real, target = call.rows["decoder"].scored, self.target
        if target is not None and real is not None:  # padding is never kept: what it would predict must not sway the scores
            target = target.masked_fill(~real, IGNORED)
        return TokenScores(
            self.architecture, self.config, self.seeking, call, records, store, chunk, self.inputs, self.labels, target,
            None if self.stream is None else self.stream.encoded,
        )  # fmt: skip

    def _select(self, call: BodyCall, scores: TokenScores) -> dict[str, Selection]:
        chosen = {}
        choose = sample if self.config.token_selection == "sample" else select
        for name, rows in call.rows.items():
            if self.stream is not None and name != "decoder":
                continue  # its tokens have no loss, and the gradient through all of them is exact
            given = None if self.precomputed is None else self.precomputed[name]
            with torch.no_grad(), evaluating(self.architecture.base):
                values = self.seeking.scorer(scores.context(name)) if given is None else given
            self.values[name] = values
            labelled = self._labelled(name) if self.config.select_from == "labels" else None
            first_last = self.config.kept_always == "first_last"
            forced = forced_tokens(
                self.architecture, rows, first_last, self.seeking.facts.is_causal, self.inputs.get("input_ids"), self.labels
            )
            chosen[name] = choose(values, self.config.token_ratio, rows.scored, labelled, forced)
        return chosen

    def _inspect(self, call: BodyCall, scores: TokenScores) -> None:
        """Fill `inspection` with the asked-for scores of every stack, (B, T) each, and which tokens are real."""
        with torch.no_grad(), evaluating(self.architecture.base):
            for stack in self.selection:
                seen = scores.context(stack)
                self.inspection[stack] = {name: getattr(seen, name) for name in self.inspection[stack]}
                self.inspection[stack]["real"] = seen.attention_mask

    @property
    def _labels_are_rows(self) -> bool:
        """Whether padding of the decoder shows in its labels alone, as in the usual sequence-to-sequence batch."""
        unmasked = self.architecture.is_encoder_decoder and self.inputs.get("decoder_attention_mask") is None
        return unmasked and self.target is not None

    def _labelled(self, stack: str) -> Tensor | None:
        return self.target != IGNORED if stack == "decoder" and self.target is not None else None

    def _focus_pass(self, call: BodyCall, store: KeyValueStore, context_output: Tensor | None):
        spans = {name: rows.kept(self.selection[name]) for name, rows in call.rows.items()}
        decoder = self.selection["decoder"]
        if self.target is not None:
            self.turn_target = self.learned_target = decoder.gather(self.target, fill=IGNORED)
            self.turn_weight = decoder.weight
        focus = FocusPass(spans, store, self.seeking.places)
        with self.seeking.running(focus), at_positions(self.architecture, call, spans):
            output = call.forward(**call.at(spans))
        if context_output is not None:  # a pooled head: it sees every token, the unselected ones as constants
            valid = decoder.valid if decoder.is_ragged else None
            live = output.last_hidden_state[:, None]
            output.last_hidden_state = place(context_output[:, None], live, decoder.index, valid)[:, 0]
        elif self.whole_logits and self.architecture.task is Task.CAUSAL_LM:
            output.last_hidden_state = F.pad(output.last_hidden_state, (0, 0, 0, 1))
        return output

    # -- a stream

    @property
    def _skips(self) -> bool:
        return self.config.token_gradient == "skip"

    def _begin_stream(self, selection: Selection) -> None:
        """The loss is that of the kept tokens; the gradient goes through all, or through those that matter."""
        if self.target is None:
            raise MemTuneError("the batch has no labels, so there is nothing to learn from it.")
        self.learned_target = self.target.masked_fill(~selection.kept_mask(), IGNORED)
        self._weight = None
        if selection.weight is not None:
            zeros = torch.zeros(self.target.shape, dtype=selection.weight.dtype, device=self.target.device)
            self._weight = zeros.scatter(1, selection.index, selection.weight)
        self.stream.skip(first_turn=True)

    def _wanted(self, start: int, stop: int, mass: Tensor | None) -> Tensor:
        """(B, stop - start) bool: tokens with a loss, those whose keys and values are owed more than the threshold by later chunks,
        and those before any of these: what the chunk owes to itself is known only once it has run."""
        wanted = self.learned_target[:, start:stop] != IGNORED
        if mass is not None:
            self._passed[start] = mass[:, start:].sum(1, keepdim=True)
            total = mass[:, :start].sum(1, keepdim=True) + sum(self._passed.values())
            wanted = wanted | (mass[:, start:] > self.config.skip_threshold * total)
        return wanted.flip(1).cumsum(1).flip(1) > 0

    # -- called by whoever trains

    @property
    def loss_tokens(self) -> Tensor:
        """The kept labels; of a sample, whose weights make it stand for all tokens, all labels."""
        if self.config.token_selection != "sample" or not self.architecture.task.loss_per_token:
            return super().loss_tokens
        real = self._call.rows["decoder"].scored
        labelled = self.target != IGNORED
        return (labelled if real is None else labelled & real).sum().clamp_min(1)

    def token_counts(self) -> dict[str, Tensor | int]:
        """Tokens of this step, for the logs: real ones, kept ones, those learned from, and those that ran with gradient in a stream."""
        found = {"seen": self.tokens_seen, "kept": sum(sum(s.counts) for s in self.selection.values())}
        if self.learned_target is not None:
            found["learned"] = self.kept_labels
        if self.stream is not None:
            found["recomputed"] = self.stream.tokens_run
        return found


class Inspected(Exception):
    """Ends a call of the model whose scores alone were wanted."""


def _up_to_last_label(target: Tensor) -> Tensor:
    """(B, T) bool. A row without any label is taken whole."""
    positions = torch.arange(target.shape[1], device=target.device)
    last = torch.where(target != IGNORED, positions, -1).amax(1, keepdim=True)
    return (positions <= last) | (last < 0)
