"""Settings that work and waste time or teach little on the rows at hand: said before the first step, with the setting to change.

Each trap is a function of the training arguments and of the lengths of the rows, and gives a message or None.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from hf_memtune.levers.facts import checkpointed_by, saved_by_one_chunk

SHORT = 512  # tokens: below it streaming saves little and its small chunks cost time (docs/measurements.md)


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row to train on, and how many of them carry a label. together: rows of a batch that become one, as packed ones do."""

    tokens: list[int]
    labelled: list[int]
    together: int = 1

    @property
    def longest(self) -> int:
        return max(self.tokens) * self.together


def chunk_beyond_every_row(args: Any, rows: Lengths) -> str | None:
    """One chunk is the loss without logits, which may be what is wanted; on short rows with checkpointing it is what the README advises."""
    chunk = args.stream_chunk_size
    if chunk is None or chunk <= rows.longest or args.token_seeking:
        return None
    remedies = [f"set it to {rows.longest // 4}"] if rows.longest > SHORT else []  # see the next trap
    remedies += [] if checkpointed_by(args) else ["turn activation_checkpointing on"]
    if not remedies:
        return None
    return (
        f"sequence_chunk_size: got {chunk}, and the longest row has {rows.longest} tokens, so rows are not cut: {saved_by_one_chunk(args)}. For "
        f"less memory {', or '.join(remedies)}."
    )


def chunks_of_short_rows(args: Any, rows: Lengths) -> str | None:
    chunk = args.stream_chunk_size
    if chunk is None or args.token_seeking or not chunk < rows.longest <= SHORT:
        return None
    return (
        f"sequence_chunk_size: got {chunk}, but the longest row has {rows.longest} tokens: on rows that short, small chunks cost more time than "
        f"they save memory. Try sequence_chunk_size={rows.longest} with activation_checkpointing."
    )


def nothing_labelled_is_kept(args: Any, rows: Lengths) -> str | None:
    """Among all tokens, a small part of a row may be prompt alone."""
    if not args.token_seeking or args.select_from != "all" or not any(rows.labelled):
        return None
    expected = median(args.token_ratio * labelled for labelled in rows.labelled)
    if expected >= 1:
        return None
    return (
        f"token_ratio: got {args.token_ratio:g} of all tokens, but half of the rows have {median(rows.labelled):g} tokens with a label or fewer, so "
        "that often none of these is kept, and nothing is learned. Set select_from=labels, or raise token_ratio."
    )


TRAPS: tuple[Callable[[Any, Lengths], str | None], ...] = (chunk_beyond_every_row, chunks_of_short_rows, nothing_labelled_is_kept)


def traps(args: Any, rows: Lengths) -> Iterator[str]:
    """What to say of these settings on these rows."""
    for trap in TRAPS:
        if (message := trap(args, rows)) is not None:
            yield message
