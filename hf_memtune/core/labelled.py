"""The tokens that carry a label, taken out of a batch and put back. Shape legend: B rows, T tokens in a row, N labelled tokens.

Traced tensors have no values: of them every token counts as labelled, which is the most there can be, and what is made in memory meanwhile
is what would be made of real ones.
"""

import torch
from torch import Tensor

from hf_memtune._compat import is_fake


def take_labelled(values: Tensor, labelled: Tensor) -> Tensor:
    """(B, T, ...) to (N, ...): the tokens where `labelled` (B, T) bool."""
    return values[_places(labelled)]


def put_labelled(flat: Tensor, labelled: Tensor, into: Tensor) -> Tensor:
    """`into` (B, T, ...) itself, in which the labelled tokens are now those of `flat` (N, ...)."""
    into[_places(labelled)] = flat
    return into


def _places(labelled: Tensor) -> Tensor | tuple[Tensor, ...]:
    if not is_fake(labelled):
        return labelled
    return torch.zeros(labelled.numel(), 2, dtype=torch.long, device=labelled.device).unbind(1)
