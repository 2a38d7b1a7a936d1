"""The gradient of a loss with respect to the last hidden states, from which token scores start.

Shape legend: B rows of a batch, T tokens in a row, S tokens of a chunk, N labelled tokens, D hidden size, V classes.
"""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_memtune.architectures import Architecture
from hf_memtune.core.labelled import put_labelled, take_labelled
from hf_memtune.core.loss import IGNORED, linear_loss_gradient, logit_rows, losses_of_logits, softmax_residual_norm
from hf_memtune.errors import ConfigError
from hf_memtune.methods.attention.outputs import pooled
from hf_memtune.methods.facts import Facts
from hf_memtune.methods.overrides import forward_as


class LossGradient(Protocol):
    """dL/dhidden by position, and the loss of each token where L is a sum over tokens."""

    def cotangent(self, hidden: Tensor, start: int) -> Tensor:
        """(B, S, D), of the hidden states (B, S, D) of the tokens from `start` on."""

    def of_tokens(self) -> "OfTargets | None":
        """What knows the loss of each token; None where nothing does."""


class Known:
    """The gradient (B, T, D) that backward has brought: of whatever loss was taken. labels: what the call's own labels cost, or None."""

    def __init__(self, gradient: Tensor, labels: "OfTargets | None" = None):
        self._gradient, self._labels = gradient, labels

    def cotangent(self, hidden: Tensor, start: int) -> Tensor:
        return self._gradient.narrow(1, start, hidden.shape[1]).to(hidden.dtype)

    def of_tokens(self) -> "OfTargets | None":
        return self._labels


class OfTargets:
    """The summed cross entropy of `target` (B, T) int64, the label of each position's own prediction, -100 for none."""

    def __init__(self, architecture: Architecture, facts: Facts, target: Tensor, inputs: dict[str, Any]):
        self._architecture, self._facts, self._target, self._inputs = architecture, facts, target, inputs
        self._losses: dict[int, Tensor] = {}  # of tokens whose cotangent was asked for, by where they begin

    def of_tokens(self) -> "OfTargets":
        return self

    @property
    def has_label(self) -> Tensor:
        """(B, T) bool."""
        return self._target != IGNORED

    def cotangent(self, hidden: Tensor, start: int) -> Tensor:
        target = self._target[:, start : start + hidden.shape[1]]
        if self._is_linear:  # which leaves out tokens without a label by itself
            flat, loss = self._linear_head(hidden.flatten(0, 1), target.flatten())
            self._losses[start] = loss.float().view(target.shape)
            return flat.view(hidden.shape)
        labelled = target != IGNORED
        flat, loss = self._own_head(take_labelled(hidden, labelled), take_labelled(target, labelled))
        self._losses[start] = put_labelled(loss.float(), labelled, torch.zeros(target.shape, device=hidden.device))
        return put_labelled(flat, labelled, torch.zeros_like(hidden))

    def losses(self, hidden: Tensor, start: int) -> Tensor:
        """(B, S) float32: loss of each token of the hidden states (B, S, D) of the tokens from `start` on; 0 without a label."""
        return self._losses[start] if start in self._losses else self._by_token(losses_of_logits, hidden, start)

    def residuals(self, hidden: Tensor, start: int) -> Tensor:
        """(B, S) float32: norm of softmax - onehot, of the hidden states (B, S, D) of the tokens from `start` on; 0 without a label."""
        return self._by_token(softmax_residual_norm, hidden, start)

    def _by_token(self, of_logits: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, start: int) -> Tensor:
        """(B, S) float32: what a function makes of logits (N, V) and labels (N,), a number a token; 0 without a label."""
        target = self._target[:, start : start + hidden.shape[1]]
        labelled, rows = target != IGNORED, logit_rows(self._architecture.base.config.get_text_config().vocab_size)
        pairs = zip(take_labelled(hidden, labelled).split(rows), take_labelled(target, labelled).split(rows))
        found = [of_logits(self._logits(part), labels.clamp_min(0)) for part, labels in pairs if len(labels)]
        numbers = torch.zeros(target.shape, device=hidden.device)
        return put_labelled(torch.cat(found).to(numbers.dtype), labelled, numbers) if found else numbers

    @property
    def _is_linear(self) -> bool:
        """Whether the head is one product of the hidden states."""
        return self._facts.has_plain_head and self._facts.head_reads_body

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        if self._is_linear:
            head = self._architecture.head
            return F.linear(hidden_ND.to(head.weight.dtype), head.weight, head.bias)
        return head_on(self._architecture, self._facts, hidden_ND[None], self._inputs).logits[0]

    def _linear_head(self, hidden_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        head = self._architecture.head
        bias = None if head.bias is None else head.bias.detach()
        return linear_loss_gradient(hidden_ND, head.weight.detach(), bias, target_N)

    def _own_head(self, hidden_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """The same through the model's own head, where it does more than one product; heads see tokens one by one."""
        rows = logit_rows(self._architecture.base.config.get_text_config().vocab_size)
        parts = [self._own_head_part(*pair) for pair in zip(hidden_ND.split(rows), target_N.split(rows))]
        gradients, losses = zip(*parts) if parts else ((hidden_ND,), (hidden_ND.new_zeros(0),))
        return torch.cat(gradients), torch.cat(losses)

    def _own_head_part(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            losses = losses_of_logits(self._logits(leaf), target)
            return torch.autograd.grad(losses.sum(), leaf)[0], losses.detach()


class OfRows:
    """The model's own loss of whole rows: of a head that has one for a row. labels: by name. whole: last hidden states of all tokens (B, T, D)."""

    def __init__(
        self, architecture: Architecture, facts: Facts, inputs: dict[str, Any], labels: dict[str, Tensor], whole: Callable[[], Tensor]
    ):
        self._architecture, self._facts, self._inputs, self._labels, self._whole = architecture, facts, inputs, labels, whole

    def of_tokens(self) -> None:
        return None

    def cotangent(self, hidden: Tensor, start: int) -> Tensor:
        if not self._labels:
            raise ConfigError(
                [
                    f"token_scorer: the batch has no labels for {self._architecture.name}, without which no gradient scores it. Choose random or context."
                ]
            )
        return self._gradient[:, start : start + hidden.shape[1]]

    @cached_property
    def _gradient(self) -> Tensor:
        """(B, T, D): the head looks at one position of a row, which no chunk of it knows."""
        with torch.enable_grad():
            leaf = self._whole().detach().requires_grad_()
            loss = head_on(self._architecture, self._facts, leaf, self._inputs | self._labels).loss
            return torch.autograd.grad(loss, leaf)[0]


def head_on(architecture: Architecture, facts: Facts, hidden: Tensor, inputs: dict[str, Any]) -> Any:
    """What the model returns with `hidden` (B, S, D) in the place of its body's output; its head as it is, of the class."""

    model, head = architecture.head_model, architecture.output_head
    if not inputs.get("return_dict", getattr(model.config, "return_dict", True)):
        inputs = inputs | {"return_dict": True}
    with forward_as(architecture.base, _returning(architecture, facts, hidden)):
        if head is None:
            return type(model).forward(model, **inputs)
        with forward_as(head, partial(type(head).forward, head)):
            return type(model).forward(model, **inputs)


def given_to_head(architecture: Architecture, facts: Facts, hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
    """(B, S, D): what the model's linear head is given where its body returns `hidden` (B, S, D)."""
    model, given = architecture.head_model, []

    def head(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return hidden.new_zeros(1, 1, 1)

    with forward_as(architecture.base, _returning(architecture, facts, hidden)), forward_as(architecture.head, head):
        type(model).forward(model, **inputs)
    return given[0]


def _returning(architecture: Architecture, facts: Facts, hidden: Tensor) -> Callable:
    def body(*args, **kwargs):
        return facts.body_output(last_hidden_state=hidden, **pooled(architecture.base, facts.body_output, hidden))

    return body
