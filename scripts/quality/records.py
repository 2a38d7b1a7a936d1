"""The runs of results/quality.jsonl and results/glue.jsonl."""

from collections.abc import Iterable
from pathlib import Path

import store

KEY = ("stage", "task", "arm", "rows", "steps", "learning_rate", "seed")


def key(record: dict) -> tuple:
    """What tells one run from another."""
    return tuple(record[name] for name in KEY)


def latest(found: Iterable[dict]) -> list[dict]:
    """The last record of each run."""
    return list({key(record): record for record in found}.values())


def read(file: Path) -> list[dict]:
    """All finished runs."""
    return latest(store.read(file))


def final_loss(record: dict) -> float:
    """The last held-out loss; infinite where the run diverged or measured none."""
    loss = record["losses"][-1][1] if record["losses"] else None
    return float("inf") if loss is None else loss


def of(records: Iterable[dict], **wanted) -> list[dict]:
    """The records whose fields have these values."""
    return [record for record in records if all(record[name] == value for name, value in wanted.items())]
