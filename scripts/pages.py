"""Pages whose tables come from result files: what stands between `<!-- name -->` and `<!-- end -->` is made anew."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Formatter

from hf_memtune.files import write_text

ROOT = Path(__file__).resolve().parent.parent
MIB, GIB = 2**20, 2**30
UNMEASURED = "Not measured yet."
Rows = list[dict]
_SECTION = re.compile(r"<!-- ([a-z0-9-]+) -->\n.*?<!-- end -->", re.S)


def filled(text: str, sections: Mapping[str, Callable[[], str]]) -> str:
    """The text with every section made anew. Raises KeyError for an unknown marker."""
    return _SECTION.sub(lambda match: f"<!-- {match[1]} -->\n{sections[match[1]]()}\n<!-- end -->", text)


def write(page: Path, sections: Mapping[str, Callable[[], str]], check: bool) -> bool:
    """Whether the page was up to date. check: write nothing."""
    before = page.read_text()
    after = filled(before, sections)
    if not check:
        write_text(page, after)
    return before == after


# --- what tables are made of: rows by their values, and lines of cells


def of(rows: Iterable[dict], /, **wanted) -> Rows:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def key(row: dict, names: str):
    """The values of the fields named in a string: a tuple, or the one value."""
    found = tuple(row[name] for name in names.split())
    return found if len(found) > 1 else found[0]


def unique(rows: Iterable[dict], names: str) -> list:
    """Each key once, in the order of the rows."""
    return list(dict.fromkeys(key(row, names) for row in rows))


def by(rows: Iterable[dict], names: str, value: str | None = None) -> dict:
    """The rows, or one value of each, by their keys. The last of a key counts."""
    return {key(row, names): row if value is None else row[value] for row in rows}


def pivot(rows: Rows, index: str, column: str, columns: Iterable, value: str | None, shown: Callable) -> list[list]:
    """A line for every key of `index`: the key, and what is `shown` of the value at each of `columns`, or of None where there is none."""
    found = by(rows, f"{index} {column}", value)
    keys = [each if isinstance(each, tuple) else (each,) for each in unique(rows, index)]
    return [[*each, *(shown(found.get((*each, name))) for name in columns)] for each in keys]


def table(heads: str | Sequence, lines: Iterable[Sequence], align: str = "l") -> str:
    """heads: a list, or a string with bars between them. align: l or r for each of the first columns; the others are numbers."""
    heads = heads.split(" | ") if isinstance(heads, str) else heads
    sides = ("---" if side == "l" else "---:" for side in align.ljust(len(heads), "r"))
    head, *rest = (f"| {' | '.join(map(str, cells))} |" for cells in (heads, *lines))
    return "\n".join([head.replace("|  |", "| |"), f"|{'|'.join(sides)}|", *rest])


class Cell(Formatter):
    """str.format, in which None is a dash, and bytes and shares have words of their own: {peak_bytes:mib}, {kept_share:share}."""

    def format_field(self, value, form: str) -> str:
        if value is None:
            return "-"
        return mib(value) if form == "mib" else f"{100 * value:.1f} %" if form == "share" else format(value, form)


def listing(rows: Iterable[dict], columns: Mapping[str, str], align: str = "l") -> str:
    """A table with a line for every row. columns: of every head, what its cells are made of, such as "{seconds:.2f}"."""
    return table([*columns], [[Cell().format(form, **row) for form in columns.values()] for row in rows], align)


def mib(value: float | None) -> str:
    """A cell of a table."""
    return "-" if value is None else f"{value / MIB:,.0f}"


def conditions_of(rows: Rows, leave_out: tuple[str, ...] = ("lora_rank",)) -> str:
    """One line on what the rows of a table were measured with; where they differ, every value."""
    if not rows:
        return UNMEASURED
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, value in row["conditions"].items():
            if value is not None and name not in leave_out and str(value) not in found.setdefault(name, []):
                found[name].append(str(value))
    return "Conditions: " + ", ".join(f"{name.replace('_', ' ')} {' / '.join(values)}" for name, values in found.items()) + "."
