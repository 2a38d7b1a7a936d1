"""One preflight: two optimizer steps and an evaluation on the batch that needs most, measured, and taken back."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from hf_memtune.memory import StepLedger, peak_device_bytes, reset_peak_device_bytes
from hf_memtune.memory.optimizer_layout import unwrapped_optimizer
from hf_memtune.training.care.preflight.longest import Longest, longest_batch
from hf_memtune.training.care.preflight.report import PreflightReport
from hf_memtune.training.care.preflight.snapshot import everything_restored
from hf_memtune.training.care.preflight.watch import LeverWatch
from hf_memtune.training.care.recovery.advice import advice, advice_on_evaluation
from hf_memtune.training.care.recovery.halving import HalvingSteps
from hf_memtune.training.care.savings import BatchShape
from hf_memtune.training.rng import preserved_rng
from hf_memtune.training.running import RunningTrainer
from hf_memtune.units import format_bytes

_STEPS_OF_A_SCALER = 12  # at most, until its scale has fallen so far that the optimizer steps
_MICRO_BATCHES = 2  # of an accumulation: gradients are made in the first, and are there from the beginning in all others


class Flight:
    """One preflight on one batch."""

    def __init__(self, trainer: RunningTrainer, longest: Longest, halving: HalvingSteps):
        self.trainer, self.longest, self.halving = trainer, longest, halving
        self.report = PreflightReport(str(trainer.args.device), longest.rows, longest.tokens, longest.why, BatchShape.of(longest.batch))
        self._phase = "training"
        self._peaks: dict[str, int] = {}

    def run(self) -> None:
        """Raises what training on the batch would raise. Everything is as it was afterwards, but for `report`."""
        trainer, args = self.trainer, self.trainer.args
        watch = LeverWatch(trainer, is_longest=self.longest.tokens is not None)
        was_on, self.halving.is_on = self.halving.is_on, False
        try:
            with everything_restored(trainer):
                self._train_twice(watch)
                watch.require()
                if trainer.evaluates:
                    self._evaluate()
        finally:
            self.halving.is_on = was_on
            reset_peak_device_bytes(args.device)
        self.report.allocator_peaks = self._peaks or None
        self.report.device_bytes = _device_bytes(args.device)

    def no_room(self, message: str) -> str:
        """What to say where memory ran out."""
        is_of_evaluation = self._phase == "evaluation"
        remedies = "; ".join(advice_on_evaluation(self.trainer) if is_of_evaluation else advice(self.trainer, self.longest.rows))
        predicted = self.report.predicted
        needed = "" if predicted is None else f" Predicted are {format_bytes(predicted.peak_bytes)} of tensors."
        return (
            f"preflight: no memory for {self._phase} on {self.report.batch_in_words} ({message}).{needed} Nothing was trained, and the "
            f"model is as it was. Try, one at a time: {remedies}."
        )

    # -- training

    def _train_twice(self, watch: LeverWatch) -> None:
        """The first step makes the state of the optimizer, which is there from the beginning of the second, and of all others."""
        scaler = self.trainer.accelerator.scaler
        for _ in range(1 if scaler is None else _STEPS_OF_A_SCALER):
            self._train(watch.watching())
            if not self.trainer.accelerator.optimizer_step_was_skipped:
                break
        ledger = self._ledger()
        self._train(ledger)
        self.report.account = ledger.account()

    def _train(self, around: AbstractContextManager) -> None:
        """One optimizer step, as the Trainer takes it."""
        trainer = self.trainer
        count = min(trainer.args.gradient_accumulation_steps, _MICRO_BATCHES)
        batch = trainer._prepare_inputs(self.longest.batch)  # a data loader has put it on the device
        batches, num_items = trainer.get_batch_samples(iter([batch] * count), count, trainer.args.device)
        trainer.current_gradient_accumulation_steps = count
        with around:
            for number in range(count):
                self._micro_batch(batches[number], num_items, is_last=number == count - 1)
            self._measured("forward and backward")
            self._optimizer_step()
            self._measured("optimizer")
            trainer.model_wrapped.zero_grad()

    def _micro_batch(self, batch: dict[str, Any], num_items: Any, is_last: bool) -> None:
        trainer = self.trainer
        trainer.accelerator.gradient_state._set_sync_gradients(is_last)
        with nullcontext() if is_last else trainer.accelerator.no_sync(trainer.model_wrapped):
            trainer.training_step(trainer.model_wrapped, batch, num_items)

    def _optimizer_step(self) -> None:
        trainer = self.trainer
        if trainer.args.max_grad_norm > 0:
            trainer._clip_grad_norm(trainer.model_wrapped)
        trainer.optimizer.step()
        if not trainer.accelerator.optimizer_step_was_skipped and not hasattr(trainer.lr_scheduler, "patience"):
            trainer.lr_scheduler.step()  # one with patience waits for metrics, as in the Trainer

    def _ledger(self, inputs: dict[str, Any] | None = None) -> StepLedger:
        trainer = self.trainer
        inputs = trainer._prepare_inputs(self.longest.batch) if inputs is None else inputs
        tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        ledger = StepLedger(trainer.model_wrapped, unwrapped_optimizer(trainer.optimizer), tensors)
        if trainer.method is not None:
            ledger.watch(trainer.method)
        return ledger

    # -- evaluation

    def _evaluate(self) -> None:
        """One batch of each evaluation set, as the Trainer evaluates it."""
        self._phase, sets = "evaluation", self.trainer.eval_dataset
        self.trainer.model.eval()
        for name in sets if isinstance(sets, dict) else (None,):
            self._evaluate_one(name)
        self._measured("evaluation")

    def _evaluate_one(self, name: str | None) -> None:
        trainer, args = self.trainer, self.trainer.args
        loader = trainer.get_eval_dataloader(name)
        with preserved_rng(args.device, loader.collate_fn, loader.dataset):  # often those of training
            found = longest_batch(loader, args.eval_batch_size)
        if found is None:
            self.report.notes.append("evaluation was not tried: a data set without length cannot be looked through")
            return
        inputs = trainer._prepare_inputs(found.batch)
        ledger = self._ledger(inputs)
        with ledger, ledger.phase("evaluation"):
            logits_bytes = _bytes(trainer.prediction_step(trainer.model, inputs, not trainer.wants_logits)[1])
        self.report.add_evaluation(ledger.account(), logits_bytes, len(loader))

    def _measured(self, phase: str) -> None:
        """The allocator's peak since the last call."""
        device = self.trainer.args.device
        if (peak := peak_device_bytes(device)) is not None:
            self._peaks[phase] = max(peak, self._peaks.get(phase, 0))
            reset_peak_device_bytes(device)


def _bytes(logits: Any) -> int:
    if isinstance(logits, torch.Tensor):
        return logits.nbytes
    return sum(map(_bytes, logits)) if isinstance(logits, (list, tuple)) else 0


def _device_bytes(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
