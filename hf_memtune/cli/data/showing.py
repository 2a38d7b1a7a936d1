"""A look at rows as they will be learned, before training: which of their tokens carry a label."""

import warnings
from collections.abc import Mapping
from itertools import groupby

from hf_memtune.cli.data.kinds import Unread
from hf_memtune.cli.data.making import IGNORED
from hf_memtune.cli.data.rows import Rows

_LONGEST = 240  # characters of a piece that are shown; the middle of longer ones is left out


def show(rows: Rows, tokenizer, count: int) -> None:
    """Print the first rows to train on as a table, and what of the rows is left out. What carries a label stands between « and »."""
    from rich.console import Console

    tell_of(rows.reasons, rows.unread)
    if count:
        Console(stderr=True).print(table_of(rows, tokenizer, count))


def tell_of(dropped: Mapping[str, int], unread: Unread) -> None:
    """Print what of the rows is left out: how many by reason, and columns; warn of those that answers may depend on."""
    from rich.console import Console

    console = Console(stderr=True)
    if dropped:
        told = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
        console.print(f"dropped {sum(dropped.values())} rows: {told}", highlight=False)
    if unread.warning is not None:
        warnings.warn(unread.warning, stacklevel=3)
    elif unread.columns:
        console.print(f"columns not read: {', '.join(unread.columns)}", highlight=False, markup=False)


def table_of(rows: Rows, tokenizer, count: int):
    """A rich table of `count` rows."""
    from rich.table import Table
    from rich.text import Text

    title = "Rows as they are learned: « » has a loss" if rows.classes is None else "Rows as they are learned"
    table = Table(title=title, show_lines=True)
    for head, justify in (("row", "right"), ("tokens", "right"), ("with loss", "right"), ("text", "left")):
        table.add_column(head, justify=justify)
    for number in range(min(count, len(rows.train))):
        row = rows.train[number]
        text, learned = Text(), 1
        if rows.classes is not None:
            text = Text(f"{_short(tokenizer.decode(row['input_ids']))} → {rows.classes[row['labels']]}")
        else:
            learned = sum(label != IGNORED for label in row["labels"][1:])
            for piece, is_learned in pieces(row, tokenizer):
                text.append(f"«{_short(piece)}»" if is_learned else _short(piece), "bold" if is_learned else "dim")
        table.add_row(str(number), str(len(row["input_ids"])), str(learned), text)
    return table


def pieces(row: dict, tokenizer) -> list[tuple[str, bool]]:
    """The text of a row in runs of tokens, and whether a run carries a label."""
    pairs = groupby(zip(row["input_ids"], row["labels"]), key=lambda pair: pair[1] != IGNORED)
    return [(tokenizer.decode([token for token, _ in run]), is_learned) for is_learned, run in pairs]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
