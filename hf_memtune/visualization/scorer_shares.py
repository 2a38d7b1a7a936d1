"""What several scorers keep of a data set: shares of the kept tokens by position, by role and by class, and how far two scorers agree.

Sums over rows, a few dozen numbers however many rows there are. Each token counts with the probability with which it is kept: for the
highest scores that is 1 or 0, for draws it is what an average over all draws would count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from hf_memtune.visualization.token_class import CLASSES

BINS = 10
ALL, LABELLED = "all tokens", "with a label"  # beside the scorers, to compare with
ROLES = ("with a label (answer)", "without (prompt)")
PLACES = tuple(f"{100 * n // BINS} to {100 * (n + 1) // BINS} %" for n in range(BINS))
GROUPS = {"position": PLACES, "role": ROLES, "token class": tuple(CLASSES)}


@dataclass(frozen=True)
class ComparedRow:
    """One text of n real tokens. labelled: n flags. classes: n keys of CLASSES. chances: scorer -> n numbers in [0, 1], of being kept."""

    labelled: Sequence[bool]
    classes: Sequence[str]
    chances: dict[str, Sequence[float]]


class ScorerShares:
    """Filled row by row, by `add`. scorers: names, in the order in which they are shown."""

    def __init__(self, scorers: Sequence[str]):
        self.scorers = list(scorers)
        self.rows = 0
        self._sums = {who: {kind: dict.fromkeys(names, 0.0) for kind, names in GROUPS.items()} for who in (ALL, LABELLED, *scorers)}
        self._common = {pair: [0.0, 0.0] for pair in combinations(self.scorers, 2)}

    def add(self, row: ComparedRow) -> None:
        """Count one row. Raises ValueError for columns that are not all of one length."""
        n = len(row.labelled)
        lengths = {"classes": len(row.classes)} | {name: len(row.chances[name]) for name in self.scorers}
        if wrong := {name: length for name, length in lengths.items() if length != n}:
            raise ValueError(f"ScorerShares.add: got {wrong} values, expected {n}, one for each token; cut padding from all of them alike")
        self.rows += 1
        chances = {ALL: [1.0] * n, LABELLED: [float(flag) for flag in row.labelled]} | {name: row.chances[name] for name in self.scorers}
        for i in range(n):
            names = {"position": PLACES[BINS * i // n], "role": ROLES[not row.labelled[i]], "token class": row.classes[i]}
            for who, values in chances.items():
                for kind, name in names.items():
                    self._sums[who][kind][name] += values[i]
        for (one, other), common in self._common.items():
            pairs = list(zip(row.chances[one], row.chances[other]))
            common[0] += sum(map(min, pairs))
            common[1] += sum(map(max, pairs))

    def kept(self, who: str) -> float:
        """How many tokens: of a scorer, those it keeps, on average over draws."""
        return sum(self._sums[who]["role"].values())

    @property
    def columns(self) -> list[str]:
        """What there are shares of: all tokens, those with a label where some are without, and what each scorer keeps."""
        return [ALL, *([LABELLED] if 0 < self.kept(LABELLED) < self.kept(ALL) else []), *self.scorers]

    @property
    def kinds(self) -> list[str]:
        """Of GROUPS, those that divide these rows: without any label nothing is a prompt or an answer."""
        return [kind for kind in GROUPS if kind != "role" or self.kept(LABELLED)]

    def shares(self, who: str, kind: str) -> dict[str, float]:
        """Of the tokens of `who`, the share of each group of a kind; they sum to 1, or are all 0 where nothing is kept."""
        sums, whole = self._sums[who][kind], self.kept(who)
        return {name: value / whole if whole else 0.0 for name, value in sums.items()}

    def overlap(self, one: str, other: str) -> float:
        """Jaccard index of what two scorers keep, weighed by chance: sum of the lower chances over sum of the higher ones, in [0, 1]."""
        if one == other:
            return 1.0
        least, most = self._common[(one, other) if (one, other) in self._common else (other, one)]
        return least / most if most else 1.0

    def to_dict(self) -> dict[str, Any]:
        """All numbers of the page, as plain data."""
        return {
            "rows": self.rows,
            "tokens": {who: self.kept(who) for who in self.columns},
            "shares": {kind: {who: self.shares(who, kind) for who in self.columns} for kind in self.kinds},
            "overlap": {one: {other: self.overlap(one, other) for other in self.scorers} for one in self.scorers},
        }
