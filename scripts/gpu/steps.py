"""(b) Seconds and peak bytes of a step, and the bytes of its trace without a device. LoRA, bfloat16, one row, no optimizer."""

import statistics
import time
from collections.abc import Iterator

from methods import chunk_of, options_of

from gpu.machine import Machine
from hf_memtune.memory.trace import trace_causal_lm_step

SHORT = 1.0  # seconds: shorter steps are timed several times
TRACED_TOKENS, TRACED_CHUNKS = 8192, 4  # at most: a trace takes longer with every chunk


class Steps:
    name, share = "step", 0.66
    described = {"dtype": "bfloat16", "rows": 1, "lora_rank": 8, "attention": "sdpa"}

    def __init__(self, machine: Machine):
        self._machine = machine
        self._taken: dict[tuple[str, str], tuple[int, float]] = {}  # the last row of a model and a method, and its seconds

    def runs(self) -> Iterator[dict]:
        sizes = self._machine.sizes
        for model in sizes.models:
            for tokens in sizes.step_tokens:
                yield from ({"model": model, "tokens": tokens, "method": method} for method in sizes.methods)

    def expected_seconds(self, run: dict) -> float:
        """Of the same on a shorter row, as if attention were all."""
        tokens, seconds = self._taken.get((run["model"], run["method"]), (run["tokens"], 0.0))
        return seconds * (run["tokens"] / tokens) ** 2

    def measured(self, run: dict, seconds: float) -> dict:
        """Bytes above weights and gradients of an untimed step, then median seconds of timed ones; and the bytes of a trace of short rows."""
        began = time.perf_counter()
        with self._machine.step(run["model"], run["tokens"], run["method"]) as step:
            account = step.measure()
            taken = [step.seconds()]
            if taken[0] < SHORT:
                taken += [step.seconds() for _ in range(self._machine.sizes.repeats - 1)]
        found = {"seconds": statistics.median(taken), "spread": [min(taken), max(taken)], "repeats": len(taken)}
        found |= {"peak_bytes": account.peak_bytes, "host_bytes": account.host_bytes} | self._traced(run)
        self._taken[run["model"], run["method"]] = (run["tokens"], time.perf_counter() - began)
        return found

    def _traced(self, run: dict) -> dict:
        if run["tokens"] > min(TRACED_TOKENS, TRACED_CHUNKS * (chunk_of(run["method"]) or TRACED_TOKENS)):
            return {"traced_bytes": None, "traced_host_bytes": None}
        traced = trace_causal_lm_step(self._machine.sizes.models[run["model"]](), run["tokens"], **options_of(run["method"]))
        return {"traced_bytes": traced.peak_bytes, "traced_host_bytes": traced.host_bytes}
