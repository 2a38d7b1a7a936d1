"""From the logs of two short models to the account of a deep one.

A step of a model of L equal layers is a number of stretches (a forward pass, a backward pass, the optimizer) that each go through the
layers once. At a moment of a stretch, with i layers done, the live bytes are a + b i + c L, so that their largest value over i is at the
first or at the last layers. The moments at the first layers are those of a short model, counted from the beginning of the stretch; those
at the last ones, counted from its end. Both are found in two short models, one a layer deeper than the other, and what a moment gains from
the one to the other it gains with every further layer. Of each phase the largest of all these moments is its peak, exactly.

Layers need not be equal: a period of them, such as sliding, sliding, full, is taken as one.
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


def extrapolate(shorter: Log, longer: Log, steps: int) -> MemoryAccount | None:
    """The account of the model that has `steps` times as many more layers than the shorter one as the longer one has.

    None where the two logs do not go through the same stretches: then there is nothing to conclude.
    """
    few, more = _Course.of(shorter), _Course.of(longer)
    if [phase for phase, *_ in few.stretches] != [phase for phase, *_ in more.stretches]:
        return None
    best: dict[str, np.ndarray] = {}
    for one, other in zip(few.stretches, more.stretches):
        for moments in _moments(few, more, one, other, steps):
            top = moments[moments.sum(1).argmax()]
            if one[0] not in best or top.sum() > best[one[0]].sum():
                best[one[0]] = top
    phases = (PhaseBytes(phase, dict(zip(CATEGORIES, best[phase].tolist()))) for phase in PHASES if phase in best)
    return MemoryAccount(tuple(phases))


def _moments(few: _Course, more: _Course, one: tuple, other: tuple, steps: int) -> Iterator[np.ndarray]:
    """(moments, categories): what is alive in the deep model at the moments of one stretch that can be its highest."""
    (_, start, stop), (_, start_more, stop_more) = one, other
    length = min(stop - start, stop_more - start_more)
    from_begin = _common(few.keys[start : start + length], more.keys[start_more : start_more + length])
    yield _grown(few.totals[start : start + from_begin], more.totals[start_more : start_more + from_begin], steps)
    from_end = _common(few.keys[stop - length : stop][::-1], more.keys[stop_more - length : stop_more][::-1])
    if from_end:
        yield _grown(few.totals[stop - from_end : stop], more.totals[stop_more - from_end : stop_more], steps)
    tops = (c.totals[a:b][c.totals[a:b].sum(1).argmax()][None] for c, a, b in ((few, start, stop), (more, start_more, stop_more)))
    yield _grown(*tops, steps)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many events two stretches have in common at their beginning."""
    differs = (one != other).any(1)
    return int(differs.argmax()) if differs.any() else len(differs)


def _grown(few: np.ndarray, more: np.ndarray, steps: int) -> np.ndarray:
    return few + steps * (more - few)
