"""One training step of token seeking: context pass, selection, focus pass, inside one call of the model.

Shape legend: B rows of a batch, T tokens in a row, S selected tokens, D hidden size, V classes.
"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_memtune._compat import is_fake
from hf_memtune.architectures import Task
from hf_memtune.core.loss import IGNORED, linear_loss
from hf_memtune.core.selection import Selection, select
from hf_memtune.core.store import KeyValueStore, place
from hf_memtune.strategies.batch import BodyCall
from hf_memtune.errors import MemTuneError
from hf_memtune.strategies.forced import forced_tokens
from hf_memtune.strategies.overrides import evaluating, forward_as, forwards_as
from hf_memtune.strategies.passes import ContextPass, FocusPass, Records
from hf_memtune.strategies.spans import Span
from hf_memtune.strategies.targets import LABEL_NAMES, model_inputs, targets
from hf_memtune.strategies.token_scores import TokenScores


class SeekingStep:
    """The state of one step. Made by `TokenSeeking.step`; `selection` is filled in when the model is called."""

    def __init__(self, seeking: Any, inputs: dict[str, Any], label_smoothing: float, whole_logits: bool, scores=None):
        self.seeking, self.architecture, self.config = seeking, seeking.architecture, seeking.config
        self.label_smoothing, self.whole_logits, self.precomputed = label_smoothing, whole_logits, scores
        self.labels = {name: inputs[name] for name in LABEL_NAMES if inputs.get(name) is not None}
        self.target = targets(self.architecture, self.labels)
        self.inputs = model_inputs(self.architecture, inputs)
        self.selection: dict[str, Selection] = {}
        self.values: dict[str, Tensor] = {}
        self.tokens_seen: Tensor | int = 0
        self.inspection: dict[str, dict[str, Tensor]] | None = None
        self.kept_target: Tensor | None = None
        self.fused = seeking.facts.has_plain_head and not whole_logits
        self._called = self._focusing = False

    # -- called by the model -------------------------------------------------------------------------------------

    @contextmanager
    def open(self):
        """While open, the model's body runs the passes of this step, and its linear head gives the summed loss."""
        base, head = self.architecture.base, self.architecture.output_head
        with ExitStack() as stack:
            stack.enter_context(forward_as(base, partial(self._body, base.forward)))
            if self.fused:
                stack.enter_context(forward_as(head, partial(self._fused_loss, head.forward)))
            yield self

    def _body(self, forward: Callable, *args, **kwargs):
        if self._called:
            raise MemTuneError("the model was called twice within one step of token seeking: open a step for each call.")
        self._called = True
        call = BodyCall(self.architecture, forward, args, kwargs)
        if self._labels_are_rows:
            call.rows["decoder"] = replace(call.rows["decoder"], labelled_until=_up_to_last_label(self.target))
        with forward_as(self.architecture.base, forward):
            scores, context_output = self._context_pass(call)
            self.selection = self._select(call, scores)
            self.tokens_seen = sum(_real_tokens(rows) for rows in call.rows.values())
            if self.inspection is not None:
                self._inspect(call, scores)
                raise Inspected
            scores.records.clear()
            # autocast keeps the casts of weights that the context pass made without gradient, and some versions of torch (2.9 and
            # 2.10 for certain) then use them where a gradient is wanted
            torch.clear_autocast_cache()
            self._focusing = True
            return self._focus_pass(call, scores.store, context_output)

    def _context_pass(self, call: BodyCall) -> tuple[TokenScores, Tensor | None]:
        """All tokens, without gradient. Returns the scores to come, and the last hidden state (B, T, D) if the head needs it."""
        length = call.rows["decoder"].length
        chunk = min(self.config.context_chunk_size, length) if self.seeking.facts.is_causal else length
        records, store = Records(self.seeking.context_modules), KeyValueStore()
        outputs = []
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self.architecture.base))
            if self.inspection is not None or (self.precomputed is None and self.seeking.scorer.reads_model):
                stack.enter_context(records.of_last_blocks(self.architecture))
            else:
                records.context_modules = {}
            for start in range(0, length, chunk):
                spans = {name: rows.whole() for name, rows in call.rows.items()}
                spans["decoder"] = call.rows["decoder"].chunk(start, min(start + chunk, length))
                running = ContextPass(spans, store, self.seeking.places, records, self.seeking.kernel_knows_causal)
                with self.seeking.running(running):
                    output = call.forward(**call.at(spans)).last_hidden_state
                if not self.architecture.task.loss_per_token:
                    outputs.append(output)
        real, target = call.rows["decoder"].scored, self.target
        if target is not None and real is not None:  # padding is never kept: what it would predict must not sway the scores
            target = target.masked_fill(~real, IGNORED)
        scores = TokenScores(
            self.architecture, self.config, self.seeking, call, records, store, chunk, self.inputs, self.labels, target
        )
        return scores, torch.cat(outputs, dim=1) if outputs else None

    def _select(self, call: BodyCall, scores: TokenScores) -> dict[str, Selection]:
        chosen = {}
        for name, rows in call.rows.items():
            given = None if self.precomputed is None else self.precomputed[name]
            with torch.no_grad(), evaluating(self.architecture.base):
                values = self.seeking.scorer(scores.context(name)) if given is None else given
            self.values[name] = values
            labelled = self._labelled(name) if self.config.select_from == "labels" else None
            first_last = self.config.kept_always == "first_last"
            forced = forced_tokens(
                self.architecture, rows, first_last, self.seeking.facts.is_causal, self.inputs.get("input_ids"), self.labels
            )
            chosen[name] = select(values, self.config.token_ratio, rows.scored, labelled, forced)
        return chosen

    def _inspect(self, call: BodyCall, scores: TokenScores) -> None:
        """Fill `inspection` with the asked-for scores of every stack, (B, T) each, and which tokens are real."""
        with torch.no_grad(), evaluating(self.architecture.base):
            for stack in call.rows:
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
            self.kept_target = decoder.gather(self.target, fill=IGNORED)
        pairs = [
            (module, positions_at(module.forward, call, spans[stack], stack))
            for stack, module in self.architecture.position_modules.items()
        ]
        with self.seeking.running(FocusPass(spans, store, self.seeking.places)), forwards_as(pairs):
            output = call.forward(**call.at(spans))
        if context_output is not None:  # a pooled head: it sees every token, the unselected ones as constants
            valid = decoder.valid if decoder.is_ragged else None
            live = output.last_hidden_state[:, None]
            output.last_hidden_state = place(context_output[:, None], live, decoder.index, valid)[:, 0]
        elif self.whole_logits and self.architecture.task is Task.CAUSAL_LM:
            output.last_hidden_state = F.pad(output.last_hidden_state, (0, 0, 0, 1))
        return output

    def _fused_loss(self, forward: Callable, hidden: Tensor) -> Tensor:
        """In place of the head: the summed loss of the kept, labelled tokens, a scalar. While scores run, the head itself."""
        if not self._focusing:
            return forward(hidden)
        head = self.architecture.output_head
        labelled = self.kept_target != IGNORED
        if is_fake(hidden):
            hidden, target = hidden.flatten(0, 1), self.kept_target.flatten()
        else:
            hidden, target = hidden[labelled], self.kept_target[labelled]
        return linear_loss(hidden, head.weight, head.bias, target, self.label_smoothing)

    # -- called by the trainer -----------------------------------------------------------------------------------

    @property
    def kept_labels(self) -> Tensor:
        """Number of kept tokens that carry a label, an int64 scalar tensor."""
        return (self.kept_target != IGNORED).sum()

    def loss_sum(self, outputs) -> Tensor:
        """Summed loss of the kept, labelled tokens, from what the model returned: a scalar, 0 where none is labelled."""
        if self.fused:
            return outputs.logits
        logits, target = outputs.logits, self.kept_target
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="sum", label_smoothing=self.label_smoothing
        )

    def shiftable_labels(self) -> Tensor:
        """Labels for a loss function that shifts them itself: (B, S + 1), to go with the S + 1 logits of `whole_logits`."""
        if self.architecture.task is not Task.CAUSAL_LM:
            return self.kept_target
        return F.pad(self.kept_target, (1, 0), value=IGNORED)


class Inspected(Exception):
    """Ends a call of the model whose scores alone were wanted."""


def _real_tokens(rows) -> Tensor | int:
    return rows.batch * rows.length if rows.scored is None else rows.scored.sum()


def _up_to_last_label(target: Tensor) -> Tensor:
    """(B, T) bool. A row without any label is taken whole."""
    positions = torch.arange(target.shape[1], device=target.device)
    last = torch.where(target != IGNORED, positions, -1).amax(1, keepdim=True)
    return (positions <= last) | (last < 0)


def positions_at(forward: Callable, call: BodyCall, span: Span, stack: str) -> Callable:
    """Position embeddings of the kept tokens, from a module that numbers the tokens it is given, or their shape, itself."""

    def run(given: Tensor | tuple | None, *args, **kwargs) -> Tensor:
        shape = (span.rows.batch, span.rows.length)
        ids = call.input_ids(stack)
        if isinstance(given, tuple):  # torch.Size is one
            whole = torch.Size(shape)
        else:
            whole = ids if ids is not None else torch.zeros(shape, dtype=torch.long, device=span.index.device)
        embedded = forward(whole)
        return span.take(embedded if embedded.dim() == 3 else embedded[None])

    return run
