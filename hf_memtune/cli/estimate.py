"""`hf-memtune estimate --model M [--config RECIPE.yaml] [flags of train]`: the memory of a training step, before there is one.

    hf-memtune estimate --model Llama-3.1-8B --sequence_length 2048 --dtype bfloat16 --lora_r 16 --sequence_chunk_size 512
    hf-memtune estimate --model llama --config_overrides hidden_size=512,num_hidden_layers=8 --json

Needs no GPU, no weights and no data: the config of the model is enough.
"""

import json

from hf_memtune.cli import forecast
from hf_memtune.cli.budget import RoomArguments
from hf_memtune.cli.verdict import verdict


def run(arguments: list[str]) -> None:
    """Print the estimate. Raises ConfigError with all problems of the settings."""
    settings = forecast.parse(arguments, make_parser(), RoomArguments, as_given=True)
    found, room = forecast.predict(settings), settings.more.room
    if settings.what.json:
        fits = None if room is None else {"budget_bytes": room.tensor_bytes, "fits": found.peak_bytes <= room.tensor_bytes}
        print(json.dumps(found.to_dict() | {"verdict": fits}))
        return
    show(found)
    print("\n".join(verdict(found, room, forecast.run_of(settings))))


def make_parser():
    """The parser of this command: that of train, with what memory there is before it."""
    return forecast.make_parser("estimate", RoomArguments)


def show(found) -> None:
    """The account as a table: phases side by side, one line a category."""
    from rich.console import Console

    console = Console()
    console.print(table_of(found.account))
    from hf_memtune.units import format_bytes

    console.print(f"peak: [bold]{format_bytes(found.peak_bytes)}[/] in {found.peak_phase.replace('_', ' ')}, all of tensors.")
    console.print(", ".join(f"{name.replace('_', ' ')} {_said(value)}" for name, value in found.conditions.items()) + ".")
    if found.extrapolated:
        console.print(f"Extrapolated: {found.extrapolated} (exact where layers repeat).")
    console.print("A device needs more beside tensors: its context, the allocator's rounding and cache, and workspaces of kernels.")


def _said(value) -> str:
    return " and ".join(value) if isinstance(value, list) else str(value)


def table_of(account):
    """A rich table of a MemoryAccount."""
    from rich.table import Table

    from hf_memtune.memory.account import CATEGORIES
    from hf_memtune.units import format_bytes

    table = Table(title="Bytes at the peak of each phase", collapse_padding=True)  # five phases in 80 characters
    table.add_column("")
    for phase in account.phases:
        table.add_column(phase.phase.replace("_", " "), justify="right", style="bold" if phase.phase == account.peak_phase else None)
    for category in CATEGORIES:
        sizes = [phase.by_category[category] for phase in account.phases]
        if any(sizes):
            table.add_row(category.replace("_", " "), *(format_bytes(size) if size else "-" for size in sizes))
    table.add_section()
    table.add_row("all", *(format_bytes(phase.peak_bytes) for phase in account.phases))
    return table
