"""The head in one call of a model with token seeking: where the loss is its own cross entropy, the kept tokens alone reach it.

Shape legend: B rows of a batch, T tokens in a row, S kept tokens, D hidden size, V classes.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_memtune.core.head_call import HeadOnDemand, Pointwise
from hf_memtune.core.loss import IGNORED, linear_loss
from hf_memtune.methods.head import Head
from hf_memtune.methods.seeking.ditched import DitchedCall
from hf_memtune.methods.seeking.loss_gradient import given_to_head
from hf_memtune.methods.seeking.streamed import ChosenStream


class ChoosingHead(Head):
    """run: the body's part of the call, whose tokens are yet to be chosen by labels."""

    def __init__(self, linear, inputs: dict[str, Any]):
        super().__init__(linear, inputs)
        self.run: DitchedCall | ChosenStream | None = None
        self._body: int | None = None

    def choose_for(self, run: DitchedCall | ChosenStream, hidden_BTD: Tensor) -> None:
        """Let the loss choose the tokens of a run, whose body has returned `hidden_BTD`."""
        self.run, self._body = run, _memory(hidden_BTD)

    def of(self, forward: Callable[[Tensor], Tensor]) -> HeadOnDemand:
        run, self.run = self.run, None
        if run is None:
            return super().of(forward)
        return _ChoosingLoss(self.bound(forward), self.weight, self.there.bias, run, self._body)


def _memory(hidden: Tensor) -> int:
    """What is the same of two views of one tensor; traced tensors have it too."""
    return hidden.untyped_storage()._cdata


def _carried_by(run: weakref.ref, gradient: Tensor) -> None:
    """A hook of the loss that chose the tokens, where it goes back through the outputs."""
    if (found := run()) is not None:  # it is gone where backward comes a second time
        found.carries_loss = True


class _ChoosingLoss(HeadOnDemand):
    """The summed cross entropy of the kept tokens, scaled to stand for that of all labels; logits are those of all tokens.

    The kept tokens alone run on from the body. What is between body and head (the transform of masked language models, the dropout of
    classifiers) works on tokens one by one, and runs again for them.
    """

    def __init__(self, forward, weight, bias, run: DitchedCall | ChosenStream, body: int | None):
        super().__init__(forward, weight, bias)
        # kept alive by the graph of the hidden states: logits that are kept after backward hold no keys and values
        self._run, self._body = weakref.ref(run), body

    def cross_entropy(
        self, hidden_BTD: Tensor, weight_VD: Tensor, target_BT: Tensor, label_smoothing: float, pointwise: Pointwise | None
    ) -> tuple[Tensor, Tensor]:
        if (run := self._run()) is None or not self._may_choose(run, target_BT):
            return super().cross_entropy(hidden_BTD, weight_VD, target_BT, label_smoothing, pointwise)
        choice = run.choice
        weight_VD.detach()[:, 0].gather(0, target_BT.flatten().clamp_min(0))  # raises for what is no class, of tokens that are not kept too
        is_of_body = self._body == _memory(hidden_BTD)
        is_whole = is_of_body and isinstance(run, DitchedCall)  # a stream ran with dropout, and scores are without
        choice.by_labels(target_BT, hidden_BTD.detach() if is_whole else None)
        assert choice.target is not None
        weight: Tensor | None
        if is_live := isinstance(run, DitchedCall):
            hidden, target = run.focus(live=True).last_hidden_state, choice.decoder.gather(choice.target, fill=IGNORED)
            if not is_of_body:
                hidden = given_to_head(run.router.architecture, choice.chooser.facts, hidden, choice.without_labels())
            weight = choice.decoder.weight
            weight_VD, run.matrix = (weight_VD if run.matrix is None else run.matrix), None
        else:
            hidden, target, weight = hidden_BTD, choice.target.masked_fill(~choice.decoder.kept_mask(), IGNORED), choice.weight
            run.let_go_of_scores()
        weight = None if weight is None else weight.flatten()
        total = linear_loss(hidden.flatten(0, 1), weight_VD, self.bias, target.flatten(), label_smoothing, weight, pointwise=pointwise)
        if not is_live and total.requires_grad:
            total.register_hook(partial(_carried_by, self._run))
        return total * choice.scale(target_BT, total.dtype), (target_BT != IGNORED).sum()

    def _may_choose(self, run: DitchedCall | ChosenStream, target_BT: Tensor) -> bool:
        rows = run.call.decoder
        return run.choice.selection is None and target_BT.shape == (rows.batch, rows.length) and torch.is_grad_enabled()
