"""One training step in one or more calls of the model, whose body is taken apart meanwhile.

Shape legend: B rows of a batch, T tokens in a row, S tokens of a turn, D hidden size, V classes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_memtune.architectures import Task
from hf_memtune.core.labelled import take_labelled
from hf_memtune.core.loss import IGNORED, linear_loss
from hf_memtune.core.owed import Due
from hf_memtune.errors import MemTuneError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.streaming.chunk_stream import NOT_BACKWARD, ChunkStream, chunk_count
from hf_memtune.methods.overrides import forward_as
from hf_memtune.methods.seeking.targets import LABEL_NAMES, model_inputs, targets
from hf_memtune.methods.tied import TiedMatrix, tied_matrix

if TYPE_CHECKING:
    from hf_memtune.methods.installed import InstalledStrategy


class ModelStep:
    """The state of one step; what kinds of step do with the body is in `begin` and `next_turn`.

    Between `open` and its end, each of the `turns` calls the model with `inputs` (heads with one loss for a row: and with `labels`)
    and sends `loss_sum` backward.
    """

    def __init__(self, strategy: "InstalledStrategy", inputs: dict[str, Any], label_smoothing: float, whole_logits: bool):
        self.strategy, self.architecture, self.config = strategy, strategy.architecture, strategy.config
        self.label_smoothing, self.whole_logits = label_smoothing, whole_logits
        self.labels = {name: inputs[name] for name in LABEL_NAMES if inputs.get(name) is not None}
        self.target = targets(self.architecture, self.labels)
        self.inputs = model_inputs(self.architecture, inputs)
        self.fused = strategy.facts.has_plain_head and not whole_logits
        self.stream: ChunkStream | None = None
        self.turn_target: Tensor | None = None
        self.turn_weight: Tensor | None = None
        self.learned_target: Tensor | None = None
        self._call: BodyCall | None = None
        self._is_called, self._is_learning = False, False
        self._hidden: Tensor | None = None  # of heads with one loss for a row: what the head was given, (B, T, D)
        self._due: Tensor | None = None
        self._matrix: TiedMatrix | None = None  # of the head, while the step is open and the head gives the loss

    # -- what kinds of step do

    def begin(self, call: BodyCall) -> None:
        """Everything before the first turn: the pass without gradient, and what is chosen from it."""
        raise NotImplementedError

    def next_turn(self, call: BodyCall):
        """What the body returns in this turn, with gradient."""
        raise NotImplementedError

    def stored(self) -> list[Tensor]:
        """Keys and values that are kept for the turns to come, and sums of their gradients, on the device."""
        return [] if self.stream is None else [*self.stream.store.tensors(), *self.stream.owed.tensors()]

    # -- called by whoever trains

    def turns(self) -> Iterator[bool]:
        """One item for each call of the model: whether it is the last one of this step."""
        is_over = False
        while not is_over:
            self._is_called = False
            yield self.is_last_turn
            if not self._is_called:
                raise MemTuneError("a turn of the step has ended in which the model was not called.")
            is_over = not self._has_turns_to_come()

    @property
    def is_last_turn(self) -> bool:
        """Whether the step is over after the next call of the model."""
        if self._call is None:
            return self._turn_count() == 1
        return self.stream is None or self.stream.is_last

    @contextmanager
    def open(self):
        """While open, the model's body runs the passes of this step, and its linear head gives the summed loss."""
        base, head = self.architecture.base, self.architecture.output_head
        with ExitStack() as stack:
            stack.enter_context(forward_as(base, partial(self._body, base.forward)))
            if self.fused:
                self._matrix = stack.enter_context(tied_matrix(self.architecture, lambda: self._is_learning))
                stack.enter_context(forward_as(head, partial(self._fused_loss, head.forward)))
            try:
                yield self
            finally:
                self._matrix = None  # it holds this step
                if self.stream is not None:
                    self.stream.wanted = None  # it holds this step, which holds the stream: keys and values would outlive both
        if self._call is not None and self.stream is not None and not self.stream.is_done:
            raise MemTuneError(
                "the step has ended before all chunks went backward: its gradient would be that of the last tokens alone. Call the "
                "model once in each of `for _ in step.turns():`."
            )

    def loss_sum(self, outputs) -> Tensor:
        """Summed loss of this turn's tokens, from what the model returned: a scalar, 0 where none has a label.

        Of heads with one loss for a row: the model's loss in the first turn, whose value is that of the step, and then 0.
        """
        if self._due is not None:
            return self._connected(self._due)
        if not self.architecture.task.loss_per_token:
            return outputs.loss
        if self.fused:
            return outputs.logits
        logits, target = outputs.logits, self.turn_target
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=self.label_smoothing
        )
        return (losses if self.turn_weight is None else losses * self.turn_weight.flatten()).sum()

    @property
    def kept_labels(self) -> Tensor:
        """Number of tokens learned from, which are kept and carry a label, an int64 scalar tensor. Known after the first call."""
        return (self.learned_target != IGNORED).sum()

    @property
    def loss_tokens(self) -> Tensor:
        """What the summed losses of all turns are to be divided by for a mean, an int64 scalar tensor."""
        if not self.architecture.task.loss_per_token:
            return torch.ones((), dtype=torch.long)
        return self.kept_labels.clamp_min(1)

    @property
    def row_length(self) -> int:
        """Tokens of a row of the decoder, padding included."""
        return _row_length(self.architecture, self.inputs)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row of the decoder that may be kept. Known after the first call."""
        rows = self._call.rows["decoder"]
        return rows.length if rows.scored is None else int(rows.scored.sum(1).amax())

    def shiftable_labels(self) -> Tensor:
        """Labels for a loss function that shifts them itself: (B, S + 1), to go with the S + 1 logits of `whole_logits`."""
        if self.architecture.task is not Task.CAUSAL_LM:
            return self.turn_target
        return F.pad(self.turn_target, (1, 0), value=IGNORED)

    # -- called by the model

    def _body(self, forward: Callable, *args, **kwargs):
        if self._is_called:
            raise MemTuneError("the model was called more often than the step has turns: open a step for each batch.")
        self._is_called = True
        with forward_as(self.architecture.base, forward):
            if self._call is None:
                call = BodyCall(self.architecture, forward, args, kwargs)
                self.begin(call)
                self._call = call
            # autocast keeps the casts of weights that a pass made without gradient, and some versions of torch (2.9 and
            # 2.10 for certain) then use them where a gradient is wanted
            torch.clear_autocast_cache()
            self._is_learning = True
            return self.next_turn(self._call)

    def _fused_loss(self, forward: Callable, hidden: Tensor) -> Tensor:
        """In place of the head: the summed loss of the turn's labelled tokens, a scalar. While scores run, the head itself."""
        if not self._is_learning:
            return forward(hidden)
        head, target, weight = self.architecture.output_head, self.turn_target, self.turn_weight
        labelled = target != IGNORED
        hidden, target, weight = (x if x is None else take_labelled(x, labelled) for x in (hidden, target, weight))
        return linear_loss(hidden, self._matrix.of_head(), head.bias, target, self.label_smoothing, weight)

    # -- turns of a stream

    def _turn_count(self) -> int:
        """Turns of the whole step, at most; before the first call."""
        chunk = self.config.stream_chunk_size
        if chunk is None:
            return 1
        return chunk_count(self.row_length, chunk) + int(not self.architecture.task.loss_per_token)

    def _has_turns_to_come(self) -> bool:
        if self.stream is None or self.stream.is_done:
            return False
        self.stream.skip()
        return True

    def stream_turn(self, target: Tensor | None, weight: Tensor | None, context_output: Tensor | None = None):
        """What the body returns for the next chunk of a stream."""
        if not self.architecture.task.loss_per_token and self._hidden is None:
            self._hidden = context_output.requires_grad_()
            return self.strategy.facts.body_output(last_hidden_state=self._hidden)
        if target is None and self.architecture.task.loss_per_token:
            raise MemTuneError("the batch has no labels, so there is nothing to learn from it.")
        if self._hidden is not None and self._hidden.grad is None:
            raise MemTuneError(NOT_BACKWARD)
        span, output = self.stream.run()
        if target is not None:
            self.turn_target = span.take(target) if span.valid is None else span.selection.gather(target, fill=IGNORED)
            self.turn_weight = None if weight is None else span.take(weight)
        else:
            self._due = Due.apply(output.last_hidden_state, span.take(self._hidden.grad))
            # a path to the body: distributed training looks for one, and would take what `Due` sends for a second gradient
            output.last_hidden_state = self._hidden.detach() + self._due
        if self.whole_logits and self.architecture.task is Task.CAUSAL_LM:
            output.last_hidden_state = F.pad(output.last_hidden_state, (0, 0, 0, 1))
        return output

    def _connected(self, due: Tensor) -> Tensor:
        """With a gradient of 0 to the parameters of the head, which distributed training waits for in the last turn."""
        in_base = {id(p) for p in self.architecture.base.parameters()}
        head = [p for p in self.architecture.head_model.parameters() if p.requires_grad and id(p) not in in_base]
        return due + sum(p.reshape(-1)[:1].sum() * 0 for p in head) if head else due


def _row_length(architecture, inputs: dict[str, Any]) -> int:
    prefix = "decoder_" if architecture.is_encoder_decoder else ""
    ids = inputs.get(f"{prefix}input_ids")
    return (inputs[f"{prefix}inputs_embeds"] if ids is None else ids).shape[1]
