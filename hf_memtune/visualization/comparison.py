"""Methods side by side: a table for the terminal and a page with plots."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path

from hf_memtune.units import format_bytes
from hf_memtune.visualization.html import settings_list, write_page
from hf_memtune.visualization.picture import INK, MUTED, new_figure

COLOURS = ("#5b6470", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")  # Okabe and Ito, told apart by all
_HEADINGS = ("method", "tokens kept", "held-out loss before", "after", "peak memory", "seconds a step")


def _cells(row: dict) -> tuple[str, ...]:
    share = row.get("tokens_kept_share")
    return (
        row["method"],
        "all" if share is None or share >= 1 else f"{100 * share:.1f} %",
        f"{row['loss_before']:.4f}",
        f"{row['loss_after']:.4f}",
        format_bytes(row["peak_bytes"]),
        f"{row['seconds_per_step']:.2f}",
    )


def comparison_table(rows: list[dict]) -> str:
    """An aligned plain-text table. Rows: method, loss_before, loss_after, peak_bytes, seconds_per_step, tokens_kept_share."""
    lines = [_HEADINGS, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADINGS))]
    aligned = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in lines]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def write_comparison_html(rows: list[dict], path: str | Path, title: str, conditions: dict, notes: str = "") -> Path:
    """Write one self-contained page: table, plots, conditions. Returns its path.

    rows: as for comparison_table, and optionally `losses`, [(step, held-out loss), ...]. conditions: name -> value, what
    was measured on. notes: HTML shown below the title. Raises ImportError without matplotlib.
    """
    if not rows:
        raise ValueError("write_comparison_html: rows is empty, expected one dict a method")
    head = "".join(f"<th>{escape(h)}</th>" for h in _HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in _cells(row)) + "</tr>" for row in rows)
    page = (
        f"<h1>{escape(title)}</h1>{notes}<table class='methods'><tr>{head}</tr>{body}</table>"
        f"<figure>{_svg(rows)}</figure><h2>Conditions</h2>{settings_list(conditions)}"
    )
    style = "table.methods td, table.methods th { text-align: right; border-bottom: 1px solid var(--line); padding: .35rem .9rem; }"
    style += "table.methods td:first-child, table.methods th:first-child { text-align: left; padding-left: 0; }"
    style += "figure { background: #fff; border-radius: .5rem; padding: .5rem; } svg text { fill: inherit; }"
    return write_page(path, title, page, style)


def _svg(rows: list[dict]) -> str:
    """Held-out loss by step and by seconds, peak bytes, seconds a step, as one inline SVG."""
    figure = new_figure(13, 7.2)
    axes = figure.subplots(2, 2)
    for number, row in enumerate(rows):
        losses = row.get("losses") or [(0, row["loss_before"])]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": "o", "markersize": 3.5, "label": row["method"]}
        axes[0][0].plot([step for step, _ in losses], [loss for _, loss in losses], **style)
        axes[0][1].plot([step * row["seconds_per_step"] for step, _ in losses], [loss for _, loss in losses], **style)
    _label(axes[0][0], "Held-out loss of all tokens, by optimizer step", "step")
    _label(axes[0][1], "The same, by seconds of training", "seconds (steps x median seconds a step)")
    axes[0][0].legend(frameon=False, fontsize=9)
    _bars(axes[1][0], rows, "Peak memory of a step above the weights, MiB", lambda row: row["peak_bytes"] / 2**20)
    _bars(axes[1][1], rows, "Seconds a step (median)", lambda row: row["seconds_per_step"])
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _label(axes, title: str, below: str = "") -> None:
    axes.set_title(title, fontsize=11, loc="left", color=INK, parse_math=False)
    axes.set_xlabel(below, fontsize=9, color=MUTED)
    axes.tick_params(labelsize=9, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes, rows: list[dict], title: str, value) -> None:
    names = [row["method"] for row in rows]
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(rows))]
    bars = axes.barh(names, [value(row) for row in rows], color=colours)
    axes.bar_label(bars, fmt=lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.2f}", padding=4, fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    _label(axes, title)
