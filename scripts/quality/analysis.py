"""Numbers of the results page, from the records: means over seeds, intervals, paired differences, what was screened out."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, median, stdev

from quality import records
from quality.arms import PLAIN, STREAMING, TOKENTUNE, is_seeking, parts_of

CONFIDENCE = 0.95
MARGIN = 0.02  # of loss: a difference below it between two single runs is taken for noise
SAME_BYTES = 1.02  # as many bytes, to within what padding of the traced batch does


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its confidence interval; None from one seed, which has no spread."""

    mean: float
    half: float | None

    @property
    def differs_from_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")

    @property
    def signed(self) -> str:
        return f"{self.mean:+.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def interval(values: Iterable[float]) -> Interval:
    """By Student's t distribution: the values are few."""
    from scipy.stats import t

    values = list(values)
    if len(values) < 2:
        return Interval(values[0], None)
    quantile = t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return Interval(mean(values), float(quantile) * stdev(values) / math.sqrt(len(values)))


@dataclass
class Seeds:
    """All seeds of one arm in the finals. seconds: of a step; alone: measured with the machine to itself."""

    arm: str
    runs: dict[int, dict]
    seconds: float
    alone: bool

    @property
    def any_run(self) -> dict:
        return next(iter(self.runs.values()))

    @property
    def ended(self) -> dict[int, dict]:
        """The runs that did not diverge, by seed."""
        return {seed: run for seed, run in self.runs.items() if not run["diverged"]}

    @property
    def peak_bytes(self) -> float:
        return median(run["peak_bytes"] for run in self.runs.values())


@dataclass
class Group(Seeds):
    """Those of one task, with batches of one size."""

    rows: int

    @property
    def label(self) -> str:
        return self.arm if self.rows < 32 else f"{self.arm} ({self.rows} rows)"

    def curve(self) -> list[tuple[int, Interval]]:
        """The held-out loss at each measured step."""
        at_steps = zip(*(run["losses"] for run in self.ended.values()))
        return [(points[0][0], interval(loss for _, loss in points)) for points in at_steps]

    def final(self, field: str = "losses") -> Interval | None:
        return interval(run[field][-1][1] for run in self.ended.values()) if self.ended else None

    def share(self, field: str) -> float | None:
        found = [run[field] for run in self.runs.values() if run[field] is not None]
        return mean(found) if found else None

    def minus(self, other: "Group | None", field: str = "losses") -> Interval | None:
        """The final difference to another arm, seed by seed; None without a seed in common."""
        seeds = sorted(self.ended.keys() & other.ended.keys()) if other is not None else []
        ends = [self.runs[seed][field][-1][1] - other.runs[seed][field][-1][1] for seed in seeds]
        return interval(ends) if ends else None


def finals(found: list[dict], task: str) -> list[Group]:
    """The arms of a task's finals, in the order in which they were first run."""
    runs = records.of(found, task=task, stage="final")
    return [_group(found, task, arm, rows, runs) for arm, rows in dict.fromkeys((run["arm"], run["rows"]) for run in runs)]


def _group(found: list[dict], task: str, arm: str, rows: int, runs: list[dict]) -> Group:
    own = {run["seed"]: run for run in records.of(runs, arm=arm, rows=rows)}
    alike = [run for run in records.of(found, task=task, arm=arm, rows=rows) if run["seconds_per_step"]]
    timed = records.of(alike, timed=True)
    return Group(arm, own, median(run["seconds_per_step"] for run in timed or alike), bool(timed), rows)


def baseline(groups: list[Group], group: Group) -> Group | None:
    """Plain training with batches of the same size."""
    return next((other for other in groups if other.arm == PLAIN and other.rows == group.rows), None)


def largest_streaming_difference(groups: list[Group]) -> float | None:
    """Between exact streaming and plain training, at any step and seed; None where they were not both run."""
    differences = [
        abs(streamed - plain)
        for group in groups
        if group.arm == STREAMING and (other := baseline(groups, group)) is not None
        for seed in group.ended.keys() & other.ended.keys()
        for (_, streamed), (_, plain) in zip(group.runs[seed]["losses"], other.runs[seed]["losses"])
    ]
    return max(differences, default=None)


# --- the screening


@dataclass(frozen=True)
class Screened:
    """An arm at its best learning rate. reasons: why it was left out, none where it was kept."""

    arm: str
    rows: int
    learning_rate: float
    loss: float
    peak_bytes: int
    reasons: tuple[str, ...] = ()


def screened(found: list[dict]) -> list[Screened]:
    """Every arm of the screening, best first within a batch size, each with what speaks against it."""
    runs = records.of(found, stage="screen")
    cells = dict.fromkeys((run["task"], run["rows"], run["arm"]) for run in runs)
    best = [min(records.of(runs, task=task, rows=rows, arm=arm), key=records.final_loss) for task, rows, arm in cells]
    arms = [Screened(run["arm"], run["rows"], run["learning_rate"], records.final_loss(run), run["peak_bytes"]) for run in best]
    judged = [Screened(**{**vars(arm), "reasons": tuple(_reasons(arm, arms))}) for arm in arms]
    return sorted(judged, key=lambda arm: (arm.rows, arm.loss))


def _reasons(arm: Screened, arms: list[Screened]) -> list[str]:
    """Against random tokens (TokenTune) of the same ratio, and against the best that needs no more bytes."""
    if not is_seeking(arm.arm):
        return []
    others = [other for other in arms if other.rows == arm.rows and other.arm != arm.arm and is_seeking(other.arm)]
    against = {other: "" for other in others if other.arm == f"{TOKENTUNE}/{parts_of(arm.arm)[3]}"}
    lighter = [other for other in others if other.peak_bytes <= SAME_BYTES * arm.peak_bytes]
    if lighter:
        against.setdefault(min(lighter, key=lambda other: other.loss), ", which needs no more bytes")
    return [f"{arm.loss - other.loss:.3f} above {other.arm}{why}" for other, why in against.items() if arm.loss > other.loss + MARGIN]


@dataclass(frozen=True)
class Effect:
    """What one choice does when all others stay: the mean difference over pairs of arms that differ in it alone."""

    factor: str
    value: str
    against: str
    pairs: int
    difference: Interval


FACTORS = {"scorer": 0, "selection": 1, "gradient": 2, "ratio": 3}
REFERENCES = {"scorer": "random", "selection": "top", "gradient": "cut", "ratio": "10%"}


def effects(arms: list[Screened]) -> list[Effect]:
    """Of every level of every factor against the published random choice, arms of the same batch size paired."""
    losses = {(arm.rows, *parts_of(arm.arm)): arm.loss for arm in arms if is_seeking(arm.arm) and math.isfinite(arm.loss)}
    found = []
    for factor, place in FACTORS.items():
        for value in dict.fromkeys(key[place + 1] for key in losses if key[place + 1] != REFERENCES[factor]):
            pairs = [
                loss - losses[twin]
                for key, loss in losses.items()
                if key[place + 1] == value and (twin := _with(key, place, factor)) in losses
            ]
            if pairs:
                found.append(Effect(factor, value, REFERENCES[factor], len(pairs), interval(pairs)))
    return found


def _with(key: tuple, place: int, factor: str) -> tuple:
    """The same arm with the reference level of one factor."""
    return (*key[: place + 1], REFERENCES[factor], *key[place + 2 :])
