"""The batch that needs the most memory of all that the data and the collator can give: the longest rows, collated as in training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

LENGTH_COLUMNS = ("input_ids", "labels", "decoder_input_ids")  # a collator pads each of them to its own longest
_SHOW_PROGRESS_FROM = 20_000
_AT_A_TIME = 1000


@dataclass(frozen=True)
class Longest:
    """A collated batch. rows: how many are in it. tokens: of its longest one, None where rows have no tokens. why: how it was found."""

    batch: dict[str, Any]
    rows: int
    tokens: int | None
    why: str


def longest_batch(loader: DataLoader, rows: int) -> Longest | None:
    """`rows` rows (fewer where there are fewer) of the loader's data set, through its collator. None for a data set without length.

    The longest rows by the sum of their token columns, and in any case the longest of each column. A data set whose rows have no
    input_ids gives its first rows: nothing in them tells which need most.
    """
    data, collate = loader.dataset, loader.collate_fn
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        return None
    rows = min(rows, len(data))
    if rows == 0:
        return None
    lengths = row_lengths(data)
    if not lengths:
        why = f"the first {rows} of {len(data)} rows: they have no input_ids, so that none is known to be the longest"
        return Longest(_collated(collate, data, range(rows)), rows, None, why)
    chosen = longest_rows(lengths, rows)
    column = lengths["input_ids"]
    tokens, batch = max(column[number] for number in chosen), _collated(collate, data, chosen)
    if rows > 1 and _is_unpadded(batch):  # attention needs more where it needs a mask
        shorter = max((number for number in range(len(column)) if column[number] < tokens), key=column.__getitem__, default=None)
        batch = batch if shorter is None else _collated(collate, data, [*chosen[:-1], shorter])
    return Longest(batch, rows, tokens, f"the longest {rows} of {len(data)} rows")


def _is_unpadded(batch: Any) -> bool:
    mask = batch.get("attention_mask") if hasattr(batch, "get") else None
    return mask is not None and bool((mask != 0).all())


def longest_rows(lengths: dict[str, Sequence[int]], count: int) -> list[int]:
    """Indices of `count` rows: the longest of each column first, then those with the largest sum."""
    columns = list(lengths.values())
    total = [sum(each) for each in zip(*columns)]
    by_total = sorted(range(len(total)), key=lambda number: -total[number])
    peaks = [by_total[0], *(max(range(len(column)), key=column.__getitem__) for column in columns)]
    return list(dict.fromkeys([*peaks, *by_total]))[:count]


def row_lengths(data: Any) -> dict[str, list[int]]:
    """Tokens of every row, by column; {} where the first row has no list of input_ids."""
    first = data[0]
    if not hasattr(first, "keys"):
        return {}
    columns = [name for name in LENGTH_COLUMNS if name in first and _length(first[name]) is not None]
    if "input_ids" not in columns:
        return {}
    if (stored := _stored_lengths(data, columns)) is not None:
        return stored
    found: dict[str, list[int]] = {name: [] for name in columns}
    for number in _progress(range(len(data)), len(data)):
        row = data[number]
        for name in columns:
            found[name].append(_length(row[name]) or 0)
    return found


def _stored_lengths(data: Any, columns: list[str]) -> dict[str, list[int]] | None:
    """Of a data set in Arrow's format, without making lists of its tokens; None for others, and where rows are made as they are read."""
    if not hasattr(data, "with_format") or data.format["type"] == "custom":
        return None
    import pyarrow.compute

    found: dict[str, list[int]] = {name: [] for name in columns}
    parts = data.select_columns(columns).with_format("arrow").iter(batch_size=_AT_A_TIME)
    for part in _progress(parts, -(-len(data) // _AT_A_TIME), from_count=20):
        for name in columns:
            found[name] += [n or 0 for n in pyarrow.compute.list_value_length(part[name]).to_pylist()]
    return found


def _length(value: Any) -> int | None:
    return len(value) if hasattr(value, "__len__") and not isinstance(value, (str, bytes)) else None


def _collated(collate: Callable, data: Any, numbers) -> dict[str, Any]:
    return collate([data[number] for number in numbers])


def _progress(items, total: int, from_count: int = _SHOW_PROGRESS_FROM):
    if total < from_count:
        return items
    from rich.progress import track

    return track(items, description="looking for the longest rows", total=total, transient=True)
