"""Whether what was turned on acted: an option that silently does nothing is found in the first step, not in the bill.

Levers that run layers a second time are seen by hooks: modules of the model that run while autograd goes backward.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hf_memtune.core.offload import HostMemory
from hf_memtune.errors import ConfigError
from hf_memtune.methods.events import Listener
from hf_memtune.training.care.recovery.advice import checkpoints, optimizer_name

logger = logging.getLogger(__name__)

_BLOCKWISE_FROM = 4096  # bitsandbytes keeps the state of smaller parameters in float32 (min_8bit_size)


class LeverWatch(Listener):
    """What one training step did, for `require`. Filled by `watching` around the step, and by what the method tells.

    is_longest: whether the step has the longest batch there is: then what cannot act on it never will, and a warning says so.
    """

    def __init__(self, trainer: Any, is_longest: bool):
        self.trainer, self.is_longest = trainer, is_longest
        self.recomputed = 0
        self.chunks = self.seen = self.kept = self.row_length = self.longest_row = 0
        self.host_bytes = 0

    # -- looking

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around forward and backward."""
        with ExitStack() as undo:
            for module in self.trainer.model.modules():
                undo.callback(module.register_forward_pre_hook(self._runs).remove)
            if self.trainer.strategy_callback is not None:
                strategy = self.trainer.strategy_callback.strategy
                host, strategy.host = strategy.host, _CountingHost(self)
                undo.callback(setattr, strategy, "host", host)
                undo.callback(strategy.listeners.add(self))
            yield

    def _runs(self, module: nn.Module, inputs: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # as torch.utils.checkpoint asks: -1 outside of backward
            self.recomputed += 1

    def counted(self, **counts: Any) -> None:
        self.seen += int(counts.get("seen", 0))
        self.kept += int(counts.get("kept", 0))

    def shaped(self, chunks: int, rows: Any) -> None:
        self.chunks = max(self.chunks, chunks)
        self.row_length = max(self.row_length, rows.length)  # padding runs in chunks, too
        self.longest_row = max(self.longest_row, rows.longest)

    # -- judging

    def require(self) -> None:
        """Raises ConfigError with every lever that is on and did not act; warns of those for which the rows are too short."""
        found, short = [], []
        for problem, is_short in (*self._recomputation(), *self._passes(), *self._optimizer(), *self._adapters()):
            (short if is_short else found).append(problem)
        if found:
            raise ConfigError(found)
        for message in short if self.is_longest else ():
            logger.warning(message)

    def _recomputation(self) -> Iterator[tuple[str, bool]]:
        args = self.trainer.args
        names = [name for name, is_on in (
            ("gradient_checkpointing", checkpoints(args)),
            ("checkpoint_levels", args.checkpoint_levels),
            ("reversible", self.trainer.reversible is not None),
        ) if is_on]  # fmt: skip
        if names and not self.recomputed:
            yield (
                f"{names[0]}: it is on, but no module ran again in backward, so no activation was saved. Expected layers that run twice: "
                "call model.enable_input_require_grads() where everything below the adapters is frozen and use_reentrant is True, and do "
                "not override the forward of the layers.",
                False,
            )

    def _passes(self) -> Iterator[tuple[str, bool]]:
        args = self.trainer.args
        if not (args.token_seeking or args.streams) or not self.row_length:
            return
        chunk = args.stream_chunk_size
        if args.streams and self.chunks <= 1 and getattr(args, "token_gradient", "stream") != "skip":
            name = "token_gradient" if args.token_seeking else "sequence_chunk_size"
            yield (
                f"{name}: the longest row of {'all' if self.is_longest else 'the first batch'} has {self.row_length} tokens, which ran in "
                f"{self.chunks} chunk with sequence_chunk_size={chunk}. Set sequence_chunk_size below the length of the rows, or leave it out.",
                self.row_length <= chunk,
            )
        if args.token_seeking and args.token_ratio < 1 and self.kept >= self.seen:
            yield (
                f"token_seeking: all {self.seen} tokens were kept with token_ratio={args.token_ratio:g}, so backward was that of plain "
                "training. Lower token_ratio, or leave token_seeking out.",
                math.ceil(args.token_ratio * self.longest_row) >= self.longest_row - (2 if self._keeps_ends else 0),
            )
        if args.kv_offload and args.streams and not self.host_bytes:
            yield "kv_offload: it is on, but no key or value was moved to host memory. Leave it out, or use longer rows.", False

    @property
    def _keeps_ends(self) -> bool:
        return self.trainer.args.kept_always == "first_last"

    def _optimizer(self) -> Iterator[tuple[str, bool]]:
        name, state = optimizer_name(self.trainer.args), self._optimizer_state()
        if "8bit" not in name or not state:
            return
        tensors = [value for held in state.values() for value in held.values() if isinstance(value, torch.Tensor)]
        if not any(_is_small(value) for value in tensors):
            yield (
                f"optim: got {name}, but no tensor of its state has 8 bits: every parameter it trains may be smaller than "
                f"{_BLOCKWISE_FROM} values, whose state stays in 32. Use optim=adamw_torch.",
                all(parameter.numel() < _BLOCKWISE_FROM for parameter in state),
            )

    def _optimizer_state(self) -> dict[nn.Parameter, dict[str, Any]]:
        optimizer = self.trainer.optimizer
        return getattr(optimizer, "optimizer", optimizer).state

    def _adapters(self) -> Iterator[tuple[str, bool]]:
        """PEFT marks what it trains; a merged or forgotten adapter leaves all of the model, or nothing, to train."""
        model = self.trainer.model
        if not hasattr(model, "peft_config"):
            return
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if not 0 < trained < total:
            yield (
                f"peft: the model has adapters, but {trained:,} of its {total:,} parameters are trained, expected fewer than all and more "
                "than none. Freeze the base model, and load adapters with is_trainable=True.",
                False,
            )


def _is_small(value: torch.Tensor) -> bool:
    """Whether it is kept in 8 bits. torchao's is a tensor of its own that names the dtype it stands for."""
    return value.dtype.itemsize == 1 or type(value).__module__.startswith("torchao")


class _CountingHost(HostMemory):
    """Host memory that tells how much of it was asked for."""

    def __init__(self, watch: LeverWatch):
        super().__init__()
        self._watch = watch

    def empty(self, *args) -> torch.Tensor:
        home = super().empty(*args)
        self._watch.host_bytes += home.nbytes
        return home
