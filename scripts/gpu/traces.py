"""The bytes of the same steps, traced: shapes alone run, on any machine, so that no time of a card is spent on it."""

import time
from collections.abc import Iterator

from causal_lm_step import trace_causal_lm_step
from methods import chunk_of, options_of

from gpu.machine import Machine
from gpu.steps import Steps, steps_of

TRACED_TOKENS, TRACED_CHUNKS = 8192, 4  # at most: a trace takes longer with every chunk


class Traces:
    name, share = "trace", 0.66
    described = Steps.described

    def __init__(self, machine: Machine):
        self._machine = machine
        self._longest = 0.0  # seconds of a trace so far

    def runs(self) -> Iterator[dict]:
        for run in steps_of(self._machine):
            if run["tokens"] <= min(TRACED_TOKENS, TRACED_CHUNKS * (chunk_of(run["method"]) or TRACED_TOKENS)):
                yield run

    def expected_seconds(self, run: dict) -> float:
        return self._longest

    def measured(self, run: dict, seconds: float) -> dict:
        began = time.perf_counter()
        traced = trace_causal_lm_step(self._machine.sizes.models[run["model"]](), run["tokens"], **options_of(run["method"]))
        self._longest = max(self._longest, time.perf_counter() - began)
        return {"traced_bytes": traced.peak_bytes, "traced_host_bytes": traced.host_bytes}
