"""Token scorers: what a scorer sees, the built-in ones, and how to register another.

Shape legend: B rows of a batch, T tokens in a row (padding included), D hidden size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hf_memtune._compat import is_fake
from hf_memtune.core.scoring import combined_score
from hf_memtune.errors import ConfigError, TokenScoreError
from hf_memtune.settings.scorers import BUILT_IN, OF_ONES_OWN, ScorerFacts, facts_of


class SeekingContext:
    """What a scorer may look at. The costly entries are computed when they are first asked for, and only then.

    Of a model with encoder and decoder it is called once for each stack whose tokens are chosen, T being the tokens of that stack.

    input_ids: (B, T) int64, or None where the model was given embeddings.
    attention_mask: (B, T) bool, True at real tokens.
    labels: (B, T) int64, each in the place of the token that it names, -100 for none: those that the call was given, or, without any, those that
        its loss was taken of. Of a loss for a row: as the call was given them. Of the decoder, for an encoder too. None where there are none.
    has_label: (B, T) bool, whether each position's own prediction has a label.
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
    def has_label(self) -> Tensor:
        return self._compute["has_label"]()

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
    """A named scorer. facts: what is known of it."""

    name: str
    score: TokenScorer
    facts: ScorerFacts = OF_ONES_OWN

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


def register_scorer(name: str, scorer: TokenScorer) -> None:
    """Make `--token_scorer name` use `scorer`, which maps a SeekingContext to scores (B, T), larger is kept.

    Raises ConfigError for the name of a built-in scorer.
    """
    if name in BUILT_IN:
        raise ConfigError([f"token scorer {name!r} is built in and cannot be replaced: register another name."])
    _REGISTERED[name] = scorer


def scorer_names() -> list[str]:
    return [*BUILT_IN, *_REGISTERED]


def problems_of_name(name: str | None) -> list[str]:
    """Of a name that is no scorer's."""
    if name in scorer_names():
        return []
    return [
        f"token_scorer: got {name!r}, expected one of {', '.join(scorer_names())}, or a name given to hf_memtune.register_scorer before."
    ]


def make_scorer(name: str, context_weight: float = 1.0, gradient_weight: float = 1.0, sampling: bool = False) -> Scorer:
    """The scorer of that name; the weights are alpha and beta of eq. 5 and matter to `combined` only. Raises ConfigError for an unknown name.

    `random` is TokenTune (arXiv 2501.18824): uniform choice, drawn anew at every call from torch's generator.
    A weight of 0 leaves its score uncomputed. sampling: scores are probabilities to be drawn with, so that `random` is the same for all:
    to draw with random probabilities would add noise, and nothing else.
    Two change what is learned. `profit` is the probability of the label, so that top leaves the least probable tokens out (ProFit, arXiv
    2601.09195); `excess_loss` is what a token costs beyond the reference model (Rho-1, arXiv 2404.07965, eq. 3), so that top keeps those that
    can still be learned, and leaves out the easy ones and noise. Tokens whose own prediction has no label come last.
    """
    if found := problems_of_name(name):
        raise ConfigError(found)

    def combined(seen: SeekingContext) -> Tensor:
        flat = torch.zeros(seen.attention_mask.shape, device=seen.attention_mask.device)
        context = seen.context_score if context_weight else flat + 1
        gradient = seen.gradient_score if gradient_weight else flat
        return combined_score(context, gradient, context_weight, gradient_weight, seen.attention_mask)

    def random(seen: SeekingContext) -> Tensor:
        shape, device = seen.attention_mask.shape, seen.attention_mask.device
        return torch.zeros(shape, device=device) if sampling else torch.rand(shape, device=device)

    built_in: dict[str, TokenScorer] = {
        "combined": combined,
        "context": lambda seen: seen.context_score,
        "gradient": lambda seen: seen.gradient_score,
        "true_gradient": lambda seen: seen.true_gradient,
        "softmax_residual": lambda seen: seen.softmax_residual,
        "random": random,
        "loss": lambda seen: seen.token_loss,
        "profit": lambda seen: _labels_first(seen, (-seen.token_loss).exp()),
        "excess_loss": lambda seen: _labels_first(seen, seen.token_loss - seen.reference_loss),
    }
    facts = facts_of(name)
    if name == "combined":
        weights = {"context_score": context_weight, "gradient_score": gradient_weight}
        facts = replace(facts, reads=frozenset(entry for entry, weight in weights.items() if weight))
    return Scorer(name, {**_REGISTERED, **built_in}[name], facts)


def _labels_first(seen: SeekingContext, scores: Tensor) -> Tensor:
    """Scores (B, T) of what is learned; without a label nothing is, and the loss of 0 is no merit."""
    return scores.masked_fill(~seen.has_label, -torch.inf)
