"""Masks that a model makes outside of its body, of all tokens at once: models with images, whose tokens see one another both ways.

Shape legend: B rows of a batch or 1, T tokens in a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def visible(mask: Tensor) -> Tensor:
    """(B, 1, T, T) bool, True where a query may look, of a mask of that kind or one that is added."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


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
