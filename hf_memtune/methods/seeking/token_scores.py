"""The scores of one batch, computed from what the context pass left behind, each when a scorer first asks for it.

Shape legend: B rows of a batch, H heads, T tokens in a row, D hidden size, C channels of a head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_memtune.core.scorers import SeekingContext
from hf_memtune.core.scoring import attention_received, gradient_magnitude
from hf_memtune.errors import ConfigError, UnsupportedModelError
from hf_memtune.methods.attention.spans import attention_mask
from hf_memtune.methods.facts import Facts
from hf_memtune.methods.seeking.last_block import LastBlock
from hf_memtune.methods.seeking.loss_gradient import LossGradient, OfTargets
from hf_memtune.methods.seeking.reference import ReferenceLoss
from hf_memtune.settings.protocol import filled_in
from hf_memtune.settings.seeking import TokenSeekingConfig


@dataclass
class TokenScores:
    """Lazy scores of one call of the body. loss: whose gradient and losses score tokens. labels: as the batch has them, or None.

    true_gradient: dL/dhidden (B, T, D), where backward has brought it. reference: what scores compare with another model by, or None.
    """

    config: TokenSeekingConfig
    facts: Facts
    block: LastBlock
    loss: LossGradient
    labels: Tensor | None
    true_gradient: Tensor | None = None
    reference: ReferenceLoss | None = None

    def context(self, stack: str) -> SeekingContext:
        """What a scorer sees of one stack."""
        call = self.block.call
        rows = call.rows[stack]
        real = rows.scored
        if real is None:
            real = torch.ones(rows.batch, rows.length, dtype=torch.bool, device=rows.positions.device)
        compute: dict[str, Callable[[], Tensor]] = {
            "context_score": lambda: self.context_score(stack),
            "gradient_score": lambda: self.gradient_scores[stack],
            "has_label": lambda: self._predictions(stack).has_label,
            "token_loss": lambda: self.token_loss(stack),
            "softmax_residual": lambda: self.softmax_residual(stack),
            "reference_loss": self.reference_loss,
            "last_hidden_state": lambda: self.block.output(stack),
            "true_gradient": lambda: self.true_gradient_score(stack),
        }
        return SeekingContext(call.input_ids(stack), real, self.labels, compute)

    def context_score(self, stack: str) -> Tensor:
        """(B, T): attention received in the context layer, eq. 3."""
        block = self.block
        module, rule, call = block.records.calls[stack]
        rows = block.call.rows[stack]

        def visible(start: int, stop: int):
            span = rows.chunk(start, stop, visible=rows.length if block.chunk == rows.length else stop)
            return attention_mask(rule, span, span), span.visible

        query = torch.cat(block.records.queries[stack], dim=2)
        key, _ = block.store.prefix(module, rows.length)
        received, seen_by = attention_received(query, key.to(query.dtype), visible, real=rows.scored, **call)
        return received / seen_by.clamp_min(1) if self.config.context_normalize == "mean" else received

    @cached_property
    def gradient_scores(self) -> dict[str, Tensor]:
        """(B, T) for each stack: magnitude of the loss gradient at the last block's input, eq. 4."""
        self._require_tail()
        gradients = self.block.gradients(self.loss.cotangent)
        norm = filled_in(self.config.gradient_norm)
        return {stack: gradient_magnitude(g, norm) for stack, g in gradients.items()}

    def true_gradient_score(self, stack: str) -> Tensor:
        """(B, T): magnitude of the loss gradient at the last hidden states, of the loss that was taken."""
        if stack != "decoder":
            raise ConfigError(
                [
                    f"token_scorer: got true_gradient, but no gradient comes to the {stack} of {self.block.architecture.name} from outside. Choose "
                    "gradient or random."
                ]
            )
        gradient = self.true_gradient
        if gradient is None:  # before backward, where tokens are only looked at
            gradient = torch.cat([self.loss.cotangent(hidden, start) for start, hidden in self._outputs()], dim=1)
        return gradient_magnitude(gradient, filled_in(self.config.gradient_norm))

    def _outputs(self) -> Iterator[tuple[int, Tensor]]:
        """Last hidden states (B, S, D), a chunk at a time, and where each begins."""
        start = 0
        for hidden in self.block.output().split(self.block.lengths, dim=1):
            yield start, hidden
            start += hidden.shape[1]

    def token_loss(self, stack: str) -> Tensor:
        """(B, T) float32: loss of each position's own prediction, 0 without a label."""
        known = self._predictions(stack)
        return torch.cat([known.losses(hidden, start) for start, hidden in self._outputs()], dim=1)

    def softmax_residual(self, stack: str) -> Tensor:
        """(B, T) float32: norm of softmax - onehot of each position's own prediction, 0 without a label."""
        known = self._predictions(stack)
        return torch.cat([known.residuals(hidden, start) for start, hidden in self._outputs()], dim=1)

    def reference_loss(self) -> Tensor:
        """(B, T) float32: loss of each position's own prediction by the reference model, 0 without a label."""
        if self.reference is None:
            raise ConfigError(["token_scorer: asks for reference_loss, expected token_scorer=excess_loss with a reference_model."])
        return self.reference.of(self.block.call.arguments, self.labels)

    def _predictions(self, stack: str) -> OfTargets:
        """What knows the prediction of each token of a stack."""
        name = self.block.architecture.name
        if self.block.architecture.is_encoder_decoder and stack == "encoder":
            raise ConfigError(
                [
                    f"token_scorer: the tokens of the encoder of {name} predict nothing, so they cannot be ranked by loss. Choose context, "
                    "gradient or combined."
                ]
            )
        if not self.block.architecture.task.loss_per_token:
            raise ConfigError(
                [
                    f"token_scorer: {name} has one loss for a row, not one for each token ({self.block.architecture.task.value}), so tokens "
                    "cannot be ranked by loss. Choose context, gradient or combined."
                ]
            )
        self._require_tail()
        if (known := self.loss.of_tokens()) is None:
            raise ConfigError(
                [
                    "token_scorer: the loss of this step is not the cross entropy of labels that the model was given, so that no token has one of "
                    "its own. Choose true_gradient or gradient, which take whatever loss there is."
                ]
            )
        return known

    def _require_tail(self) -> None:
        if self.facts.tail_problem:
            raise UnsupportedModelError(self.facts.tail_problem)
