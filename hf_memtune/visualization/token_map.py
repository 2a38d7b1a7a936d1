"""One training instance as a token map, and a picture of it.

The first half is plain data: :class:`TokenMap`, its counts, the colour level of each token and
the visible form of a token. html.py draws the same things as a page. The second half draws the
picture with matplotlib's object interface, which leaves pyplot and rcParams alone.
"""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

from hf_memtune.files import whole

LEVELS = 10  # colour steps: one per tenth of the tokens, so the darkest is "the best 10 %"

EXPLANATIONS = {
    "context": "how much attention the other tokens pay to this token",
    "gradient": "how strongly the training loss reacts to this token",
    "combined": "the two together, weighted as set for this run",
}
# RGB 0..255, told apart with the common forms of colour blindness (Okabe and Ito).
HUES = {"context": (0, 114, 178), "gradient": (213, 94, 0), "combined": (0, 158, 115)}
OTHER_HUE = (204, 121, 167)


@dataclass(frozen=True)
class TokenMap:
    """One training instance of n tokens. Values are copied into plain str, float and bool.

    title: shown above the instance.
    tokens: n decoded pieces, so that ``"".join(tokens)`` is the text.
    scores: scorer name -> n numbers; "context", "gradient" and "combined" are explained to the
        reader, any other name is shown as it is. A value that is not finite means "no score".
    kept: n flags, the token was selected for backpropagation.
    labelled: n flags, the token carries a training label (it is not masked out of the loss).

    Raises ValueError that lists every problem of the arguments at once.
    """

    title: str
    tokens: list[str]
    scores: dict[str, list[float]]
    kept: list[bool]
    labelled: list[bool]

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
    for where, values in columns.items():
        if len(values) != n:
            got = f"got {len(values)} values, expected {n} (one per token)"
            found.append(f"{where}: {got}; cut padding from all of them alike")
        found += _value_problem(where, values)
    return found


def _value_problem(where: str, values) -> list[str]:
    if where in ("kept", "labelled"):
        wrong = [v for v in values if v not in (True, False)]
        remedy = "expected True or False per token; pass a mask, not positions or label ids"
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


def score_names(token_map: TokenMap) -> list[str]:
    """The three known scores first, in the order in which they are explained, then the others."""
    return sorted(token_map.scores, key=lambda name: [*EXPLANATIONS, name].index(name))


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


# The picture: all lengths in inches, measured from the top left corner.
WIDTH, MARGIN, GAP, DPI = 15.0, 0.35, 0.3, 120
FONT_POINTS, CELL, LINE = 9, 9.03 / DPI, 0.2  # at 120 dpi this monospaced cell is 9 pixels wide
HEADER, TITLE, CHART = 1.25, 0.75, 1.9
INK, MUTED = "#1b1f24", "#5b6470"
MISSING = "drawing needs matplotlib, which is not installed; run: pip install 'hf_memtune[viz]'"


def new_figure(width: float, height: float, facecolor: str = "white"):
    """A matplotlib Figure on an Agg canvas, sizes in inches; pyplot is not involved.

    Raises ImportError that names the extra to install when matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(MISSING) from error
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=facecolor)
    FigureCanvasAgg(figure)
    return figure


def write_token_map_png(maps: list[TokenMap], path: str | Path, settings: dict, *, max_tokens: int = 300) -> Path:
    """Draw the maps below each other into one PNG file and return its path.

    Each map shows its first three scores: the text (its first ``max_tokens`` tokens) coloured by
    rank, and below it all scores against position. ``settings`` (name -> value) is printed on
    top. Characters that the font lacks are drawn as a box.

    Raises ValueError for no maps or a picture taller than PNG viewers open; ImportError without
    matplotlib.
    """
    if not maps:
        raise ValueError("write_token_map_png: maps is empty, expected at least one TokenMap")
    names = [score_names(m)[:3] for m in maps]
    width = (WIDTH - 2 * MARGIN + GAP) / max(map(len, names)) - GAP
    placed = [place(m.tokens[:max_tokens], int(width / CELL)) for m in maps]
    heights = [TITLE + LINE * (cells[-1][2] + 3) + CHART for cells in placed]
    height = HEADER + sum(heights)
    if height * DPI > 65_000:
        raise ValueError(
            f"write_token_map_png: {len(maps)} maps need {height * DPI:.0f} pixels of height, "
            "expected at most 65000; pass fewer maps or a smaller max_tokens"
        )
    figure = new_figure(WIDTH, height)
    _draw_header(figure, settings)
    top = HEADER
    for token_map, shown, cells, used in zip(maps, names, placed, heights, strict=True):
        _draw_map(figure, token_map, shown, cells, (top, width, max_tokens))
        top += used
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        figure.savefig(partial, format="png")
    return path


def place(tokens: list[str], columns: int) -> list[tuple[int, str, int, int]]:
    """Wrap tokens into lines of ``columns`` cells: (token index, text, line, column) per piece."""
    pieces, line, column = [], 0, 0
    for index, token in enumerate(tokens):
        lead, body, breaks = visible(token)
        column += len(lead)
        for part_number, part in enumerate((body + breaks).replace("\t", " ").split("\n")):
            if part_number:
                line, column = line + 1, 0
            for start in range(0, len(part), columns):
                chunk = part[start : start + columns]
                if column + len(chunk) > columns:
                    line, column = line + 1, 0
                pieces.append((index, chunk, line, column))
                column += len(chunk)
    return pieces


def _draw_header(figure, settings: dict) -> None:
    key = (
        "Boxed, bold, underlined: kept token (learned from).   Dotted underline: carries a training "
        "label.   Deeper colour: higher rank in this text (deepest = the highest tenth)."
    )
    listed = "   ".join(f"{name}: {value}" for name, value in settings.items())
    _write(figure, 0.45, "Which tokens training keeps, and why", 17, INK, weight="bold")
    _write(figure, 0.8, key, 10.5, INK)
    _write(figure, 1.08, listed, 9.5, MUTED)


def _write(figure, inches_from_top: float, text: str, size: float, colour: str, **style) -> None:
    y = 1 - inches_from_top / figure.get_figheight()
    style |= {"fontsize": size, "color": colour, "parse_math": False, "family": "DejaVu Sans"}
    figure.text(MARGIN / WIDTH, y, _drawable(text), **style)


def _draw_map(figure, token_map: TokenMap, names: list[str], cells, frame) -> None:
    top, width, max_tokens = frame
    n, kept, labelled, both = count([token_map])
    numbers = (
        f"{n} tokens, {kept} kept ({percent(kept, n)}).   Carrying a label: "
        f"{percent(both, kept)} of the kept, {percent(labelled, n)} of all tokens."
    )
    if n > max_tokens:
        numbers += f"   Text: first {max_tokens} of {n} tokens; plots: all."
    _write(figure, top + 0.25, token_map.title, 13, INK, weight="bold")
    _write(figure, top + 0.5, numbers, 10.5, INK)
    lines = cells[-1][2] + 1
    for number, name in enumerate(names):
        left, full = MARGIN + number * (width + GAP), figure.get_figheight()

        def axes_at(offset, height, inset=0.0, left=left, full=full):
            low = full - top - offset - height
            box = ((left + inset) / WIDTH, low / full, (width - inset) / WIDTH, height / full)
            return figure.add_axes(box)

        _draw_text(axes_at(TITLE + LINE, lines * LINE), token_map, name, cells, width)
        _draw_chart(axes_at(TITLE + (lines + 2) * LINE, CHART - 0.6, 0.5), token_map, name)


def _draw_text(axes, token_map: TokenMap, name: str, cells, width: float) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    levels = colour_levels(token_map.scores[name])
    hue = [part / 255 for part in HUES.get(name, OTHER_HUE)]
    axes.set(xlim=(0, width / CELL), ylim=(cells[-1][2] + 1, 0))
    axes.axis("off")
    heading = f"{name} score: {EXPLANATIONS.get(name, 'as named by the scorer')}"
    axes.set_title(_drawable(heading), fontsize=9.5, loc="left", color=INK, parse_math=False)
    boxes = PatchCollection(
        [Rectangle((x, y + 0.06), len(text), 0.88) for _, text, y, x in cells],
        facecolors=[(*hue, opacity(levels[i])) for i, *_ in cells],
        edgecolors=[INK if token_map.kept[i] else "none" for i, *_ in cells],
        clip_on=False,
    )
    axes.add_collection(boxes)
    for i, text, y, x in cells:
        kept, labelled = token_map.kept[i], token_map.labelled[i]
        style = {"weight": "bold" if kept else "normal", "color": INK if labelled else MUTED}
        axes.text(
            x, y + 0.53, _drawable(text), va="center", family="DejaVu Sans Mono",
            fontsize=FONT_POINTS, parse_math=False, **style,
        )  # fmt: skip
        if kept or labelled:
            line = {"linestyle": "solid" if kept else "dotted", "linewidth": 1.6 if kept else 0.9}
            axes.plot([x, x + len(text)], [y + 0.9] * 2, color=INK, clip_on=False, **line)


def _draw_chart(axes, token_map: TokenMap, name: str) -> None:
    values, logarithmic = axis_values(token_map.scores[name])
    hue = tuple(part / 255 for part in HUES.get(name, OTHER_HUE))
    kept = [i for i, flag in enumerate(token_map.kept) if flag]
    axes.plot(range(len(values)), values, color=hue, linewidth=0.9)
    axes.scatter(kept, [values[i] for i in kept], s=22, color=[hue], edgecolors=INK, zorder=3)
    for start, stop in runs(token_map.labelled):
        axes.axvspan(start - 0.5, stop - 0.5, ymax=0.04, color=MUTED, linewidth=0)
    axes.set_yscale("log" if logarithmic else "linear")
    axes.set_xlabel("position (dots: kept; bar: labelled)", fontsize=8.5, color=INK)
    axes.set_ylabel("score (log)" if logarithmic else "score", fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _drawable(text: str) -> str:
    """The text with a box for each character that the font cannot draw (no warning, no gap)."""
    known = _font_characters()
    return "".join(c if ord(c) in known else "□" for c in text)


@lru_cache(maxsize=1)
def _font_characters() -> frozenset[int]:
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont("DejaVu Sans Mono")).get_charmap())
