"""Write the tables and pictures of docs/reversible.md from the result files: `python scripts/reversible_page.py` (--check only compares).

The text between the tables is written by hand; the numbers in tables, and the sentences that say where a bound holds, come from the files.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import pages
import store
from pages import ROOT, conditions_of
from reversible import bytes_tables, inverse_tables, start_tables

Rows = list[dict]


def sections(start: Rows, memory: Rows, inverse: Rows) -> dict[str, Callable[[], str]]:
    """What stands between the markers of each name."""
    return {
        **{f"start-{model}": lambda model=model: start_tables.table(start, model) for model in start_tables.MODELS},
        "start-holds": lambda: start_tables.where_it_holds(start),
        "start-outputs": lambda: start_tables.outputs_table(start),
        "start-conditions": lambda: conditions_of(start),
        **{f"memory-{name}": lambda model=model: bytes_tables.table(memory, model) for name, model in bytes_tables.MODELS.items()},
        "memory-claim": lambda: bytes_tables.claim(memory),
        "memory-rival": lambda: bytes_tables.rival(memory),
        "memory-depth": lambda: bytes_tables.depth_table(memory),
        "inverse": lambda: inverse_tables.table(inverse),
        "inverse-conditions": lambda: conditions_of(inverse),
        "memory-conditions": lambda: conditions_of(memory),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the result files (default: results)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reversible.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    options = parser.parse_args(arguments)
    start, memory, inverse = (
        store.read(options.results / name) for name in ("start_point.jsonl", "reversible_memory.jsonl", "inverse.jsonl")
    )
    is_current = pages.write(options.page, sections(start, memory, inverse), options.check)
    if options.check:
        return int(not is_current)
    _draw(start, memory, options.page.parent / "images")
    return 0


def _draw(start: Rows, memory: Rows, folder: Path) -> None:
    from reversible import plots

    folder.mkdir(parents=True, exist_ok=True)
    plots.bytes_figure(memory, folder / "reversible-memory.png")
    plots.start_figure(start, folder / "reversible-start.png")


if __name__ == "__main__":
    raise SystemExit(main())
