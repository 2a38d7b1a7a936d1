"""Which rung of the ladder fits a budget: every one is estimated, the first that fits is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hf_memtune.errors import ConfigError, MemTuneError
from hf_memtune.forecast.ladder import Rung
from hf_memtune.memory.estimate import MemoryEstimate
from hf_memtune.units import format_bytes


@dataclass(frozen=True)
class Step:
    """A rung with what it would need. estimate: None where there is none, for the `reason`. relative_time: floating point operations of a
    step, relative to the settings as given (time itself depends on the device)."""

    rung: Rung
    estimate: MemoryEstimate | None
    relative_time: float | None
    fits: bool
    reason: str | None = None


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
    rungs: Iterable[Rung], predict: Callable[[dict[str, Any]], MemoryEstimate], budget_bytes: int, stop_at_first: bool = False
) -> Plan:
    """Estimate rung by rung. predict: maps changes of settings to the estimate of the run with them.

    A rung that does not apply (a strategy the model does not support, a package that is missing) is left out with the reason.
    stop_at_first: climb no further than to the first rung that fits.

    Raises:
        MemTuneError: what the settings as given, the first rung, raise; they are the user's.
    """
    steps, given = [], None
    for rung in rungs:
        found = _climb(rung, predict, budget_bytes, given, is_given=not steps)
        given = given or found.estimate
        steps.append(found)
        if stop_at_first and found.fits:
            break
    return Plan(tuple(steps), budget_bytes)


def _climb(rung: Rung, predict: Callable, budget_bytes: int, given: MemoryEstimate | None, is_given: bool) -> Step:
    if rung.missing is not None:
        return Step(rung, None, None, False, rung.missing)
    try:
        found = predict(rung.changes)
    except MemTuneError as error:
        if is_given:
            raise
        return Step(rung, None, None, False, _first_line(error))
    return Step(rung, found, found.flops / max(1, (given or found).flops), found.peak_bytes <= budget_bytes)


def _first_line(error: MemTuneError) -> str:
    return error.problems[0] if isinstance(error, ConfigError) else str(error).splitlines()[0]


def refusal(plan: Plan, shorter: tuple[int, MemoryEstimate] | None) -> ConfigError:
    """What to say of a budget that nothing fits. shorter: a length of rows with which the smallest rung would, and its estimate."""
    need = plan.smallest
    nearest = f"the least is {format_bytes(need.estimate.peak_bytes)}, with {need.rung.name}" if need else "no rung applies to this model"
    advice = ["Raise the budget to that" if need else "Raise the budget"]
    if shorter is not None:
        advice.append(f"or shorten rows to {shorter[0]} tokens, which needs {format_bytes(shorter[1].peak_bytes)}")
    if not any(not step.rung.is_exact for step in plan.steps):
        advice.append("or allow approximate gradients (--allow_approximate true)")
    return ConfigError([f"budget: got {format_bytes(plan.budget_bytes)}, and nothing fits: {nearest}. {', '.join(advice)}."])
