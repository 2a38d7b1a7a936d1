"""What another model says that each token costs, for the excess loss of Rho-1 (arXiv 2404.07965, eq. 3)."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_memtune.architectures.language_model import problem_of_language_model
from hf_memtune.errors import ConfigError, TokenScoreError, first_line

_LOSS = "token_loss"
_ROWS = ("input_ids", "attention_mask", "position_ids")


class Looking(Protocol):
    """What tells the losses of another model's tokens: TokenSeeking on it, with looks_only."""

    def inspect(self, inputs: dict[str, Any], scores: tuple[str, ...]) -> Any: ...


class ReferenceLoss:
    """looking: at the reference model; vocabulary: how many tokens it knows."""

    def __init__(self, model: nn.Module, looking: Looking, vocabulary: int):
        self.model, self.looking, self.vocabulary = model, looking, vocabulary

    def of(self, arguments: dict[str, Any], labels: Tensor | None) -> Tensor:
        """(B, T) float32: loss of each position's own prediction by the reference model; 0 without a label.

        arguments: of the body's call; what tells padding from tokens, and packed rows from one another, is handed on.
        """
        rows = {name: arguments[name] for name in _ROWS if name in arguments}
        input_ids = rows.get("input_ids")
        if input_ids is None or labels is None:
            raise TokenScoreError(
                "token_scorer=excess_loss: the model was given no input_ids, or no labels, which the reference model needs, too. Choose another scorer."
            )
        if int(input_ids.max()) >= self.vocabulary:
            raise TokenScoreError(
                f"token_scorer=excess_loss: got a token {int(input_ids.max())}, expected less than the {self.vocabulary} of the reference "
                "model. Give one of the same tokenizer."
            )
        # packed rows are looked for only where no cache is made
        return self.looking.inspect(rows | {"labels": labels, "use_cache": False}, (_LOSS,)).scores["decoder"][_LOSS]


def reference_model(name: str, device: torch.device) -> nn.Module:
    """Of a folder, or of a name of the hub, in evaluation mode. Raises ConfigError where none can be loaded."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto", output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            [
                f"reference_model: got {name!r}, which cannot be loaded: {first_line(error)}. Expected the folder or hub name of a causal model."
            ]
        ) from error
    model, found = loaded
    if wrong := problem_of_language_model(model, found):
        raise ConfigError([f"reference_model: {name!r} {wrong}. Expected the folder or hub name of a causal model."])
    return model.to(device).eval().requires_grad_(False)


def require_same_tokens(reference: str, own: str) -> None:
    """Raises ConfigError where a number is one token to the reference and another to the model: its losses would be of other text.

    reference, own: folders or hub names. What is saved without a tokenizer cannot be compared. Tokens that were added to one of them, as for
    chats, may differ.
    """
    ours, theirs = (_tokens(name) for name in (own, reference)) if own and own != reference else ({}, {})
    if wrong := sorted(number for number, token in ours.items() if theirs.get(number, token) != token):
        n = wrong[0]
        raise ConfigError(
            [
                f"reference_model: got {reference!r}, whose tokenizer is another one: {len(wrong)} numbers mean other tokens, such as {n}, "
                f"{theirs[n]!r} there and {ours[n]!r} in {own!r}. Give a model of the same tokenizer."
            ]
        )


def _tokens(name: str) -> dict[int, str]:
    """Those that the tokenizer was trained with, by number; none where it cannot be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception:  # of many kinds, one for each way of not being there
        return {}
    added = tokenizer.get_added_vocab()
    return {number: token for token, number in tokenizer.get_vocab().items() if token not in added}
