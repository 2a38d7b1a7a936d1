"""Runs of one arm by seed: means, confidence intervals over seeds, and differences to another arm.

± is a 95 % confidence interval over seeds. Of two arms seeds are compared one by one, for a seed has the same rows in every arm.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import NamedTuple

from pages import Rows, mib, of, unique

from learning.arms import PLAIN, is_exact

CONFIDENCE = 0.95
BESIDE = "Seconds marked * were measured while other work ran."


class Interval(NamedTuple):
    """A mean over seeds and half the width of its confidence interval; None from one seed, which has no spread."""

    mean: float
    half: float | None

    @property
    def is_clear(self) -> bool:
        """Whether it is not of zero."""
        return self.half is not None and abs(self.mean) > self.half

    def __format__(self, sign: str) -> str:
        return f"{self.mean:{sign}.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def interval(values: Iterable[float], confidence: float = CONFIDENCE) -> Interval | None:
    """By Student's t distribution: the values are few. None of no values."""
    from scipy.stats import t

    values = list(values)
    if len(values) < 2:
        return Interval(values[0], None) if values else None
    return Interval(mean(values), float(t.ppf((1 + confidence) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values)))


@dataclass
class Group:
    """All seeds of one arm in the finals, with batches of one size.

    seconds, peak_bytes: of a step; alone: with the machine to itself. tried: the learning rates that its own was chosen among.
    """

    arm: str
    rows: int
    runs: dict[int, dict]
    seconds: float
    peak_bytes: float
    alone: bool
    tried: tuple[float, ...] = ()

    @property
    def rate(self) -> str:
        """The learning rate; beside it, where no lower or no higher one was tried."""
        rate = self.any_run["learning_rate"]
        ends = {min(self.tried): " (lowest)", max(self.tried): " (highest)"} if len(set(self.tried)) > 1 else {}
        return f"{rate:g}{ends.get(rate, '')}"

    @property
    def any_run(self) -> dict:
        return next(iter(self.runs.values()))

    @property
    def ended(self) -> dict[int, dict]:
        """The runs that did not diverge, by seed."""
        return {seed: run for seed, run in self.runs.items() if not run["diverged"]}

    @property
    def costs(self) -> list[str]:
        """Cells of a table."""
        return [mib(self.peak_bytes), f"{self.seconds:.2f}" + ("" if self.alone else "*")]

    def curve(self) -> list[tuple[int, Interval]]:
        """The held-out loss at each measured step."""
        at_steps = zip(*(run["losses"] for run in self.ended.values()))
        return [(points[0][0], interval(loss for _, loss in points)) for points in at_steps]

    def at(self, end: int, field: str = "losses") -> Interval | None:
        """Before training (end 0), or after it (-1)."""
        found = (run[field][end][1] for run in self.ended.values())
        return interval(value for value in found if value is not None)

    def mean_of(self, field: str) -> float | None:
        """Of what was measured once; None where there is nothing to measure."""
        found = [run[field] for run in self.runs.values() if run[field] is not None]
        return mean(found) if found else None

    def minus(self, other: "Group | None", field: str = "losses", confidence: float = CONFIDENCE) -> Interval | None:
        """The final difference to another arm, seed by seed; None without a seed in common."""
        if other is None or other is self:
            return None
        seeds = sorted(self.ended.keys() & other.ended.keys())
        return interval((self.runs[seed][field][-1][1] - other.runs[seed][field][-1][1] for seed in seeds), confidence)


def finals(found: Rows, task: str, stage: str = "final") -> list[Group]:
    """The arms of a task's finals, or of another stage with several seeds, in the order in which they were first run."""
    groups, found = [], of(found, task=task)
    for arm, rows in unique(of(found, stage=stage), "arm rows"):
        own = of(found, stage=stage, arm=arm, rows=rows)
        own = of(own, **{name: own[-1][name] for name in ("learning_rate", "steps")})  # those of another tuning, or timing, are others
        timed = [run for run in of(found, timed=True, arm=arm, rows=rows) if run["seconds_per_step"]]
        seconds, size = (median(run[name] for run in timed or own) for name in ("seconds_per_step", "peak_bytes"))
        tried = tuple(run["learning_rate"] for run in of(found, stage="tune", arm=PLAIN if is_exact(arm) else arm, rows=rows))
        groups.append(Group(arm, rows, {run["seed"]: run for run in own}, seconds, size, bool(timed), tried))
    return groups


def named(groups: list[Group], arm: str, rows: int | None = None) -> Group | None:
    return next((group for group in groups if group.arm == arm and rows in (None, group.rows)), None)


def baseline(groups: list[Group], group: Group) -> Group | None:
    """Plain training with batches of the same size."""
    return named(groups, PLAIN, group.rows)


def left_out(groups: list[Group]) -> Iterator[str]:
    """What means over seeds lack: seeds that diverged, and seeds that other arms have."""
    counts = [(f"`{group.arm}`, {group.rows} rows", len(group.runs), len(group.ended)) for group in groups]
    most = max((runs for _, runs, _ in counts), default=0)
    if diverged := [f"{name} ({runs - ended} of {runs} seeds)" for name, runs, ended in counts if ended < runs]:
        yield f"Diverged, and in no mean: {', '.join(diverged)}."
    if fewer := [f"{name} ({runs})" for name, runs, _ in counts if runs < most]:
        yield f"Of fewer than {most} seeds: {', '.join(fewer)}."


def shown(value: Interval | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}}"


def listed(pairs: Iterable[tuple[Group, Interval]], sign: int) -> str:
    """The arms that clearly are on one side of what they are compared with."""
    return ", ".join(f"`{group.arm}` ({d:+})" for group, d in pairs if d.is_clear and sign * d.mean > 0)
