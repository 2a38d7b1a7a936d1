"""One step of token seeking on a tiny model, and everything a test may want to know about it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_memtune import TokenSeeking, TokenSeekingConfig
from hf_memtune.core.selection import Selection
from tests.strategies.tiny_models import batch_for, lm_head, tiny_model
from tests.strategies.twin import gradients, twin_loss, worst_difference
from tests.tolerances import tolerance

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
    settings = {"token_seeking": True, "token_ratio": RATIO, **settings}
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
