"""Pictures of the results page. Colour tells the scorer, the line the gradient, the marker the selection (Okabe and Ito's colours)."""

import math
from pathlib import Path

from pictures import MIB, STYLE, pyplot, save

from quality.analysis import Group, Screened
from quality.arms import PLAIN, is_seeking, parts_of

COLOURS = {
    "plain": "#000000", "streaming": "#7f7f7f", "random": "#0072B2", "context": "#CC79A7", "gradient": "#E69F00",
    "combined": "#D55E00", "combined-mean": "#56B4E9", "loss": "#009E73",
}  # fmt: skip
LINES = {"cut": "-", "stream": "--", "skip": ":"}
MARKERS = {"top": "o", "sample": "^"}
FILLS = {"cut": "full", "stream": "none", "skip": "left"}  # in the picture of single runs, which has no lines


def look(arm: str) -> dict:
    """How an arm is drawn, the same in every picture. Wider lines keep more tokens; hollow markers choose among labels alone."""
    if not is_seeking(arm):
        return {"color": COLOURS[arm], "linestyle": "-" if arm == PLAIN else "-.", "marker": "s", "linewidth": 2.0, "markersize": 5}
    scorer, selection, gradient, ratio, pool = parts_of(arm)
    hollow = {"markerfacecolor": "white"} if pool == "labels" else {}
    wide = 2.4 if ratio != "10%" else 1.3
    return {
        "color": COLOURS[scorer],
        "linestyle": LINES[gradient],
        "marker": MARKERS[selection],
        "linewidth": wide,
        "markersize": 5,
        **hollow,
    }


def finals_figure(groups: list[Group], file: Path) -> None:
    """Held-out loss against steps, against seconds, and at the end against bytes."""
    groups = [group for group in groups if group.ended]
    with pyplot.rc_context(STYLE):
        figure, (steps, seconds, size) = pyplot.subplots(1, 3, figsize=(13, 5.4), sharey=True)
        for group in groups:
            _curve(steps, group, 1.0)
            _curve(seconds, group, group.seconds)
            _point(size, group)
        steps.set(xlabel="optimizer steps", ylabel="held-out loss of all labelled tokens")
        alone = all(group.alone for group in groups)
        seconds.set(xlabel="seconds of training" + ("" if alone else " (other work ran beside it)"))
        size.set(xlabel="peak MiB of a step, above weights and optimizer state")
        _fit(steps, groups)
        _legend(figure, steps)
        save(figure, file)


def _curve(axes, group: Group, factor: float) -> None:
    points = group.curve()
    axes.plot([step * factor for step, _ in points], [loss.mean for _, loss in points], label=group.label, **look(group.arm))


def _point(axes, group: Group) -> None:
    style = {**look(group.arm), "linestyle": "none", "markersize": 7}
    final = group.final()
    axes.errorbar(
        [group.peak_bytes / MIB], [final.mean], yerr=None if final.half is None else [final.half], capsize=2, elinewidth=1, **style
    )


def _fit(axes, groups: list[Group]) -> None:
    """The first measured losses are far above the last, which are what is compared: a narrow view of all that came after."""
    later = [loss.mean for group in groups for _, loss in group.curve()[1:]]
    room = 0.08 * (max(later) - min(later)) or 0.01
    axes.set_ylim(min(later) - room, max(later) + room)


def _legend(figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.04 + 0.035 * -(-len(labels) // 4), 1, 1))
    figure.legend(handles, labels, loc="lower center", ncol=4, handlelength=3.5, fontsize=8.5)


def screening_figure(arms: list[Screened], file: Path) -> None:
    """The loss of every screened arm against its bytes, a panel for each batch size."""
    sizes = sorted({arm.rows for arm in arms})
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(sizes), figsize=(6.5 * len(sizes), 5.4), squeeze=False)
        for axes, rows in zip(panels[0], sizes):
            _scatter(axes, [arm for arm in arms if arm.rows == rows], rows)
        _screening_legend(figure, {arm.arm for arm in arms})
        save(figure, file)


def _scatter(axes, arms: list[Screened], rows: int) -> None:
    for arm in arms:
        fill = FILLS[parts_of(arm.arm)[2]] if is_seeking(arm.arm) else "full"
        style = {**look(arm.arm), "linestyle": "none", "markersize": 7, "fillstyle": fill}
        if math.isfinite(arm.loss):
            axes.plot([arm.peak_bytes / MIB], [arm.loss], **style)
    axes.set(xlabel="peak MiB of a step", ylabel="held-out loss at the end", title=f"batches of {rows} rows")


def _screening_legend(figure, arms: set[str]) -> None:
    """What colours and markers mean: there are too many arms to name each."""
    from matplotlib.lines import Line2D

    used = {parts_of(arm)[0] if is_seeking(arm) else arm for arm in arms}
    handles = [Line2D([], [], color=colour, marker="s", linestyle="none", label=name) for name, colour in COLOURS.items() if name in used]
    handles += [Line2D([], [], color="#555555", marker=marker, linestyle="none", label=name) for name, marker in MARKERS.items()]
    handles += [Line2D([], [], color="#555555", marker="D", fillstyle=fill, linestyle="none", label=name) for name, fill in FILLS.items()]
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    figure.legend(handles=handles, loc="lower center", ncol=-(-len(handles) // 2), fontsize=8.5, columnspacing=1.2, handletextpad=0.3)
