"""Write the tables and pictures of docs/ from the committed result files: `python scripts/tables.py` (--check only compares the tables).

What stands between markers follows from the files; the text around it is written by hand.
"""

import argparse
import json
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from statistics import median

import pages
import store
import tables_commands
import tables_few_shot
import tables_gradients
import tables_learning
import tables_longest
import tables_races
import tables_reversible
import tables_screening
from gpu.tables import tables as gpu_tables
from learning.plans import PLANS, latest
from methods import LOGIT_FREE
from pages import GIB, ROOT, Cell, Rows, by, conditions_of, listing, mib, of, pivot, table, unique

PAGES = (
    "README",
    *(f"docs/{name}" for name in ("measurements", "architectures", "results", "reversible", "reversible-glue", "evaluation", "what-fits")),
)
OTHERS = (  # that make the rest of the tables
    tables_commands, tables_few_shot, tables_gradients, tables_learning, tables_longest, tables_races, tables_reversible, tables_screening,
)  # fmt: skip
METHODS = (
    "plain", "checkpointing", "checkpointing + fused loss", LOGIT_FREE, "exact streaming 256", "exact streaming 512 + checkpointing",
    "exact streaming 512 + checkpointing, by chunks", *(f"seeking {ratio} + checkpointing" for ratio in ("0.1", "0.3", "0.5", "1")),
    "TokenSeek 0.1 + checkpointing",
)  # fmt: skip
# Rung, its gradient, and its method in the results of memory and of speed. Exact ones first.
LADDER = (
    ("plain Trainer", "exact", "plain"),
    ("activation checkpointing", "exact", "checkpointing"),
    ("the same, `sequence_chunk_size` as long as the row", "exact", LOGIT_FREE),
    ("`sequence_chunk_size=256`", "exact", "exact streaming 256"),
    ("`sequence_chunk_size=192`", "exact", "exact streaming 192"),
    ("`sequence_chunk_size=512`, checkpointing", "exact", "exact streaming 512 + checkpointing"),
    ("the same, `stream_order=chunks`", "exact", "exact streaming 512 + checkpointing, by chunks"),
    ("the same by layers, `keep_attention_outputs`", "exact", "exact streaming 512 + checkpointing, attention kept"),
    ("`token_seeking`, ratio 0.3", "approximate", "seeking 0.3"),
    ("`token_seeking`, ratio 0.1", "approximate", "seeking 0.1"),
)
RATIOS = (
    ("streaming, chunks of 512", "exact streaming 512"),
    ("the same with checkpointing, by layers", "exact streaming 512 + checkpointing"),
    ("the same, `keep_attention_outputs`", "exact streaming 512 + checkpointing, attention kept"),
    ("with checkpointing, by chunks", "exact streaming 512 + checkpointing, by chunks"),
    ("token seeking, 10 %", "seeking 0.1"),
)
LADDER_SHAPES = (("Llama-3.2-1B", 2048), ("Llama-3.2-1B", 8192), ("Llama-3.1-8B", 8192))
LADDER_TIMED = {"model": "Llama-3.2-1B", "tokens": 2048, "train": "lora"}
KINDS = {"causal": "causal", "masked": "masked", "seq2seq": "sequence-to-sequence"}
COVERED = {
    "streaming": "exact streaming", "by_layers": "exact streaming by layers", "seeking_cut": "token seeking, cut", "seeking_stream": "token seeking, stream",
    "two_levels": "two levels", "checkpointing": "transformers' own checkpointing",
}  # fmt: skip


def rows_of(name: str) -> Rows:
    """Of a result file; where it is a study of how methods learn, the last record of each run counts."""
    rows = store.read(ROOT / "results" / f"{name}.jsonl")
    return latest(rows) if name in PLANS else rows


def traced(**wanted) -> Rows:
    """The measurements of memory that are published: of true shapes, not of a device."""
    return of(rows_of("memory"), device="traced", **wanted)


def memory_table(train: str) -> str:
    """Peak bytes above weights, gradients and optimizer state, by model and row length; methods side by side."""
    return table(["model", "tokens", *METHODS], pivot(traced(train=train), "model tokens", "method", METHODS, "peak_bytes", mib))


def ladder_table() -> str:
    """Every rung: whether its gradient is exact, its peak at the shapes of LADDER_SHAPES, and its time relative to checkpointing."""
    peaks = by(traced(train="lora"), "model tokens method", "peak_bytes")
    (run,) = (run for run in timed_runs() if LADDER_TIMED.items() <= run[0].items())
    times = by(compared(run), "method", "more")
    lines = [
        [title, gradient, *(mib(peaks.get((*shape, method))) for shape in LADDER_SHAPES), Cell().format("{0:.2f} x", times[method]) if method in times else "-"]
        for title, gradient, method in LADDER
    ]  # fmt: skip
    return table(["", "gradient", *(f"{model}, {tokens} tokens" for model, tokens in LADDER_SHAPES), "step time"], lines, "ll")


STEP = {"model": "{model}, {conditions[dtype]}", "tokens": "{conditions[rows]} x {tokens}"}


def timed_runs() -> list[Rows]:
    """The last run of each step: methods that were timed in turns."""
    runs: dict[tuple, Rows] = {}
    for row in rows_of("speed"):
        run = runs.setdefault((row["model"], row["train"], row["conditions"]["rows"], row["tokens"]), [])
        if run and run[-1]["conditions"] != row["conditions"]:
            run.clear()  # a later one follows
        run.append(row)
    return [runs[step] for step in sorted(runs)]


def speed_table() -> str:
    """Median seconds of a step, and as parts of those of plain training and of checkpointing, where the run had them."""
    columns = STEP | {"training": "{train}", "method": "{method}", "seconds a step": "{seconds:.2f}", "x plain": "{relative:.2f}"}
    columns |= {"x checkpointing": "{more:.2f}", "x the same, logit-free": "{logit_free:.2f}"}
    return listing([row for run in timed_runs() for row in compared(run)], columns, "llll")


def ratios_table() -> str:
    """The last run on each long row: seconds as parts of those of checkpointing with the logit-free loss."""
    runs = [run for run in timed_runs() if run[0]["conditions"]["rows"] == 1]
    found = {f"{run[0]['model']}, {run[0]['tokens']}": by(run, "method", "seconds") for run in runs}
    measured = {shape: seconds for shape, seconds in found.items() if LOGIT_FREE in seconds}
    lines = [
        [title, *(Cell().format("{0:.2f}", s.get(name) and s[name] / s[LOGIT_FREE]) for s in measured.values())] for title, name in RATIOS
    ]
    return table(["", *measured], lines)


def compared(run: Rows) -> Rows:
    """With `more` and `logit_free`: seconds over those of checkpointing, and of checkpointing with the loss without logits, in the same run."""
    seconds = by(run, "method", "seconds")
    bases = {name: seconds.get(method) for name, method in (("more", "checkpointing"), ("logit_free", LOGIT_FREE))}
    return [row | {name: base and row["seconds"] / base for name, base in bases.items()} for row in run]


def scatter_sentence() -> str:
    """How far seconds of the same step of one method lie apart: in one run, and in two, of those that were not the first of a run."""
    within = sorted(
        (max(row["spread"]) - min(row["spread"])) / row["seconds"] for row in rows_of("speed") if row["conditions"].get("repeats", 1) > 1
    )
    between: dict[tuple, list[float]] = {}
    for _, run in groupby(rows_of("speed"), key=lambda row: (row["model"], row["train"], row["tokens"], row["conditions"])):
        for row in [*run][1:]:
            between.setdefault((row["model"], row["train"], row["conditions"]["rows"], row["tokens"], row["method"]), []).append(
                row["seconds"]
            )
    apart = [max(seconds) / min(seconds) - 1 for seconds in between.values()]
    if not within or not any(apart):
        return pages.UNMEASURED
    return (
        f"Where a run has several steps of one method, they lie up to {max(within):.0%} of their mean apart, half of them {median(within):.0%} or less; "
        f"steps of one method in two runs, of two commits, up to {max(apart):.0%} (but for the first of a run)."
    )


def length_table() -> str:
    """One step on one long row: what was run, and what was traced alone."""
    rows = [dict.fromkeys(("seconds", "loss", "gradient_difference", "against")) | row for row in rows_of("length")]
    for row in rows:
        row["found"] = "traced" if row["traced"] else "run"
    columns = {
        "model": "{model}", "tokens": "{tokens:,}", "method": "{method}", "": "{found}", "peak MiB": "{peak_bytes:mib}",
        "host MiB": "{host_bytes:mib}", "seconds": "{seconds:.0f}", "loss": "{loss:.5f}", "gradient, relative difference": "{gradient_difference:.1e}",
    }  # fmt: skip
    return listing(rows, columns, "lrll")


def profile_table() -> str:
    """The operators of a step by their share of its time, of each profile."""
    found = []
    for row in rows_of("profile"):
        parts = [f"{name.removeprefix('aten::')} {share:.0%} ({n})" for name, (share, n) in row["operators"].items() if share >= 0.02]
        found.append(row | {"parts": ", ".join(parts)})
    columns = {"method": "{method}", "operators, by their share of the time, and calls": "{parts}"}
    return listing(found, {**STEP, "model": STEP["model"] + ", {train}"} | columns, "llll")


def fits_table() -> str:
    """Every rung of `hf-memtune plan`: predicted peak, step time by operations, and what each rung changes about both."""
    rows = rows_of("ladder")
    models, found = sorted(unique(rows, "model"), reverse=True), by(rows, "model rung")

    def cells(model: str, rung: str) -> list[str]:
        row, given = found.get((model, rung), {}), found[model, "as given"]
        if "peak_bytes" not in row:
            return ["-"] * 4
        size, operations = row["peak_bytes"] / given["peak_bytes"] - 1, row["flops"] / given["flops"]
        return [f"{row['peak_bytes'] / GIB:.1f} GiB", f"{100 * size:+.0f} %", f"{operations:.2f} x", f"{100 * (operations - 1):+.0f} %"]

    heads = [head for model in models for head in (model, "change", "operations", "change")]
    lines = [[*rung, *(cell for model in models for cell in cells(model, rung[0]))] for rung in unique(rows, "rung gradient")]
    return table(["rung", "gradient", *heads], lines, "ll")


def contract_table() -> str:
    """Predicted against measured peaks on the committed grid, by what was varied."""
    rows, lines = rows_of("estimate"), []
    for method in [*unique(rows, "method"), None]:
        ratios = [row["ratio"] for row in rows if method in (row["method"], None)]
        lines.append([method or "**all**", len(ratios), f"{min(ratios):.4f}", f"{max(ratios):.4f}", ratios.count(1)])
    return table("method | runs | predicted / measured, least | most | equal to the byte", lines)


def demo_table() -> str:
    """What the last committed run of `make demo` printed."""
    file = ROOT / "results" / "demo.json"
    if not file.exists():
        return pages.UNMEASURED
    found = json.loads(file.read_text())
    rows = [row | {"kept": "all" if row["tokens_kept_share"] is None else Cell().format("{0:share}", row["tokens_kept_share"])}
            for row in found["results"]]  # fmt: skip
    columns = {
        "method": "{method}", "tokens kept": "{kept}", "held-out loss before": "{loss_before:.4f}", "after": "{loss_after:.4f}",
        "peak MiB": "{peak_bytes:mib}", "seconds a step": "{seconds_per_step:.2f}",
    }  # fmt: skip
    return "\n\n".join([listing(rows, columns), found["caveat"], conditions_of([found])])


def coverage_table() -> str:
    """How many types of each kind are exact, refused, wrong or crashed under each method."""
    lines, rows = [], [row for row in rows_of("coverage") if "not_built" not in row]
    for kind, said in KINDS.items():
        built = of(rows, kind=kind)
        for method, name in COVERED.items():
            counts = Counter(row[method]["outcome"] for row in built)
            lines.append([f"{said} ({len(built)})", name, *(counts[outcome] for outcome in ("exact", "refused", "wrong", "crashed"))])
    return table("types | method | exact | refused | wrong | crashed", lines, "ll")


def streamed(outcome: str) -> Rows:
    """The causal types of which streaming has this outcome."""
    return [row for row in of(rows_of("coverage"), kind="causal") if row.get("streaming", {}).get("outcome") == outcome]


def streaming_types() -> str:
    """The causal types that stream, by how their layers are followed."""
    rows = streamed("exact")
    ways = {
        way: unique(of(rows, followed=way), "type") for way in sorted(unique(rows, "followed"), key=lambda way: (way != "attention", way))
    }
    return "\n".join(f"- **{way}** ({len(types)}): {', '.join(types)}" for way, types in ways.items())


def refused_types() -> str:
    """The causal types that do not stream, and what the refusal says."""
    lines = [[row["type"], row["streaming"]["reason"].replace("|", "/").partition(" Train this model")[0]] for row in streamed("refused")]
    return table("type | refused because", lines, "ll")


def not_built_types() -> str:
    return ", ".join(f"{row['type']} ({row['kind']})" for row in rows_of("coverage") if "not_built" in row) + "."


SECTIONS = {
    "coverage": coverage_table,
    "coverage-streams": streaming_types,
    "coverage-refused": refused_types,
    "coverage-not-built": not_built_types,
    "demo": demo_table,
    "ladder": ladder_table,
    "memory-lora": lambda: memory_table("lora"),
    "memory-full": lambda: memory_table("full"),
    "memory-conditions": lambda: conditions_of(traced()),
    "fits": fits_table,
    "fits-conditions": lambda: conditions_of(rows_of("ladder")),
    "contract": contract_table,
    "contract-conditions": lambda: conditions_of(rows_of("estimate")),
    "gpu": lambda: gpu_tables(rows_of("gpu")),
    "speed": speed_table,
    "speed-ratios": ratios_table,
    "speed-scatter": scatter_sentence,
    "profile": profile_table,
    "length": length_table,
    **{
        f"{name}-conditions": lambda name=name: conditions_of(rows_of(name))
        for name in ("coverage", "gpu", "speed", "profile", "length", "inverse")
    },
    **{name: made for module in OTHERS for name, made in module.sections(rows_of).items()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    check = parser.parse_args().check
    stale = [name for name in PAGES if not pages.write(ROOT / f"{name}.md", SECTIONS, check)]
    if not check:
        draw(ROOT / "docs" / "images")
    sys.exit(f"{', '.join(stale)}: out of date: run python scripts/tables.py" if check and stale else 0)


def draw(folder: Path) -> None:
    """Every picture of what was measured."""
    import pictures  # here: the tables need no matplotlib

    pictures.draw(rows_of, folder)


if __name__ == "__main__":
    main()
