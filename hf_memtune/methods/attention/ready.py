"""Masks that a model makes outside of its body, of all tokens at once: models with images, whose tokens see one another both ways.

Shape legend: B rows of a batch or 1, T tokens in a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_memtune._compat import is_fake
from hf_memtune.errors import MemTuneError


def visible(mask: Tensor) -> Tensor:
    """(B, 1, T, T) bool, True where a query may look, of a mask of that kind or one that is added."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def require_visibility(mask: Tensor, name: str) -> None:
    """Refuse a mask that is more than who may look at whom. Raises MemTuneError.

    One mask for all heads, of booleans, or of numbers that are added: 0, or so low that nothing is seen.
    """
    wrong = None
    if mask.dim() != 4 or mask.shape[1] != 1:
        wrong = f"got the shape {tuple(mask.shape)}, of which there is one for each head"
    elif mask.requires_grad:
        wrong = "got a mask that requires a gradient, which would be lost"
    elif mask.dtype != torch.bool and not is_fake(mask) and not bool(((mask == 0) | ~visible(mask)).all()):
        wrong = "got numbers to be added to the scores that are neither 0 nor the lowest"
    if wrong is not None:
        raise MemTuneError(
            f"{name}: {wrong}; passes over a part of the tokens read of a mask with 4 dimensions only who may look at whom. Expected (batch, 1, "
            "tokens, tokens), of booleans, or of 0 and the lowest number. For other biases train with activation checkpointing alone."
        )


def rule_of(mask: Tensor) -> Callable:
    """The mask as an index-based rule, as transformers has them: rule(batch, head, query, key)."""

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        batch = batch if mask.shape[0] > 1 else torch.zeros_like(batch)
        head = head if mask.shape[1] > 1 else torch.zeros_like(head)
        return visible(mask[batch, head, query, key])  # of what is asked for alone: all of it, in every chunk, would be all tokens squared

    return rule


def may_begin(mask: Tensor) -> Tensor:
    """(T,) bool: the tokens that none before them looks at, nor beyond."""
    seen = visible(mask).flatten(0, 1).any(0)
    furthest = torch.where(seen, torch.arange(seen.shape[1], device=seen.device), -1).amax(1).cummax(0).values
    return torch.cat([torch.ones_like(seen[0, :1]), furthest[:-1] < torch.arange(1, len(seen), device=seen.device)])
