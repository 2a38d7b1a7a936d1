"""Positions of the tokens of a row, as the model itself would number them.

Shape legend: B rows of a batch, T tokens in a row (padding included).
"""

import torch
from torch import Tensor

from hf_memtune.architectures import tables
from hf_memtune.architectures.describe import Architecture
from hf_memtune.errors import UnsupportedModelError


def token_positions(architecture: Architecture, input_ids: Tensor | None, attention_mask: Tensor | None, like: Tensor) -> Tensor:
    """(B or 1, T) int64 positions. `like` is any tensor (B, T, ...) of the row, for shape and device."""
    length, rule = like.shape[1], architecture.position_rule
    row = torch.arange(length, device=like.device)[None]
    if rule == "attention_mask" and attention_mask is not None:
        mask = attention_mask.long()
        return mask.cumsum(1) * mask - 1
    if rule == "padding_idx":
        padding = architecture.head_model.config.pad_token_id
        if input_ids is None:
            return row + padding + 1
        real = (input_ids != padding).long()
        return real.cumsum(1) * real + padding
    return row


def check_rope(architecture: Architecture, length: int) -> None:
    """Refuse rows on which rotary frequencies would differ between a pass over all tokens and one over some of them."""
    config = architecture.base.config
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    trained = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
    changing = sorted(kinds & set(tables.LENGTH_DEPENDENT_ROPE))
    if changing and trained and length > trained:
        raise UnsupportedModelError(
            f"{architecture.name} uses {changing[0]} rotary embeddings, which change their frequencies past {trained} tokens, and "
            f"the batch has {length}: a part of the tokens would be rotated differently from the rest. Shorten the rows to {trained}, or train whole rows with "
            "activation checkpointing (--activation_checkpointing --checkpoint_levels 2)."
        )
