"""Write the tables and pictures of docs/ from the committed result files: `python scripts/tables.py` (--check only compares the tables).

What stands between markers follows from the files; the text around it is written by hand.
"""

import argparse
import json
import sys
from pathlib import Path

import pages
import store
from glue import page as glue_page
from gpu.tables import tables as gpu_tables
from pages import ROOT, conditions_of, mib
from quality import page as quality_page
from reversible import page as reversible_page

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("measurements", "architectures", "results", "reversible", "reversible-glue")]
METHODS = (
    "plain", "checkpointing", "checkpointing + logit-free loss", "exact streaming 256", "exact streaming 512 + checkpointing",
    "seeking 0.1", "seeking 0.3", "seeking 0.5", "seeking 1", "TokenSeek 0.1",
)  # fmt: skip
# Rung, its gradient, its name in the results of memory and of speed. Exact ones first.
LADDER = (
    ("plain Trainer", "exact", "plain", "plain"),
    ("activation checkpointing", "exact", "checkpointing", "checkpointing"),
    ("checkpointing + logit-free loss", "exact", "checkpointing + logit-free loss", "checkpointing + logit-free loss"),
    ("`sequence_chunk_size=256`", "exact", "exact streaming 256", "exact streaming, chunks of 256"),
    ("`sequence_chunk_size=192`", "exact", "exact streaming 192", "exact streaming, chunks of 192"),
    ("`sequence_chunk_size=512`, checkpointing", "exact", "exact streaming 512 + checkpointing", "exact streaming 512 + checkpointing"),
    ("`token_seeking`, ratio 0.3", "approximate", "seeking 0.3", "seeking 30 %"),
    ("`token_seeking`, ratio 0.1", "approximate", "seeking 0.1", "seeking 10 %"),
)
QUALITY_TASKS = {
    "stories-imdb": "reviews, every token labelled; stories15M, all parameters",
    "smollm2-alpaca": "instructions, prompts masked; SmolLM2-135M, LoRA",
}
QUALITY_ARMS = {
    "plain": ("plain",),
    "exact streaming": ("streaming",),
    "`token_seeking`, ratio 0.3": ("random/sample/cut/30%", "random/sample/cut/30%/labels"),
    "`token_seeking`, ratio 0.1": ("random/sample/cut/10%", "random/sample/cut/10%/labels"),
    "the same with `token_gradient=stream`": ("random/sample/stream/10%", "random/sample/stream/10%/labels"),
    "`--preset tokentune`": ("random/top/cut/10%",),
    "`--preset tokenseek`": ("combined/top/cut/10%",),
}
LADDER_SHAPES = (("Llama-3.2-1B", 2048), ("Llama-3.2-1B", 8192), ("Llama-3.1-8B", 8192))
LADDER_TIMED = {"model": "Llama-3.2-1B", "tokens": 2048, "train": "lora"}


COVERED = {
    "streaming": "exact streaming", "seeking_cut": "token seeking, cut", "seeking_stream": "token seeking, stream", "two_levels": "two levels",
    "checkpointing": "transformers' own checkpointing",
}  # fmt: skip


def rows_of(name: str) -> list[dict]:
    return store.read(ROOT / "results" / name)


def traced_rows() -> list[dict]:
    """The measurements of memory that are published: of true shapes, not of a device."""
    return [row for row in rows_of("memory.jsonl") if row["device"] == "traced"]


def memory_table(train: str) -> str:
    """Peak bytes above weights, gradients and optimizer state, by model and row length; methods side by side."""
    rows = [row for row in traced_rows() if row["train"] == train]
    measured = {(row["model"], row["tokens"], row["method"]): row["peak_bytes"] for row in rows}
    lines = [
        "| model | tokens | " + " | ".join(METHODS) + " |",
        "|---|---:|" + "---:|" * len(METHODS),
    ]
    for model, tokens in dict.fromkeys((row["model"], row["tokens"]) for row in rows):
        cells = [mib(measured.get((model, tokens, method))) for method in METHODS]
        lines.append(f"| {model} | {tokens} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ladder_table() -> str:
    """Every rung: whether its gradient is exact, its peak at the shapes of LADDER_SHAPES, and its time relative to checkpointing."""
    rows = [row for row in traced_rows() if row["train"] == "lora"]
    peaks = {(row["model"], row["tokens"], row["method"]): row["peak_bytes"] for row in rows}
    timed = [row for row in rows_of("speed.jsonl") if all(row[key] == value for key, value in LADDER_TIMED.items())]
    times = {row["method"]: row["seconds"] for row in timed}
    heads = [f"{model}, {tokens} tokens" for model, tokens in LADDER_SHAPES]
    lines = ["| | gradient | " + " | ".join(heads) + " | step time |", "|---|---|" + "---:|" * (len(heads) + 1)]
    for title, gradient, memory, speed in LADDER:
        cells = [mib(peaks.get((*shape, memory))) for shape in LADDER_SHAPES]
        time = f"{times[speed] / times['checkpointing']:.2f} x" if speed in times else "-"
        lines.append(f"| {title} | {gradient} | " + " | ".join(cells) + f" | {time} |")
    return "\n".join(lines)


def speed_table() -> str:
    """Median seconds of a step and its ratio to plain training and to checkpointing, measured in turns."""
    lines = [
        "| model | tokens | training | method | seconds a step | x plain | x checkpointing |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    rows = rows_of("speed.jsonl")
    for row in rows:
        same = [r for r in rows if all(r[key] == row[key] for key in ("model", "train", "tokens", "conditions"))]
        checkpointing = next(r["seconds"] for r in same if r["method"].startswith("checkpointing"))
        relative = "-" if row["relative"] is None else f"{row['relative']:.2f}"
        size = f"{row['conditions']['rows']} x {row['tokens']}"
        lines.append(
            f"| {row['model']}, {row['conditions']['dtype']} | {size} | {row['train']} | {row['method']} | {row['seconds']:.2f} | {relative} | {row['seconds'] / checkpointing:.2f} |"
        )
    return "\n".join(lines)


def profile_table() -> str:
    """The operators of a step by their share of its time, of each profile."""
    lines = ["| model | tokens | method | operators, by their share of the time, and calls |", "|---|---|---|---|"]
    for row in rows_of("profile.jsonl"):
        parts = [
            f"{name.removeprefix('aten::')} {share:.0%} ({count})" for name, (share, count) in row["operators"].items() if share >= 0.02
        ]
        size = f"{row['conditions']['rows']} x {row['tokens']}"
        lines.append(f"| {row['model']}, {row['conditions']['dtype']}, {row['train']} | {size} | {row['method']} | {', '.join(parts)} |")
    return "\n".join(lines)


def fits_table() -> str:
    """Every rung of `hf-memtune plan`: predicted peak, step time by operations, and what each rung changes about both."""
    rows = rows_of("ladder.jsonl")
    models = sorted({row["model"] for row in rows}, reverse=True)
    heads = [f"{model} | change | operations | change" for model in models]
    lines = ["| rung | gradient | " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (4 * len(models))]
    for name, gradient in dict.fromkeys((row["rung"], row["gradient"]) for row in rows):
        cells = [_fits_cells([row for row in rows if row["model"] == model], name) for model in models]
        lines.append(f"| {name} | {gradient} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _fits_cells(rows: list[dict], name: str) -> str:
    """GiB, and relative operations, of one rung, each with its change from the settings as given."""
    found = {row["rung"]: row for row in rows if "peak_bytes" in row}
    if name not in found:
        return "- | - | - | -"
    row, given = found[name], found["as given"]
    size, operations = row["peak_bytes"] / given["peak_bytes"] - 1, row["flops"] / given["flops"]
    return f"{row['peak_bytes'] / 2**30:.1f} GiB | {100 * size:+.0f} % | {operations:.2f} x | {100 * (operations - 1):+.0f} %"


def contract_table() -> str:
    """Predicted against measured peaks on the committed grid, by what was varied."""
    rows = rows_of("estimate.jsonl")
    lines = ["| method | runs | predicted / measured, least | most | equal to the byte |", "|---|---:|---:|---:|---:|"]
    for method in [*dict.fromkeys(row["method"] for row in rows), None]:
        ratios = [row["ratio"] for row in rows if method in (row["method"], None)]
        equal = sum(ratio == 1 for ratio in ratios)
        lines.append(f"| {method or '**all**'} | {len(ratios)} | {min(ratios):.4f} | {max(ratios):.4f} | {equal} |")
    return "\n".join(lines)


def demo_table() -> str:
    """What the last committed run of `make demo` printed."""
    file = ROOT / "results" / "demo.json"
    if not file.exists():
        return "Not measured yet."
    lines = ["| method | tokens kept | held-out loss before | after | peak MiB | seconds a step |", "|---|---:|---:|---:|---:|---:|"]
    found = json.loads(file.read_text())
    for row in found["results"]:
        share = row["tokens_kept_share"]
        kept = "all" if share is None else f"{100 * share:.1f} %"
        lines.append(
            f"| {row['method']} | {kept} | {row['loss_before']:.4f} | {row['loss_after']:.4f} | {mib(row['peak_bytes'])} | "
            f"{row['seconds_per_step']:.2f} |"
        )
    described = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["conditions"].items())
    return "\n".join([*lines, "", f"{found['caveat']}", "", f"Conditions: {described}."])


def reversible_table() -> str:
    """Peaks of the traced steps of docs/reversible.md, few methods."""
    methods = (
        "full fine-tuning", "full fine-tuning, checkpointing", "full fine-tuning, two-level checkpointing", "LoRA, checkpointing",
        "LoRA, two-level checkpointing", "centred exact", "centred float",
    )  # fmt: skip
    models = {"RoBERTa-large": "RoBERTa-large, classification", "OPT-1.3B": "OPT-1.3B, language modelling"}
    peaks = {(row["model"], row["method"]): row["peak_bytes"] for row in rows_of("reversible_memory.jsonl") if row["layers"] == 24}
    lines = ["| peak MiB of a step, 32 rows of 512 tokens | " + " | ".join(models.values()) + " |", "|---|" + "---:|" * len(models)]
    for method in methods:
        name = f"`reversible=centred`, {method.split()[1]}" if method.startswith("centred") else method
        lines.append(f"| {name} | " + " | ".join(mib(peaks.get((model, method))) for model in models) + " |")
    return "\n".join(lines)


def quality_table() -> str:
    """Held-out loss above that of plain training at the end of the finals, with bytes and seconds relative to it, by task."""
    from quality.analysis import baseline, finals

    found = rows_of("quality.jsonl")
    lines = ["| data | method | held-out loss minus plain | peak bytes | step time |", "|---|---|---:|---:|---:|"]
    for task in QUALITY_TASKS:
        groups = finals(found, task)
        by_arm = {group.arm: group for group in groups}
        for title, arm in ((title, arm) for title, arms in QUALITY_ARMS.items() for arm in arms if arm in by_arm):
            group = by_arm[arm]
            plain = baseline(groups, group)
            above = "0" if group is plain else group.minus(plain).signed
            shares = [f"{ours / theirs:.2f} x" for ours, theirs in ((group.peak_bytes, plain.peak_bytes), (group.seconds, plain.seconds))]
            lines.append(f"| {QUALITY_TASKS[task]} | {title} | {above} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def coverage_rows(**wanted: str) -> list[dict]:
    return [row for row in rows_of("coverage.jsonl") if all(row.get(name) == value for name, value in wanted.items())]


def coverage_table() -> str:
    """How many types of each kind are exact, refused, wrong or crashed under each method."""
    lines = ["| types | method | exact | refused | wrong | crashed |", "|---|---|---:|---:|---:|---:|"]
    for kind, said in {"causal": "causal", "masked": "masked", "seq2seq": "sequence-to-sequence"}.items():
        built = [row for row in coverage_rows(kind=kind) if "not_built" not in row]
        for method, name in COVERED.items():
            outcomes = [row[method]["outcome"] for row in built]
            counts = " | ".join(str(outcomes.count(outcome)) for outcome in ("exact", "refused", "wrong", "crashed"))
            lines.append(f"| {said} ({len(built)}) | {name} | {counts} |")
    return "\n".join(lines)


def streaming_types() -> str:
    """The causal types that stream, by how their layers are followed."""
    rows = [row for row in coverage_rows(kind="causal") if row.get("streaming", {}).get("outcome") == "exact"]
    ways = sorted({row["followed"] for row in rows}, key=lambda way: (way != "attention", way))
    listed = {way: ", ".join(row["type"] for row in rows if row["followed"] == way) for way in ways}
    return "\n".join(f"- **{way}** ({listed[way].count(',') + 1}): {listed[way]}" for way in ways)


def refused_types() -> str:
    """The causal types that do not stream, and what the refusal says."""
    rows = [row for row in coverage_rows(kind="causal") if row.get("streaming", {}).get("outcome") == "refused"]
    cells = [(row["type"], row["streaming"]["reason"].replace("|", "/").partition(" Train this model")[0]) for row in rows]
    return "\n".join(["| type | refused because |", "|---|---|", *(f"| {name} | {reason} |" for name, reason in cells)])


def not_built_types() -> str:
    return ", ".join(f"{row['type']} ({row['kind']})" for row in rows_of("coverage.jsonl") if "not_built" in row) + "."


SECTIONS = {
    "coverage": coverage_table,
    "coverage-streams": streaming_types,
    "coverage-refused": refused_types,
    "coverage-not-built": not_built_types,
    "coverage-conditions": lambda: conditions_of(rows_of("coverage.jsonl")),
    "quality": quality_table,
    "demo": demo_table,
    "ladder": ladder_table,
    "memory-lora": lambda: memory_table("lora"),
    "memory-full": lambda: memory_table("full"),
    "memory-conditions": lambda: conditions_of(traced_rows()),
    "fits": fits_table,
    "fits-conditions": lambda: conditions_of(rows_of("ladder.jsonl")),
    "contract": contract_table,
    "contract-conditions": lambda: conditions_of(rows_of("estimate.jsonl")),
    "gpu": lambda: gpu_tables(rows_of("gpu.jsonl")),
    "gpu-conditions": lambda: conditions_of(rows_of("gpu.jsonl")),
    "reversible": reversible_table,
    "speed": speed_table,
    "profile": profile_table,
    "profile-conditions": lambda: conditions_of(rows_of("profile.jsonl")),
    "speed-conditions": lambda: conditions_of(rows_of("speed.jsonl")),
    **quality_page.sections(*map(rows_of, ("quality.jsonl", "gradient.jsonl", "precision.jsonl"))),
    **reversible_page.sections(*map(rows_of, ("start_point.jsonl", "reversible_memory.jsonl", "inverse.jsonl"))),
    **glue_page.sections(rows_of("glue.jsonl")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    check = parser.parse_args().check
    stale = [page.name for page in PAGES if not pages.write(page, SECTIONS, check)]
    if not check:
        draw(ROOT / "docs" / "images")
    sys.exit(f"docs: {', '.join(stale)} out of date: run python scripts/tables.py" if check and stale else 0)


def draw(folder: Path) -> None:
    """Every picture of what was measured."""
    import plot_fits
    from glue import analysis as glue_analysis
    from glue import plots as glue_plots
    from quality import analysis, plots, records
    from reversible import plots as reversible_plots

    plot_fits.draw_ladder(rows_of("ladder.jsonl"), folder / "fits-ladder.png")
    plot_fits.draw_contract(rows_of("estimate.jsonl"), folder / "fits-contract.png")
    found = records.latest(rows_of("quality.jsonl"))
    for task in quality_page.TASKS:
        plots.finals_figure(analysis.finals(found, task), folder / f"quality-{task}.png")
    plots.screening_figure(analysis.screened(found), folder / "quality-screening.png")
    glue_plots.accuracy_figure(glue_analysis.groups_of(records.latest(rows_of("glue.jsonl"))), folder / "reversible-glue.png")
    reversible_plots.bytes_figure(rows_of("reversible_memory.jsonl"), folder / "reversible-memory.png")
    reversible_plots.start_figure(rows_of("start_point.jsonl"), folder / "reversible-start.png")


if __name__ == "__main__":
    main()
