"""Births and deaths of storages in the order they happened, and the account that is read from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .account import CATEGORIES, PHASES, LiveTensor, MemoryAccount, PhaseBytes, TimelinePoint


class Log:
    """Events (record, sign) with the phase they were in; a record has counted_bytes, category, where, shape, dtype and op.

    Records are told what they are until the log is read; their bytes do not change. A phase of None is before the step.
    """

    def __init__(self) -> None:
        self.events: list[tuple[Any, int, str | None]] = []
        self._phase: str | None = None
        self._living: dict[int, Any] = {}

    def turn(self, phase: str | None) -> None:
        """Another phase begins, with what is alive."""
        self._phase = phase
        self.events.append((None, 0, phase))

    def birth(self, record: Any) -> None:
        self._living[id(record)] = record
        self.events.append((record, 1, self._phase))

    def death(self, record: Any) -> None:
        if self._living.pop(id(record), None) is not None:
            self.events.append((record, -1, self._phase))

    def promote_living(self, condition: Callable[[Any], bool], category: str) -> None:
        """Say what all that is alive now and fulfils a condition is."""
        for record in self._living.values():
            if condition(record):
                record.category = category

    def is_whole(self, current_bytes: int) -> bool:
        """Whether what the log has alive is as many bytes as were counted."""
        return sum(record.counted_bytes for record in self._living.values()) == current_bytes


def account_of(log: Log, tensors: int, points: int) -> MemoryAccount:
    """Read the log: the peak of each phase, what was alive at the highest of them, and live bytes over time."""
    totals, best, live = dict.fromkeys(CATEGORIES, 0), {}, 0
    summit, summit_bytes, course = 0, -1, []
    for number, (record, sign, phase) in enumerate(log.events):
        if record is not None:
            live += sign * record.counted_bytes
            totals[record.category] += sign * record.counted_bytes
        if phase is None:
            continue
        course.append(TimelinePoint(number, phase, live))
        if phase not in best or live > best[phase].peak_bytes:
            best[phase] = PhaseBytes(phase, dict(totals))
        if live > summit_bytes:
            summit, summit_bytes = number, live
    phases = tuple(best[phase] for phase in PHASES if phase in best)
    assert sum(totals.values()) == live and max(p.peak_bytes for p in phases) == summit_bytes, "categories do not add up"
    first = course[0].event
    course = [TimelinePoint(event - first, phase, n_bytes) for event, phase, n_bytes in course]
    return MemoryAccount(phases, _largest_alive(log, summit, tensors), _thinned(course, points))


def _largest_alive(log: Log, until: int, count: int) -> tuple[LiveTensor, ...]:
    alive: dict[int, Any] = {}
    for record, sign, _ in log.events[: until + 1]:
        if sign > 0:
            alive[id(record)] = record
        elif sign < 0:
            alive.pop(id(record), None)
    largest = sorted(alive.values(), key=lambda record: record.counted_bytes, reverse=True)[:count]
    return tuple(
        LiveTensor(
            r.where, r.category, r.counted_bytes, tuple(r.shape), str(r.dtype).removeprefix("torch."), None if r.op is None else str(r.op)
        )
        for r in largest
    )


def _thinned(course: list[TimelinePoint], points: int) -> tuple[TimelinePoint, ...]:
    """The highest point of each of so many stretches of equal length."""
    stretch = max(1, -(-len(course) // max(1, points)))
    stretches = (course[start : start + stretch] for start in range(0, len(course), stretch))
    return tuple(max(part, key=lambda point: point.live_bytes) for part in stretches)
