"""The account of one step of training, of a real trainer: opened before its first micro-batch, closed when the optimizer has stepped."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import TrainerCallback

from hf_memtune.memory.account import MemoryAccount
from hf_memtune.memory.optimizer_layout import unwrapped_optimizer
from hf_memtune.memory.step_ledger import StepLedger
from hf_memtune.training.running import RunningTrainer


class StepAccountCallback(TrainerCallback):
    """Takes the account of the optimizer step number `step` (counted from 0) of `trainer`, a MemEfficientTrainer; `account` is it, or None.

    The default is the second step: in the first one the optimizer makes its state, and what comes before has none. `ledger` is the ledger
    of that step, from when it began.

    Example:
        taken = StepAccountCallback(trainer)
        trainer.add_callback(taken)
        trainer.train()
        taken.account.peak_bytes
    """

    def __init__(self, trainer: RunningTrainer, step: int = 1, names: bool = True):
        self.trainer, self.step, self.names = trainer, step, names
        self.ledger: StepLedger | None = None
        self.account: MemoryAccount | None = None
        self._is_open = False

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        batches = self.trainer.batches_of_step
        if state.global_step != self.step or self._is_open:
            return
        collated = [batch for batch in batches if isinstance(batch, Mapping)]  # rows that the trainer has yet to collate are no tensors
        inputs = [value for batch in collated for value in batch.values() if hasattr(value, "untyped_storage")]
        self.ledger = StepLedger(model, unwrapped_optimizer(optimizer), inputs, names=self.names)
        self.ledger.__enter__()
        self._is_open = True
        if self.trainer.method is not None:
            self.ledger.watch(self.trainer.method)

    def on_step_end(self, args, state, control, **kwargs):
        self.close()

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """End an account that is still open. May be called twice."""
        if self._is_open:
            self._is_open = False
            self.ledger.__exit__(None, None, None)
            self.account = self.ledger.account()
            self.ledger.batch = ()
