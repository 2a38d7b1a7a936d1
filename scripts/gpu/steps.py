"""(b) Peak bytes against the trace, (c) seconds of a step, (e) what offloading keys and values costs. LoRA, bfloat16, one row, no optimizer."""

import statistics
import time
from collections.abc import Iterator

from gpu.machine import Machine
from gpu.names import OFFLOAD, OFFLOADED, PEAK_BYTES, STEP_TIME
from hf_memtune.memory.trace import trace_causal_lm_step

SHORT = 1.0  # seconds: shorter steps are timed several times


class PeakBytes:
    name, share = PEAK_BYTES, 0.2

    def __init__(self, machine: Machine):
        self._machine, self._taken = machine, {}

    def runs(self) -> Iterator[dict]:
        sizes = self._machine.sizes
        for model in sizes.models:
            for tokens in sizes.byte_tokens:
                for method in sizes.methods:
                    chunk = next((n for n in sizes.chunks if f"streaming {n}" in method), tokens)
                    if tokens <= 4 * chunk:  # a trace takes longer with every chunk
                        yield {"model": model, "tokens": tokens, "method": method}

    def expected_seconds(self, run: dict) -> float:
        """Of the same on a shorter row, in proportion."""
        return _as_before(self._taken, run, 1)

    def measured(self, run: dict, seconds: float) -> dict:
        """Bytes above weights and gradients: of the allocator, and of the trace without a device."""
        sizes, began = self._machine.sizes, time.perf_counter()
        with self._machine.step(run["model"], run["tokens"], run["method"]) as step:
            measured = step.measure()
        traced = trace_causal_lm_step(sizes.models[run["model"]](), run["tokens"], **sizes.methods[run["method"]])
        _keep(self._taken, run, time.perf_counter() - began)
        found = {"peak_bytes": measured.peak_bytes, "traced_bytes": traced.peak_bytes, "ratio": traced.peak_bytes / measured.peak_bytes}
        return found | {"host_bytes": measured.host_bytes, "traced_host_bytes": traced.host_bytes}


class StepTime:
    name, share = STEP_TIME, 0.36

    def __init__(self, machine: Machine):
        self._machine, self._taken = machine, {}

    def runs(self) -> Iterator[dict]:
        sizes = self._machine.sizes
        for model in sizes.models:
            for tokens in self._lengths():
                for method in self._methods():
                    yield {"model": model, "tokens": tokens, "method": method}

    def expected_seconds(self, run: dict) -> float:
        """Of the same on a shorter row, as if attention were all."""
        return _as_before(self._taken, run, 2)

    def measured(self, run: dict, seconds: float) -> dict:
        """Median seconds after an untimed step, whose bytes are counted."""
        began = time.perf_counter()
        with self._machine.step(run["model"], run["tokens"], run["method"]) as step:
            account = step.measure()
            taken = [step.seconds()]
            if taken[0] < SHORT:
                taken += [step.seconds() for _ in range(self._machine.sizes.repeats - 1)]
        _keep(self._taken, run, time.perf_counter() - began)
        found = {"seconds": statistics.median(taken), "spread": [min(taken), max(taken)], "repeats": len(taken)}
        return found | {"peak_bytes": account.peak_bytes, "host_bytes": account.host_bytes}

    def _lengths(self) -> tuple[int, ...]:
        return self._machine.sizes.step_tokens

    def _methods(self) -> list[str]:
        return [name for name in self._machine.sizes.methods if OFFLOADED not in name]


class Offload(StepTime):
    """Both ways one after the other, so that nothing else differs."""

    name, share = OFFLOAD, 0.1

    def _lengths(self) -> tuple[int, ...]:
        return self._machine.sizes.offload_tokens

    def _methods(self) -> list[str]:
        return [self._machine.sizes.streamed, self._machine.sizes.streamed + OFFLOADED]


def _keep(taken: dict, run: dict, seconds: float) -> None:
    taken[run["model"], run["method"]] = (run["tokens"], seconds)


def _as_before(taken: dict, run: dict, power: int) -> float:
    tokens, seconds = taken.get((run["model"], run["method"]), (run["tokens"], 0.0))
    return seconds * (run["tokens"] / tokens) ** power
