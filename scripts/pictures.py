"""Pictures of what was measured: one style, files that are the same bytes from the same numbers. Colours are Okabe and Ito's, but for scorers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from learning.arms import ADAPTERS, EVERY_LABEL, FLAGS, FULL, LORA, is_seeking, parts_of
from learning.groups import Group, finals
from learning.plans import TASKS
from looks import PATHS, colour_of, draw_interval, draw_sample, in_order, key_below, look, named_lines, scorer_of
from pages import GIB, MIB, Rows, by, mib, of, unique
from tables_commands import groups_of
from tables_races import Raced, race_of
from tables_reversible import BOUNDS, FACTORS, START, TWO_LEVELS, alone, over_depth
from tables_screening import screened

from hf_memtune.files import whole

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  the backend is chosen first: there may be no display

STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 9, "legend.frameon": False,
}  # fmt: skip
LINED = STYLE | {"ytick.major.size": 0}  # of pictures with a line for each arm
BARE = {"axes.spines.top": False, "axes.spines.right": False}
PEAK = "peak MiB of a step, above weights and optimizer state"
BLACK, GREY, BLUE, SKY, GREEN, YELLOW, ORANGE, RED, PINK = (
    "#000000", "#7f7f7f", "#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7",
)  # fmt: skip


def draw(rows_of: Callable[[str], Rows], folder: Path) -> None:
    """Every picture. rows_of: of a result file."""
    quality = rows_of("quality")
    draw_ladder(rows_of("ladder"), folder / "fits-ladder.png")
    draw_contract(rows_of("estimate"), folder / "fits-contract.png")
    for task in TASKS:
        draw_finals(finals(quality, task), folder / f"quality-{task}.png")
        if race := race_of(quality, task):
            draw_race(race, folder / f"race-{task}.png")
    draw_screening(screened(quality), folder / "quality-screening.png")
    if estimators := rows_of("estimator"):
        draw_estimators(estimators, folder / "estimator.png")
    if scorers := rows_of("scorers"):
        draw_scorers(scorers, folder / "scorers.png")
    draw_accuracy(groups_of(rows_of("glue"), FLAGS), folder / "reversible-glue.png")
    draw_bytes(rows_of("reversible_memory"), folder / "reversible-memory.png")
    draw_start(rows_of("start_point"), folder / "reversible-start.png")


def draw_estimators(rows: Rows, file: Path) -> None:
    """The error of every way to choose tokens, a dot, and the bias in it, a ring: a line a way, a panel a ratio. Small: before training."""
    rows = [row | way_to_choose(row["arm"]) for row in rows]
    ratios = [ratio for ratio in ("10%", "30%") if of(rows, ratio=ratio)]
    names = by(rows, "way", "name")
    ways = sorted(names, key=lambda way: (in_order(way[0]), *way[1:]))
    size = (2.6 + 4.4 * len(ratios), 1.4 + 0.21 * len(ways))
    with panels(file, 1, len(ratios), size, LINED, sharey=True, layout="constrained") as (figure, all_axes):
        for axes, ratio in zip(all_axes, ratios):
            for row in (row for row in rows if row["ratio"] in (ratio, "100%")):
                draw_estimator(axes, ways.index(row["way"]), row)
            axes.set(title=f"{ratio.replace('%', ' %')} of the tokens", xlabel="size, relative to the gradient", xlim=(0, None))
        named_lines(all_axes[0], [names[way] for way in ways], pad=9)
        key = {"error (rms)": {"markersize": 5}, "bias, the part of it that averaging leaves": {"markersize": 9, "markerfacecolor": "none"}}
        key["small, above: before training"] = {"markersize": 3}
        key_below(figure, [style | {"label": name} for name, style in key.items()])


def way_to_choose(arm: str) -> dict:
    """Of an arm of the study of estimators its ratio, the rest in the order of the lines (scorer, path, selection, pool), and that rest as a name."""
    scorer, selection, path, ratio, pool = parts_of(EVERY_LABEL if arm == "labelled/cut" else arm)
    return {"ratio": ratio, "way": (scorer, path, selection, pool), "name": arm.replace(f"/{ratio}", "")}


def draw_estimator(axes, line: float, row: dict) -> None:
    """Error and bias of one way at one point of training."""
    size, line = (1.0, line + 0.1) if row["point"] == "end" else (0.6, line - 0.25)
    style = {"color": colour_of(row["way"][0]), "clip_on": False}
    axes.plot([row["bias"], row["rms"]], [line, line], linewidth=1.4 * size, **style)
    axes.plot([row["rms"]], [line], "o", markersize=5 * size, **style)
    axes.plot([row["bias"]], [line], "o", markersize=9 * size, markerfacecolor="none", **style)


KINDS = (BLUE, SKY, YELLOW, ORANGE, GREY, PINK)  # of tokens


def draw_scorers(rows: Rows, file: Path) -> None:
    """What kinds of tokens each scorer keeps, beside all tokens; and how far two scorers keep the same ones."""
    names = [row["scorer"] for row in rows]
    shown = [("all tokens", rows[0]), *zip(names, rows)]
    with panels(file, 1, 2, (11, 4.4), {**STYLE, "axes.grid": False}) as (figure, (left, right)):
        from_left = [0.0] * len(shown)
        for kind, colour in zip(rows[0]["shares"]["token class"]["all tokens"], KINDS):
            parts = [100 * row["shares"]["token class"][who][kind] for who, row in shown]
            left.barh(range(len(shown)), parts, left=from_left, color=colour, label=kind)
            from_left = [start + part for start, part in zip(from_left, parts)]
        for place, (who, row) in enumerate(shown):
            answer = next(iter(row["shares"]["role"][who].values()))
            left.text(101, place, f"{answer:.0%} in the answer", va="center", fontsize=8)
        left.set_yticks(range(len(shown)), [who for who, _ in shown])
        left.invert_yaxis()
        left.set(xlim=(0, 130), xticks=range(0, 101, 20), xlabel="% of the tokens that are kept", title="Kinds of tokens")
        overlap = [[row["overlap"][other] for other in names] for row in rows]
        right.imshow(overlap, vmin=0, vmax=1, cmap="Blues")
        for y, line in enumerate(overlap):
            for x, value in enumerate(line):
                right.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else BLACK)
        right.set_xticks(range(len(names)), names, rotation=35, ha="right")
        right.set_yticks(range(len(names)), names)
        right.set(title="How far two keep the same tokens (Jaccard index)")
        legend_below(figure, *left.get_legend_handles_labels(), columns=6)


@contextmanager
def panels(file: Path, rows: int, columns: int, size: tuple[float, float], style: dict = STYLE, dpi: int = 110, **more) -> Iterator[tuple]:
    """A figure and the list of its axes, which is saved in the end."""
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, **more)
        yield figure, [*axes.flat]
        with whole(file) as partial:
            figure.savefig(partial, format="png", dpi=dpi, metadata={"Software": None})
        pyplot.close(figure)


def legend_below(figure, handles: list, names: list[str] | None = None, columns: int = 4, **more) -> None:
    lines = -(-len(handles) // columns)
    figure.tight_layout(rect=(0, 0.04 + 0.035 * lines, 1, 1))
    figure.legend(handles, names or [handle.get_label() for handle in handles], loc="lower center", ncol=columns, fontsize=8.5, **more)


def log_axes(axes, ticks: dict[float, str], **names) -> None:
    axes.set(xscale="log", yscale="log", **names)
    axes.set_xticks(list(ticks), labels=list(ticks.values()))
    axes.minorticks_off()


# --- what fits

CATEGORIES = {
    "weights": "#4d4d4d", "gradients": "#b2182b", "optimizer_state": "#ef8a62", "saved_activations": "#2166ac", "stored_kv": "#67a9cf",
    "temporaries": "#c7c7c7", "logits": "#7fbf7b", "batch": "#000000",
}  # fmt: skip
SEEN = 0.001  # of the longest bar: less of a category is not to be seen


def draw_ladder(rows: Rows, file: Path) -> None:
    """The peak of every rung by category, one panel a model."""
    rows = [row | {"sizes": row["phases"][row["peak_phase"]]} for row in rows if "peak_bytes" in row]
    models = sorted(unique(rows, "model"), reverse=True)
    longest = {model: max(sum(row["sizes"].values()) for row in of(rows, model=model)) for model in models}
    with panels(file, 1, len(models), (6.2 * len(models), 4.6), BARE, 130, sharey=True, layout="constrained") as (figure, all_axes):
        for axes, model in zip(all_axes, models):
            of_model = of(rows, model=model)
            for number, row in enumerate(of_model):
                left = 0.0
                for category, colour in CATEGORIES.items():
                    size = row["sizes"][category] / GIB
                    axes.barh(number, size, left=left, color=colour, height=0.72)
                    left += size
                axes.text(left, number, f" {left:.1f}", va="center", fontsize=8)
            axes.set(xlim=(0, 1.1 * longest[model] / GIB), xlabel="GiB at the peak of the step")
            axes.set_yticks(range(len(of_model)), [row["rung"] for row in of_model], fontsize=8)
            axes.set_title(model, fontsize=10)
        all_axes[0].invert_yaxis()
        seen = [name for name in CATEGORIES if any(row["sizes"][name] > SEEN * longest[row["model"]] for row in rows)]
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=CATEGORIES[name]) for name in seen]
        names = [name.replace("kv", "K/V").replace("_", " ") for name in seen]
        figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def draw_contract(rows: Rows, file: Path) -> None:
    """Predicted over measured bytes of every run of the grid, by method; the band is the contract."""
    methods, found = unique(rows, "method"), [100 * (row["ratio"] - 1) for row in rows]
    within = sum(0 <= over <= 5 for over in found)
    with panels(file, 1, 1, (8, 4.2), BARE, 130, layout="constrained") as (_, (axes,)):
        axes.axhspan(0, 5, color="#e5f5e0", zorder=0)
        axes.axhline(0, color="#333333", linewidth=0.8)
        for number, method in enumerate(methods):
            over = [100 * (row["ratio"] - 1) for row in of(rows, method=method)]
            spread = [number + 0.06 * (place - len(over) / 2) / max(1, len(over) / 8) for place in range(len(over))]
            axes.plot(spread, over, "o", markersize=4, color="#2166ac", alpha=0.7)
        axes.set_xticks(range(len(methods)), methods, rotation=35, ha="right", fontsize=8)
        axes.set(ylabel="predicted over measured peak, %", ylim=(min(-0.5, *found) - 0.1, max(5.5, *found) + 0.1))
        axes.set_title(f"{len(rows)} runs on a CPU; green: never under, at most 5 % over, as are {within}", fontsize=10)


# --- how well methods learn

# Reversible arms end near one another: markers tell them apart where they overlap
GLUE = {
    FULL: (BLACK, "o"), LORA: (BLUE, "o"), ADAPTERS: (GREEN, "o"), "MEFT1 float": (ORANGE, "s"), "MEFT1 exact": (RED, "^"),
    "centred exact": (PINK, "v"),
}  # fmt: skip


def draw_finals(groups: list[Group], file: Path) -> None:
    """Held-out loss against steps and against seconds; and at the end, a line an arm with its bytes, the fewest on top."""
    groups = sorted((group for group in groups if group.ended), key=lambda group: (mebibytes(group), group.at(-1).mean))
    with panels(file, 1, 3, (14.5, max(4, 1 + 0.28 * len(groups))), layout="constrained") as (_, (steps, seconds, ends)):
        for line, group in [*enumerate(groups)][::-1]:  # plain training, which has the most bytes, below what equals it
            places, losses = zip(*((step, loss.mean) for step, loss in group.curve()))
            for axes, factor in ((steps, 1.0), (seconds, group.seconds)):
                axes.plot([step * factor for step in places], losses, **look(group.arm))
            draw_interval(ends, line, group.at(-1), **look(group.arm))
            draw_sample(ends, line, look(group.arm))
        loss = "held-out loss" + ("" if groups and groups[0].any_run["accuracies"] else " of all labelled tokens")
        alone = all(group.alone for group in groups)
        steps.set(xlabel="optimizer steps", ylabel=loss)
        seconds.set(xlabel="seconds of training" + ("" if alone else " (other work ran beside it)"))
        seconds.sharey(steps)
        seconds.tick_params(labelleft=False)
        named_lines(ends, [f"{group.arm}: {mib(group.peak_bytes)} MiB" for group in groups], pad=44)
        ends.set(xlabel=f"{loss}, at the end")
        ends.set_title(f"beside each: {PEAK}", loc="right")
        # the first measured losses are far above the last, which are what is compared: a narrow view of all that came after
        later = [loss.mean for group in groups for _, loss in group.curve()[1:]]
        room = 0.08 * (max(later) - min(later)) or 0.01
        steps.set_ylim(min(later) - room, max(later) + room)


def mebibytes(group: Group) -> int:
    """As the tables say them: arms with as many are alike."""
    return round(group.peak_bytes / MIB)


def draw_race(race: list[Raced], file: Path) -> None:
    """What was learned in the seconds of plain training, and in as many steps: a line an arm that was raced, the fewest bytes on top."""
    race = sorted((arm for arm in race if arm.same_seconds), key=lambda arm: (mebibytes(arm.group), arm.same_seconds.mean))
    with panels(file, 1, 1, (9, 1.5 + 0.4 * len(race)), LINED, layout="constrained") as (figure, (axes,)):
        axes.axvline(0, color="#999999", linewidth=0.8)
        for line, arm in enumerate(race):
            colour = colour_of(scorer_of(arm.group.arm))
            for loss, place, fill in ((arm.same_seconds, line - 0.14, colour), (arm.same_steps, line + 0.14, "white")):
                if loss:
                    draw_interval(axes, place, loss, color=colour, marker="o", markersize=6, markerfacecolor=fill)
        named_lines(axes, [f"{arm.label}: {mib(arm.group.peak_bytes)} MiB" for arm in race])
        axes.set(xlabel="held-out loss, above plain training", title=f"beside each: {PEAK}")
        key_below(figure, [{"label": "in the seconds of plain training"}, {"label": "in its steps", "markerfacecolor": "white"}])


def draw_screening(runs: Rows, file: Path) -> None:
    """The loss of every screened arm: a line a way to choose tokens, a marker a path of the gradient, with its bytes; a panel a batch size."""
    runs = [run | choice_of(run["arm"]) for run in runs if math.isfinite(run["loss"])]
    sizes, ways = sorted(unique(runs, "rows")), sorted(unique(runs, "way"), key=lambda way: (in_order(way[0]), *way[1:]))
    size = (2.6 + 4.6 * len(sizes), 1.8 + 0.25 * len(ways))
    with panels(file, 1, len(sizes), size, LINED, sharey=True, layout="constrained") as (_, all_axes):
        for axes, rows in zip(all_axes, sizes):
            for path, style in PATHS.items():
                if drawn := of(runs, rows=rows, path=path):
                    draw_path(axes, drawn, ways, {**style, "linestyle": "none"})
            axes.set(xlabel="held-out loss at the end", title=f"batches of {rows} rows")
            axes.legend(title=PEAK, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8.5, title_fontsize=8.5)
        named_lines(all_axes[0], ["/".join(filter(None, way)) for way in ways])


def choice_of(arm: str) -> dict:
    """How an arm chooses tokens, and the path of its gradient."""
    if not is_seeking(arm):
        return {"way": (arm,), "path": "all tokens"}
    scorer, selection, path, ratio, pool = parts_of(arm)
    return {"way": (scorer, selection, ratio, "labels" if pool == "labels" else ""), "path": path}


def draw_path(axes, runs: Rows, ways: list[tuple], style: dict) -> None:
    """All arms of one path, each on the line of its way; and the path in the legend."""
    for run in runs:
        axes.plot([run["loss"]], [ways.index(run["way"])], color=colour_of(run["way"][0]), **style)
    bytes_of = dict.fromkeys(mib(find(run["peak_bytes"] for run in runs)) for find in (min, max))
    axes.plot([], [], color=GREY, label=f"{runs[0]['path']}: {' to '.join(bytes_of)}", **style)


def draw_accuracy(groups: list[Group], file: Path) -> None:
    """Accuracy against bytes: a small hollow point a seed, a large one the mean. Intervals are in the table."""
    with panels(file, 1, 1, (8, 4.8), STYLE | {"font.size": 10}) as (figure, (axes,)):
        for group in (group for group in groups if group.ended):
            colour, marker = GLUE[group.arm]
            style = {"linestyle": "none", "color": colour, "marker": marker}
            seeds = [(run["peak_bytes"] / MIB, run["accuracies"][-1][1]) for run in group.ended.values()]
            axes.plot(*zip(*seeds), **style, markerfacecolor="none", markersize=5)
            axes.plot([group.peak_bytes / MIB], [group.at(-1, "accuracies").mean], label=group.arm, markersize=10, alpha=0.75, **style)
        axes.set(xlabel=PEAK, xlim=(0, None), ylabel="accuracy on held-out rows (chance: 0.5)")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="small: one seed\nlarge: mean")
        figure.tight_layout()


# --- reversible adapters

DEPTH_METHODS = {
    "full fine-tuning": ("plain", BLACK, "s", "-"),
    "full fine-tuning, checkpointing": ("checkpointing, every layer", GREY, "D", "-"),
    TWO_LEVELS: ("two-level checkpointing", ORANGE, "^", "-"),
    "centred exact": ("reversible, exact, c = 1/16", RED, "o", "-"),
    "centred exact, 1/8": ("reversible, exact, c = 1/8", PINK, "o", "--"),
    "centred float": ("reversible, float", BLUE, "v", "-"),
}
COUPLINGS = {"centred": (RED, "o", "-"), "meft1": (BLUE, "s", "-"), "meft2": (SKY, "x", "--"), "meft3": (GREEN, "^", "-")}
MARKED = {factor: name for factor, name in FACTORS.items() if factor != 0.1}


def draw_bytes(rows: Rows, file: Path) -> None:
    """What forward leaves, and the peak of a step, against the number of layers."""
    rows, depths = over_depth(rows)
    with panels(file, 1, 2, (10, 4.2), sharey=True) as (figure, all_axes):
        for axes, name, title in zip(all_axes, ("kept_bytes", "peak_bytes"), ("kept after forward", "peak of the step")):
            sizes = by(rows, "method layers", name)
            for method in unique(rows, "method"):
                label, colour, marker, line = DEPTH_METHODS[method]
                values = [sizes[method, depth] / GIB for depth in depths]
                axes.plot(depths, values, color=colour, marker=marker, linestyle=line, label=label, markersize=5)
            log_axes(axes, {depth: str(depth) for depth in depths}, xlabel="layers", title=title)
            axes.set_yticks([2.0**n for n in range(-3, 7)], labels=["1/8", "1/4", "1/2", *(str(2**n) for n in range(7))])
        all_axes[0].set(ylabel="GiB above weights and gradients")
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right center")
        figure.suptitle("Layers of RoBERTa-large, bfloat16, 32 rows of 512 tokens", fontsize=10)
        figure.set_layout_engine("constrained")


def draw_start(rows: Rows, file: Path) -> None:
    """Change of the states (encoder) and of the loss (language models) against the factor, at zero adapters."""
    pairs = [pair for model in START for pair in unique(of(rows, model=model), "model data")]
    with panels(file, 2, -(-len(pairs) // 2), (10, 6.2)) as (figure, all_axes):
        for axes, (model, data) in zip(all_axes, pairs):
            measure = "loss_change" if any(row["loss_change"] for row in of(rows, model=model)) else "state_change"
            for coupling, (colour, marker, line) in COUPLINGS.items():
                found = {factor: alone(rows, factor, model=model, data=data, coupling=coupling) for factor in MARKED}
                points = {factor: abs(row[measure]["mean"]) for factor, row in found.items() if row and not row["overflow"]}
                style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5}
                axes.plot(list(points), list(points.values()), label=coupling, **style)
            axes.axhline(BOUNDS[measure], color="#999999", linewidth=0.8, linestyle=":")
            title = f"{model}, {data}\nsize of the {measure.replace('_', ' ')} (dots: {BOUNDS[measure]})"
            log_axes(axes, MARKED, xlabel="factor", title=title)
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right center")
        figure.set_layout_engine("constrained")
