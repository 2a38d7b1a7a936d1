"""Looking at one step of training, to say whether what was turned on acted.

Levers that run layers a second time are seen by hooks: modules of the model that run while autograd goes backward.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hf_memtune.errors import ConfigError
from hf_memtune.levers.facts import Seen
from hf_memtune.levers.table import idle_levers
from hf_memtune.memory.optimizer_layout import unwrapped_optimizer
from hf_memtune.methods.events import Listener
from hf_memtune.training.running import RunningTrainer

logger = logging.getLogger(__name__)


class LeverWatch(Listener):
    """Fills in what one training step did: `watching` around it, and what the method tells; `require` judges.

    is_longest: whether the step has the longest batch there is: then what cannot act on it never will, and a warning says so.
    """

    def __init__(self, trainer: RunningTrainer, is_longest: bool):
        self.trainer, self.saw = trainer, Seen(is_longest)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around forward and backward."""
        method = self.trainer.method
        with ExitStack() as undo:
            for module in self.trainer.model.modules():
                undo.callback(module.register_forward_pre_hook(self._runs).remove)
            if method is None:
                yield
                return
            before = method.host.asked_bytes
            undo.callback(method.listeners.add(self))
            yield
            self.saw.host_bytes += method.host.asked_bytes - before

    def _runs(self, module: nn.Module, inputs: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # as torch.utils.checkpoint asks: -1 outside of backward
            self.saw.recomputed += 1

    def counted(self, **counts: Any) -> None:
        self.saw.seen += int(counts.get("seen", 0))
        self.saw.kept += int(counts.get("kept", 0))

    def shaped(self, chunks: int, rows: Any) -> None:
        saw = self.saw
        saw.chunks = max(saw.chunks, chunks)
        saw.row_length = max(saw.row_length, rows.length)  # padding runs in chunks, too
        saw.longest_row = max(saw.longest_row, rows.longest)

    def require(self) -> None:
        """Raises ConfigError with every lever that is on and did not act; warns of those for which the rows are too short."""
        self._look_at_model()
        idle = list(idle_levers(self.trainer.args, self.saw))
        if found := [message for message, is_short in idle if not is_short]:
            raise ConfigError(found)
        for message, _ in idle if self.saw.is_longest else ():
            logger.warning(message)

    def _look_at_model(self) -> None:
        trainer, saw, model = self.trainer, self.saw, self.trainer.model
        saw.has_reversible, saw.has_adapters = trainer.reversible is not None, hasattr(model, "peft_config")
        saw.total = sum(p.numel() for p in model.parameters())
        saw.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        saw.optimizer_state = unwrapped_optimizer(trainer.optimizer).state
