"""Token maps as one self-contained page: no script, no request, readable without having read the paper."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from hf_memtune.files import write_text
from hf_memtune.visualization.decision import Decision, as_shown, decisions_of
from hf_memtune.visualization.panels import Panel, panels
from hf_memtune.visualization.token_map import TokenMap, count, percent, runs, visible, weights_in_words

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --muted: #5b6470; --paper: #ffffff; --line: #d5dae0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --muted: #9aa4b0; --paper: #14171b; --line: #343b44; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .2rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; } p { margin: .4rem 0; } .muted { color: var(--muted); }
dl.settings { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .6rem 0; font-size: .9rem; } dl.settings div { display: flex; gap: .4rem; }
dt { color: var(--muted); } dd { margin: 0; } .legend { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem; margin: .8rem 0; }
.text { font: 14px/1.95 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding-left: .8rem; }
.t { border-radius: 3px; padding: 1px 0; color: var(--muted); } .l { color: var(--ink); border-bottom: 2px dotted var(--muted); }
.k { color: var(--ink); font-weight: 700; outline: 2px solid var(--ink); outline-offset: -1px; border-bottom: none; padding: 1px; }
table { border-collapse: collapse; margin: .6rem 0; } td, th { padding: .15rem 1.2rem .15rem 0; text-align: left; font-weight: normal; } td { font-variant-numeric: tabular-nums; }
.decided { border-left: 3px solid #e69f00; padding: .1rem .9rem; margin: .8rem 0; } .decided h3 { margin-top: .2rem; }
details { margin: .6rem 0; } summary { cursor: pointer; } table.tokens { font-size: .85rem; } tr.kept td { font-weight: 700; }
svg { width: 100%; height: auto; margin-top: .4rem; } svg text { font: 12px system-ui, sans-serif; fill: var(--muted); } figure { margin: 0; }
"""

_INTRODUCTION = """<p>A language model reads every token (word piece) of a training text. Token seeking then lets it <em>learn</em> from
a few of them only, which takes much less memory. This page shows how the tokens of some texts were ranked, and which were kept.</p>"""

_LEGEND = """<div class="legend"><p><span class="t k">boxed and bold</span> kept: the model learns from this token &ensp;
<span class="t l">dotted line</span> carries a label: predicting the next token from here counts in training &ensp; <span class="t">grey</span>
neither (usually the prompt).</p><p>Colour is the <strong>rank</strong> of the token's score within its text: the deepest step is the highest
tenth. Ranks, because a few tokens get most of the attention and would leave all others colourless. Point at a token for its
numbers, or open the table below its text.</p>"""
_LEGEND_OF_CHANCES = "<p>The chance of being kept is in yellow: the deeper, the likelier. A token without yellow is never kept.</p>"


def write_token_map_html(maps: list[TokenMap], path: str | Path, settings: dict) -> Path:
    """Write the maps as one HTML file and return its path. `settings` (name -> value) is shown on top.

    Raises ValueError for no maps.
    """
    if not maps:
        raise ValueError("write_token_map_html: maps is empty, expected at least one TokenMap")
    chosen = "".join(map(_decision, decisions_of(maps)))
    body = f"<h1>Which tokens training keeps, and why</h1>{_INTRODUCTION}{settings_list(settings)}{chosen}{_legend(maps)}"
    body += "".join(_example(token_map) for token_map in maps)
    return write_page(path, "Token maps", body)


def write_page(path: str | Path, title: str, body: str, style: str = "") -> Path:
    """One HTML file with its style inside; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{escape(title)}</title>"
    page = f"<!doctype html><html lang='en'><head>{head}<style>{_STYLE}{style}</style></head><body>{body}</body></html>"
    write_text(path, page, errors="replace")
    return path


def _legend(maps: list[TokenMap]) -> str:
    return _LEGEND + _LEGEND_OF_CHANCES * any(each.probability is not None for each in maps) + "</div>"


def settings_list(settings: dict) -> str:
    """Names and values, beside each other."""
    listed = "".join(f"<div><dt>{escape(str(k))}</dt><dd>{escape(as_shown(v))}</dd></div>" for k, v in settings.items())
    return f"<dl class='settings'>{listed}</dl>"


def _decision(decision: Decision) -> str:
    said = "".join(f"<p>{escape(text)}</p>" for text in decision.said())
    return f"<div class='decided'><h3>What decided here</h3>{said}{settings_list(decision.listed())}</div>"


def _example(token_map: TokenMap) -> str:
    n, kept, labelled, both = count([token_map])
    numbers = [
        ("tokens", f"{n}"),
        ("kept", f"{kept} ({percent(kept, n)})"),
        ("kept tokens that carry a label", f"{both} ({percent(both, kept)} of the kept)"),
        ("all tokens that carry a label", f"{labelled} ({percent(labelled, n)})"),
        *_chances(token_map),
    ]
    table = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in numbers)
    views = "".join(_panel(token_map, panel) for panel in panels(token_map))
    return f"<section><h2>{escape(token_map.title)}</h2><table>{table}</table>{views}{_token_table(token_map)}</section>"


def _chances(token_map: TokenMap) -> list[tuple[str, str]]:
    """What the probabilities of one map sum to, and the weights among them."""
    if token_map.probability is None:
        return []
    return [
        ("chances summed, which is how many are kept", f"{sum(token_map.probability):.2f}"),
        ("tokens that may be kept", f"{sum(p > 0 for p in token_map.probability)}"),
        ("what one of them counts for in the loss, if kept", weights_in_words(token_map)),
    ]


def _panel(token_map: TokenMap, panel: Panel) -> str:
    spans = "".join(_span(token_map, i, panel.hue, panel.strength[i]) for i in range(len(token_map.tokens)))
    heading = f"<h3>{escape(panel.name)} <span class='muted'>- {escape(panel.explained)}</span></h3>"
    return f"{heading}<div class='text'>{spans}</div>{_chart(token_map, panel)}"


def _span(token_map: TokenMap, i: int, hue: tuple[int, int, int], strength: float) -> str:
    lead, text, breaks = visible(token_map.tokens[i])
    kept, labelled = token_map.kept[i], token_map.labelled[i]
    values = ", ".join(f"{name} {value}" for name, value in _numbers(token_map, i).items())
    state = f"{'kept' if kept else 'not kept'}, {'labelled' if labelled else 'no label'}"
    classes = "t" + " k" * kept + " l" * labelled
    colour = f"rgba({hue[0]},{hue[1]},{hue[2]},{strength:.2f})"
    title = escape(f"position {i}: {state}; {values}", quote=True)
    return f"{lead}<span class='{classes}' style='background:{colour}' title='{title}'>{escape(text)}</span>{breaks}"


def _numbers(token_map: TokenMap, i: int) -> dict[str, str]:
    """Of one token: its chance, where tokens are drawn, its weight, where that is not 1 for all, and its scores."""
    signs = {"probability": "chance p", "label_probability": "label's q"}
    found = {signs[name]: f"{values[i]:.4g}" for name, values in token_map.chances.items()}
    if found:
        q, p = "q" if token_map.label_probability is not None else "1", "/p" * (token_map.probability is not None)
        weight = token_map.weight_of(i)
        found[f"weight {q}{p}"] = "never kept" if weight is None else f"{weight:.4g}"
    return found | {name: f"{values[i]:.4g}" for name, values in token_map.scores.items()}


def _token_table(token_map: TokenMap) -> str:
    """Every token with its numbers, folded away."""
    names = ["position", "token", "label", "kept", *_numbers(token_map, 0)]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for i, token in enumerate(token_map.tokens):
        cells = [str(i), "".join(visible(token)).strip(), *("yes" if flag[i] else "" for flag in (token_map.labelled, token_map.kept))]
        cells += _numbers(token_map, i).values()
        rows.append(f"<tr{' class=kept' * token_map.kept[i]}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<details><summary>Every token with its numbers</summary><table class='tokens'><tr>{head}</tr>{''.join(rows)}</table></details>"


# The chart: sizes in SVG units, of which the page shows as many as fit its width.
_CHART_WIDTH, _CHART_HEIGHT, _LEFT, _BOTTOM = 1100, 170, 76, 32


def _chart(token_map: TokenMap, panel: Panel) -> str:
    """Values against position; dots mark kept tokens, a bar below marks labelled ones."""
    (values, logarithmic), hue = panel.axis, panel.hue
    heights = [math.log10(v) if logarithmic and v > 0 else v for v in values]
    finite = [h for h in heights if math.isfinite(h)] or [0.0]
    low, high = 0.0 if panel.from_zero else min(finite), max(finite)
    spread = (high - low) or 1.0
    step = (_CHART_WIDTH - _LEFT - 10) / max(len(values) - 1, 1)

    def x(position: float) -> float:
        return _LEFT + position * step

    def y(height: float) -> float:
        return 10 + (_CHART_HEIGHT - 10 - _BOTTOM) * (1 - (height - low) / spread)

    colour = f"rgb({hue[0]},{hue[1]},{hue[2]})"
    drawn = [(x(i), y(h)) for i, h in enumerate(heights) if math.isfinite(h)]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in drawn)
    dots = "".join(
        f"<circle class='dot' cx='{x(i):.1f}' cy='{y(heights[i]):.1f}' r='4' fill='{colour}' stroke='currentColor'/>"
        for i, kept in enumerate(token_map.kept)
        if kept and math.isfinite(heights[i])
    )
    base = _CHART_HEIGHT - _BOTTOM + 4
    bars = "".join(
        f"<rect x='{x(start - 0.4):.1f}' y='{base}' width='{max(1.0, (stop - start - 0.2) * step):.1f}' height='5' fill='currentColor' opacity='.45'/>"
        for start, stop in runs(token_map.labelled)
    )
    ends = [(10 ** (low + spread) if logarithmic else low + spread, 14), (10**low if logarithmic else low, base - 4)]
    ticks = "".join(f"<text x='{_LEFT - 6}' y='{at}' text-anchor='end'>{value:.3g}</text>" for value, at in ends)
    scale = f"{panel.scale}; " * logarithmic
    caption = f"<text x='{_LEFT}' y='{_CHART_HEIGHT - 4}'>position 0 to {len(values) - 1} ({scale}dots: kept; bar: labelled)</text>"
    return (
        f"<figure><svg viewBox='0 0 {_CHART_WIDTH} {_CHART_HEIGHT}' role='img' aria-label='{escape(panel.name, quote=True)} by position'>"
        f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='1.2'/>{bars}{dots}{ticks}{caption}</svg></figure>"
    )
