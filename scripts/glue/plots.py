"""The picture of the page: accuracy against peak bytes."""

from pathlib import Path

import matplotlib
from glue.analysis import Group
from glue.arms import ADAPTERS, FULL, LORA

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  the backend is chosen first: there may be no display

MIB = 2**20
# Okabe and Ito's colours; reversible arms are diamonds
COLOURS = {
    FULL: "#000000", LORA: "#0072B2", ADAPTERS: "#009E73", "MEFT1 float": "#E69F00", "MEFT1 exact": "#D55E00", "centred exact": "#CC79A7",
}  # fmt: skip
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "legend.frameon": False,
}  # fmt: skip


def accuracy_figure(groups: list[Group], file: Path) -> None:
    """A small point a seed, a large one the mean with its 95 % interval."""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(8, 4.8))
        for group in groups:
            _points(axes, group)
        axes.axhline(0.5, color="#7f7f7f", linewidth=1, linestyle=":")
        axes.text(1, 0.503, "chance", transform=axes.get_yaxis_transform(), ha="right", fontsize=9, color="#555555")
        axes.set(xlabel="peak MiB of a step, above weights and optimizer state", ylabel="accuracy on held-out rows", xlim=(0, None))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=110, metadata={"Software": None})  # the same bytes from the same numbers
        pyplot.close(figure)


def _points(axes, group: Group) -> None:
    if not group.ended:
        return
    mean, colour = group.at(-1), COLOURS[group.arm]
    marker = "o" if group.any_run["inverse_error"] is None else "D"
    seeds = [(run["peak_bytes"] / MIB, run["accuracies"][-1][1]) for run in group.ended.values()]
    axes.plot(*zip(*seeds), linestyle="none", marker=marker, markersize=3.5, color=colour, alpha=0.6)
    half = None if mean.half is None else [mean.half]
    where = [group.peak_bytes / MIB]
    axes.errorbar(where, [mean.mean], yerr=half, label=group.arm, color=colour, marker=marker, markersize=9, capsize=3, linestyle="none")
