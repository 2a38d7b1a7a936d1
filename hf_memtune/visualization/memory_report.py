"""The page of a memory report: where the bytes of a step went, as bars, a curve and tables. Plain data in, one HTML file out."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from hf_memtune.units import format_bytes
from hf_memtune.visualization.html import settings_list, write_page

# Okabe and Ito's colours, and two greys: told apart with the common forms of colour blindness, on light and on dark.
COLOURS = {
    "weights": "#7a8591",
    "gradients": "#e69f00",
    "optimizer_state": "#cc79a7",
    "saved_activations": "#0072b2",
    "stored_kv": "#56b4e9",
    "temporaries": "#d55e00",
    "logits": "#009e73",
    "batch": "#b5bcc4",
}
_PHASES = {"context_pass": "#56b4e9", "forward": "#009e73", "backward": "#d55e00", "optimizer": "#cc79a7", "evaluation": "#e69f00"}
_WIDTH, _LEFT, _RIGHT = 1100, 150, 110
_STYLE = """
table.bytes td, table.bytes th { border-bottom: 1px solid var(--line); padding: .3rem .9rem .3rem 0; text-align: right; }
table.bytes td { white-space: nowrap; } table.bytes th { vertical-align: bottom; }
table.bytes td:first-child, table.bytes th:first-child { text-align: left; } table.bytes td.left, table.bytes th.left { text-align: left; }
table.bytes tr.peak td { font-weight: 700; } .scroll { overflow-x: auto; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .5rem 0; font-size: .9rem; } .key i { width: .8rem; height: .8rem;
display: inline-block; border-radius: 2px; margin-right: .35rem; vertical-align: -1px; }
.advice { border-left: 4px solid #009e73; padding: .3rem .9rem; margin: .8rem 0; }
.headline { font-size: 1.15rem; margin: .6rem 0; } code { font: .92em ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
"""


def write_memory_report_html(report: dict[str, Any], path: str | Path) -> Path:
    """Write the report, the dict of MemoryReport.to_dict (and of memory_report.json), as one self-contained page. Returns its path."""
    account, predicted = report["measured"], (report.get("predicted") or {}).get("account")
    sections = [
        f"<h1>Where the memory of a training step went</h1>{_headline(report)}{settings_list(report['conditions'])}",
        f"<h2>By phase and category</h2>{_key(COLOURS, account)}{_bars(account, predicted)}{_phase_table(account, predicted)}",
        f"<h2>Live bytes over the step</h2>{_timeline(account)}",
        f"<h2>What the settings save</h2>{_levers(report)}{_advice(report)}",
        f"<h2>The largest tensors at the peak</h2>{_tensors(account)}",
        _notes(report),
    ]
    return write_page(path, "Memory report", "".join(sections), _STYLE)


# -- words and tables


def _headline(report: dict[str, Any]) -> str:
    account, allocator = report["measured"], report.get("allocator_peaks")
    peak, phase = format_bytes(account["peak_bytes"]), _words(account["peak_phase"])
    said = f"At most <strong>{peak}</strong> of tensors were alive, in the {phase} phase"
    if allocator:
        said += f"; the allocator's peak was <strong>{format_bytes(max(allocator.values()))}</strong>"
    if predicted := report.get("predicted"):
        off = 100 * (predicted["peak_bytes"] / account["peak_bytes"] - 1)
        said += f"; predicted were {format_bytes(predicted['peak_bytes'])} ({off:+.1f} %)"
    return f"<p class='headline'>{said}.</p><p class='muted'>Measured on {escape(report['batch'])}.</p>"


def _key(colours: dict[str, str], account: dict[str, Any]) -> str:
    used = [name for name in colours if any(phase["by_category"].get(name) for phase in account["phases"])]
    return "<div class='key'>" + "".join(f"<span><i style='background:{colours[n]}'></i>{_words(n)}</span>" for n in used) + "</div>"


def _table(heads: list[str], rows: list[list[str]], left: int = 1, peak: int | None = None) -> str:
    """Cells are HTML. left: columns that are words. peak: number of the row that stands out."""

    def line(cells: list[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=left' if i < left else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))

    body = "".join(f"<tr{' class=peak' if n == peak else ''}>{line(cells, 'td')}</tr>" for n, cells in enumerate(rows))
    return f"<div class='scroll'><table class='bytes'><tr>{line(heads, 'th')}</tr>{body}</table></div>"


def _phase_table(account: dict[str, Any], predicted: dict[str, Any] | None) -> str:
    used = [name for name in COLOURS if any(phase["by_category"].get(name) for phase in account["phases"])]
    expected = {phase["phase"]: sum(phase["by_category"].values()) for phase in (predicted or {"phases": []})["phases"]}
    rows = []
    for phase in account["phases"]:
        cells = [_size(phase["by_category"].get(name, 0)) for name in used]
        total = sum(phase["by_category"].values())
        rows.append([_words(phase["phase"]), *cells, format_bytes(total), _size(expected.get(phase["phase"]))])
    peak = next(n for n, phase in enumerate(account["phases"]) if phase["phase"] == account["peak_phase"])
    return _table(["at the peak of", *map(_words, used), "measured", "predicted"], rows, peak=peak)


def _tensors(account: dict[str, Any]) -> str:
    rows = [
        [
            _code(t["name"]), _words(t["category"]), _code(str(tuple(t["shape"]))),
            escape(t["dtype"]), _code(t["op"] and t["op"].removesuffix(".default")), format_bytes(t["n_bytes"]),
        ]
        for t in account["tensors"]
    ]  # fmt: skip
    return _table(["made in", "category", "shape", "dtype", "by", "bytes"], rows, left=5) if rows else "<p class='muted'>Not recorded.</p>"


def _levers(report: dict[str, Any]) -> str:
    rows = [
        [
            _code(lever["setting"]), _size(lever.get("without_bytes")), _size(lever.get("with_bytes")),
            _size(lever.get("saved_bytes")), escape(lever.get("note") or ""),
        ]
        for lever in report["levers"]
    ]  # fmt: skip
    if not rows:
        return "<p>None is on.</p>"
    said = "<p class='muted'>Peaks of the same step without and with each, both traced by the same ledger on tensors without values.</p>"
    return said + _table(["setting", "peak without", "with", "saved", ""], rows)


def _advice(report: dict[str, Any]) -> str:
    if not (advice := report.get("advice")):
        return "<p class='muted'>Nothing that was tried would need less.</p>"
    kind = "the gradient stays exact" if advice["exact"] else "the gradient becomes approximate"
    return (
        f"<p class='advice'>To need less: {_code(advice['setting'])} would save about "
        f"<strong>{format_bytes(advice['saved_bytes'])}</strong> (peak {format_bytes(advice['peak_bytes'])}); {kind}.</p>"
    )


def _notes(report: dict[str, Any]) -> str:
    return "<h2>Notes</h2>" + "".join(f"<p>{escape(note)}</p>" for note in report["notes"]) if report["notes"] else ""


# -- drawings: sizes in SVG units, of which the page shows as many as fit its width


def _bars(account: dict[str, Any], predicted: dict[str, Any] | None) -> str:
    """A bar a phase, of its categories; below it, thin, what was predicted."""
    expected = {phase["phase"]: phase for phase in (predicted or {"phases": []})["phases"]}
    most = max(sum(p["by_category"].values()) for p in (*account["phases"], *expected.values()))
    scale, drawn = (_WIDTH - _LEFT - _RIGHT) / most, []
    for number, phase in enumerate(account["phases"]):
        top = 8 + 46 * number
        end = _stack(drawn, phase, top, 22, scale)
        if phase["phase"] in expected:
            _stack(drawn, expected[phase["phase"]], top + 24, 7, scale)
        drawn.append(f"<text x='{_LEFT - 10}' y='{top + 16}' text-anchor='end'>{_words(phase['phase'])}</text>")
        drawn.append(f"<text x='{end + 8:.1f}' y='{top + 16}'>{format_bytes(sum(phase['by_category'].values()))}</text>")
    caption = "thick: measured; thin: predicted" if expected else "measured"
    drawn.append(f"<text x='{_LEFT}' y='{16 + 46 * len(account['phases'])}'>{caption}</text>")
    return _svg(drawn, 24 + 46 * len(account["phases"]), "bytes by phase and category")


def _stack(drawn: list[str], phase: dict[str, Any], top: int, height: int, scale: float) -> float:
    x = float(_LEFT)
    for name, colour in COLOURS.items():
        size = phase["by_category"].get(name, 0)
        title = f"<title>{_words(name)}: {format_bytes(size)}</title>"
        if size:
            drawn.append(f"<rect x='{x:.1f}' y='{top}' width='{size * scale:.2f}' height='{height}' fill='{colour}'>{title}</rect>")
        x += size * scale
    return x


def _timeline(account: dict[str, Any]) -> str:
    points = account["timeline"]
    if not points:
        return "<p class='muted'>Not recorded.</p>"
    height, base = 300, 255
    across, most = max(points[-1][0], 1), max(n for _, _, n in points)

    def x(event: float) -> float:
        return _LEFT + (event / across) * (_WIDTH - _LEFT - _RIGHT)

    def y(n_bytes: float) -> float:
        return base - (base - 20) * n_bytes / most

    drawn = _phase_areas(points, x, y, base)
    event, _, n_bytes = max(points, key=lambda point: point[2])
    drawn.append(f"<circle cx='{x(event):.1f}' cy='{y(n_bytes):.1f}' r='4' fill='currentColor'/>")
    drawn.append(f"<text x='{x(event) + 8:.1f}' y='{y(n_bytes) - 4:.1f}'>peak {format_bytes(n_bytes)}</text>")
    ticks = [f"<text x='{_LEFT - 8}' y='{y(v) + 4:.1f}' text-anchor='end'>{format_bytes(v)}</text>" for v in (0, most / 2, most)]
    drawn.append(f"<text x='{_LEFT}' y='{height - 8}'>events of the step: tensors made and freed, in order (not seconds)</text>")
    phases = list(dict.fromkeys(phase for _, phase, _ in points))
    key = "".join(f"<span><i style='background:{_PHASES[phase]}'></i>{_words(phase)}</span>" for phase in phases)
    return f"<div class='key'>{key}</div>" + _svg(drawn + ticks, height, "live bytes over the step")


def _phase_areas(points: list, x: Callable, y: Callable, base: float) -> list[str]:
    """The area under the curve in one piece for each stretch of a phase, each ending where the next begins."""
    drawn, start = [], 0
    for i in range(1, len(points) + 1):
        if i < len(points) and points[i][1] == points[start][1]:
            continue
        piece = points[start : min(i + 1, len(points))]
        line = " ".join(f"{x(event):.1f},{y(n_bytes):.1f}" for event, _, n_bytes in piece)
        area = f"{x(piece[0][0]):.1f},{base} {line} {x(piece[-1][0]):.1f},{base}"
        drawn.append(f"<polygon points='{area}' fill='{_PHASES[points[start][1]]}' opacity='.55'/>")
        drawn.append(f"<polyline points='{line}' fill='none' stroke='currentColor' stroke-width='1'/>")
        start = i
    return drawn


def _svg(drawn: list[str], height: int, label: str) -> str:
    return f"<figure><svg viewBox='0 0 {_WIDTH} {height}' role='img' aria-label='{label}'>{''.join(drawn)}</svg></figure>"


def _code(text: str | None) -> str:
    return f"<code>{escape(text or '-')}</code>"


def _words(name: str) -> str:
    return {"stored_kv": "stored keys and values"}.get(name, name.replace("_", " "))


def _size(n_bytes: int | None) -> str:
    return "-" if not n_bytes else format_bytes(n_bytes)
