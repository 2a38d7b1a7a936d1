"""Tables of docs/reversible.md, and sentences that say where a bound holds, from the result files."""

from collections.abc import Callable

from pages import conditions_of

from reversible import bytes_tables, inverse_tables, start_tables

Rows = list[dict]


def sections(start: Rows, memory: Rows, inverse: Rows) -> dict[str, Callable[[], str]]:
    """What stands between the markers of each name."""
    return {
        **{f"start-{model}": lambda model=model: start_tables.table(start, model) for model in start_tables.MODELS},
        "start-holds": lambda: start_tables.where_it_holds(start),
        "start-outputs": lambda: start_tables.outputs_table(start),
        "start-conditions": lambda: conditions_of(start),
        **{f"bytes-{name}": lambda model=model: bytes_tables.table(memory, model) for name, model in bytes_tables.MODELS.items()},
        "bytes-claim": lambda: bytes_tables.claim(memory),
        "bytes-rival": lambda: bytes_tables.rival(memory),
        "bytes-depth": lambda: bytes_tables.depth_table(memory),
        "inverse": lambda: inverse_tables.table(inverse),
        "inverse-conditions": lambda: conditions_of(inverse),
        "bytes-conditions": lambda: conditions_of(memory),
    }
