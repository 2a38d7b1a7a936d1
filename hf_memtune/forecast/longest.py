"""How far a step can grow: the longest row, or the largest batch, whose bytes stay within a budget.

Bytes grow with the row as the largest of several straight lines, one a moment of the step. So a search needs few traces: a line through
two of them meets the budget where the answer is, or near it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

_FIRST_STEP = 8  # units: the first line goes through the bytes of one unit and of so many


class Found(NamedTuple):
    """size: the largest multiple of the unit that fits; 0: not even one. bytes, bytes_beyond: of it, and of one unit more.

    bytes_beyond is None where the search ended at its limit. sizes: the traces it took, in their order.
    """

    size: int
    bytes: int | None
    bytes_beyond: int | None
    sizes: tuple[int, ...]


def largest(bytes_at: Callable[[int], int], budget: int, unit: int, at_most: int) -> Found:
    """The largest multiple of `unit`, `at_most` at most, with bytes_at(size) <= budget. bytes_at: does not fall as sizes grow."""
    known: dict[int, int] = {}

    def at(count: int) -> int:
        if count not in known:
            known[count] = bytes_at(count * unit)
        return known[count]

    def found(count: int, beyond: int | None) -> Found:
        return Found(count * unit, at(count) if count else None, beyond, tuple(each * unit for each in known))

    last = at_most // unit
    if last < 1 or at(1) > budget:
        return found(0, known.get(1))
    low, high = 1, None  # low fits, high does not
    second = min(last, _FIRST_STEP)
    while high is None:
        if second > low and at(second) <= budget:
            slope, before = (at(second) - at(low)) / (second - low), second
            low = second
            if low == last:
                return found(last, None)
            reach = int((budget - at(low)) / slope) if slope > 0 else last
            second = min(last, max(before + 1, low + reach + 1))  # one beyond where the line meets the budget
        elif second == low:
            return found(last, None)
        else:
            high = second
    while high - low > 1:
        share = (budget - at(low)) / (at(high) - at(low))
        middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
        low, high = (middle, high) if at(middle) <= budget else (low, middle)
        if high - low > 1 and at(low + 1) > budget:  # on a line it is the next one
            high = low + 1
    return found(low, at(high))
