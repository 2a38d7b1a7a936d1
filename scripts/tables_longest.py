"""The longest row that fits a card, read off the predicted peaks of results/longest.jsonl."""

from collections.abc import Callable

from pages import GIB, UNMEASURED, Rows, conditions_of, table

from hf_memtune.memory.cards import Room

CARDS = (8, 12, 16, 24, 40, 80)  # GiB
BENT = 0.02  # of a slope: lines that differ by less are one
MOST = 1_000_000  # tokens that are still told apart: far beyond what was predicted


def sections(rows_of: Callable[[str], Rows]) -> dict[str, Callable[[], str]]:
    return {
        "longest": lambda: longest_table(rows_of("longest")),
        "longest-of-one": lambda: longest_table(
            [row for row in rows_of("longest") if row["model"] == "Llama-3.1-8B" and row["train"] != "full"], False
        ),
    }


def longest_table(rows: Rows, says_conditions: bool = True) -> str:
    """A line for every model, what is trained, and method; a column for every card."""
    if not rows:
        return UNMEASURED
    order = {name: number for number, name in enumerate(dict.fromkeys(row["method"] for row in rows))}
    rows = sorted(rows, key=lambda row: (row["model"], ("full", "LoRA", "QLoRA").index(row["train"]), order[row["method"]]))
    lines = [[row["model"], row["train"], row["method"], *(cell(row, card) for card in CARDS)] for row in rows]
    found = table(["model", "trained", "method", *(f"{card} GiB" for card in CARDS)], lines, "lll")
    return f"{found}\n\n{conditions_of(rows)}" if says_conditions else found


def cell(row: dict, card: int) -> str:
    """Thousands of tokens, rounded down. Short of the shortest row that was predicted: less than it, or none at all."""
    if "left_out" in row:
        return "-"
    knots = sorted((int(tokens), peak) for tokens, peak in row["peak_bytes"].items())
    tokens = longest(knots, Room.of_device(card * GIB, "card").tensor_bytes)
    if tokens is None:
        return f"< {knots[0][0] / 1000:.0f}K"
    if tokens > knots[-1][0] and not is_straight(knots):
        return f"> {knots[-1][0] // 1000:,}K"
    return f"{tokens // 1000:,}K" if tokens <= MOST else f"> {MOST // 1000:,}K"


def is_straight(knots: list[tuple[int, int]]) -> bool:
    """Whether the last three knots lie on one line, along which the peak then goes on."""
    before, last = ((higher - peak) / (more - tokens) for (tokens, peak), (more, higher) in zip(knots[-3:], knots[-2:]))
    return abs(last - before) <= BENT * last


def longest(knots: list[tuple[int, int]], room: int) -> int | None:
    """Tokens of the longest row whose step fits; None: not even the shortest of `knots`, which are (tokens, peak bytes).

    The peak is the largest of several straight lines of the length: between two knots it lies on or below the line through them. Beyond the
    last one it goes on along the line through the last two, where `is_straight`.
    """
    if room < knots[0][1]:
        return None
    for (tokens, peak), (more, higher) in zip(knots, knots[1:]):
        if room < higher:
            return tokens + int((more - tokens) * (room - peak) / (higher - peak))
    (tokens, peak), (more, higher) = knots[-2:]
    if higher == peak:
        return MOST + 1  # nothing grows with the row
    return more + int((more - tokens) * (room - higher) / (higher - peak))
