"""Tokens that are kept whatever their score.

Shape legend: B rows of a batch, T tokens in a row.
"""

import torch
from torch import Tensor

from hf_memtune.architectures import Architecture, Task
from hf_memtune.methods.attention.spans import Rows


def forced_tokens(
    architecture: Architecture,
    rows: Rows,
    first_last: bool,
    is_causal: bool,
    input_ids: Tensor | None,
    labels: dict[str, Tensor],
) -> Tensor | None:
    """(B, T) bool: tokens the head cannot do without, and the first and last real ones if wanted; None where there are none.

    A classification head reads one pooled position, a question-answering head is trained on a start and an end.
    """
    positions = torch.arange(rows.length, device=rows.positions.device)
    masks = [_ends(rows, positions)] if first_last else []
    if architecture.task is Task.QUESTION_ANSWERING:
        masks += [positions == labels[k].reshape(-1, 1) for k in ("start_positions", "end_positions") if k in labels]
    if architecture.task is Task.SEQUENCE_CLASSIFICATION:
        padding = architecture.head_model.config.get_text_config().pad_token_id
        masks.append(positions == _pooled_position(rows, positions, is_causal, padding, input_ids)[:, None])
    return torch.stack(masks).any(0) if masks else None


def _ends(rows: Rows, positions: Tensor) -> Tensor:
    """The first and the last real token of each row."""
    shape = (rows.batch, rows.length)
    real = rows.scored if rows.scored is not None else torch.ones(shape, dtype=torch.bool, device=positions.device)
    first = torch.where(real, positions, rows.length).amin(1, keepdim=True)
    last = (real * positions).amax(1, keepdim=True)
    return real & ((positions == first) | (positions == last))


def _pooled_position(rows: Rows, positions: Tensor, is_causal: bool, padding: int | None, ids: Tensor | None) -> Tensor:
    """(B,) int64: causal models are read at the last token that is not the padding token, others at the first token."""
    first = torch.zeros(rows.batch, dtype=torch.long, device=positions.device)
    if not is_causal:
        return first
    if ids is None or padding is None:
        return first + rows.length - 1
    return ((ids != padding) * positions).amax(1)
