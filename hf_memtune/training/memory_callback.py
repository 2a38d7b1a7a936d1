"""Memory and time of training, for the logs."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from hf_memtune._compat import wait_for
from hf_memtune.memory import LiveBytes, peak_device_bytes, reset_peak_device_bytes, resident_bytes
from hf_memtune.methods.events import Listener
from hf_memtune.training.logged import LoggedCallback
from hf_memtune.training.restorable import Restorable


class MemoryCallback(LoggedCallback, Listener, Restorable):
    """Measures memory and time of training, for the logs.

    peak_memory_bytes: on a GPU, the allocator's peak since the last log; on a CPU, the peak of live bytes traced in one step of
    `trace_steps` but those `left_out` (storages that are older than the step, such as weights, are not in it). resident_bytes: the process.
    step_seconds: mean of an optimizer step. tokens_seen, tokens_kept, tokens_learned, the kept ones that carry a label (where
    the loss is one of tokens), and tokens_recomputed, those that ran with gradient in a stream: since the last log, of this process.
    """

    def __init__(self, trace_steps: int = 50):
        self.trace_steps, self.left_out = trace_steps, set()
        self._tracer: LiveBytes | None = None
        self._traced_bytes: int | None = None
        self._began = 0.0
        self._device = torch.device("cpu")
        self._restart()

    def _restart(self) -> None:
        self._steps, self._seconds = 0, 0.0
        self._tokens: dict[str, Tensor | int] = {}

    def counted(self, **counts: Tensor | int) -> None:
        """Counts of a call of the model (seen, kept, learned, recomputed); those on a device stay there until the next log."""
        for name, count in counts.items():
            self._tokens[name] = self._tokens.get(name, 0) + count

    def keep(self) -> Callable[[], None]:
        tokens = dict(self._tokens)
        return lambda: setattr(self, "_tokens", dict(tokens))

    def on_train_begin(self, args, state, control, **kwargs):
        self.close()
        self._restart()
        self._device = args.device
        reset_peak_device_bytes(args.device)

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()
        on_device = args.device.type not in ("cpu", "mps")
        if state.global_step in self.left_out:
            return
        if not on_device and self.trace_steps and state.global_step % self.trace_steps == min(1, self.trace_steps - 1):
            self._tracer = LiveBytes()
            self._tracer.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        wait_for(args.device)
        self._seconds += time.perf_counter() - self._began
        self._steps += 1
        self.close()

    def close(self) -> None:
        """End a trace that is still open (training failed in the middle of a step). May be called twice."""
        if self._tracer is not None:
            tracer, self._tracer = self._tracer, None
            tracer.__exit__(None, None, None)
            self._traced_bytes = tracer.peak_bytes

    @property
    def has_news(self) -> bool:
        return self._steps > 0

    def since_last_log(self) -> dict[str, float]:
        """Measurements since the last call, for the logs."""
        peak = peak_device_bytes(self._device)
        found = {"peak_memory_bytes": peak if peak is not None else self._traced_bytes, "resident_bytes": resident_bytes()}
        if self._steps:
            found["step_seconds"] = self._seconds / self._steps
        found |= {f"tokens_{name}": int(count) for name, count in self._tokens.items()}
        reset_peak_device_bytes(self._device)
        self._restart()
        return {name: value for name, value in found.items() if value is not None}
