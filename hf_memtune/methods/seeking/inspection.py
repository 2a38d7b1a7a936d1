"""What scores say of the tokens of one batch, and which would be kept."""

from typing import Any

import torch
from torch import Tensor

from hf_memtune.core.selection import Selection
from hf_memtune.methods.overrides import evaluating
from hf_memtune.methods.seeking.choice import Choice


class Inspected(Exception):
    """Ends a call of the model whose scores alone were wanted."""


class Inspection:
    """Filled in by `TokenSeeking.inspect`.

    inputs: the batch. ids: (B, T) int64 of each stack, or None. values: what the scorer gave, (B, T), by stack. selection: by stack.
    scores: by stack, the scores asked for, (B, T) each, and "real", False at padding. target: (B, T), labels of each position's own
    prediction, or None.
    """

    def __init__(self, names: tuple[str, ...], inputs: dict[str, Any]):
        self.names, self.inputs = names, inputs
        self.values: dict[str, Tensor] = {}
        self.selection: dict[str, Selection] = {}
        self.scores: dict[str, dict[str, Tensor]] = {}
        self.ids: dict[str, Tensor | None] = {}
        self.target: Tensor | None = None

    def see(self, choice: Choice, target: Tensor | None) -> None:
        """Choose by the labels of the batch, and look at the scores."""
        self.target = target
        choice.at_once() if target is None else choice.by_labels(target)
        self.values, self.selection = choice.values, choice.selection
        with torch.no_grad(), evaluating(choice.call.architecture.base):
            for stack in choice.stacks:
                seen = choice.scores.context(stack)
                self.scores[stack] = {name: getattr(seen, name) for name in self.names} | {"real": seen.attention_mask}
                self.ids[stack] = choice.call.input_ids(stack)
