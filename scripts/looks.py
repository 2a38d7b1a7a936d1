"""How the arms of the studies of learning look, the same in every picture; and what pictures with a line for each arm are drawn with."""

from learning.arms import PLAIN, is_seeking, parts_of, way_of
from learning.groups import Interval
from matplotlib.lines import Line2D

# One scorer, one colour, in this order: 3 to 1 and more against white, and told apart with the common forms of colour blindness
SCORERS = {
    "plain": "#000000", "checkpointing": "#89602f", "streaming": "#7f7f7f", "streaming+checkpointing": "#178f94", "every": "#6f9440", "random": "#1b6bf8", "context": "#e74ab9",
    "gradient": "#56350b", "combined": "#cd500f", "combined-mean": "#74353e", "loss": "#3a9f66", "softmax_residual": "#00415c",
    "true_gradient": "#4a1d93",
}  # fmt: skip
UNLISTED = "#555555"  # another scorer, which an arm of one's own may have
LINES = {"cut": "-", "stream": "--", "skip": ":"}  # the path of the gradient, in curves
PATHS = {  # and where there are none: large hollow ones, which show around a small full one
    "all tokens": {"marker": "s", "markersize": 7},
    "cut": {"marker": "o", "markersize": 5},
    "stream": {"marker": "^", "markersize": 9, "markerfacecolor": "none"},
    "skip": {"marker": "D", "markersize": 7, "markerfacecolor": "none"},
}
MARKERS = {"top": "o", "sample": "^"}


def scorer_of(arm: str) -> str:
    """Of arms with exact gradients, which have none, their name."""
    return parts_of(arm)[0] if is_seeking(arm) else way_of(arm)


def colour_of(scorer: str) -> str:
    return SCORERS.get(scorer, UNLISTED)


def in_order(scorer: str) -> int:
    """The place of a scorer in the order of all pictures."""
    return [*SCORERS].index(scorer) if scorer in SCORERS else len(SCORERS)


def look(arm: str) -> dict:
    """The curve of an arm: its line tells the path of the gradient, its marker the selection. Wider keeps more; hollow chooses among labels alone."""
    colour = {"color": colour_of(scorer_of(arm))}
    if not is_seeking(arm):
        return colour | {"linestyle": "-" if arm == PLAIN else "-.", "marker": "s", "linewidth": 2.0, "markersize": 5}
    _, selection, path, ratio, pool = parts_of(arm)
    line = {"linestyle": LINES[path], "linewidth": 2.4 if ratio != "10%" else 1.3}
    marker = {"marker": MARKERS.get(selection, "D"), "markersize": 5} | ({"markerfacecolor": "white"} if pool == "labels" else {})
    return colour | line | marker


# --- a horizontal line for each arm


def named_lines(axes, names: list[str], pad: float = 4) -> None:
    """The names of lines 0, 1, ..., from the top. pad: points between them and the axes."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, pad=pad)


def draw_interval(axes, line: float, found: Interval, **style) -> None:
    """A mean, and its interval where there is one."""
    half = None if found.half is None else [found.half]
    axes.errorbar([found.mean], [line], xerr=half, capsize=2.5, elinewidth=1, **style | {"linestyle": "none"})


def draw_sample(axes, line: float, style: dict) -> None:
    """A piece of an arm's curve, left of its line: what a legend would show."""
    axes.plot([-0.15, -0.085, -0.02], [line] * 3, transform=axes.get_yaxis_transform(), markevery=[1], clip_on=False, **style)


def key_below(figure, styles: list[dict]) -> None:
    """What markers mean, whatever their colour."""
    handles = [Line2D([], [], **{"color": UNLISTED, "marker": "o", "linestyle": "none"} | style) for style in styles]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8.5)
