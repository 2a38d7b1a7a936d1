"""The worst batch first: before step 0, the longest batch is trained on and evaluated, measured, and taken back bit by bit.

A run that will need more memory than there is fails in its first minute, and not hours in, on one long batch, or in evaluation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hf_memtune._compat import is_fake
from hf_memtune.errors import MemTuneError
from hf_memtune.training.care.preflight.flight import Flight
from hf_memtune.training.care.preflight.levers import LeverWatch
from hf_memtune.training.care.preflight.longest import Longest, longest_batch
from hf_memtune.training.care.preflight.report import PreflightReport
from hf_memtune.training.care.recovery.advice import first_line, is_out_of_memory


class Preflight:
    """One for a trainer.

    report: what the last one found, or None. watch: notes which levers act in the step at hand, or None. looks: False where a trainer
    takes what is on out of the model on purpose, in its own training_step: without a preflight the first step is then not looked at.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.report, self.looks = trainer, None, True
        self.watch: LeverWatch | None = None
        self._is_due, self._looked = False, None

    def begin_training(self) -> None:
        """The next step is the first one."""
        self._is_due, self._looked = True, None

    def before_step(self, batches: list[dict[str, Any]]) -> None:
        """Before each step. batches: those of the step, for data sets that cannot be looked through."""
        if self._looked is not None:  # in the first step: now the optimizer has its state
            looked, self._looked = self._looked, None
            looked.require()
        if not self._is_due or not batches or not self.trainer.args.preflights or self._is_rehearsal:
            return
        self._is_due = False
        try:
            self.report = self._fly(batches)
        except BaseException:
            self._is_due = True  # where a batch that did not fit is halved, training begins again
            raise
        self.report.tell(self.trainer)

    @contextmanager
    def first_step(self) -> Iterator[None]:
        """Around every micro-batch: in the first of a training without preflight, whether the levers act is looked at on the way."""
        is_off = not self.looks or self.trainer.args.torch_compile or self._is_rehearsal
        if not self._is_due or self.trainer.args.preflights or is_off:
            yield
            return
        self._is_due = False
        self.watch = LeverWatch(self.trainer, is_longest=False)
        try:
            with self.watch.watching():
                yield
            self.watch.require()
        finally:
            self._looked, self.watch = self.watch, None

    @property
    def _is_rehearsal(self) -> bool:
        """Whether the step runs on tensors without values, for an estimate: then there is nothing to look at."""
        return is_fake(next(self.trainer.model.parameters()))

    # -- flying

    def _fly(self, batches: list[dict[str, Any]]) -> PreflightReport:
        found = longest_batch(self.trainer.callback_handler.train_dataloader, self.trainer._train_batch_size)
        if found is None:
            why = "the first batch: a data set without length cannot be looked through, so its longest row is not known"
            found = Longest(batches[0], _rows(batches[0]), None, why)
        flight, failure = Flight(self.trainer, found), None
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
