"""Scores on tasks as a picture: a point a task, with its standard error. One column of points a metric."""

from pathlib import Path
from typing import NamedTuple

from hf_memtune.files import whole
from hf_memtune.visualization.picture import INK, MUTED, new_figure

COLOUR = "#0072b2"
WIDTH, LINE, AROUND = 4.6, 0.34, 1.5  # inches: of a column, of a task, of what is above and below


class Point(NamedTuple):
    """label: of the line it stands on. stderr: standard error, or None."""

    label: str
    metric: str
    value: float
    stderr: float | None


def write_scores_png(points: list[Point], path: str | Path, title: str) -> Path:
    """Draw the points, and write a PNG file. Returns its path. Raises ValueError for no points, ImportError without matplotlib."""
    if not points:
        raise ValueError("write_scores_png: points is empty, expected at least one score")
    metrics, labels = (list(dict.fromkeys(getattr(each, name) for each in points)) for name in ("metric", "label"))
    figure = new_figure(1.8 + WIDTH * len(metrics), AROUND + LINE * len(labels))
    columns = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(columns, metrics):
        _draw(axes, metric, [each for each in points if each.metric == metric], labels)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=INK, parse_math=False)
    figure.supxlabel("Points are scores; bars reach one standard error to each side.", fontsize=8, x=0.01, ha="left", color=MUTED)
    figure.tight_layout()
    with whole(path) as partial:
        figure.savefig(partial, format="png")
    return Path(path)


def _draw(axes, metric: str, points: list[Point], labels: list[str]) -> None:
    lines = [labels.index(each.label) for each in points]
    errors = [each.stderr or 0.0 for each in points]
    axes.errorbar([each.value for each in points], lines, xerr=errors, fmt="o", color=COLOUR, markersize=5, capsize=3, elinewidth=1.4)
    for line, each, error in zip(lines, points, errors):
        axes.annotate(_said(each), (each.value + error, line), (7, 0), textcoords="offset points", va="center", fontsize=8, color=MUTED)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_title(metric, fontsize=10, loc="left", color=INK, parse_math=False)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="x", color="#d5dae0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.35)


def _said(point: Point) -> str:
    return f"{point.value:.3f}" + ("" if point.stderr is None else f" ± {point.stderr:.3f}")
