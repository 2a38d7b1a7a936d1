"""Pages whose tables come from result files: what stands between `<!-- name -->` and `<!-- end -->` is made anew."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from hf_memtune.files import write_text

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
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


def mib(value: int | None) -> str:
    """A cell of a table."""
    return "-" if value is None else f"{value / MIB:,.0f}"


def conditions_of(rows: list[dict], leave_out: tuple[str, ...] = ("lora_rank",)) -> str:
    """One line on what the rows of a table were measured with; where they differ, every value."""
    if not rows:
        return "Not measured yet."
    found: dict[str, list[str]] = {}
    for row in rows:
        for key, value in row["conditions"].items():
            if value is not None and key not in leave_out and str(value) not in found.setdefault(key, []):
                found[key].append(str(value))
    return "Conditions: " + ", ".join(f"{key.replace('_', ' ')} {' / '.join(values)}" for key, values in found.items()) + "."
