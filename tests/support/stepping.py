"""One step of token seeking or of exact streaming on a tiny model, and everything a test may want to know about it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_memtune import Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig
from hf_memtune.core.selection import Selection
from hf_memtune.methods.events import Listener
from tests.support.tiny_models import batch_for, lm_head, tiny_model
from tests.support.tolerances import tolerance
from tests.support.twin import gradients, shifted, twin_loss, worst_difference

# What most of these tests are about: the best of scores that read the model. The library's own settings are tested by name.
PUBLISHED = {"token_scorer": "combined", "token_selection": "top", "select_from": "all"}
RATIO = 0.35  # of rows of 13 and 9 tokens: keeps 5 and 4, so that every batch has fillers


@dataclass
class Taken:
    """A finished step: its mean loss, the gradients of all parameters, which tokens were kept, and what was told of them."""

    loss: Tensor
    gradients: dict[str, Tensor]
    selection: dict[str, Selection]
    outputs: object
    heard: "Ear"

    @property
    def kept(self) -> dict[str, Tensor]:
        return {name: selection.kept_mask() for name, selection in self.selection.items()}


class Ear(Listener):
    """Everything that a method tells."""

    def __init__(self):
        self.counts: dict[str, int] = {}
        self.chunks: list[int] = []
        self.turns = 0  # of chunks that went backward
        self.selections: list[dict[str, Selection]] = []

    def counted(self, **counts):
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + int(count)

    def shaped(self, chunks, rows):
        self.chunks.append(chunks)

    def chunk_ends(self):
        self.turns += 1

    def chosen(self, selection):
        self.selections.append(selection)


def seeking_on(model, scorer=None, **settings) -> TokenSeeking:
    """Token seeking with the settings of these tests."""
    settings = {"token_seeking": True, "token_ratio": RATIO, **PUBLISHED, **settings}
    return TokenSeeking(model, TokenSeekingConfig(**settings), scorer=scorer)


def target_of(model, batch) -> Tensor | None:
    """(B, T): the label of each position's own prediction; None where the model has one loss for a row."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "labels" not in batch or batch["labels"].dim() < 2 or batch["labels"].is_floating_point():  # classes of rows, one or several
        return None
    return shifted(batch["labels"]) if type(inner).__name__.endswith(("CausalLM", "LMHeadModel")) else batch["labels"]


def loss_of(model, batch, label_smoothing=0.0) -> tuple[Tensor, object]:
    """The mean loss in the dtype of the logits (transformers takes it in float32), and the outputs; of rows, the model's own."""
    target = target_of(model, batch)
    if target is None:
        outputs = model(**batch)
        return outputs.loss, outputs
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if inner.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = inner.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    outputs = model(**inputs)
    total = F.cross_entropy(outputs.logits.flatten(0, 1), target.flatten(), reduction="sum", label_smoothing=label_smoothing)
    return total / (target != -100).sum().clamp_min(1), outputs


def step_on(model, method, batch, **settings) -> Taken:
    """One call and its backward under a method that is on. Gradients that were there are dropped."""
    ear = Ear()
    forget = method.listeners.add(ear)
    try:
        loss, outputs = loss_of(model, batch, **settings)
        found = gradients(model, loss)
        return Taken(loss.detach(), found, ear.selections[-1] if ear.selections else {}, outputs, ear)
    finally:
        forget()


def take_step(model, batch, scorer=None, label_smoothing=0.0, **settings) -> Taken:
    """One step of token seeking, its backward, and removal."""
    with seeking_on(model, scorer, **settings) as seeking:
        return step_on(model, seeking, batch, label_smoothing=label_smoothing)


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
    """Whether a model called in float64 has a sum in float32 whose order follows from how many tokens pass together.

    Norms of Gemma and Cohere sum the gradient of their weight over the tokens, DeepSeek's router is a matrix product, Llama 4's
    rotation is complex, and eager attention has a softmax over keys. What is float32 within one token, as Llama's norms are,
    is the same operation on the same numbers however tokens are cut, and rounds alike.
    """
    return name in ("gemma2", "gemma3", "llama4", "cohere2", "deepseek-v3") or attention == "eager"


# -- streams ---------------------------------------------------------------------------------------------------------


def stream(model, batch, chunk, order=None, keeps=False, **settings) -> Taken:
    """One step of exact streaming in chunks of `chunk` tokens, its backward, and removal. keeps: what attention gave in forward."""
    with Streaming(model, StreamingConfig(sequence_chunk_size=chunk, stream_order=order, keep_attention_outputs=keeps)) as streaming:
        return step_on(model, streaming, batch, **settings)


def seek_in_stream(model, batch, chunk, scorer=None, **settings) -> Taken:
    """One step of token seeking whose gradient is not cut, in chunks of `chunk` tokens, its backward, and removal."""
    with seeking_on(model, scorer, **{"token_gradient": "stream", "sequence_chunk_size": chunk, **settings}) as seeking:
        return step_on(model, seeking, batch)


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
    losses = F.cross_entropy(model(**inputs).logits.flatten(0, 1), target.flatten(), reduction="sum", label_smoothing=label_smoothing)
    loss = losses / (target != -100).sum().clamp_min(1)
    return loss.detach(), gradients(model, loss)
