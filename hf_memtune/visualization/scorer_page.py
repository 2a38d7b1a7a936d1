"""Scorers side by side: one page that shows which tokens each of them keeps, for a reader who has not read the papers."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from hf_memtune.files import write_text
from hf_memtune.visualization.comparison import COLOURS
from hf_memtune.visualization.decision import EXPLANATIONS, Decision, share_in_words
from hf_memtune.visualization.html import settings_list, write_page
from hf_memtune.visualization.scorer_shares import ALL, LABELLED, PLACES, ScorerShares
from hf_memtune.visualization.token_class import CLASSES

_STYLE = """
table.shares td, table.shares th { text-align: right; border-bottom: 1px solid var(--line); padding: .3rem .8rem; }
table.shares td, table.shares th { white-space: nowrap; min-width: 4.5rem; } table.scorers td { vertical-align: top; }
table.shares th:first-child { text-align: left; padding-left: 0; }
table.shares th small { display: block; color: var(--muted); white-space: normal; }
.scroll { overflow-x: auto; } .key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; margin: .5rem 0; }
.key svg { width: 1.6rem; height: .4rem; margin: 0 .35rem 0 0; vertical-align: 3px; }
"""
_INTRODUCTION = """<p>Token seeking lets a language model <em>learn</em> from a few tokens (word pieces) of each text only. A scorer is
what says which. This page compares scorers: of the tokens that each of them keeps, how many stand early or late, in the prompt or in the
answer, and of what kind they are; and how far two scorers keep the same ones.</p>"""
_SAMPLED = """<p>Tokens are drawn by chance, so these numbers are averages over all draws: every token counts with its chance of being
kept. {} of the weight in a draw goes evenly to all tokens that may be drawn, so what is kept differs less than the scores do.</p>"""
_TOP = "<p>Each scorer keeps the tokens with the highest scores, without chance. Random picks are one draw, from a fixed seed.</p>"
_READING = """<p>A column says where the tokens that a scorer keeps are, and sums to 100 %. Compare it with the column of all tokens, or of
those with a label if only they may be kept: where its share is higher, the scorer favours such tokens. The fairest to compare with is
<em>random</em>, which is subject to the same rules: as many tokens of each text, and no score. Each text, its prompt included, is cut
into ten parts of equal length.</p>"""
_ROLES = """<p>A token carries a label where the model learns to predict the token that follows it: in the answer, and at the last token of the
prompt.{}</p>"""
_LABELS_ALONE = " Here only such tokens may be kept (select_from=labels), so each scorer has 100 % of them, whatever it favours."


def write_scorer_comparison(shares: ScorerShares, decisions: list[Decision], path: str | Path, settings: dict) -> tuple[Path, Path]:
    """Write one self-contained page, and its numbers as JSON beside it; returns both paths.

    decisions: one a scorer, in the order of `shares.scorers`. settings: name -> value, shown on top. Raises ValueError for no rows.
    """
    if not shares.rows:
        raise ValueError("write_scorer_comparison: got no rows, expected at least one; add rows to the shares first")
    common = _common(decisions[0]) | {"rows": shares.rows, "tokens": int(shares.kept(ALL))}
    parts = [
        f"<h1>What each score keeps</h1>{_INTRODUCTION}{settings_list(settings | common)}",
        _SAMPLED.format(_evenly(decisions)) if decisions[0].samples else _TOP,
        _scorers(shares, decisions),
        f"<h2>Where in the text</h2>{_READING}{_lines(shares)}{_table(shares, 'position', {})}",
        _roles(shares, decisions[0]) if "role" in shares.kinds else _NO_LABELS,
        f"<h2>What kind of token</h2>{_table(shares, 'token class', CLASSES)}",
        f"<h2>How far two scorers agree</h2>{_overlap(shares, decisions[0].samples)}",
    ]
    page = write_page(path, "What each score keeps", "".join(parts), _STYLE)
    listed = {each.scorer: each.listed() for each in decisions}
    numbers = {"settings": settings, "scorers": listed, **shares.to_dict()}
    return page, write_text(page.with_suffix(".json"), json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", errors="replace")


def _evenly(decisions: list[Decision]) -> str:
    """How much of a draw is even, by scorer where they differ."""
    by_share: dict[str, list[str]] = {}
    for each in decisions:
        if each.scorer != "random":  # whose draws are even throughout
            by_share.setdefault(share_in_words(each.floor), []).append(each.scorer)
    if len(by_share) < 2:
        return next(iter(by_share), share_in_words(1.0))
    first, *others = (f"{share} ({escape(', '.join(scorers))})" for share, scorers in by_share.items())
    return ", ".join([first, *(text[0].lower() + text[1:] for text in others)])


_NO_LABELS = "<h2>Prompt or answer</h2><p>No token of these rows carries a label of its own, so none is told apart as prompt or answer.</p>"


def _roles(shares: ScorerShares, decision: Decision) -> str:
    is_of_labels = decision.select_from == "labels" and decision.always_keep == "none"  # the first and the last token may be without
    words = _ROLES.format(_LABELS_ALONE * is_of_labels)
    return f"<h2>Prompt or answer</h2>{words}{_table(shares, 'role', {})}"


def _common(decision: Decision) -> dict:
    """What all scorers share."""
    names = ("token_selection", "token_ratio", "select_from")
    return {name: value for name, value in decision.listed().items() if name in names}


def _scorers(shares: ScorerShares, decisions: list[Decision]) -> str:
    rows = []
    for each in decisions:
        own = each.parameters | ({"always_keep": each.always_keep} if each.always_keep != "none" else {})
        said = "no score: every token that may be kept is as likely as any other" if each.scorer == "random" else None
        words = said or EXPLANATIONS.get(each.scorer, "as named by the scorer")
        numbers = ", ".join(f"{name} {value}" for name, value in own.items())
        cells = (each.scorer, words, numbers, f"{shares.kept(each.scorer):.1f}".removesuffix(".0"))
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th class='muted'>{name}</th>" for name in ("scorer", "what it measures", "settings that it reads", "tokens kept"))
    return f"<h2>The scorers</h2><table class='scorers'><tr>{head}</tr>{''.join(rows)}</table>"


def _colour(shares: ScorerShares, who: str) -> str:
    """Greys for what scorers are compared with."""
    return {ALL: "#9aa4b0", LABELLED: "#5b6470"}.get(who) or COLOURS[1:][shares.scorers.index(who) % len(COLOURS[1:])]


def _stroke(shares: ScorerShares, who: str) -> str:
    """Of a line: what scorers are compared with is dashed, and those for whom no colour is left are dotted, each in one that a solid line has."""
    repeats = who in shares.scorers and shares.scorers.index(who) >= len(COLOURS[1:])
    dashes = "6 4" if who in (ALL, LABELLED) else "2 3" if repeats else ""
    return f"stroke='{_colour(shares, who)}' stroke-width='2'" + f" stroke-dasharray='{dashes}'" * bool(dashes)


def _table(shares: ScorerShares, kind: str, explained: dict[str, str]) -> str:
    """A row a group, a column a scorer; bars behind the numbers, on one scale for the whole table."""
    columns = {who: shares.shares(who, kind) for who in shares.columns}
    top = max(max(values.values()) for values in columns.values()) or 1.0
    body = []
    for name in columns[ALL]:
        small = f"<small>{escape(explained[name])}</small>" if name in explained else ""
        cells = "".join(_bar(values[name], top, _colour(shares, who)) for who, values in columns.items())
        body.append(f"<tr><th>{escape(name)}{small}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(who)}</th>" for who in columns)
    return f"<div class='scroll'><table class='shares'><tr><th></th>{head}</tr>{''.join(body)}</table></div>"


def _bar(share: float, top: float, colour: str) -> str:
    width = f"{100 * share / top:.1f}%"
    return f"<td style='background:linear-gradient(to right,{colour}55 {width},transparent {width})'>{100 * share:.1f} %</td>"


def _overlap(shares: ScorerShares, sampled: bool) -> str:
    how = "tokens kept by both, over those kept by either"
    if sampled:
        how = "the lower of a token's two chances, summed over all tokens, over the sum of the higher ones"
    words = (
        f"<p>1 means that two scorers keep the same tokens{', with the same chances' * sampled}, 0 that no token is kept by both. The number is {how} "
        "(the Jaccard index).</p>"
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in shares.scorers)
    rows = []
    for one in shares.scorers:
        values = [shares.overlap(one, other) for other in shares.scorers]
        cells = "".join(f"<td style='background:rgba(0,114,178,{0.5 * value:.3f})'>{value:.3f}</td>" for value in values)
        rows.append(f"<tr><th>{escape(one)}</th>{cells}</tr>")
    return f"{words}<div class='scroll'><table class='shares'><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"


# The chart: sizes in SVG units, of which the page shows as many as fit its width.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _ABOVE = 1100, 330, 60, 50, 56, 28


def _lines(shares: ScorerShares) -> str:
    """Share of the kept tokens by tenth of the text, a line a scorer."""
    columns = {who: list(shares.shares(who, "position").values()) for who in shares.columns}
    top = max(map(max, columns.values())) or 1.0
    step = (_WIDTH - _LEFT - _RIGHT) / (len(PLACES) - 1)

    def at(number: int, share: float) -> tuple[float, float]:
        return _LEFT + number * step, _ABOVE + (_HEIGHT - _ABOVE - _BOTTOM) * (1 - share / top)

    drawn = "".join(
        _line([at(*pair) for pair in enumerate(values)], _stroke(shares, who), _colour(shares, who)) for who, values in columns.items()
    )
    grid = "".join(_grid(at(0, top * part / 4)[1], top * part / 4) for part in range(5))
    below = "".join(
        f"<text x='{at(number, 0)[0]:.1f}' y='{_HEIGHT - 32}' text-anchor='middle'>{escape(name)}</text>"
        for number, name in enumerate(PLACES)
    )
    key = "".join(f"<span>{_swatch(_stroke(shares, who))}{escape(who)}</span>" for who in columns)
    named = "role='img' aria-label='share of the kept tokens by position in the text'"
    titles = "<text x='0' y='12'>share of the kept tokens; dashed: to compare with</text>"
    titles += (
        f"<text x='{_WIDTH / 2:.0f}' y='{_HEIGHT - 8}' text-anchor='middle'>position in the text, from its first token to its last</text>"
    )
    svg = f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' {named}>{titles}{grid}{below}{drawn}</svg>"
    return f"<div class='key'>{key}</div><figure>{svg}</figure>"


def _swatch(stroke: str) -> str:
    return f"<svg viewBox='0 0 24 6'><line x1='0' x2='24' y1='3' y2='3' {stroke}/></svg>"


def _line(points: list[tuple[float, float]], stroke: str, colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3.5' fill='{colour}'/>" for x, y in points)
    return f"<polyline points='{path}' fill='none' {stroke}/>{dots}"


def _grid(y: float, share: float) -> str:
    line = f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}' stroke='currentColor' opacity='.12'/>"
    return f"{line}<text x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{100 * share:.1f} %</text>"
