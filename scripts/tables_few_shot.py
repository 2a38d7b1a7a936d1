"""The table of the few-shot suite in docs/evaluation.md, from the result file: scores with their standard errors, and what they cost."""

import json
from collections.abc import Callable, Iterable
from statistics import mean, stdev

from learning.arms import FEW_SHOT
from learning.few_shot import chosen_rate
from pages import UNMEASURED, Rows, by, conditions_of, mib, of, table

# Llama-3.2-1B on Open-Platypus, table of the paper (arXiv 2601.19739): means of the five tasks
PUBLISHED = {"plain": ("QLoRA", 52.13), "tokenseek": ("QLoRA + TokenSeek", 52.61), "tokentune": ("QLoRA + TokenTune", 49.22)}
COMMON = ("model", "data", "setup", "tasks", "limit", "files")  # what the lines of one table have in common


def sections(rows_of: Callable[[str], Rows]) -> dict[str, Callable[[], str]]:
    """What stands between the markers of each name. rows_of: of a result file."""
    return {
        "few-shot": lambda: few_shot(rows_of("few_shot")),
        "few-shot-conditions": lambda: conditions_of(of(rows_of("few_shot"), stage="final")),
    }


def few_shot(rows: Rows) -> str:
    """A table for each model, data, recipe and set of tasks; and what is published."""
    found = {json.dumps([row[name] for name in COMMON]): row for row in of(rows, stage="final")}
    tables = [group_table(rows, {name: row[name] for name in COMMON}) for row in found.values()]
    return "\n\n".join([*(tables or [UNMEASURED]), published()])


def published() -> str:
    heads = "arm | published, not measured here: Llama-3.2-1B on Open-Platypus | mean of the five tasks"
    return table(heads, [[f"`{arm}`", name, f"{score:.2f}"] for arm, (name, score) in PUBLISHED.items()], "ll")


def group_table(rows: Rows, common: dict) -> str:
    """A line for every arm, of its runs at the learning rate that its search chose, with the settings that the arm has now."""
    lines = []
    for arm in FEW_SHOT:
        finals = of(rows, stage="final", arm=arm, settings=FEW_SHOT[arm], **common)
        chosen = of(finals, learning_rate=chosen_rate(rows, finals[-1])) if finals else []
        if chosen:
            lines.append([f"`{arm}`", *cells(list(by(chosen, "seed").values()))])
    tasks = [f"{name}, {shots}-shot {metric}" for name, shots, metric in common["tasks"]]
    heads = ["arm", "learning rate", "seeds", *tasks, "mean", "between seeds", "held-out loss", "tokens kept", "peak MiB", "seconds a step"]
    rows_scored = f", the first {common['limit']} rows of each task" if common["limit"] else ""
    settings = ", ".join(f"{name} {value}" for name, value in common["setup"].items())
    return "\n\n".join([f"**{common['model']} on {common['data']}**{rows_scored}:", table(heads, lines), f"Recipe: {settings}."])


def cells(runs: Rows) -> list[str]:
    """Of one arm. Every seed is scored on the same rows, so that more seeds make no standard error smaller."""
    tasks = [score([run["scores"][name] for run in runs]) for name in runs[0]["scores"]]
    means = [run["mean"] for run in runs]
    whole = score([{"score": run["mean"], "stderr": run["mean_stderr"]} for run in runs])
    between = f"{100 * stdev(means):.2f}" if len(runs) > 1 else "-"
    losses = [run["held_out_loss"] for run in runs]
    loss = "diverged" if None in losses else f"{mean(losses):.4f}"
    kept = [run["kept_share"] for run in runs]
    share = "all" if None in kept else f"{100 * mean(kept):.1f} %"
    seconds = mean(run["seconds_per_step"] for run in runs)
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    rate = f"{runs[0]['learning_rate']:g}"
    return [rate, str(len(runs)), *tasks, whole, between, loss, share, mib(max(peaks, default=None)), f"{seconds:.2f}"]


def score(found: Iterable[dict]) -> str:
    """Percent, and the standard error of one run's."""
    found = list(found)
    errors = [each["stderr"] for each in found]
    said = "" if None in errors else f" ± {100 * mean(errors):.2f}"
    return f"{100 * mean(each['score'] for each in found):.2f}{said}"
