"""Token scorers: what a scorer sees, the built-in ones, and how to register another.

Shape legend: B rows of a batch, T tokens in a row (padding included), D hidden size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_memtune._compat import is_fake
from hf_memtune.core.scoring import combined_score
from hf_memtune.errors import ConfigError, TokenScoreError


class SeekingContext:
    """What a scorer may look at. The costly entries are computed when they are first asked for, and only then.

    input_ids: (B, T) int64, or None where the model was given embeddings.
    attention_mask: (B, T) bool, True at real tokens.
    labels: as the batch has them, or None.
    last_hidden_state: (B, T, D), of the pass over all tokens.
    context_score: (B, T) float32, attention received in the context layer (TokenSeek, eq. 3), normalised as configured.
    gradient_score: (B, T) float32, magnitude of the loss gradient at the input of the last block (eq. 4).
    token_loss: (B, T) float32, loss of each position's own prediction; 0 where it has no label.
    softmax_residual: (B, T) float32, norm of softmax - onehot of each position's own prediction, the gradient of its loss at its logits; 0
        where it has no label.
    reference_loss: (B, T) float32, the same loss by the model that `reference_model` names.
    true_gradient: (B, T) float32, magnitude of the gradient of the loss at the last hidden states: in backward, of whatever loss was taken.
    """

    def __init__(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor,
        labels: Tensor | None,
        compute: Mapping[str, Callable[[], Tensor]],
    ):
        self.input_ids, self.attention_mask, self.labels = input_ids, attention_mask, labels
        self._compute = compute

    @cached_property
    def last_hidden_state(self) -> Tensor:
        return self._compute["last_hidden_state"]()

    @cached_property
    def context_score(self) -> Tensor:
        return self._compute["context_score"]()

    @cached_property
    def gradient_score(self) -> Tensor:
        return self._compute["gradient_score"]()

    @cached_property
    def token_loss(self) -> Tensor:
        return self._compute["token_loss"]()

    @cached_property
    def softmax_residual(self) -> Tensor:
        return self._compute["softmax_residual"]()

    @cached_property
    def reference_loss(self) -> Tensor:
        return self._compute["reference_loss"]()

    @cached_property
    def true_gradient(self) -> Tensor:
        return self._compute["true_gradient"]()


TokenScorer = Callable[[SeekingContext], Tensor]


@dataclass(frozen=True)
class Scorer:
    """A named scorer.

    reads_model: False where it needs nothing of the pass over all tokens (random choice, the gradient that backward brings). runs_last_block: True where it is
    known to ask for gradients or losses, which come from running the last block alone. reads_context: True where it is known to ask for the
    attention that tokens receive. is_size: its scores are magnitudes of gradients, to which probabilities are to be proportional.
    """

    name: str
    score: TokenScorer
    reads_model: bool = True
    runs_last_block: bool = False
    reads_context: bool = False
    is_size: bool = False

    def __call__(self, context: SeekingContext) -> Tensor:
        scores = self.score(context)
        expected = tuple(context.attention_mask.shape)
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        if got != expected:
            raise TokenScoreError(
                f"token scorer {self.name!r} returned {got}, expected a tensor of shape {expected} (batch, tokens): "
                "return one score for each token, padding included (its score is not used)."
            )
        scores = scores.detach()
        if self.name not in BUILT_IN and not is_fake(scores) and bool((scores.isnan() & context.attention_mask).any()):
            raise TokenScoreError(
                f"token scorer {self.name!r} returned NaN for a real token, expected a number for each: NaN has no place in an "
                "order. Return a very low number for a token that must not be kept."
            )
        return scores


_REGISTERED: dict[str, TokenScorer] = {}
BUILT_IN = ("combined", "context", "gradient", "true_gradient", "softmax_residual", "random", "loss", "profit", "excess_loss")
SIZES = ("true_gradient", "softmax_residual")


def register_scorer(name: str, scorer: TokenScorer) -> None:
    """Make `--token_scorer name` use `scorer`, which maps a SeekingContext to scores (B, T), larger is kept."""
    if name in BUILT_IN:
        raise ConfigError([f"token scorer {name!r} is built in and cannot be replaced: register another name."])
    _REGISTERED[name] = scorer


def scorer_names() -> list[str]:
    return [*BUILT_IN, *_REGISTERED]


def make_scorer(name: str, context_weight: float = 1.0, gradient_weight: float = 1.0, sampling: bool = False) -> Scorer:
    """The scorer of that name; the weights are alpha and beta of eq. 5 and matter to `combined` only.

    `random` is TokenTune (arXiv 2501.18824): uniform choice, drawn anew at every call from torch's generator.
    A weight of 0 leaves its score uncomputed. sampling: scores are probabilities to be drawn with, so that `random` is the same for all:
    to draw with random probabilities would add noise, and nothing else.
    Two change what is learned. `profit` is the probability of the label, so that top leaves the least probable tokens out (ProFit, arXiv
    2601.09195); `excess_loss` is what a token costs beyond the reference model (Rho-1, arXiv 2404.07965, eq. 3), so that top keeps those that
    can still be learned, and leaves out the easy ones and noise.
    """

    def combined(seen: SeekingContext) -> Tensor:
        flat = torch.zeros(seen.attention_mask.shape, device=seen.attention_mask.device)
        context = seen.context_score if context_weight else flat + 1
        gradient = seen.gradient_score if gradient_weight else flat
        return combined_score(context, gradient, context_weight, gradient_weight, seen.attention_mask)

    def random(seen: SeekingContext) -> Tensor:
        shape, device = seen.attention_mask.shape, seen.attention_mask.device
        return torch.zeros(shape, device=device) if sampling else torch.rand(shape, device=device)

    built_in = {
        "combined": combined,
        "context": lambda seen: seen.context_score,
        "gradient": lambda seen: seen.gradient_score,
        "true_gradient": lambda seen: seen.true_gradient,
        "softmax_residual": lambda seen: seen.softmax_residual,
        "random": random,
        "loss": lambda seen: seen.token_loss,
        "profit": lambda seen: (-seen.token_loss).exp(),
        "excess_loss": lambda seen: seen.token_loss - seen.reference_loss,
    }
    runs_last_block = name in ("gradient", "loss", "profit", "excess_loss", "softmax_residual") or (
        name == "combined" and gradient_weight > 0
    )
    reads_context = name == "context" or (name == "combined" and context_weight > 0)
    reads_model = name not in ("random", "true_gradient")
    return Scorer(name, {**_REGISTERED, **built_in}[name], reads_model, runs_last_block, reads_context, is_size=name in SIZES)
