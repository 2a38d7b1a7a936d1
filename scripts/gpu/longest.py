"""(c) The longest row on a smaller card, by limiting the allocator: a line through the bytes of two short rows says where to try."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from methods import LOGIT_FREE, OFFLOADED

from gpu.machine import Machine
from gpu.steps import Steps

MOST_TRIALS, NEAR, FARTHEST, FRAGMENTED = 9, 1.05, 16, 0.9


@dataclass(frozen=True)
class Trial:
    """All bytes of a step, weights and gradients too, and its seconds."""

    peak_bytes: int
    seconds: float


class LongestRow:
    name, share = "longest row", 0.2
    described = Steps.described

    def __init__(self, machine: Machine):
        self._machine = machine

    def runs(self) -> Iterator[dict]:
        sizes, most = self._machine.sizes, self._machine.memory_bytes
        for model in sizes.models:
            for card in (name for name, limit_bytes in sizes.cards.items() if most is None or limit_bytes <= most):
                wanted = (sizes.streamed, LOGIT_FREE, "checkpointing", "plain", sizes.streamed + OFFLOADED)
                yield from ({"model": model, "card": card, "method": method} for method in wanted if method in sizes.methods)

    def expected_seconds(self, run: dict) -> float:
        return 0.0

    def measured(self, run: dict, seconds: float) -> dict:
        limit_bytes, unit = self._machine.sizes.cards[run["card"]], self._machine.sizes.chunks[0]
        trial = lambda tokens: self._tried(run, tokens, limit_bytes)  # noqa: E731
        return {"limit_bytes": limit_bytes} | longest(trial, limit_bytes, unit, seconds)

    def _tried(self, run: dict, tokens: int, limit_bytes: int) -> Trial | None:
        """None: it ran out of memory."""
        self._machine.empty()
        try:
            model = self._machine.model(run["model"])
            began = time.perf_counter()  # what it takes to make a model is no part of a longer step
            with limited(self._machine.device, limit_bytes), self._machine.step(run["model"], tokens, run["method"]) as step:
                account = step.measure()
                peak_bytes = account.weight_bytes + account.gradient_bytes + account.peak_bytes
                if model.device.type != "cuda" and peak_bytes > limit_bytes:
                    raise torch.OutOfMemoryError(f"{peak_bytes} bytes")
        except torch.OutOfMemoryError:
            return None
        return Trial(peak_bytes, time.perf_counter() - began)


@contextmanager
def limited(device: torch.device, limit_bytes: int) -> Iterator[None]:
    """While open, the allocator of a CUDA device refuses what goes beyond; elsewhere nothing is limited."""
    if device.type != "cuda":
        yield
        return
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def longest(trial: Callable[[int], Trial | None], limit_bytes: int, unit: int, seconds: float) -> dict:
    """The longest row, in whole units, that fits, to 5 %.

    trial: of a row of so many tokens. seconds: no trial is begun that is expected to take more than what is left of them. Returns tokens:
    of the longest that fitted, 0 where none did; too_long: of the shortest that did not, or None; ended_by: memory, trials or seconds;
    predicted: where the line through the longest two meets the limit, or None.
    """
    fitted: dict[int, Trial] = {}
    refused: list[int] = []
    ended_by, deadline, tokens = "trials", time.perf_counter() + seconds, 4 * unit
    while len(fitted) + len(refused) < MOST_TRIALS:
        if (found := trial(tokens)) is None:
            refused.append(tokens)
        else:
            fitted[tokens] = found
        if (tokens := _next(fitted, refused, limit_bytes, unit)) is None:
            ended_by = "memory"
            break
        if time.perf_counter() + _seconds_of(fitted, tokens) > deadline:
            ended_by = "seconds"
            break
    best = max(fitted, default=0)
    return {
        "tokens": best, "too_long": min(refused, default=None), "ended_by": ended_by, "predicted": _predicted(fitted, limit_bytes),
        "peak_bytes": fitted[best].peak_bytes if fitted else None, "trials": len(fitted) + len(refused),
    }  # fmt: skip


def _next(fitted: dict[int, Trial], refused: list[int], limit_bytes: int, unit: int) -> int | None:
    """The next length to try, or None where what fits and what does not are near each other."""
    best, too_long = max(fitted, default=0), min(refused, default=None)
    predicted = _predicted(fitted, limit_bytes)
    if too_long is None:
        return max(min(predicted or 2 * best, FARTHEST * best) // unit * unit, _beyond(best, unit))
    if too_long <= _beyond(best, unit):
        return None
    near = FRAGMENTED * too_long if len(refused) == 1 else predicted or 0  # what no tensor uses is seldom more of the memory
    guess = int(near) // unit * unit
    return guess if best < guess < too_long else (best + too_long) // 2 // unit * unit


def _beyond(best: int, unit: int) -> int:
    return max(best + unit, int(NEAR * best) // unit * unit)


def _predicted(fitted: dict[int, Trial], limit_bytes: int) -> int | None:
    if len(fitted) < 2:
        return None
    first, second = sorted(fitted)[-2:]
    slope = (fitted[second].peak_bytes - fitted[first].peak_bytes) / (second - first)
    return None if slope <= 0 else int(second + (limit_bytes - fitted[second].peak_bytes) / slope)


def _seconds_of(fitted: dict[int, Trial], tokens: int) -> float:
    """As if attention were all."""
    best = max(fitted, default=0)
    return fitted[best].seconds * (tokens / best) ** 2 if best else 0.0
