"""The worst batch first: before step 0, the longest batch is trained on and evaluated, measured, and taken back bit by bit.

A run that will need more memory than there is fails in its first minute, and not hours in, on one long batch, or in evaluation.
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from hf_memtune._compat import is_fake
from hf_memtune.errors import ConfigError, MemTuneError, first_line
from hf_memtune.training.care.preflight.flight import Flight
from hf_memtune.training.care.preflight.longest import Longest, longest_batch
from hf_memtune.training.care.preflight.report import PreflightReport
from hf_memtune.training.care.preflight.watch import LeverWatch
from hf_memtune.training.care.recovery.advice import is_out_of_memory
from hf_memtune.training.care.recovery.halving import HalvingSteps
from hf_memtune.training.rng import preserved_rng
from hf_memtune.training.running import RunningTrainer

logger = logging.getLogger(__name__)


class Preflight(TrainerCallback):
    """Before the first step of a training, a flight if the arguments ask for one; else the first step itself is looked at on the way.

    It has to be told of a step before whoever measures steps. report: what the last flight found, or None. why_none: why a flight that is on
    by itself could not be, or None. looks: False where a trainer takes what is on out of the model on purpose, in its own training_step:
    without a flight the first step is then not looked at.
    """

    def __init__(self, trainer: RunningTrainer, halving: HalvingSteps):
        self.trainer, self.halving, self.looks = trainer, halving, True
        self.report: PreflightReport | None = None
        self.why_none: str | None = None
        self._is_due, self._open, self._watch = False, ExitStack(), None

    def on_train_begin(self, args, state, control, **kwargs):
        self.close()
        self.why_none = None
        self._is_due = True  # again where a batch that did not fit is halved: training begins again

    def on_step_begin(self, args, state, control, **kwargs):
        if not self._is_due or not self.trainer.batches_of_step or self._is_rehearsal:
            return
        if args.preflights and self._can_fly(self.trainer.batches_of_step[0]):
            self.report = self._fly(self.trainer.batches_of_step)
            self.report.tell(self.trainer)
        elif self.looks and not args.torch_compile:
            self._watch = LeverWatch(self.trainer, is_longest=False)
            self._open.enter_context(self._watch.watching())
        self._is_due = False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._open.close()
        if self._watch is not None:
            self._watch.require()

    def on_step_end(self, args, state, control, **kwargs):
        if self._watch is not None:
            watch, self._watch = self._watch, None
            watch.require()  # now the optimizer has its state

    def close(self) -> None:
        """No longer look at a step that was left in the middle. May be called twice."""
        self._open.close()
        self._watch = None

    @property
    def _is_rehearsal(self) -> bool:
        """Whether the step runs on tensors without values, for an estimate: then there is nothing to look at."""
        return is_fake(next(self.trainer.model.parameters()))

    # -- flying

    def _can_fly(self, batch: Any) -> bool:
        """Whether a step on this batch can be taken back. A trainer that is given rows (GRPO, RLOO) makes answers to them in its step, and
        keeps these for later steps."""
        if isinstance(batch, Mapping):
            return True
        trainer = self.trainer
        what = f"{type(trainer).__name__} makes its batches in its own step: the data loader gives a {type(batch).__name__}, not a mapping of tensors"
        if trainer.args.memory_preflight:
            raise ConfigError([f"memory_preflight: got True, but {what}, and such a step cannot be taken back bit by bit. Leave it out."])
        self.why_none = f"No preflight: {what}."
        if trainer.is_world_process_zero():
            logger.info(self.why_none)
        return False

    def _fly(self, batches: list[dict[str, Any]]) -> PreflightReport:
        loader = self.trainer.callback_handler.train_dataloader
        with preserved_rng(self.trainer.args.device, loader.collate_fn, loader.dataset):
            found = longest_batch(loader, self.trainer._train_batch_size)
        if found is None:
            why = "the first batch: a data set without length cannot be looked through, so its longest row is not known"
            found = Longest(batches[0], _rows(batches[0]), None, why)
        flight, failure = Flight(self.trainer, found, self.halving), None
        try:
            flight.run()
        except Exception as error:
            if not is_out_of_memory(error) or self.trainer.args.auto_find_batch_size:  # which halves the batch and begins again
                raise
            failure = first_line(error)
        flight.report.predict(self.trainer)
        if failure is not None:
            raise MemTuneError(flight.no_room(failure))
        return flight.report


def _rows(batch: dict[str, Any]) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 0)
