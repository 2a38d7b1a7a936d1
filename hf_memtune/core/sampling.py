"""Tokens drawn by chance, so that what is learned from the few is an unbiased estimate of what all would teach.

Keeping the best-scored tokens alone makes the gradient another one than that of all tokens, however often one averages. Here
a higher score makes a token more likely, none impossible, and a kept token counts for the others that might have been drawn:
with pi_j the probability that token j is kept and f_j anything of token j,

    E[ sum_{j kept} f_j / pi_j ] = sum_j f_j          (Horvitz & Thompson 1952, J. Amer. Statist. Assoc. 47:663).

Shape legend: B rows of a batch, T tokens in a row (padding included).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_memtune.core.selection import Selection, first_of, kept_counts

# Probabilities are counted in units of 2**-32: in integers the probabilities of a row sum to its number of draws exactly, so
# that no rounding lets one draw more or fewer through; and weights are those of the probabilities really drawn with.
CERTAIN = 2**32


@dataclass(frozen=True)
class Draw:
    """How scores become probabilities, and probabilities weights.

    floor: the share, in (0, 1], of the even distribution in that of a single draw. by_size: probabilities are proportional to the magnitude of
    scores, whatever their sign, not to their place between the lowest and the highest of the row: with magnitudes of gradients, the variance
    of the estimated sum is the least there is (but for the floor).
    cap: most that a weight may be, which biases the estimate towards tokens with smaller weights, and bounds its noise; None: any.
    """

    floor: float = 0.5
    by_size: bool = False
    cap: float | None = None


HALF = Draw()


def sample(
    scores: Tensor,
    ratio: float,
    real: Tensor | None = None,
    candidates: Tensor | None = None,
    forced: Tensor | None = None,
    how: Draw = HALF,
) -> Selection:
    """Draw tokens of each row without replacement, a fixed number, the likelier the larger their score, and weigh them.

    Arguments, budget and fillers are those of `select`, with scores of any real dtype. sum_kept weight_j f_j is an unbiased
    estimate of the sum of f over all eligible tokens: candidates and forced ones (in a row without either, its real ones).

    forced tokens are kept with certainty, at weight 1. Where they alone fill the budget and other tokens are eligible, one of
    those is drawn beyond it: left out for good, they would bias the estimate.
    Unless `how` is by size, only the place of a score between lowest and highest of the row counts, and -inf makes a token as unlikely as a
    score can. NaN always does, and +inf makes it as likely; what must never be drawn is left out of `candidates`.
    torch's generator of the device of the scores draws one number a row.

    With k draws from n tokens no weight exceeds n / (k floor) (but by the 2**-32 that probabilities are rounded to): with a floor of 1/2
    2 / ratio at most without forced tokens, and 2 n in a row that falls back on its real ones. At ratio 1 all weights are 1.
    """
    counts, units = _planned(scores, ratio, real, candidates, forced, how)
    taken = systematic(units)
    priority = 2 * taken.to(torch.int8) + (0 if real is None else real.to(torch.int8))
    chosen = first_of(priority.argsort(dim=1, descending=True, stable=True), counts)
    weight = (CERTAIN / units.gather(1, chosen.index).double()).clamp(max=torch.inf if how.cap is None else how.cap)
    return replace(chosen, weight=weight.float().masked_fill(~chosen.valid, 1))


def probabilities(
    scores: Tensor,
    ratio: float,
    real: Tensor | None = None,
    candidates: Tensor | None = None,
    forced: Tensor | None = None,
    how: Draw = HALF,
) -> Tensor:
    """The probability with which `sample` keeps each token, (B, T) float64: what it draws with, and one over its weights (but for a cap).

    Arguments are those of `sample`. Each row sums to the number of tokens it keeps. 0 at padding and at what is not eligible.
    """
    return _planned(scores, ratio, real, candidates, forced, how)[1].double() / CERTAIN


def _planned(
    scores: Tensor, ratio: float, real: Tensor | None, candidates: Tensor | None, forced: Tensor | None, how: Draw
) -> tuple[list[int], Tensor]:
    """Tokens to keep of each row, and probabilities that sum to them, (B, T) int64 in units of 1 / CERTAIN."""
    rows, length = scores.shape
    counts = kept_counts(rows, length, ratio, real, candidates, forced, beside_forced=1)
    forced = torch.zeros_like(scores, dtype=torch.bool) if forced is None else forced
    pool = _drawn_from(scores, real, candidates) & ~forced
    draws = torch.tensor(counts, device=scores.device)[:, None] - forced.sum(1, keepdim=True)
    shares = inclusion_probability(base_probability(scores, pool, how), draws)
    return counts, in_units(shares, pool, draws).masked_fill(forced, CERTAIN)


def _drawn_from(scores: Tensor, real: Tensor | None, candidates: Tensor | None) -> Tensor:
    """(B, T) bool: the candidates of each row, or where there are none its real tokens, or where there are none all of them."""
    everything = torch.ones_like(scores, dtype=torch.bool)
    real = everything if real is None else torch.where(real.any(1, keepdim=True), real, everything)
    if candidates is None:
        return real
    allowed = candidates & real
    return torch.where(allowed.any(1, keepdim=True), allowed, real)


def base_probability(scores: Tensor, pool: Tensor, how: Draw = HALF) -> Tensor:
    """Probability of each token in a single draw, (B, T) float64, 0 outside `pool`, (B, T) bool: a part by score, a part evenly,

        p_j = a * 1/n + (1 - a) * s_j / sum_i s_i,    a the floor, s_j the score's size, or its place in [0, 1] between lowest and highest.

    The even part is the defensive part of the mixture (Hesterberg 1995, Technometrics 37:185, "Weighted average importance
    sampling and defensive mixture distributions"). By score alone, 1 / p_j has no bound, and one unlikely token with a large
    gradient would outweigh the rest of the batch: the variance is bounded by nothing. With it p_j >= a / n, and scores
    however wrong cost at most 1 / a times the weight of even draws (and, were the draws independent, 1 / a times the second moment).
    """
    share = _size(scores, pool) if how.by_size else _place(scores, pool)
    total = share.sum(1, keepdim=True)
    even = pool / pool.sum(1, keepdim=True).clamp_min(1).double()
    return torch.where(total > 0, how.floor * even + (1 - how.floor) * share / total, even)


def _size(scores: Tensor, pool: Tensor) -> Tensor:
    """Magnitudes of the scores of the tokens of `pool`, float64, relative to the largest of their row; 0 outside, and for NaN."""
    work = scores.double().abs().nan_to_num(nan=0, posinf=torch.inf).masked_fill(~pool, 0)
    largest = work.amax(1, keepdim=True)
    return torch.where(largest.isinf(), work.isinf().double(), work / largest.clamp_min(torch.finfo(work.dtype).tiny))


def _place(scores: Tensor, pool: Tensor) -> Tensor:
    """Scores of the tokens of `pool` mapped to [0, 1] row by row, float64; 1/2 where all are equal; 0 outside."""
    work = scores.double() / 2  # halves: the difference of two float64 may overflow
    finite = pool & work.isfinite()
    lowest = work.masked_fill(~finite, torch.inf).amin(1, keepdim=True)
    highest = work.masked_fill(~finite, -torch.inf).amax(1, keepdim=True)
    place = torch.where(highest > lowest, (work - lowest) / (highest - lowest), 0.5)
    return torch.where(finite, place, (pool & (work == torch.inf)).double())


def inclusion_probability(base: Tensor, draws: Tensor) -> Tensor:
    """pi_j = min(1, c p_j) with c such that each row sums to its `draws` k, (B, 1) int64: (B, T) float64, as is `base`.

    Whichever i most likely tokens are certain, the others share k - i, in proportion to p: c = (k - i) / (sum of their p).
    This grows with i as long as the next token too would be certain, and falls from there on; so c is its maximum over i, and
    no iteration is needed. c >= k, at i = 0, hence pi_j >= min(1, k p_j).
    """
    shared = base.sort(dim=1).values.cumsum(1)  # by the tokens up to here, in ascending order; those behind are certain
    behind = torch.arange(base.shape[1] - 1, -1, -1, device=base.device)
    scale = ((draws - behind) / shared.clamp_min(torch.finfo(base.dtype).tiny)).amax(1, keepdim=True)
    return (scale * base).clamp(max=1)


def in_units(probability: Tensor, pool: Tensor, draws: Tensor) -> Tensor:
    """Probabilities as (B, T) int64 multiples of 1 / CERTAIN whose rows sum to `draws` exactly.

    What rounding lost or won, at most half a unit a token, is made up one unit a token. Certain tokens stay certain.
    """
    units = (probability * CERTAIN).round().long()
    adjustable = pool & (units < CERTAIN)
    missing = draws * CERTAIN - units.sum(1, keepdim=True)
    return units + missing.sign() * (adjustable & (adjustable.cumsum(1) <= missing.abs()))


def systematic(units: Tensor) -> Tensor:
    """Systematic sampling with unequal probabilities (Madow 1949, Ann. Math. Statist. 20:333): (B, T) bool, True where taken.

    Laid end to end in token order, the probabilities cover a row of unit intervals; points one unit apart, with one start by
    chance, take the tokens they fall on. None is longer than a unit, so none is hit twice, and each row gives as many tokens
    as its probabilities sum to. The tokens are spread along the row, whose neighbours resemble each other: as a rule that
    makes the estimate better than independent draws would. Neighbours may exclude each other; that biases no sum of tokens.
    """
    start = torch.randint(CERTAIN, (units.shape[0], 1), device=units.device)
    points = (units.cumsum(1) + start) // CERTAIN
    return points.diff(dim=1, prepend=torch.zeros_like(start)) > 0
