"""Which rung of the ladder fits a budget: every one is estimated, the first that fits is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from hf_memtune.errors import ConfigError, MemTuneError, first_line
from hf_memtune.forecast.ladder import Rung
from hf_memtune.memory.estimate import MemoryEstimate
from hf_memtune.units import format_bytes

_EVALUATION = "per_device_eval_batch_size"


@dataclass(frozen=True)
class Step:
    """A rung with what it would need. estimate: None where there is none, for the `reason`. relative_time: floating point operations of a
    step, relative to the settings as given (time itself depends on the device). at_least: of a rung that was not traced, since what is
    there in any case exceeds the budget: bytes of weights and gradients."""

    rung: Rung
    estimate: MemoryEstimate | None
    relative_time: float | None
    fits: bool
    reason: str | None = None
    at_least: int | None = None


@dataclass(frozen=True)
class Plan:
    """The ladder, climbed. chosen: the first rung that fits, an exact one if any exact one does; None: nothing fits."""

    steps: tuple[Step, ...]
    budget_bytes: int

    @property
    def chosen(self) -> Step | None:
        fitting = [step for step in self.steps if step.fits]
        return next((step for step in fitting if step.rung.is_exact), fitting[0] if fitting else None)

    @property
    def smallest(self) -> Step | None:
        """The rung that needs least."""
        known = [step for step in self.steps if step.estimate is not None]
        return min(known, key=lambda step: step.estimate.peak_bytes, default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {
                "rung": step.rung.name,
                "gradient": step.rung.gradient,
                "changes": step.rung.changes,
                "peak_bytes": step.estimate and step.estimate.peak_bytes,
                "relative_time": step.relative_time,
                "fits": step.fits,
                "left_out": step.reason,
            }
            for step in self.steps
        ]
        return {"budget_bytes": self.budget_bytes, "chosen": self.chosen and self.chosen.rung.name, "rungs": rows}


def make_plan(
    rungs: Iterable[Rung],
    predict: Callable[[dict[str, Any]], MemoryEstimate],
    budget_bytes: int,
    stop_at_first: bool = False,
    floor: Callable[[dict[str, Any]], int] | None = None,
    tell: Callable[[Step], None] = lambda step: None,
) -> Plan:
    """Estimate rung by rung. predict: maps changes of settings to the estimate of the run with them.

    A rung that does not apply (a strategy the model does not support, a package that is missing) is left out with the reason, and so is one
    whose `floor`, what it needs in any case, exceeds the budget: that takes no trace. Where a batch of evaluation sets the peak, it is
    made smaller, there and in the rungs above.
    stop_at_first: climb no further than to the first rung that fits. tell: hears of every step as it is made.

    Raises:
        MemTuneError: what the settings as given, the first rung, raise; they are the user's.
    """
    steps: list[Step] = []
    given: MemoryEstimate | None = None
    smaller: dict[str, Any] = {}  # batches of evaluation
    for rung in rungs:
        rung = replace(rung, changes={**rung.changes, **smaller})
        found = _climb(rung, predict, budget_bytes, given, not steps, floor)
        if not found.fits and found.estimate is not None and found.estimate.peak_phase == "evaluation":
            found = _with_less_evaluation(found, predict, budget_bytes, given)
            smaller = {name: value for name, value in found.rung.changes.items() if name == _EVALUATION}
        given = given or found.estimate
        steps.append(found)
        tell(found)
        if stop_at_first and found.fits:
            break
    return Plan(tuple(steps), budget_bytes)


def _climb(
    rung: Rung, predict: Callable, budget_bytes: int, given: MemoryEstimate | None, is_given: bool, floor: Callable | None = None
) -> Step:
    if rung.missing is not None:
        return Step(rung, None, None, False, rung.missing)
    try:
        if floor is not None and (least := floor(rung.changes)) > budget_bytes:
            return Step(rung, None, None, False, f"weights and their gradients alone need {format_bytes(least)}", least)
        found = predict(rung.changes)
    except MemTuneError as error:
        if is_given:
            raise
        return Step(rung, None, None, False, first_line(error))
    return Step(rung, found, found.flops / max(1, (given or found).flops), found.peak_bytes <= budget_bytes)


def _with_less_evaluation(step: Step, predict: Callable, budget_bytes: int, given: MemoryEstimate | None) -> Step:
    """With halves of the batch of evaluation, until training sets the peak, or one row is left."""
    rows = step.estimate.conditions["evaluation_rows"]
    while rows > 1 and step.estimate.peak_phase == "evaluation":
        rows = rows // 2
        rung = replace(step.rung, changes={**step.rung.changes, _EVALUATION: rows})
        tried = _climb(rung, predict, budget_bytes, given, is_given=False)
        if tried.estimate is None:
            break
        step = tried
    return step


def refusal(plan: Plan, shorter: tuple[int, MemoryEstimate] | None, gpu: str | None = None) -> ConfigError:
    """What to say of a budget that nothing fits. shorter: a length of rows with which the smallest rung would, and its estimate. gpu: the
    card that the budget is of; None: of none."""
    need, least = plan.smallest, min((step.at_least for step in plan.steps if step.at_least), default=None)
    nearest = "no rung applies to this model"
    if need:
        nearest = f"the least is {format_bytes(need.estimate.peak_bytes)}, with {need.rung.name}"
    elif least:
        nearest = f"weights and their gradients alone need {format_bytes(least)}; take a smaller model, or more memory"
    got, advice = "budget: got", ["Raise the budget to that" if need else "Raise the budget"]
    if gpu is not None:
        got, advice = f"gpu: got {gpu}, which leaves", ["Take a card that leaves that much" if need else "Take a larger card"]
    if shorter is not None:
        advice.append(f"or shorten rows to {shorter[0]} tokens, which needs {format_bytes(shorter[1].peak_bytes)}")
    if need and need.estimate.peak_phase == "evaluation":
        advice.append("or hold out no rows (--eval_fraction 0, or no --eval_split), whose evaluation needs most")
    if need and all(step.rung.is_exact for step in plan.steps):  # of weights that are too large it makes nothing smaller
        advice.append("or allow approximate gradients (--allow_approximate true)")
    return ConfigError([f"{got} {format_bytes(plan.budget_bytes)}, and nothing fits: {nearest}. {', '.join(advice)}."])
