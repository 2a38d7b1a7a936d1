"""Pictures of docs/what-fits.md: the ladder of a plan by category, and predicted over measured bytes."""

from pathlib import Path

from pictures import GIB, pyplot, save

COLOURS = {
    "weights": "#4d4d4d", "gradients": "#b2182b", "optimizer_state": "#ef8a62", "saved_activations": "#2166ac", "stored_kv": "#67a9cf",
    "temporaries": "#c7c7c7", "logits": "#7fbf7b", "batch": "#000000",
}  # fmt: skip


def draw_ladder(rows: list[dict], path: Path) -> None:
    """The peak of every rung by category, one panel a model."""
    rows = [row for row in rows if "peak_bytes" in row]
    models = sorted({row["model"] for row in rows}, reverse=True)
    figure, axes = pyplot.subplots(1, len(models), figsize=(6.2 * len(models), 4.6), sharey=True, layout="constrained")
    for axis, model in zip(axes, models):
        of_model = [row for row in rows if row["model"] == model]
        for number, row in enumerate(of_model):
            left = 0.0
            for category, colour in COLOURS.items():
                size = row["phases"][row["peak_phase"]][category] / GIB
                axis.barh(number, size, left=left, color=colour, height=0.72)
                left += size
            axis.text(left, number, f" {left:.1f}", va="center", fontsize=8)
        axis.set_yticks(range(len(of_model)), [row["rung"] for row in of_model], fontsize=8)
        axis.set_title(model, fontsize=10)
        axis.set_xlabel("GiB at the peak of the step")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, [name.replace("_", " ") for name in COLOURS], loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save(figure, path, dpi=130)


def draw_contract(rows: list[dict], path: Path) -> None:
    """Predicted over measured bytes of every run of the grid, by method; the band is the contract."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axis = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    axis.axhspan(0, 5, color="#e5f5e0", zorder=0)
    axis.axhline(0, color="#333333", linewidth=0.8)
    for number, method in enumerate(methods):
        over = [100 * (row["ratio"] - 1) for row in rows if row["method"] == method]
        spread = [number + 0.06 * (place - len(over) / 2) / max(1, len(over) / 8) for place in range(len(over))]
        axis.plot(spread, over, "o", markersize=4, color="#2166ac", alpha=0.7)
    axis.set_xticks(range(len(methods)), methods, rotation=35, ha="right", fontsize=8)
    axis.set_ylabel("predicted over measured peak, %")
    axis.set_ylim(-0.5, 5.5)
    axis.set_title(f"{len(rows)} runs on a CPU; green: never under, at most 5 % over", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path, dpi=130)
