"""The loss of one training step that may take several calls of the model, each sent backward before the next.

What the trainer does of a step in passes is here: which divisor makes its sums a mean, and in which turn processes synchronise.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_memtune._compat import is_fake
from hf_memtune.errors import MemTuneError
from hf_memtune.methods.model_step import ModelStep


class Turns:
    """One micro-batch on its way through `trainer`.

    count: calls of the model so far. reported: its part of the logged loss, where that is not the loss itself.
    """

    def __init__(self, trainer: Any, step: ModelStep, model, inputs: dict[str, Any], num_items_in_batch):
        self.trainer, self.step, self.model, self.inputs = trainer, step, model, inputs
        self.num_items_in_batch = num_items_in_batch
        self.outputs, self.count = None, 0
        self.reported: Tensor | None = None
        self._divisor: Tensor | None = None

    def run(self) -> Tensor:
        """Every turn; all but the last have gone backward when this returns. The loss of the step, whose backward is the last turn's."""
        before = 0.0
        for is_last in self.step.turns():
            self.count += 1
            with nullcontext() if is_last else self.trainer.accelerator.no_sync(self.model):
                loss = self._turn_loss(is_first=self.count == 1)
                if not is_last:
                    self.trainer.accelerator.backward(loss)
                    before = before + loss.detach()
        if self.count > 1:  # by nothing that holds the step: the loss of a frozen head is kept by the step, and would keep itself alive
            loss.register_hook(partial(_check_scale, self.trainer))
        return before + loss

    def _turn_loss(self, is_first: bool) -> Tensor:
        step = self.step
        if step.architecture.task.loss_per_token:
            self.outputs = self.model(**step.inputs)
            return self._token_loss(is_first)
        if is_first:
            loss, self.outputs = self.trainer.plain_loss(self.model, self.inputs, self.num_items_in_batch)
            return loss if step.stream is None else loss / self._accumulation_steps()
        return step.loss_sum(self.model(**step.inputs, **step.labels))

    def _token_loss(self, is_first: bool) -> Tensor:
        """This turn's part of the mean over the tokens of the accumulated batch that the loss is taken at."""
        trainer, step = self.trainer, self.step
        if is_first:
            self._divisor = self._kept_tokens() if self.step.config.is_mean_of_kept else self._all_tokens()
        if trainer.compute_loss_func is not None:
            loss = self._own_loss()
        else:
            loss = step.loss_sum(self.outputs) / self._divisor
        if step.fused:
            self.outputs.logits = None  # there are none: in their place came the loss
        if self.step.config.is_mean_of_kept:
            added = trainer.running_mean.report(loss * self._divisor * self._processes)
            self.reported = added if self.reported is None else self.reported + added
        return loss * self._processes

    @property
    def _counts_all_processes(self) -> bool:
        args = self.trainer.args
        return args.average_tokens_across_devices and args.world_size > 1

    def _kept_tokens(self) -> Tensor:
        """Known only when the tokens are chosen, so that gradients of earlier micro-batches are rescaled: see normalizer.py."""
        count = self.step.kept_labels
        self._processes = 1
        if self._counts_all_processes:
            # the divisor counts all processes' tokens, and their gradients are averaged, not summed
            count, self._processes = self.trainer.accelerator.gather(count).sum(), self.trainer.accelerator.num_processes
        return self.trainer.running_mean.add_tokens(count, self.trainer.model.parameters())

    def _all_tokens(self) -> Tensor | int:
        """As in plain training: the labels of the accumulated batch, or the mean of micro-batches where they are not counted."""
        self._processes = 1
        if self.num_items_in_batch is None:
            return self.step.loss_tokens * self._accumulation_steps()
        if self._counts_all_processes:
            self._processes = self.trainer.accelerator.num_processes
        return torch.as_tensor(self.num_items_in_batch).clamp_min(1)  # no label at all: a loss of 0, not 0 / 0

    def _accumulation_steps(self) -> int:
        """What a loss that is a mean over a micro-batch is to be divided by."""
        trainer = self.trainer
        counted = trainer.model_accepts_loss_kwargs and self.num_items_in_batch is not None
        is_scaled = counted or trainer.compute_loss_func is not None
        return 1 if is_scaled else trainer.current_gradient_accumulation_steps

    def _own_loss(self) -> Tensor:
        """The loss function of the user on this turn's tokens; what each turn adds must add up to the loss of all."""
        own, labels = self.trainer.compute_loss_func, self.step.shiftable_labels()
        loss = own(self.outputs, labels, num_items_in_batch=self._divisor)
        if self.step.stream is not None and not self.trainer.loss_func_is_checked and bool(loss.detach() != 0):
            with torch.no_grad():
                half = own(self.outputs, labels, num_items_in_batch=2 * self._divisor)
            if not torch.allclose(2 * half.float(), loss.detach().float(), rtol=1e-2, atol=1e-6):
                raise MemTuneError(_NOT_ADDITIVE)
            self.trainer.loss_func_is_checked = True
        return loss


_NOT_ADDITIVE = (
    "compute_loss_func: its loss does not halve when num_items_in_batch doubles, so it is no sum over tokens divided by num_items_in_batch. "
    "Streaming adds up the losses of chunks, which only such a sum survives. Divide a sum by num_items_in_batch, or leave streaming out."
)


def _check_scale(trainer: Any, gradient: Tensor) -> None:
    if is_fake(gradient):
        return
    scaler = trainer.accelerator.scaler
    expected = 1.0 if scaler is None else scaler.get_scale()
    if float(gradient) != expected:
        raise MemTuneError(
            f"the loss of a streamed step went backward with a gradient of {float(gradient):g}, expected {expected:g}: "
            f"{type(trainer).__name__}.compute_loss multiplies what super().compute_loss returns, but all chunks before the last have "
            "gone backward already. Scale the loss in compute_loss_func instead, or leave streaming out."
        )
