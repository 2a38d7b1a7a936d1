"""One training instance as a token map: plain data, its counts, and the visible form of a token."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

from hf_memtune.visualization.decision import Decision

LEFT_OUT = {"probability": "tokens were not drawn by chance", "label_probability": "losses are not multiplied by it"}


@dataclass(frozen=True)
class TokenMap:
    """One training instance of n tokens. Values are copied into plain str, float and bool.

    title: shown above the instance.
    tokens: n decoded pieces, so that ``"".join(tokens)`` is the text.
    scores: scorer name -> n numbers; "context", "gradient" and "combined" are explained to the
        reader, any other name is shown as it is. A value that is not finite means "no score".
    kept: n flags, the token was selected for backpropagation.
    labelled: n flags, the token carries a training label (it is not masked out of the loss).
    probability: n numbers in [0, 1], with which each token is kept, where tokens are drawn by chance; None where they are not. One over it
        is what a kept token counts for in the loss, unless the decision has a cap, or `label_probability` is given.
    label_probability: n numbers in [0, 1], the probability that the model gives the label of each, where the loss of a kept token is multiplied
        by it (token_weight=dft), 1 where there is none; None where it is not.
    decision: how the tokens were chosen, for the page to say; None leaves it unsaid.

    Raises ValueError that lists every problem of the arguments at once.
    """

    title: str
    tokens: list[str]
    scores: dict[str, list[float]]
    kept: list[bool]
    labelled: list[bool]
    probability: list[float] | None = None
    decision: Decision | None = None
    label_probability: list[float] | None = None

    def weight_of(self, i: int) -> float | None:
        """What token i counts for in the loss, if it is kept; None where it never is."""
        drawn = 1.0
        if self.probability is not None:
            if not self.probability[i]:
                return None
            drawn, cap = 1 / self.probability[i], None if self.decision is None else self.decision.cap
            drawn = drawn if cap is None else min(drawn, cap)
        return drawn if self.label_probability is None else drawn * self.label_probability[i]

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            listed = "".join(f"\n  - {problem}" for problem in problems)
            raise ValueError(f"TokenMap {self.title!r} has {len(problems)} problem(s):{listed}")
        scores = {name: [float(v) for v in values] for name, values in self.scores.items()}
        object.__setattr__(self, "tokens", list(self.tokens))
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "kept", [bool(v) for v in self.kept])
        object.__setattr__(self, "labelled", [bool(v) for v in self.labelled])
        for name, values in self.chances.items():
            object.__setattr__(self, name, [float(v) for v in values])

    @property
    def chances(self) -> dict[str, list[float]]:
        """The columns of probabilities that are given, by their names."""
        named = {"probability": self.probability, "label_probability": self.label_probability}
        return {name: values for name, values in named.items() if values is not None}


def _problems(token_map: TokenMap) -> list[str]:
    """Every fault of the arguments, each as: where, got, expected, what to do."""
    n, found = len(token_map.tokens), []
    if n == 0:
        found.append("tokens: got none, expected at least one; drop empty instances")
    wrong = [i for i, token in enumerate(token_map.tokens) if not isinstance(token, str)]
    if wrong:
        kind = type(token_map.tokens[wrong[0]]).__name__
        found.append(f"tokens[{wrong[0]}]: got {kind}, expected str; decode the ids first")
    if not token_map.scores:
        found.append("scores: got none, expected at least one name; pass {'combined': [...]}")
    columns = {f"scores[{name!r}]": values for name, values in token_map.scores.items()}
    columns |= {"kept": token_map.kept, "labelled": token_map.labelled}
    columns |= token_map.chances
    for where, values in columns.items():
        if len(values) != n:
            got = f"got {len(values)} values, expected {n} (one per token)"
            found.append(f"{where}: {got}; cut padding from all of them alike")
        found += _value_problem(where, values)
    return found or _impossible(token_map)


def _impossible(token_map: TokenMap) -> list[str]:
    """Kept tokens that could not be."""
    chances = token_map.probability or []
    wrong = [i for i, (p, kept) in enumerate(zip(chances, token_map.kept)) if kept and p == 0]
    remedy = "expected more than 0, since the token was kept; pass the probabilities of the draw that kept it"
    return [f"probability[{wrong[0]}]: got 0, {remedy}"] if wrong else []


def _value_problem(where: str, values) -> list[str]:
    if where in ("kept", "labelled"):
        wrong = [v for v in values if v not in (True, False)]
        remedy = "expected True or False per token; pass a mask, not positions or label ids"
    elif where in LEFT_OUT:
        wrong = [v for v in values if isinstance(v, str) or not hasattr(v, "__float__") or not 0 <= float(v) <= 1]
        remedy = f"expected a number in [0, 1] per token; leave it out where {LEFT_OUT[where]}"
    else:
        wrong = [v for v in values if isinstance(v, str) or not hasattr(v, "__float__")]
        remedy = "expected a number per token; use float('nan') where there is no score"
    return [f"{where}: got {wrong[0]!r}, {remedy}"] if wrong else []


class Counts(NamedTuple):
    """Numbers of tokens of one or of several maps."""

    tokens: int
    kept: int
    labelled: int
    kept_labelled: int


def count(maps: list[TokenMap]) -> Counts:
    """Count tokens, kept, labelled, and tokens that are both, over all maps together."""
    pairs = [pair for m in maps for pair in zip(m.kept, m.labelled, strict=True)]
    kept, labelled = sum(k for k, _ in pairs), sum(lab for _, lab in pairs)
    return Counts(len(pairs), kept, labelled, sum(k and lab for k, lab in pairs))


def percent(part: float, whole: float) -> str:
    """``part`` of ``whole`` as text with one decimal, "n/a" when there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "n/a"


def weights_in_words(token_map: TokenMap) -> str:
    """The least and the most that a token which may be kept counts for in the loss, if it is; "n/a" where none may be."""
    weights = [weight for i in range(len(token_map.tokens)) if (weight := token_map.weight_of(i)) is not None]
    return " to ".join(dict.fromkeys(f"{weight:.4g}" for weight in (min(weights), max(weights)))) if weights else "n/a"


def runs(flags: list[bool]) -> list[tuple[int, int]]:
    """The [start, stop) stretches of true flags, in order."""
    padded = [False, *flags, False]
    edges = [i for i in range(len(flags) + 1) if padded[i] != padded[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def visible(token: str) -> tuple[str, str, str]:
    """Split a token into (plain leading spaces, visible text, line breaks that follow it).

    A newline shows as ⏎ and still breaks the line; spaces that stand alone show as ␣, a tab as →,
    and other characters without a shape as their code point.
    """
    body = token.replace("\r\n", "\n").lstrip(" ")
    lead, body = (" " * (len(token) - len(token.lstrip(" "))), body) if body else ("", token)
    if not body.strip(" "):
        return "", "␣" * len(body) or "∅", ""
    shown = "".join(_visible_character(character) for character in body)
    text = shown.rstrip("\n")
    return lead, text, shown[len(text) :]


def _visible_character(character: str) -> str:
    if character in "\n\t":
        return {"\n": "⏎\n", "\t": "→\t"}[character]
    shapeless = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return f"‹U+{ord(character):04X}›" if shapeless else character
