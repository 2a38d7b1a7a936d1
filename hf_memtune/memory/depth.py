"""From the logs of two short models to the account of a deep one.

A step of a model of L equal layers is a number of stretches (a forward pass, a backward pass, the optimizer) that each go through the
layers once. At a moment of a stretch, with i layers done, the live bytes are a + b i + c L, so that their largest value over i is at the
first or at the last layers. The moments at the first layers are those of a short model, counted from the beginning of the stretch; those
at the last ones, counted from its end. Both are found in two short models, one a layer deeper than the other, and what a moment gains from
the one to the other it gains with every further layer. Of each phase the largest of all these moments is its peak, exactly.

Layers need not be equal: a period of them, such as sliding, sliding, full, is taken as one.

A moment counted from the end may be one at the first layers of the shorter model, whose events look alike: what it seems to gain is then no
gain of a further layer. Where that may decide, a third model, deeper by as much again, says which moments gain the same twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from .account import CATEGORIES, PHASES, MemoryAccount, PhaseBytes
from .log import Log

FEWEST = 2  # periods of the shorter model: its first layer is often another one than those that follow, for nothing before it learns


@dataclass(frozen=True)
class Depths:
    """Layers of the two models to trace, and of the one that is asked for."""

    shorter: int
    longer: int
    wanted: int

    @property
    def steps(self) -> int:
        """How often what the longer model has more than the shorter one is to be added to the shorter one."""
        return (self.wanted - self.shorter) // (self.longer - self.shorter)

    @property
    def third(self) -> int:
        """Layers of a model that is deeper than the longer one by as much as that is deeper than the shorter one."""
        return 2 * self.longer - self.shorter


def depths_of(signatures: list[Any], fewest: int = FEWEST) -> Depths | None:
    """The depths to trace for layers with these signatures; None where the layers repeat too seldom for it to be less than the whole.

    From some layer on, layers repeat with a period p; the short models have as many layers less as are whole periods. fewest: periods of
    the shorter one.
    """
    count = len(signatures)
    for period in range(1, count // (fewest + 2) + 1):
        first = next((i for i in range(count) if _repeats(signatures[i:], period)), count)
        periods = (count - first) // period
        if periods >= fewest + 2:
            shorter = count - (periods - fewest) * period
            return Depths(shorter, shorter + period, count)
    return None


def _repeats(signatures: list[Any], period: int) -> bool:
    return all(one == other for one, other in zip(signatures, signatures[period:]))


def signature_of(layer: nn.Module, kind: Any = None) -> tuple:
    """What two layers have in common if they need the same memory. kind: what the config says of the layer."""
    parameters = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    numbers = tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, (int, float, str, bool)) and key not in ("layer_idx", "layer_id", "layer_index", "layer_number")
    )
    return type(layer), kind, parameters, numbers


@dataclass(frozen=True)
class _Course:
    """A log as numbers. totals: (events, categories), what is alive after each event. keys: (events, 2), what each event is."""

    totals: np.ndarray
    keys: np.ndarray
    stretches: list[tuple[str, int, int]]

    @classmethod
    def of(cls, log: Log) -> _Course:
        index = {category: number for number, category in enumerate(CATEGORIES)}
        change = np.zeros((len(log.events), len(CATEGORIES)), dtype=np.int64)
        keys, starts = np.zeros((len(log.events), 2), dtype=np.int64), []
        for number, (record, sign, phase) in enumerate(log.events):
            if record is None:
                starts.append((phase, number))
                keys[number] = (0, -1)
            else:
                change[number, index[record.category]] = sign * record.counted_bytes
                keys[number] = (sign * record.counted_bytes, index[record.category])
        stops = [start for _, start in starts[1:]] + [len(log.events)]
        return cls(change.cumsum(0), keys, [(phase, start, stop) for (phase, start), stop in zip(starts, stops)])


def extrapolate(shorter: Log, longer: Log, steps: int, third: Log | None = None) -> MemoryAccount | None:
    """The account of the model that has `steps` times as many more layers than the shorter one as the longer one has.

    third: of a model with twice as many more. None where the logs do not go through the same stretches: then there is nothing to conclude.
    """
    courses = [_Course.of(log) for log in (shorter, longer, third) if log is not None]
    if len({tuple(phase for phase, *_ in course.stretches) for course in courses}) > 1:
        return None
    best: dict[str, np.ndarray] = {}
    for stretches in zip(*(course.stretches for course in courses)):
        phase = stretches[0][0]
        parts = [(c.keys[start:stop], c.totals[start:stop]) for c, (_, start, stop) in zip(courses, stretches)]
        for moments in _moments(parts, steps):
            top = moments[moments.sum(1).argmax()]
            if phase not in best or top.sum() > best[phase].sum():
                best[phase] = top
    phases = (PhaseBytes(phase, dict(zip(CATEGORIES, best[phase].tolist()))) for phase in PHASES if phase in best)
    return MemoryAccount(tuple(phases))


def _moments(parts: list[tuple[np.ndarray, np.ndarray]], steps: int) -> Iterator[np.ndarray]:
    """(moments, categories): what is alive in the deep model at the moments of one stretch that can be its highest.

    parts: keys and totals of that stretch in each model, the shorter ones first.
    """
    for ends in (slice(None), slice(None, None, -1)):  # counted from the beginning, and from the end
        keys, totals = zip(*((keys[ends], totals[ends]) for keys, totals in parts))
        count = min(_common(one, other) for one, other in zip(keys, keys[1:]))
        few, more, *third = (each[:count] for each in totals)
        steady = (third[0] - more == more - few).all(1) if third else slice(None)
        if len(found := _grown(few, more, steps)[steady]):
            yield found
    *_, few, more = (totals[totals.sum(1).argmax()][None] for _, totals in parts)
    yield _grown(few, more, steps + 2 - len(parts))


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many events two stretches have in common at their beginning."""
    length = min(len(one), len(other))
    one, other = one[:length], other[:length]
    differs = (one != other).any(1)
    return int(differs.argmax()) if differs.any() else len(differs)


def _grown(few: np.ndarray, more: np.ndarray, steps: int) -> np.ndarray:
    return few + steps * (more - few)
