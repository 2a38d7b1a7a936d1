"""One step of token seeking or of exact streaming on a tiny model, and everything a test may want to know about it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_memtune import Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig
from hf_memtune.architectures import Task
from hf_memtune.core.selection import Selection
from tests.methods.tiny_models import batch_for, lm_head, tiny_model
from tests.methods.twin import gradients, shifted, twin_loss, worst_difference
from tests.tolerances import tolerance

# What most of these tests are about: the best of scores that read the model. The library's own settings are tested by name.
PUBLISHED = {"token_scorer": "combined", "token_selection": "top", "select_from": "all"}
RATIO = 0.35  # of rows of 13 and 9 tokens: keeps 5 and 4, so that every batch has fillers


@dataclass
class Taken:
    """A finished step: its mean loss, the gradients of all parameters, and which tokens were kept."""

    loss: Tensor
    gradients: dict[str, Tensor]
    selection: dict[str, Selection]
    fused: bool
    outputs: object

    @property
    def kept(self) -> dict[str, Tensor]:
        return {name: selection.kept_mask() for name, selection in self.selection.items()}


def seeking_on(model, scorer=None, **settings) -> TokenSeeking:
    """Token seeking with the settings of these tests."""
    settings = {"token_seeking": True, "token_ratio": RATIO, **PUBLISHED, **settings}
    return TokenSeeking(model, TokenSeekingConfig(**settings), scorer=scorer)


def take_step(model, batch, scorer=None, scores=None, whole_logits=False, **settings) -> Taken:
    """One step, its backward, and removal."""
    seeking = seeking_on(model, scorer, **settings)
    try:
        with seeking.step(batch, scores=scores, whole_logits=whole_logits) as step:
            per_row = not seeking.architecture.task.loss_per_token
            outputs = model(**(step.inputs | step.labels if per_row else step.inputs))
        loss = outputs.loss if per_row else step.loss_sum(outputs) / step.kept_labels
        return Taken(loss.detach(), gradients(model, loss), step.selection, step.fused, outputs)
    finally:
        seeking.remove()


def token_twin(model, batch, kept, head=None) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and gradients of the twin, for heads with a loss at every token."""
    loss = twin_loss(model, batch, kept, causal_lm=head == "causal_lm")
    return loss.detach(), gradients(model, loss)


def assert_equal_step(taken: Taken, loss: Tensor, expected: dict[str, Tensor], dtype, float32_inside: bool = False) -> None:
    """Loss and every parameter's gradient agree as well as the dtype allows."""
    allowed = tolerance(dtype, float32_inside)
    assert abs(taken.loss - loss) <= allowed * max(1.0, abs(loss))
    assert worst_difference(taken.gradients, expected) <= allowed


def model_and_batch(name: str, side: str = "right", head: str | None = None, lengths=(13, 9), **overrides):
    """A tiny model on which float64 works, its batch, and its dtype.

    Gemma 2 has eager attention, whose softmax is in float32: float64's smallest number becomes -inf there, and a row that sees
    nothing becomes NaN, in transformers itself. So its window reaches past right padding, and left padding is in float32.
    """
    dtype = overrides.pop("dtype", torch.float64)
    if name == "gemma2" and dtype == torch.float64:
        dtype = torch.float32 if side == "left" else dtype
        overrides.setdefault("sliding_window", 4 if side == "left" else 8)
    head = head or lm_head(name)
    if head == "question_answering":
        overrides.setdefault("num_labels", 2)  # start and end
    model = tiny_model(name, head, dtype=dtype, **overrides)
    return model, batch_for(model, head, lengths=lengths, side=side), dtype


def has_float32_inside(name: str, attention: str = "sdpa") -> bool:
    return name in ("gemma2", "gemma3", "llama4", "cohere2") or attention == "eager"


# -- steps in several turns ------------------------------------------------------------------------------------------


@dataclass
class Streamed:
    """A finished step of one or more turns: its mean loss, the gradients of all parameters, and the step itself."""

    loss: Tensor
    gradients: dict[str, Tensor]
    step: object
    turns: int


def take_turns(model, strategy, batch, label_smoothing=0.0, whole_logits=False) -> Streamed:
    """One step of a strategy, every turn of it with its backward. Gradients that were there are dropped."""
    model.zero_grad(set_to_none=True)
    loss, turns, is_last = 0, 0, []
    with strategy.step(batch, label_smoothing=label_smoothing, whole_logits=whole_logits) as step:
        for last in step.turns():
            outputs = model(**_inputs_of(step))
            part = (_own_loss_sum(step, outputs) if whole_logits else step.loss_sum(outputs)) / step.loss_tokens
            part.backward()
            loss, turns, is_last = loss + part.detach(), turns + 1, [*is_last, last]
    assert is_last == [False] * (turns - 1) + [True]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Streamed(loss, found, step, turns)


def _own_loss_sum(step, outputs) -> Tensor:
    """From the logits of a turn, shifted as every causal loss of transformers shifts them."""
    logits, labels = outputs.logits, step.shiftable_labels()
    if step.architecture.task is Task.CAUSAL_LM:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=step.label_smoothing)


def _inputs_of(step) -> dict:
    """What the model is called with in a turn: with its labels where it takes the loss itself."""
    return step.inputs if step.architecture.task.loss_per_token else step.inputs | step.labels


def stream(model, batch, chunk, **settings) -> Streamed:
    """One step of exact streaming in chunks of `chunk` tokens, its backward, and removal."""
    streaming = Streaming(model, StreamingConfig(sequence_chunk_size=chunk))
    try:
        return take_turns(model, streaming, batch, **settings)
    finally:
        streaming.remove()


def seek_in_stream(model, batch, chunk, scorer=None, **settings) -> Streamed:
    """One step of token seeking whose gradient is not cut, in chunks of `chunk` tokens, its backward, and removal."""
    seeking = seeking_on(model, scorer, **{"token_gradient": "stream", "sequence_chunk_size": chunk, **settings})
    try:
        return take_turns(model, seeking, batch)
    finally:
        seeking.remove()


def plain_twin(model, batch, kept=None, label_smoothing=0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and gradients of plain backpropagation, the loss of the logits themselves (transformers takes it in float32).

    kept: (B, T) bool, tokens whose loss counts; None: all. model: may be a PEFT model around one.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    target = batch["labels"]
    if inner.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = inner.prepare_decoder_input_ids_from_labels(labels=target)
    if type(inner).__name__.endswith(("CausalLM", "LMHeadModel")):
        target = shifted(target)
    if kept is not None:
        target = target.masked_fill(~kept, -100)
    losses = F.cross_entropy(
        model(**inputs).logits.flatten(0, 1), target.flatten(), reduction="sum", label_smoothing=label_smoothing
    )
    loss = losses / (target != -100).sum().clamp_min(1)
    return loss.detach(), gradients(model, loss)
