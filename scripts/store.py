"""Result files: one JSON object a line and a run, which several processes may add to; and the loop that measures what a file lacks."""

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from conditions import conditions


def read(file: Path) -> list[dict]:
    """Every line. One that a killed process left unfinished is passed over."""
    if not file.exists():
        return []
    return [row for line in file.read_text().splitlines() if (row := _parsed(line)) is not None]


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def append(file: Path, row: dict) -> None:
    """Add one line in one write, under a lock."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b", buffering=0) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        text = json.dumps(row, allow_nan=False) + "\n"
        os.write(stream.fileno(), (_missing_newline(stream) + text).encode())


def _missing_newline(stream) -> str:
    """A newline where the last line has none: what is left of a killed process must not swallow the next record."""
    if stream.seek(0, os.SEEK_END) == 0:
        return ""
    stream.seek(-1, os.SEEK_END)
    return "" if stream.read(1) == b"\n" else "\n"


def missing(file: Path, wanted: Iterable[dict]) -> list[dict]:
    """Of these descriptions of runs, those of which the file has no line with the same values."""
    rows = read(file)
    return [run for run in wanted if not any(all(row.get(name) == value for name, value in run.items()) for row in rows)]


def measure(
    file: Path,
    wanted: Iterable[dict],
    measured: Callable[[dict], dict],
    title: str = "Measuring",
    said: Callable[[dict], str] | None = None,
    **described,
) -> list[dict]:
    """Measure what the file lacks, one line a run, which is told and returned. It is read again before each run: others may write to it too.

    measured: what is found for a description of a run, with its conditions or without. said: a line for people. described: in conditions.
    """
    from rich.progress import track

    rows = []
    for run in track(missing(file, wanted), description=title, disable=not sys.stderr.isatty()):
        if not missing(file, [run]):
            continue
        found = run | measured(run)
        met = found.pop("conditions", None) or conditions(**described)
        rows.append(found | {"conditions": met})
        append(file, rows[-1])
        print((said or told)(found), flush=True)
    return rows


def told(row: dict) -> str:
    """Names and values, but for those that are made of many."""
    return ", ".join(f"{name} {_short(value)}" for name, value in row.items() if value is not None and not isinstance(value, (dict, list)))


def _short(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
