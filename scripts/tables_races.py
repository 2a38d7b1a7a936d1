"""Arms against one another: in the same seconds and bytes, and seed by seed; from results/quality.jsonl."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from learning.arms import PLAIN, is_exact
from learning.groups import CONFIDENCE, Group, Interval, finals, left_out, named, shown
from learning.plans import RACED
from pages import UNMEASURED, Rows, mib, table

PAIRS = {  # by task and stage: arms of which one differs from the other by one choice, or that compete for the same seconds; also with other rows
    ("smollm2-alpaca", "final"): (
        ("combined/top/cut/10%", "random/top/cut/10%"),
        ("combined/top/cut/10%/labels", "combined/top/cut/10%"),
        ("combined/sample/cut/10%/labels", "combined/top/cut/10%/labels"),
        ("combined/sample/cut/10%/labels", "random/sample/cut/10%/labels"),
        ("random/sample/cut/10%/labels", "random/top/cut/10%"),
        ("random/sample/stream/10%/labels", "random/sample/cut/10%/labels"),
        ("random/sample/cut/30%/labels", "random/sample/cut/10%/labels"),
        ("true_gradient/sample/cut/10%/labels", "random/sample/cut/10%/labels"),
        ("true_gradient/top/cut/10%/labels", "true_gradient/sample/cut/10%/labels"),
        ("true_gradient/top/cut/30%/labels", "true_gradient/sample/cut/30%/labels"),
        ("true_gradient/sample/cut/30%/labels", "random/sample/cut/30%/labels"),
        ("softmax_residual/sample/cut/30%/labels", "random/sample/cut/30%/labels"),
        ("true_gradient/sample/stream/30%/labels", "true_gradient/sample/cut/30%/labels"),
    ),
    ("smollm2-alpaca", "race"): (
        ("true_gradient/sample/cut/30%/labels", "random/sample/cut/30%/labels"),
        ("checkpointing@1", "random/sample/cut/10%/labels"),
        ("checkpointing@1", "random/sample/cut/30%/labels"),
        ("checkpointing@1", "true_gradient/sample/cut/30%/labels"),
        ("streaming", "random/sample/cut/30%/labels"),
        ("streaming", "true_gradient/sample/cut/30%/labels"),
        ("plain@1", "random/sample/cut/30%/labels"),
        (("random/sample/cut/10%/labels", 8), ("random/sample/cut/10%/labels", 4)),
        (("random/sample/cut/30%/labels", 6), ("random/sample/cut/30%/labels", 4)),
        (("checkpointing@1", 2), ("checkpointing@1", 4)),
        (("plain@1", 2), ("plain@1", 4)),
        (("checkpointing@1", 4), ("random/sample/cut/10%/labels", 8)),
        (("streaming", 4), ("random/sample/cut/30%/labels", 6)),
        (("plain@1", 4), ("random/sample/cut/30%/labels", 6)),
        (("plain@1", 4), ("true_gradient/sample/cut/30%/labels", 4)),
        (("plain@1", 2), ("random/sample/cut/30%/labels", 4)),
    ),
    ("stories-imdb", "final"): (
        ("combined/top/cut/10%", "random/top/cut/10%"),
        ("combined/sample/cut/10%", "combined/top/cut/10%"),
        ("random/sample/cut/10%", "random/top/cut/10%"),
        ("combined/sample/cut/10%", "random/sample/cut/10%"),
        ("random/sample/stream/10%", "random/sample/cut/10%"),
        ("random/sample/stream/30%", "random/sample/cut/30%"),
        ("random/sample/cut/30%", "random/sample/cut/10%"),
        ("true_gradient/sample/cut/30%", "random/sample/cut/30%"),
        ("true_gradient/sample/stream/30%", "random/sample/stream/30%"),
        ("true_gradient/sample/stream/30%", "true_gradient/sample/cut/30%"),
    ),
    ("stories-imdb", "race"): (
        ("true_gradient/sample/cut/30%", "random/sample/cut/30%"),
        ("streaming", "random/sample/cut/30%"),
        ("streaming", "true_gradient/sample/cut/30%"),
        ("streaming", "random/sample/stream/30%"),
        (("random/sample/cut/10%", 12), ("random/sample/cut/10%", 4)),
        (("random/sample/cut/30%", 8), ("random/sample/cut/30%", 4)),
        (("streaming", 2), ("streaming", 4)),
        (("streaming", 4), ("random/sample/cut/30%", 8)),
        (("streaming", 2), ("random/sample/cut/30%", 4)),
    ),
    ("smollm2-imdb", "final"): (
        ("combined/top/cut/10%", "random/top/cut/10%"),
        ("random/sample/cut/10%", "random/top/cut/10%"),
        ("random/sample/cut/30%", "random/sample/cut/10%"),
        ("true_gradient/sample/cut/30%", "random/sample/cut/30%"),
    ),
    ("smollm2-imdb", "race"): (
        ("true_gradient/sample/cut/30%", "random/sample/cut/30%"),
        ("streaming@1", "random/sample/cut/30%"),
        ("streaming@1", "true_gradient/sample/cut/30%"),
        ("streaming+checkpointing@1", "random/sample/cut/10%"),
    ),
    ("minilm-reviews", "final"): (
        ("context/top/cut/10%", "random/top/cut/10%"),
        ("combined/top/cut/10%", "random/top/cut/10%"),
        ("context/top/cut/10%", "combined/top/cut/10%"),
    ),
}  # fmt: skip
AT = {"final": "steps", "race": "seconds"}


def sections(rows_of: Callable[[str], Rows]) -> dict[str, Callable[[], str]]:
    """What stands between the markers of each name. rows_of: of a result file."""
    quality = partial(rows_of, "quality")
    return {
        **{f"race-{task}": lambda task=task: race_section(race_of(quality(), task), finals(quality(), task, "race")) for task in RACED},
        "quality-pairs": lambda: pairs_table(quality()),
    }


# --- the same seconds, the same bytes


class Raced(NamedTuple):
    """An arm with what its step costs, and its loss above that of plain training after as many steps, and in as many seconds (of `steps`).

    After as many steps: of batches of the same size only.
    """

    group: Group
    same_steps: Interval | None
    same_seconds: Interval | None
    steps: int | None

    @property
    def label(self) -> str:
        return f"{self.group.arm}, {self.group.rows} rows"


def race_of(found: Rows, task: str) -> list[Raced]:
    """By bytes, the fewest first; none where nothing was raced."""
    timed, ended, raced = (finals(found, task, stage) for stage in ("time", "final", "race"))
    plain, zero, race = named(ended, PLAIN), Interval(0.0, None), []
    for group in sorted(timed, key=lambda group: group.peak_bytes) if raced else ():
        steps, seconds = named(ended, group.arm, group.rows), named(raced, group.arm, group.rows)
        same_steps = zero if is_exact(group.arm) and plain and group.rows == plain.rows else steps and steps.minus(plain)
        if group.arm == PLAIN:
            race.append(Raced(group, zero, zero, plain and plain.any_run["steps"]))
        else:
            race.append(Raced(group, same_steps, seconds and seconds.minus(plain), seconds and seconds.any_run["steps"]))
    return race


def race_section(race: list[Raced], raced: Iterable[Group] = ()) -> str:
    """What a step of each arm costs, what as many steps learn, and what as many seconds learn. raced: the groups of the race."""
    if not race:
        return UNMEASURED
    lines = [
        [arm.group.arm, arm.group.rows, *arm.group.costs, shown(arm.same_steps, "+"), arm.steps or "-", shown(arm.same_seconds, "+")]
        for arm in race
    ]
    heads = "arm | rows | peak MiB | s a step | minus plain, same steps | steps in plain's seconds | minus plain, same seconds"
    return "\n\n".join([table(heads, lines), " ".join([race_sentence(race), *left_out([*raced])])])


def race_sentence(race: list[Raced]) -> str:
    """The arms that learn more in the seconds of plain training than every arm that needs fewer bytes."""
    best, leading = math.inf, []
    for arm in race:
        if arm.same_seconds and arm.same_seconds.mean < best:
            best = arm.same_seconds.mean
            leading.append(f"from {mib(arm.group.peak_bytes)} MiB `{arm.group.arm}`, {arm.group.rows} rows ({arm.same_seconds:+})")
    return f"In the seconds of plain training the lowest loss ends with: {', '.join(leading)}."


# --- seed by seed


def pairs_table(found: Rows) -> str:
    """Differences between arms, seed by seed, and whether they are larger than their interval; of each at the rate that was best for it.

    Beside that, whether they would be where all intervals are as wide as it takes to hold at once (Bonferroni).
    """
    compared = []
    for (task, stage), pairs in PAIRS.items():
        groups = finals(found, task, stage)
        for arms in pairs:
            sized = [arm if isinstance(arm, tuple) else (arm,) for arm in arms]
            one, other = (named(groups, *arm) for arm in sized)
            if one and other and (difference := one.minus(other)) and difference.half is not None:
                told = (f"`{arm}`" + "".join(f", {rows} rows" for rows in size) for arm, *size in sized)
                compared.append(([task, AT[stage], *told], one, other))
    if not compared:
        return UNMEASURED
    at_once, lines, clear = 1 - (1 - CONFIDENCE) / len(compared), [], []
    for told, one, other in compared:
        rates = " / ".join(dict.fromkeys(f"{group.any_run['learning_rate']:g}" for group in (one, other)))
        difference, wider = one.minus(other), one.minus(other, confidence=at_once)
        clear.append("all" if wider.is_clear else "yes" if difference.is_clear else "no")
        lines.append([*told, rates, f"{difference:+}", clear[-1]])
    return "\n\n".join([
        table("data | the same | arm | minus | rates | difference of the loss | clear", lines, "llll"),
        f"{len(clear) - clear.count('no')} of {len(clear)} are clear, each by itself; if nothing differed, some {(1 - CONFIDENCE) * len(clear):.0f} would be. "
        f"With intervals so wide that all of them hold at once in {CONFIDENCE:.0%} of cases (Bonferroni), {clear.count('all')} are: those with *all*.",
    ])  # fmt: skip
