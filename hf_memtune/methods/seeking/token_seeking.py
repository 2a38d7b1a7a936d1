"""Token seeking and ditching on any transformers model (TokenSeek, arXiv 2601.19739; TokenTune, arXiv 2501.18824).

    seeking = TokenSeeking(model, TokenSeekingConfig(token_seeking=True, token_ratio=0.1))
    with seeking.step(batch) as step:
        for _ in step.turns():  # one, unless token_gradient streams
            outputs = model(**step.inputs)
            (step.loss_sum(outputs) / step.loss_tokens).backward()
    ...
    seeking.remove()

All tokens are seen forward; the loss of the kept ones alone is taken. With token_gradient=cut keys, values and hidden states of
the others are constants. Exactly that: the gradients equal those of a full run in which they are detached. With stream the
gradient of that loss is the true one, through all tokens.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hf_memtune.settings.methods import TokenSeekingConfig
from hf_memtune.core.scorers import Scorer, TokenScorer, make_scorer, scorer_names
from hf_memtune.errors import ConfigError
from hf_memtune.methods.installed import InstalledStrategy
from hf_memtune.methods.seeking.seeking_step import Inspected, SeekingStep


class TokenSeeking(InstalledStrategy):
    """Token seeking on one model, until `remove()`. Between steps nothing of the model is changed.

    model: a transformers model with a head, or a PEFT model around one. scorer: a callable that replaces
    `config.token_scorer`; it maps a SeekingContext to scores (batch, tokens), larger is kept.
    Raises ConfigError and UnsupportedModelError before the model is touched.
    """

    def __init__(self, model: nn.Module, config: TokenSeekingConfig, scorer: TokenScorer | None = None, check: bool = True):
        self._given_scorer = scorer
        super().__init__(model, config, check)

    def prepare(self) -> None:
        """Settle what the settings leave to the model, and find the modules, by id, whose attention is the context score, for each stack."""
        if not self.architecture.task.loss_per_token:
            self.config = self.config.for_row_loss()
        if self._given_scorer is not None and self.config.always_keep is None:
            self.config = TokenSeekingConfig.of(self.config, always_keep="none")  # token_scorer is not read, so it is not random
        self.scorer = resolve_scorer(self.config, self._given_scorer)
        self.context_modules, wanted = {}, self.config.context_layer
        for name, stack in self.architecture.stacks.items():
            if not -len(stack.layers) <= wanted < len(stack.layers):
                raise ConfigError([
                    f"context_layer: got {wanted}, expected a layer of the {name} of {self.architecture.name}, which has "
                    f"{len(stack.layers)} (0 to {len(stack.layers) - 1}, or -{len(stack.layers)} to -1)."
                ])
            self.context_modules |= {id(module): name for module in stack.layers[wanted].modules()}
        if found := self._without_token_losses():
            raise ConfigError(found)

    def _without_token_losses(self) -> list[str]:
        """Settings that weigh or choose losses of tokens, on a head that has one loss for a row."""
        if self.architecture.task.loss_per_token:
            return []
        task = self.architecture.task.value
        return [
            f"{name}: got {got!r} with {self.architecture.name}, which has one loss for a row, not one for each token ({task}). "
            f"Expected {expected!r}; for exact gradients in less memory set sequence_chunk_size without token_seeking."
            for name, got, expected in (
                ("token_gradient", self.config.token_gradient, "cut"),
                ("token_selection", self.config.token_selection, "top"),
            )
            if got != expected
        ]

    def step(
        self,
        inputs: dict[str, Any],
        label_smoothing: float = 0.0,
        whole_logits: bool = False,
        scores: dict[str, Tensor] | None = None,
    ) -> AbstractContextManager[SeekingStep]:
        """Open one step for a batch. Inside it, each of the step's `turns` calls the model (wrapped or not) with `step.inputs`.

        whole_logits: return logits of the kept tokens instead of fusing head and loss (for loss functions of one's own).
        scores: scores computed earlier, (B, T) for each stack; without them the batch is scored now.
        """
        self.router  # raises when removed
        return SeekingStep(self, inputs, label_smoothing, whole_logits, scores).open()

    def inspect(self, inputs: dict[str, Any], scores: tuple[str, ...] = ()) -> SeekingStep:
        """Score and select the tokens of a batch without training on them.

        Returns a step whose `values` and `selection` are filled in, and whose `inspection` holds, by stack, the `scores` asked
        for (names of SeekingContext, such as "context_score"), (B, T) each, and "real", False at padding.
        """
        with self.step(inputs) as step, torch.no_grad(), contextlib.suppress(Inspected):
            step.inspection = {stack: dict.fromkeys(scores) for stack in self.architecture.stacks}
            self.architecture.head_model(**step.inputs)
        return step


def resolve_scorer(config: TokenSeekingConfig, scorer: TokenScorer | None) -> Scorer:
    """The scorer to use: the user's own callable, or the one of that name. Raises ConfigError for an unknown name."""
    if scorer is not None:
        return Scorer(getattr(scorer, "__name__", type(scorer).__name__), scorer)
    if config.token_scorer not in scorer_names():
        raise ConfigError([
            f"token_scorer: got {config.token_scorer!r}, expected one of {', '.join(scorer_names())}, or a name given to "
            "hf_memtune.register_scorer before."
        ])
    return make_scorer(config.token_scorer, config.context_weight, config.gradient_weight, config.token_selection == "sample")
