"""Token seeking and ditching on any transformers model (TokenSeek, arXiv 2601.19739; TokenTune, arXiv 2501.18824).

    seeking = TokenSeeking(model, TokenSeekingConfig(token_seeking=True, token_ratio=0.1))
    with seeking.step(batch) as step:
        outputs = model(**step.inputs)
    loss = step.loss_sum(outputs) / step.kept_labels
    ...
    seeking.remove()

All tokens are seen forward; the gradient flows through the kept ones, whose loss alone is taken. Keys, values and hidden
states of the others are constants. Exactly that: the gradients equal those of a full run in which they are detached.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hf_memtune._compat import forbid_4bit_repacking, has_repacked_4bit
from hf_memtune.architectures import describe
from hf_memtune.config import TokenSeekingConfig
from hf_memtune.core.scorers import Scorer, TokenScorer, make_scorer, scorer_names
from hf_memtune.errors import ConfigError, MemTuneError, UnsupportedModelError
from hf_memtune.strategies.passes import Places
from hf_memtune.strategies.routing import Router
from hf_memtune.strategies.seeking_step import Inspected, SeekingStep
from hf_memtune.strategies.verify import verify


class TokenSeeking:
    """Token seeking on one model, until `remove()`. Between steps nothing of the model is changed.

    model: a transformers model with a head, or a PEFT model around one. scorer: a callable that replaces
    `config.token_scorer`; it maps a SeekingContext to scores (batch, tokens), larger is kept.
    Raises ConfigError and UnsupportedModelError before the model is touched.
    """

    def __init__(self, model: nn.Module, config: TokenSeekingConfig, scorer: TokenScorer | None = None, check: bool = True):
        self.config, self.architecture = config, describe(model)
        self.scorer = resolve_scorer(config, scorer)
        self.context_modules = self._context_modules()
        self.places = Places(self.architecture)
        if has_repacked_4bit(model):
            raise UnsupportedModelError(
                f"{self.architecture.name}: its 4-bit weights were repacked by an evaluation on the CPU, and no gradient passes them any "
                "more. Load the model again, and make the trainer (or this object) before the first evaluation."
            )
        self._router: Router | None = Router(self.architecture)
        self._forbidden = forbid_4bit_repacking(model)
        try:
            self.facts = verify(self, check)
        except BaseException:
            self.remove()
            raise

    def _context_modules(self) -> dict[int, str]:
        """The modules, by id, of the layer whose attention is the context score, for each stack."""
        found, wanted = {}, self.config.context_layer
        for name, stack in self.architecture.stacks.items():
            if not -len(stack.layers) <= wanted < len(stack.layers):
                raise ConfigError([
                    f"context_layer: got {wanted}, expected a layer of the {name} of {self.architecture.name}, which has "
                    f"{len(stack.layers)} (0 to {len(stack.layers) - 1}, or -{len(stack.layers)} to -1)."
                ])
            found |= {id(module): name for module in stack.layers[wanted].modules()}
        return found

    @property
    def kernel_knows_causal(self) -> bool:
        """Whether the attention kernel applies a causal mask by itself where it is given none."""
        return self.router.kernel(self.architecture.base.config) == "sdpa"

    @property
    def router(self) -> Router:
        if self._router is None:
            raise MemTuneError("token seeking was removed from this model: make a new TokenSeeking.")
        return self._router

    def running(self, active) -> AbstractContextManager:
        return self.router.running(active)

    def step(
        self,
        inputs: dict[str, Any],
        label_smoothing: float = 0.0,
        whole_logits: bool = False,
        scores: dict[str, Tensor] | None = None,
    ) -> AbstractContextManager[SeekingStep]:
        """Open one step for a batch. Inside it call the model (wrapped or not) with `step.inputs`, once.

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

    def remove(self) -> None:
        """Take every trace out of the model and of transformers' interfaces. May be called twice."""
        if self._router is not None:
            self._router.close()
            self._router = None
            for module in self._forbidden:
                module.support_avx512bf16_for_cpu = True


def resolve_scorer(config: TokenSeekingConfig, scorer: TokenScorer | None) -> Scorer:
    """The scorer to use: the user's own callable, or the one of that name. Raises ConfigError for an unknown name."""
    if scorer is not None:
        return Scorer(getattr(scorer, "__name__", type(scorer).__name__), scorer)
    if config.token_scorer not in scorer_names():
        raise ConfigError([
            f"token_scorer: got {config.token_scorer!r}, expected one of {', '.join(scorer_names())}, or a name given to "
            "hf_memtune.register_scorer before."
        ])
    return make_scorer(config.token_scorer, config.context_weight, config.gradient_weight)
