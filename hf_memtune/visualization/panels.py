"""The views of a token map that page and picture share: for each, its numbers, its colours and its axis."""

from __future__ import annotations

import math
from bisect import bisect_left
from statistics import median
from typing import NamedTuple

from hf_memtune.visualization.decision import EXPLANATIONS, Decision
from hf_memtune.visualization.token_map import TokenMap

LEVELS = 10  # colour steps: one per tenth of the tokens, so the darkest is "the best 10 %"
# RGB 0..255, told apart with the common forms of colour blindness (Okabe and Ito).
HUES = {"context": (0, 114, 178), "gradient": (213, 94, 0), "combined": (0, 158, 115)}
OTHER_HUE, CHANCE_HUE = (204, 121, 167), (230, 159, 0)
CHANCE = "how likely this token is to be kept: 0 never, 1 always"


class Panel(NamedTuple):
    """One view of n tokens. name, explained: its heading. hue: RGB. values: n numbers; strength: n of [0, 1], how deep the colour of
    each token is. axis: the numbers of the chart, n, and whether they are on a logarithmic scale; from_zero: whether it starts at 0."""

    name: str
    explained: str
    hue: tuple[int, int, int]
    values: list[float]
    strength: list[float]
    axis: tuple[list[float], bool]
    from_zero: bool = False

    @property
    def scale(self) -> str:
        """What a reader is to know of the axis: empty where it is linear."""
        if not self.axis[1]:
            return ""
        return "log scale, a score of 0 at its lower end" if 0 in self.values else "log scale"


def panels(token_map: TokenMap) -> list[Panel]:
    """The chance of being kept, where there is one; then the scores, the one that decided first."""
    found = [_score_panel(token_map, name) for name in score_names(token_map)]
    chances = token_map.probability
    if chances is None:
        return found
    strength = [chance_strength(p) for p in chances]
    return [Panel("chance of being kept", CHANCE, CHANCE_HUE, chances, strength, (chances, False), True), *found]


def _score_panel(token_map: TokenMap, name: str) -> Panel:
    values = token_map.scores[name]
    deciding = token_map.decision is not None and token_map.decision.scorer == name
    explained = EXPLANATIONS.get(name, "as named by the scorer") + ("; this score decided" if deciding else "")
    strength = [opacity(level) for level in colour_levels(values)]
    return Panel(f"{name} score", explained, HUES.get(name, OTHER_HUE), values, strength, axis_values(values))


def score_names(token_map: TokenMap) -> list[str]:
    """The score that decided first, then the others in the order in which they are explained, then those of one's own."""
    decision: Decision | None = token_map.decision
    first = [] if decision is None else [decision.scorer]
    return sorted(token_map.scores, key=lambda name: [*first, *EXPLANATIONS, name].index(name))


def colour_levels(values: list[float]) -> list[int | None]:
    """Colour step 0..LEVELS-1 of each token by rank; None where the score is not finite.

    By rank, because one attention sink holds most of the attention: on a linear scale it would
    take the whole range and all other tokens would look alike. Ties share the lower step.
    """
    ordered = sorted(v for v in values if math.isfinite(v))
    last = max(len(ordered) - 1, 1)
    step = [LEVELS * bisect_left(ordered, v) // last if math.isfinite(v) else None for v in values]
    return [s if s is None else min(s, LEVELS - 1) for s in step]


def opacity(level: int | None) -> float:
    """Strength 0..0.7 of the hue at a colour step; convex, so that the top tenths stand out."""
    return 0.7 * ((level or 0) / (LEVELS - 1)) ** 1.7


def chance_strength(p: float) -> float:
    """How deep the colour of a chance is: a step at 0, so that what is seldom kept is told from what never is."""
    return 0.15 + 0.7 * p if p else 0.0


def axis_values(values: list[float]) -> tuple[list[float], bool]:
    """The values to plot and whether the axis is logarithmic.

    Logarithmic for scores >= 0 whose largest is over 30 times the median: on a linear axis all
    but the largest would lie flat. Zeros are then drawn at the smallest positive score.
    """
    finite = [v for v in values if math.isfinite(v)]
    positive = [v for v in finite if v > 0]
    if not positive or min(finite) < 0 or max(positive) <= 30 * median(positive):
        return values, False
    return [min(positive) if v == 0 else v for v in values], True
