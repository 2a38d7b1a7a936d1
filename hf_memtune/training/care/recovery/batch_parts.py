"""A micro-batch cut into parts of fewer rows, and what the loss of a part has to be multiplied by so that the parts add up.

Shape legend: B rows of a micro-batch, T tokens in a row.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_memtune.core.loss import IGNORED
from hf_memtune.methods.seeking.targets import LABEL_NAMES

_MAIN_INPUTS = ("input_ids", "inputs_embeds", "labels", "pixel_values")
_LENGTHS_OF_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "max_length_q")


def row_count(inputs: Mapping[str, Any]) -> int | None:
    """B, or None where the inputs do not tell, or are no mapping: some trainers are given rows that they have yet to collate."""
    if not isinstance(inputs, Mapping):
        return None
    for name in _MAIN_INPUTS:
        if isinstance(value := inputs.get(name), Tensor) and value.dim():
            return len(value)
    return None


def why_not_cut(inputs: Mapping[str, Any]) -> str | None:
    """What makes these inputs one piece, or None: cutting between rows changes nothing else."""
    rows = row_count(inputs)
    if rows is None:
        names = ", ".join(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        return f"its inputs ({names}) do not tell how many rows they have"
    if rows == 1:
        return "it has one row"
    if packed := [name for name in _LENGTHS_OF_PACKED if inputs.get(name) is not None]:
        return f"its rows are packed ({', '.join(packed)} tell where each ends)"
    odd = [name for name, value in inputs.items() if not _is_cut(value, rows) and not _is_shared(name, value)]
    if odd:
        return f"{', '.join(odd)} have not one entry for each of its {rows} rows"
    return None


def parts_of(inputs: Mapping[str, Any], rows_at_most: int) -> list[dict[str, Any]]:
    """The rows in order, `rows_at_most` at a time, padded as they are. What is one for all rows is in every part."""
    rows = row_count(inputs)
    return [
        {name: value[start : start + rows_at_most] if _is_cut(value, rows) else value for name, value in inputs.items()}
        for start in range(0, rows, rows_at_most)
    ]


def _is_cut(value: Any, rows: int) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0 and len(value) == rows
    return isinstance(value, (list, tuple)) and len(value) == rows


def _is_shared(name: str, value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 or len(value) == 1  # one row of positions for all
    return not isinstance(value, (list, tuple))


def shares(inputs: Mapping[str, Any], parts: list[dict[str, Any]], shifted: bool) -> list[float]:
    """Each part's share of what a mean loss is over: labels that count, or rows. They add up to 1.

    shifted: whether the first label of a row is not predicted.
    """
    counts = [_counted(part, shifted) for part in parts]
    total = _counted(inputs, shifted)
    return [count / total if total else 1 / len(parts) for count in counts]


def _counted(inputs: Mapping[str, Any], shifted: bool) -> int:
    labels = inputs.get("shift_labels")
    if labels is None and (labels := inputs.get("labels")) is not None and shifted and labels.dim() > 1:
        labels = labels[..., 1:]
    if isinstance(labels, Tensor):
        return int((labels != IGNORED).sum())
    return row_count(inputs)


def leaves_out_answers(inputs: Mapping[str, Any]) -> bool:
    """Whether answers of question answering lie outside of their row: its two means leave them out, each for itself."""
    if inputs.get("labels") is not None or not isinstance(inputs.get("input_ids"), Tensor):
        return False
    length = inputs["input_ids"].shape[1]
    ends = [inputs[name] for name in LABEL_NAMES if isinstance(inputs.get(name), Tensor)]
    return any(bool((end >= length).any() or (end < 0).any()) for end in ends)
