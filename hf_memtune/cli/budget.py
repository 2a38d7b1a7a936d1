"""From settings to settings that fit a memory budget: for `plan`, and for `train --memory_budget`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from hf_memtune.cli import forecast
from hf_memtune.errors import ConfigError, MemTuneError


@dataclass
class BudgetArguments:
    """How much memory there is, and what may be changed to stay within it."""

    _argument_group_name = "memory budget"

    memory_budget: str | None = field(
        default=None,
        metadata={
            "help": "Most bytes that the tensors of a step may take, such as 8GiB; settings are changed, exact ways first, until the "
            "prediction fits. Leave room for what a device needs beside tensors. Default: no budget.",
            "aliases": ["--budget"],
        },
    )
    allow_approximate: bool = field(
        default=True,
        metadata={"help": "Whether a budget may be met by token seeking, whose gradients are those of a part of the tokens."},
    )

    @property
    def budget_bytes(self) -> int:
        from hf_memtune.units import parse_bytes

        return parse_bytes(self.memory_budget)

    def ineffective(self) -> list[str]:
        idle = self.memory_budget is None and not self.allow_approximate
        return ["allow_approximate has no effect without memory_budget"] if idle else []

    def problems(self) -> list[str]:
        if self.memory_budget is None:
            return []
        try:
            return [] if self.budget_bytes > 0 else [f"memory_budget: got {self.memory_budget}, expected more than 0 bytes."]
        except ValueError as error:
            return [f"memory_budget: {error}."]


def within_budget(arguments: list[str]) -> list[str]:
    """The arguments of `train`, with what makes them fit their memory budget after them; says what was chosen.

    Raises ConfigError where nothing fits.
    """
    plan, _ = climb(arguments, lambda: forecast.make_parser("train", BudgetArguments), BudgetArguments, stop_at_first=True)
    show(plan)
    return [*arguments, *flags(plan.chosen.rung.changes)]


def climb(arguments: list[str], parser: Callable, more: type, stop_at_first: bool):
    """(plan, settings as given) for the flags of a command. parser: makes the parser to read them with."""
    from hf_memtune.forecast.ladder import ladder
    from hf_memtune.forecast.plan import make_plan

    def read(changes: dict):
        return forecast.parse([*arguments, *flags(changes)], parser(), more)

    given = read({})
    model, training = given.model, given.training
    rungs = ladder(training, given.tokens, model.lora_r, model.load_in_4bit, model.reversible_adapters is None)
    if not given.more.allow_approximate:
        rungs = [rung for rung in rungs if rung.is_exact or not rung.changes]
    plan = make_plan(_shown(rungs), lambda changes: forecast.predict(read(changes)), given.more.budget_bytes, stop_at_first)
    if plan.chosen is None:
        raise _refusal(plan, arguments, parser, more, given)
    return plan, given


def _shown(rungs: list):
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(rungs, "Estimating", console=console, disable=not sys.stderr.isatty(), transient=True)


def _refusal(plan, arguments: list[str], parser: Callable, more: type, given) -> ConfigError:
    from hf_memtune.forecast.plan import refusal

    return refusal(plan, None if plan.smallest is None else _shorter(plan, arguments, parser, more, given))


def _shorter(plan, arguments: list[str], parser: Callable, more: type, given):
    """Half as many tokens, a quarter, an eighth: the first with which the smallest rung fits, and its estimate."""
    for tokens in (given.tokens // 2, given.tokens // 4, given.tokens // 8):
        if tokens < 2:
            break
        changes = {**plan.smallest.rung.changes, "max_length": tokens, "sequence_length": tokens}
        try:
            found = forecast.predict(forecast.parse([*arguments, *flags(changes)], parser(), more))
        except MemTuneError:
            continue
        if found.peak_bytes <= plan.budget_bytes:
            return tokens, found
    return None


def flags(changes: dict) -> list[str]:
    """Settings as the words of a command line."""
    return [f"--{name}={value}" for name, value in changes.items()]


def show(plan) -> None:
    """The ladder as a table, with the rung that was chosen."""
    from rich.console import Console

    console = Console()
    console.print(table_of(plan))
    for step in plan.steps:
        if step.reason is not None:
            console.print(f"left out: {step.rung.name}: {step.reason}", style="dim", highlight=False)
    changes = ", ".join(f"{name}={value}" for name, value in plan.chosen.rung.changes.items()) or "nothing is changed"
    console.print(f"chosen: [bold]{plan.chosen.rung.name}[/] ({plan.chosen.rung.gradient}): {changes}", highlight=False)


def table_of(plan):
    """A rich table of the rungs. Each is with all above it in the table, but a ratio is in place of streaming."""
    from rich.table import Table

    from hf_memtune.units import format_bytes

    table = Table(title=f"Budget {format_bytes(plan.budget_bytes)}: each rung with those above it")
    for head, justify in (("rung", "left"), ("gradient", "left"), ("predicted", "right"), ("operations", "right"), ("", "left")):
        table.add_column(head, justify=justify)
    for step in plan.steps:
        style = "bold" if step is plan.chosen else None
        if step.estimate is None:
            table.add_row(step.rung.name, step.rung.gradient, "-", "-", "left out", style="dim")
            continue
        size, time = format_bytes(step.estimate.peak_bytes), f"{step.relative_time:.2f} x"
        table.add_row(step.rung.name, step.rung.gradient, size, time, "fits" if step.fits else "does not fit", style=style)
    return table
