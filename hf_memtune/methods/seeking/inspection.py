"""What scores say of the tokens of one batch, and which would be kept."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_memtune.core.selection import Selection
from hf_memtune.methods.overrides import evaluating
from hf_memtune.methods.seeking.choice import Choice, Chooser


class Inspected(Exception):
    """Ends a call of the model whose scores alone were wanted."""


class Chosen(NamedTuple):
    """What one scorer makes of a batch, by stack. values: what it gave, (B, T). probability: (B, T) float64, with which each token is kept;
    None where the highest scores are."""

    values: dict[str, Tensor]
    selection: dict[str, Selection]
    probability: dict[str, Tensor | None]

    @classmethod
    def of(cls, choice: Choice) -> "Chosen":
        return cls(choice.values, choice.made, {stack: choice.probability(stack) for stack in choice.stacks})


class Inspection:
    """Filled in by `TokenSeeking.inspect`.

    inputs: the batch. ids: (B, T) int64 of each stack, or None. values: what the scorer gave, (B, T), by stack. selection: by stack.
    probability: by stack, (B, T) float64, with which each token is kept; None where the highest scores are. others: what further scorers
    make of the batch, in the order of `choosers`. scores: by stack, the scores asked for, (B, T) each, and "real", False at padding.
    target: (B, T), labels of each position's own prediction, or None.
    """

    def __init__(self, names: tuple[str, ...], inputs: dict[str, Any], choosers: Sequence[Chooser] = ()):
        self.names, self.inputs, self.choosers = names, inputs, choosers
        self.values: dict[str, Tensor] = {}
        self.selection: dict[str, Selection] = {}
        self.probability: dict[str, Tensor | None] = {}
        self.others: list[Chosen] = []
        self.scores: dict[str, dict[str, Tensor]] = {}
        self.ids: dict[str, Tensor | None] = {}
        self.target: Tensor | None = None

    def see(self, choice: Choice, target: Tensor | None) -> None:
        """Choose by the labels of the batch, and look at the scores."""
        self.target = target
        choice.at_once() if target is None else choice.by_labels(target)
        self.values, self.selection, self.probability = Chosen.of(choice)
        self.others = [Chosen.of(choice.of_other(chooser)) for chooser in self.choosers]
        with torch.no_grad(), evaluating(choice.call.architecture.head_model):
            for stack in choice.stacks:
                seen = choice.seen(stack)
                self.scores[stack] = {name: getattr(seen, name) for name in self.names} | {"real": seen.attention_mask}
                self.ids[stack] = choice.call.input_ids(stack)
