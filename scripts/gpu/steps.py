"""(b) Seconds and peak bytes of a step. LoRA, bfloat16, one row, no optimizer."""

import statistics
from collections.abc import Iterator

from gpu.machine import Machine

SHORT = 1.0  # seconds: shorter steps are timed several times


def steps_of(machine: Machine) -> Iterator[dict]:
    """Every model, length and method."""
    for model in machine.sizes.models:
        for tokens in machine.sizes.step_tokens:
            yield from ({"model": model, "tokens": tokens, "method": method} for method in machine.sizes.methods)


class Steps:
    name, share = "step", 0.66
    described = {"dtype": "bfloat16", "rows": 1, "lora_rank": 8, "attention": "sdpa"}

    def __init__(self, machine: Machine):
        self._machine = machine
        self._taken: dict[tuple[str, str], tuple[int, float]] = {}  # of a model and a method, the last row, and the seconds of a step

    def runs(self) -> Iterator[dict]:
        return steps_of(self._machine)

    def expected_seconds(self, run: dict) -> float:
        """Of an untimed step and a timed one, as if attention were all: of the same on a shorter row, or of the slowest other method."""
        own = self._taken.get((run["model"], run["method"]))
        known = [own] if own else [taken for (model, _), taken in self._taken.items() if model == run["model"]]
        return max((2 * seconds * (run["tokens"] / tokens) ** 2 for tokens, seconds in known), default=0.0)

    def measured(self, run: dict, seconds: float) -> dict:
        """Bytes above weights and gradients of an untimed step, then median seconds of timed ones."""
        with self._machine.step(run["model"], run["tokens"], run["method"]) as step:
            account = step.measure()
            taken = [step.seconds()]
            if taken[0] < SHORT:
                taken += [step.seconds() for _ in range(self._machine.sizes.repeats - 1)]
        found = {"seconds": statistics.median(taken), "spread": [min(taken), max(taken)], "repeats": len(taken)}
        self._taken[run["model"], run["method"]] = (run["tokens"], found["seconds"])
        return found | {"peak_bytes": account.peak_bytes, "host_bytes": account.host_bytes}
