"""The picture of the page: accuracy against peak bytes."""

from pathlib import Path

from pictures import MIB, STYLE, pyplot, save

from glue.analysis import Group
from glue.arms import ADAPTERS, FULL, LORA

# Okabe and Ito's colours. Reversible arms end near one another: markers tell them apart where they overlap
COLOURS = {
    FULL: "#000000", LORA: "#0072B2", ADAPTERS: "#009E73", "MEFT1 float": "#E69F00", "MEFT1 exact": "#D55E00", "centred exact": "#CC79A7",
}  # fmt: skip
MARKERS = {"MEFT1 float": "s", "MEFT1 exact": "^", "centred exact": "v"}


def accuracy_figure(groups: list[Group], file: Path) -> None:
    """A small hollow point a seed, a large one the mean. Intervals are in the table."""
    with pyplot.rc_context(STYLE | {"font.size": 10}):
        figure, axes = pyplot.subplots(figsize=(8, 4.8))
        for group in groups:
            _points(axes, group)
        axes.set(xlabel="peak MiB of a step, above weights and optimizer state", xlim=(0, None))
        axes.set(ylabel="accuracy on held-out rows (chance: 0.5)")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="small: one seed\nlarge: mean")
        figure.tight_layout()
        save(figure, file)


def _points(axes, group: Group) -> None:
    if not group.ended:
        return
    style = {"linestyle": "none", "color": COLOURS[group.arm], "marker": MARKERS.get(group.arm, "o")}
    hollow = {"markerfacecolor": "none", "markersize": 5}
    seeds = [(run["peak_bytes"] / MIB, run["accuracies"][-1][1]) for run in group.ended.values()]
    axes.plot(*zip(*seeds), **style, **hollow)
    axes.plot([group.peak_bytes / MIB], [group.at(-1).mean], label=group.arm, markersize=10, alpha=0.75, **style)
