"""How far a step can grow: the longest row, or the largest batch, whose bytes stay within a budget.

Bytes grow with the row as the largest of several straight lines, one a moment of the step, once rows are longer than the pieces that their
parts are computed in. So a search needs few traces: a line through two of them meets the budget where the answer is, or beyond it, and no
size beyond is below the line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

FINE = 64  # tokens: a step of a row that is not run in chunks
_FIRST_STEPS = (8, 12)  # units, that are traced before a line is trusted: shorter rows may be shorter than a piece
_GROWTH = 8  # times the largest size that is known to fit, while bytes do not grow at all


class Found(NamedTuple):
    """size: the largest multiple of the unit that fits; 0: not even one. bytes: of it. bytes_beyond: that one unit more needs at least.

    bytes_beyond is None where the search ended at its limit. sizes: the traces it took, in their order.
    """

    size: int
    bytes: int | None
    bytes_beyond: int | None
    sizes: tuple[int, ...]


def largest(bytes_at: Callable[[int], int], budget: int, unit: int, at_most: int) -> Found:
    """The largest multiple of `unit`, `at_most` at most, with bytes_at(size) <= budget.

    bytes_at: does not fall as sizes grow, and from 8 units on it is the largest of straight lines.
    """
    search = _Search(bytes_at, budget, unit, at_most // unit)
    while search.low + 1 < search.high:
        search.trace(search.next())
    return search.found()


def longest_row(bytes_at: Callable[[int], int], budget: int, chunk: int | None, positions: int) -> Found:
    """The longest row, in steps of FINE tokens. chunk: of a stream, whose steps are whole chunks, since a part of one needs as much.

    Where not even one chunk fits its parts are tried; and where all whole ones do, as many tokens as there are positions for.
    """
    unit = min(chunk or FINE, positions)
    found = largest(bytes_at, budget, unit, positions)
    if not found.size and unit > FINE:
        part = largest(bytes_at, budget, FINE, unit - 1)
        beyond = found.bytes_beyond if part.bytes_beyond is None else part.bytes_beyond
        return part._replace(bytes_beyond=beyond, sizes=found.sizes + part.sizes)
    if found.bytes_beyond is not None or found.size == positions:
        return found
    needed, sizes = bytes_at(positions), (*found.sizes, positions)
    return Found(positions, needed, None, sizes) if needed <= budget else found._replace(bytes_beyond=needed, sizes=sizes)


class _Search:
    """low: the most units that are known to fit. high: the fewest that are known not to, or to be beyond the limit."""

    def __init__(self, bytes_at: Callable[[int], int], budget: int, unit: int, limit: int):
        self._bytes_at, self._budget, self._unit, self._limit = bytes_at, budget, unit, max(0, limit)
        self._known: dict[int, int] = {}
        self.low, self.high = 0, self._limit + 1
        self._tried = 0  # sizes between two known ones

    def trace(self, count: int) -> None:
        self._known[count] = self._bytes_at(count * self._unit)
        if self._known[count] > self._budget:
            self.high = min(self.high, count)
            return
        self.low = max(self.low, count)
        if (line := self._line()) and line[0]:
            rise, run = line
            self.high = min(self.high, self.low + 1 + (self._budget - self._known[self.low]) * run // rise)

    def next(self) -> int:
        """Units of the next trace, between low and high."""
        wanted = self._outwards() if self.high not in self._known else self._inwards()
        return max(self.low + 1, min(self.high - 1, wanted))

    def _outwards(self) -> int:
        steps = [step for step in _FIRST_STEPS if step > self.low]
        if steps:
            return steps[0]
        line = self._line()
        return self.high - 1 if line and line[0] else _GROWTH * self.low

    def _inwards(self) -> int:
        """In turns: where the line between low and high meets the budget, the next one, which on that line does not fit, and the middle."""
        self._tried += 1
        if self._tried % 3 == 2 or not self.low:
            return self.low + 1
        if self._tried % 3 == 0:
            return (self.low + self.high) // 2
        low, high = self._known[self.low], self._known[self.high]
        return self.low + (self._budget - low) * (self.high - self.low) // (high - low)

    def found(self) -> Found:
        beyond = None if self.low == self._limit else self._known.get(self.low + 1) or self._beyond()
        sizes = tuple(count * self._unit for count in self._known)
        return Found(self.low * self._unit, self._known.get(self.low), beyond, sizes)

    def _line(self) -> tuple[int, int] | None:
        """(bytes, units) of the slope that low was reached with, below which no larger size lies; None where there is none."""
        below = [count for count in self._known if _FIRST_STEPS[0] <= count < self.low]
        if not below:
            return None
        return self._known[self.low] - self._known[max(below)], self.low - max(below)

    def _beyond(self) -> int:
        line = self._line()
        assert line is not None, "low is next to high, which was traced or follows from a line"
        return self._known[self.low] - (-line[0] // line[1])
