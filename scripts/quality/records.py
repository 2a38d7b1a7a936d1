"""results/quality.jsonl: one JSON object a line and a run, which several processes may add to at the same time."""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path

KEY = ("stage", "task", "arm", "rows", "steps", "learning_rate", "seed")


def key(record: dict) -> tuple:
    """What tells one run from another."""
    return tuple(record[name] for name in KEY)


def read(file: Path) -> list[dict]:
    """All finished runs, the last line of each. A line that a killed process left unfinished is passed over."""
    if not file.exists():
        return []
    found = [record for line in file.read_text().splitlines() if (record := _parsed(line)) is not None]
    return list({key(record): record for record in found}.values())


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def append(file: Path, record: dict) -> None:
    """Add one line in one write, under a lock."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b", buffering=0) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        text = json.dumps(record, allow_nan=False) + "\n"
        os.write(stream.fileno(), (_missing_newline(stream) + text).encode())


def _missing_newline(stream) -> str:
    """A newline where the last line has none: what is left of a killed process must not swallow the next record."""
    if stream.seek(0, os.SEEK_END) == 0:
        return ""
    stream.seek(-1, os.SEEK_END)
    return "" if stream.read(1) == b"\n" else "\n"


def final_loss(record: dict) -> float:
    """The last held-out loss; infinite where the run diverged or measured none."""
    loss = record["losses"][-1][1] if record["losses"] else None
    return float("inf") if loss is None else loss


def of(records: Iterable[dict], **wanted) -> list[dict]:
    """The records whose fields have these values."""
    return [record for record in records if all(record[name] == value for name, value in wanted.items())]
