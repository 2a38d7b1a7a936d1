"""Token maps as a picture, drawn with matplotlib's object interface, which leaves pyplot and rcParams alone."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from textwrap import wrap

from hf_memtune.files import whole
from hf_memtune.visualization.decision import as_shown, decisions_of
from hf_memtune.visualization.panels import Panel, panels
from hf_memtune.visualization.token_map import TokenMap, count, percent, runs, visible, weights_in_words

# All lengths in inches, measured from the top left corner.
WIDTH, MARGIN, GAP, DPI = 15.0, 0.35, 0.3, 120
FONT_POINTS, CELL, LINE = 9, 9.03 / DPI, 0.2  # at 120 dpi this monospaced cell is 9 pixels wide
HEADER, TITLE, CHART = 1.25, 1.1, 1.9  # a title has room for headings of three lines
MOST_PANELS, COLUMNS = 4, 200  # views side by side; characters of a line of the header
INK, MUTED = "#1b1f24", "#5b6470"
MISSING = "drawing needs matplotlib, which is not installed; run: pip install -e '.[viz]'"


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

    Each map shows the chance of being kept, where there is one, and its first scores, up to four views:
    the text (its first ``max_tokens`` tokens) coloured by chance or by rank, and below it all values
    against position. ``settings`` (name -> value), and how the tokens were chosen, are printed on top.
    Characters that the font lacks are drawn as a box.

    Raises ValueError for no maps or a picture taller than PNG viewers open; ImportError without
    matplotlib.
    """
    if not maps:
        raise ValueError("write_token_map_png: maps is empty, expected at least one TokenMap")
    views = [panels(m)[:MOST_PANELS] for m in maps]
    width = (WIDTH - 2 * MARGIN + GAP) / max(map(len, views)) - GAP
    placed = [place(m.tokens[:max_tokens], int(width / CELL)) for m in maps]
    heights = [TITLE + LINE * (cells[-1][2] + 3) + CHART for cells in placed]
    said = _header(maps, settings)
    top = HEADER + LINE * (len(said) - 1)
    height = top + sum(heights)
    if height * DPI > 65_000:
        raise ValueError(
            f"write_token_map_png: {len(maps)} maps need {height * DPI:.0f} pixels of height, "
            "expected at most 65000; pass fewer maps or a smaller max_tokens"
        )
    figure = new_figure(WIDTH, height)
    _draw_header(figure, said)
    for token_map, shown, cells, used in zip(maps, views, placed, heights, strict=True):
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


def _header(maps: list[TokenMap], settings: dict) -> list[str]:
    """Lines below the title: the settings, and how the tokens were chosen."""
    words = [" ".join(each.said()) for each in decisions_of(maps)]
    listed = [settings, *(each.listed() for each in decisions_of(maps))]
    rows = ["   ".join(f"{name}: {as_shown(value)}" for name, value in some.items()) for some in listed]
    return [line for text in [*rows, *words] for line in wrap(text, COLUMNS)] or [""]


def _draw_header(figure, said: list[str]) -> None:
    key = (
        "Boxed, bold, underlined: kept token (learned from).   Dotted underline: carries a training "
        "label.   Deeper colour: higher rank in this text (deepest = the highest tenth), or a higher chance."
    )
    _write(figure, 0.45, "Which tokens training keeps, and why", 17, INK, weight="bold")
    _write(figure, 0.8, key, 10.5, INK)
    for number, line in enumerate(said):
        _write(figure, 1.08 + LINE * number, line, 9.5, MUTED)


def _write(figure, inches_from_top: float, text: str, size: float, colour: str, **style) -> None:
    y = 1 - inches_from_top / figure.get_figheight()
    style |= {"fontsize": size, "color": colour, "parse_math": False, "family": "DejaVu Sans"}
    figure.text(MARGIN / WIDTH, y, _drawable(text), **style)


def _draw_map(figure, token_map: TokenMap, views: list[Panel], cells, frame) -> None:
    top, width, max_tokens = frame
    _write(figure, top + 0.25, token_map.title, 13, INK, weight="bold")
    _write(figure, top + 0.5, _numbers(token_map, max_tokens), 10.5, INK)
    lines = cells[-1][2] + 1
    for number, panel in enumerate(views):
        left, full = MARGIN + number * (width + GAP), figure.get_figheight()

        def axes_at(offset, height, inset=0.0, left=left, full=full):
            low = full - top - offset - height
            box = ((left + inset) / WIDTH, low / full, (width - inset) / WIDTH, height / full)
            return figure.add_axes(box)

        _draw_text(axes_at(TITLE + LINE, lines * LINE), token_map, panel, cells)
        _draw_chart(axes_at(TITLE + (lines + 2) * LINE, CHART - 0.6, 0.5), token_map, panel)


def _numbers(token_map: TokenMap, max_tokens: int) -> str:
    """What is below the title of a map: its counts, what a kept token counts for where that is not 1 for all, and how much of the text is drawn."""
    n, kept, labelled, both = count([token_map])
    said = [
        f"{n} tokens, {kept} kept ({percent(kept, n)}).",
        f"Carrying a label: {percent(both, kept)} of the kept, {percent(labelled, n)} of all tokens.",
    ]
    if token_map.chances:
        said.append(f"A kept token counts {weights_in_words(token_map)} times in the loss.")
    if n > max_tokens:
        said.append(f"Text: first {max_tokens} of {n} tokens; plots: all.")
    return "   ".join(said)


def _draw_text(axes, token_map: TokenMap, panel: Panel, cells) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    hue = [part / 255 for part in panel.hue]
    axes.set(xlim=(0, axes.get_position().width * WIDTH / CELL), ylim=(cells[-1][2] + 1, 0))
    axes.axis("off")
    heading = wrap(f"{panel.name}: {panel.explained}", int(axes.get_position().width * WIDTH / CELL))
    axes.set_title("\n".join(map(_drawable, heading)), fontsize=9.5, loc="left", color=INK, parse_math=False)
    boxes = PatchCollection(
        [Rectangle((x, y + 0.06), len(text), 0.88) for _, text, y, x in cells],
        facecolors=[(*hue, panel.strength[i]) for i, *_ in cells],
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


def _draw_chart(axes, token_map: TokenMap, panel: Panel) -> None:
    values, logarithmic = panel.axis
    hue = tuple(part / 255 for part in panel.hue)
    kept = [i for i, flag in enumerate(token_map.kept) if flag]
    axes.plot(range(len(values)), values, color=hue, linewidth=0.9)
    axes.scatter(kept, [values[i] for i in kept], s=22, color=[hue], edgecolors=INK, zorder=3)
    for start, stop in runs(token_map.labelled):
        axes.axvspan(start - 0.5, stop - 0.5, ymax=0.04, color=MUTED, linewidth=0)
    axes.set_yscale("log" if logarithmic else "linear")
    axes.set_xlabel("\n".join(filter(None, ["position (dots: kept; bar: labelled)", panel.scale])), fontsize=8.5, color=INK)
    axes.set_ylabel("chance" if panel.from_zero else "score", fontsize=8.5, color=INK)
    if panel.from_zero:
        axes.set_ylim(0, 1.05 * max(values) or 1)  # chances of a few percent would lie flat below 1
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
