"""Which tokens of each instance are kept.

Shape legend: B rows of a batch, T tokens in a row (padding included), S width of the widest selection.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_memtune._compat import is_fake

_ROUNDING_SLACK = 1e-9  # 0.1 * 30 is 3.0000000000000004 in binary: without slack it would round up to 4


def budget(real_tokens: int, ratio: float) -> int:
    """Tokens to keep of a row with `real_tokens` tokens: the fraction `ratio` of them, rounded up, at least 1."""
    return max(1, math.ceil(ratio * real_tokens - _ROUNDING_SLACK))


@dataclass(frozen=True)
class Selection:
    """The kept tokens of a batch.

    index: (B, S) int64, positions in ascending order, distinct within a row.
    valid: (B, S) bool. Rows that keep fewer tokens than the widest are filled up with further distinct positions, marked
        False: they run through the model to make the batch rectangular, and nothing of them is used or learned from.
    counts: tokens kept, a Python number for each row.
    length: T.
    weight: (B, S) float32, one over the probability with which each kept token was drawn (`sampling.sample`), finite, and 1 at
        fillers; None, where tokens were not drawn but chosen, stands for 1 everywhere.
    """

    index: Tensor
    valid: Tensor
    counts: tuple[int, ...]
    length: int
    weight: Tensor | None = None

    @property
    def width(self) -> int:
        return self.index.shape[1]

    @property
    def is_ragged(self) -> bool:
        return min(self.counts) < self.width

    def kept_mask(self) -> Tensor:
        """(B, T) bool, True where a token is kept."""
        mask = torch.zeros(self.index.shape[0], self.length, dtype=torch.bool, device=self.index.device)
        return mask.scatter(1, self.index, self.valid)

    def gather(self, values: Tensor, fill: float | None = None) -> Tensor:
        """Take the selected entries of `values` (B or 1, T, ...): (B, S, ...). Fillers read `fill` where it is given."""
        if values.shape[0] == 1 and self.index.shape[0] != 1:
            values = values.expand(self.index.shape[0], *values.shape[1:])
        index = self.index.reshape(*self.index.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
        taken = values.gather(1, index)
        if fill is None or not self.is_ragged:
            return taken
        return taken.masked_fill(~self.valid.reshape(*self.valid.shape, *[1] * (values.dim() - 2)), fill)


def select(
    scores: Tensor,
    ratio: float,
    real: Tensor | None = None,
    candidates: Tensor | None = None,
    forced: Tensor | None = None,
) -> Selection:
    """Keep the best-scored tokens of each row (TokenSeek, section 3: the top r of each instance).

    scores: (B, T), larger is kept. ratio: fraction of the real tokens of the row, rounded up, at least 1.
    real: (B, T) bool, False at padding; None means that every token is real.
    candidates: (B, T) bool, the tokens that may be chosen (a row without any chooses among its real ones); None: all real.
    forced: (B, T) bool, kept whatever their score. They count towards the budget, and enlarge it if they alone exceed it.
    """
    rows, length = scores.shape
    counts = kept_counts(rows, length, ratio, real, candidates, forced)
    tier = torch.zeros_like(scores, dtype=torch.int8)
    if real is not None:
        tier += real.to(torch.int8)
    if candidates is not None:
        allowed = candidates if real is None else candidates & real
        tier += allowed.to(torch.int8)
    if forced is not None:
        tier = tier.masked_fill(forced, 4)
    order = scores.argsort(dim=1, descending=True, stable=True)
    if any(mask is not None for mask in (real, candidates, forced)):
        order = order.gather(1, tier.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return first_of(order, counts)


def first_of(order: Tensor, counts: list[int]) -> Selection:
    """Keep the first `counts[b]` tokens of row b of `order`, (B, T) int64, its rows permutations; the next ones are fillers."""
    kept = torch.tensor(counts, device=order.device)[:, None]
    index, position = order[:, : max(counts)].sort(dim=1)
    return Selection(index, position < kept, tuple(counts), order.shape[1])


def _most_counts(rows: int, most: int, real: Tensor | None, forced: Tensor | None, beside_forced: int) -> list[int]:
    """Of traced masks, which have no values: the first row is as long as the batch, the others are one token shorter if there is padding."""
    most = max(most, (2 if forced is not None else 0) + beside_forced)
    return [most] + [most if real is None else max(1, most - 1)] * (rows - 1)


def kept_counts(
    rows: int,
    length: int,
    ratio: float,
    real: Tensor | None,
    candidates: Tensor | None,
    forced: Tensor | None,
    beside_forced: int = 0,
) -> list[int]:
    """Tokens to keep of each row; masks as in `select`. All sums come from the device in one transfer: each makes a GPU wait.

    beside_forced: where other tokens are eligible, keep at least so many of them, whatever the forced ones leave of the budget.
    """
    given = [mask for mask in (real, candidates, forced) if mask is not None]
    if not given:
        return [budget(length, ratio)] * rows
    if is_fake(given[0]):
        return _most_counts(rows, budget(length, ratio), real, forced, beside_forced)
    everything = torch.ones_like(given[0])
    real = everything if real is None else real
    allowed = real if candidates is None else candidates & real
    forced = ~everything if forced is None else forced
    sums = torch.stack([real.sum(1), allowed.sum(1), forced.sum(1), (forced & ~allowed).sum(1)])
    return [
        max(min(budget(tokens, ratio), union) if eligible else 1, min(required + beside_forced, union), 1)
        for tokens, eligible, required, outside in zip(*sums.tolist())
        for union in [eligible + outside]  # candidates and forced tokens together
    ]
