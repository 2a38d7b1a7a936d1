"""From settings to settings that fit a memory budget: for `plan`, and for `train --memory_budget`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from hf_memtune.cli import forecast
from hf_memtune.errors import ConfigError, MemTuneError
from hf_memtune.settings.protocol import setting


@dataclass
class RoomArguments:
    """How much memory there is."""

    _argument_group_name = "memory budget"

    memory_budget: str | None = setting(
        None,
        "Most bytes that the tensors of a step may take, such as 8GiB. Leave room for what a device needs beside tensors, or "
        "name the card with --gpu. Default: none.",
        aliases=["--budget"],
    )
    gpu: str | None = setting(
        None, "Card whose memory is the budget, less an allowance for context and allocator: rtx4090, a100-80gb, ... Default: none."
    )

    @property
    def room(self):
        """What tensors may take, or None where nothing was said."""
        from hf_memtune.memory.cards import Room
        from hf_memtune.units import parse_bytes

        if self.gpu is not None:
            return Room.of_card(self.gpu)
        return None if self.memory_budget is None else Room(parse_bytes(self.memory_budget), "budget")

    def problems(self) -> list[str]:
        from hf_memtune.memory.cards import CARDS
        from hf_memtune.units import parse_bytes

        if self.gpu is not None and self.memory_budget is not None:
            return [f"gpu: got {self.gpu} with memory_budget={self.memory_budget}. Leave one of them out."]
        if self.gpu is not None and self.gpu.lower() not in CARDS:
            return [f"gpu: got {self.gpu!r}, expected one of {', '.join(CARDS)}; of another card give --budget, in bytes for tensors."]
        if self.memory_budget is None:
            return []
        try:
            wanted = parse_bytes(self.memory_budget)
        except ValueError as error:
            return [f"memory_budget: {error}."]
        return [] if wanted > 0 else [f"memory_budget: got {self.memory_budget}, expected more than 0 bytes."]


@dataclass
class BudgetArguments(RoomArguments):
    """How much memory there is, and what may be changed to stay within it."""

    allow_approximate: bool = setting(
        True, "Whether a budget may be met by token seeking, whose gradients are those of a part of the tokens."
    )

    def ineffective(self) -> dict[str, str]:
        idle = self.memory_budget is self.gpu is None and not self.allow_approximate
        return {"allow_approximate": "without memory_budget or gpu"} if idle else {}


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

    @lru_cache(maxsize=1)  # of each rung it is asked what it needs in any case, and then what in all
    def read(*changes: str):
        return forecast.parse([*arguments, *changes], parser(), more)

    given, blanks = read(), forecast.Blanks()
    rungs = ladder(forecast.run_of(given))
    if not given.more.allow_approximate:
        rungs = [rung for rung in rungs if rung.is_exact or not rung.changes]
    plan = make_plan(
        rungs,
        lambda changes: forecast.predict(read(*flags(changes)), blanks=blanks),
        given.more.room.tensor_bytes,
        stop_at_first,
        floor=lambda changes: forecast.least(read(*flags(changes)), blanks),
        tell=_teller(len(rungs)),
    )
    if plan.chosen is None:
        raise _refusal(plan, arguments, parser, more, given)
    return plan, given


def _teller(count: int) -> Callable:
    """Says on standard error what each rung needs, as it is tried."""
    from rich.console import Console

    console = Console(stderr=True)
    console.print(f"Estimating up to {count} ways to run, exact ones first.", style="dim")

    def tell(step) -> None:
        size, judged = _judged(step)
        console.print(f"  {step.rung.name}: {size} {judged}", style="dim", highlight=False)

    return tell


def _judged(step) -> tuple[str, str]:
    """What a rung needs, and what comes of that."""
    from hf_memtune.units import format_bytes

    if step.at_least is not None:
        return f"> {format_bytes(step.at_least)}", "does not fit"
    if step.estimate is None:
        return "-", "left out"
    return format_bytes(step.estimate.peak_bytes), "fits" if step.fits else "does not fit"


def _refusal(plan, arguments: list[str], parser: Callable, more: type, given) -> ConfigError:
    from hf_memtune.forecast.plan import refusal

    shorter = None if plan.smallest is None else _shorter(plan, arguments, parser, more, given)
    return refusal(plan, shorter, given.more.gpu)


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

    from hf_memtune.units import format_bytes

    console = Console()
    console.print(table_of(plan))
    for step in plan.steps:
        if step.reason is not None and step.at_least is None:
            console.print(f"left out: {step.rung.name}: {step.reason}", style="dim", highlight=False)
    changes = ", ".join(f"{name}={value}" for name, value in plan.chosen.rung.changes.items()) or "nothing is changed"
    console.print(f"chosen: [bold]{plan.chosen.rung.name}[/] ({plan.chosen.rung.gradient}): {changes}", highlight=False)
    rows, tokens = (plan.chosen.estimate.conditions[name] for name in ("rows", "tokens"))
    spare = format_bytes(plan.budget_bytes - plan.chosen.estimate.peak_bytes)
    console.print(f"verdict: fits, with {spare} to spare, {rows} row{'s' * (rows != 1)} of {tokens} tokens at a time.", highlight=False)


def table_of(plan):
    """A rich table of the rungs. Each is with all above it in the table, but a ratio is in place of streaming."""
    from rich.table import Table

    from hf_memtune.units import format_bytes

    table = Table(title=f"Budget {format_bytes(plan.budget_bytes)}: each rung with those above it")
    for head, justify in (("rung", "left"), ("gradient", "left"), ("predicted", "right"), ("operations", "right"), ("", "left")):
        table.add_column(head, justify=justify)
    for step in plan.steps:
        style = "bold" if step is plan.chosen else "dim" if step.estimate is None else None
        time = "-" if step.estimate is None else f"{step.relative_time:.2f} x"
        size, judged = _judged(step)
        table.add_row(step.rung.name, step.rung.gradient, size, time, judged, style=style)
    return table
