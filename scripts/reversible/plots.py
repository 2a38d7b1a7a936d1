"""Pictures of docs/reversible.md: bytes against depth, and what couplings change against their factor (Okabe and Ito's colours)."""

from pathlib import Path

from pictures import GIB, STYLE, pyplot, save

from reversible import bytes_tables, start_tables

METHODS = {
    "full fine-tuning": ("plain", "#000000", "s", "-"),
    "full fine-tuning, checkpointing": ("checkpointing, every layer", "#7f7f7f", "D", "-"),
    "full fine-tuning, two-level checkpointing": ("two-level checkpointing", "#E69F00", "^", "-"),
    "centred exact": ("reversible, exact, c = 1/16", "#D55E00", "o", "-"),
    "centred exact, 1/8": ("reversible, exact, c = 1/8", "#CC79A7", "o", "--"),
    "centred float": ("reversible, float", "#0072B2", "v", "-"),
}
COUPLINGS = {
    "centred": ("#D55E00", "o", "-"),
    "meft1": ("#0072B2", "s", "-"),
    "meft2": ("#56B4E9", "x", "--"),
    "meft3": ("#009E73", "^", "-"),
}
MARKED = (0.25, 0.125, 0.0625, 0.03125)


def bytes_figure(rows: list[dict], file: Path) -> None:
    """What forward leaves, and the peak of a step, against the number of layers."""
    with pyplot.rc_context(STYLE):
        figure, (kept, peak) = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True)
        for axes, name, title in ((kept, "kept_bytes", "kept after forward"), (peak, "peak_bytes", "peak of the step")):
            for method in bytes_tables.depth_methods(rows):
                label, colour, marker, line = METHODS[method]
                depths = bytes_tables.depths(rows)
                values = [bytes_tables.of(rows, bytes_tables.MODELS["roberta"], depth)[method][name] / GIB for depth in depths]
                axes.plot(depths, values, color=colour, marker=marker, linestyle=line, label=label, markersize=5)
            axes.set(xscale="log", yscale="log", xlabel="layers", title=title)
            axes.set_xticks(bytes_tables.depths(rows), labels=map(str, bytes_tables.depths(rows)))
            axes.minorticks_off()
            axes.set_yticks([0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64], labels=["1/8", "1/4", "1/2", "1", "2", "4", "8", "16", "32", "64"])
        kept.set(ylabel="GiB above weights and gradients")
        figure.legend(*kept.get_legend_handles_labels(), loc="outside right center")
        figure.suptitle("Layers of RoBERTa-large, bfloat16, 32 rows of 512 tokens", fontsize=10)
        figure.set_layout_engine("constrained")
        save(figure, file)


def start_figure(rows: list[dict], file: Path) -> None:
    """Change of the states (encoder) and of the loss (language models) against the factor, at zero adapters."""
    pairs = [(model, data) for model in start_tables.MODELS for data in start_tables.data_of(rows, model)]
    if not pairs:
        return
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(2, -(-len(pairs) // 2), figsize=(10, 6.2), squeeze=False)
        for axes, (model, data) in zip(panels.flat, pairs):
            measure = "loss_change" if any(row["loss_change"] for row in rows if row["model"] == model) else "state_change"
            for coupling, (colour, marker, line) in COUPLINGS.items():
                _curve(axes, rows, (model, data, coupling), measure, {"color": colour, "marker": marker, "linestyle": line})
            bound = start_tables.MOST_LOSS if measure == "loss_change" else start_tables.MOST_STATE
            axes.axhline(bound, color="#999999", linewidth=0.8, linestyle=":")
            axes.set(
                xscale="log",
                yscale="log",
                xlabel="factor",
                title=f"{model}, {data}\nsize of the {measure.replace('_', ' ')} (dots: {bound})",
            )
            axes.set_xticks(MARKED, labels=[start_tables.FACTORS[factor] for factor in MARKED])
            axes.minorticks_off()
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center")
        figure.set_layout_engine("constrained")
        save(figure, file)


def _curve(axes, rows: list[dict], which: tuple[str, str, str], measure: str, look: dict) -> None:
    found = [(factor, start_tables.alone(rows, *which, factor)) for factor in MARKED]
    points = [(factor, abs(row[measure]["mean"]), row[measure]["deviation"]) for factor, row in found if row and not row["overflow"]]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], label=which[2], markersize=5, **look)
