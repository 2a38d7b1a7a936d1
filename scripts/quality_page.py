"""Write docs/results.md and its pictures from results/quality.jsonl and the results on gradients beside it (--check only compares).

Every number and every sentence follows from the file. What a person makes of them is in docs/discussion.md, which is included.
"""

import argparse
import sys
from pathlib import Path

from quality import gradients, records
from quality.analysis import (
    MARGIN,
    Group,
    Interval,
    Screened,
    baseline,
    effects,
    finals,
    largest_streaming_difference,
    screened,
)
from quality.arms import PLAIN, STREAMING, TOKENTUNE, is_seeking
from quality.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
INTRODUCTION = """# How well token seeking learns

Plain training, exact streaming and ways of token seeking, on the same rows in the same order; the held-out loss is that of *all* labelled
tokens, from plain forward passes. An arm is named SCORER/SELECTION/GRADIENT/RATIO: what ranks tokens, whether the best are taken (`top`) or
tokens are drawn by score and weighted (`sample`), and what becomes of the gradient that other tokens' keys and values would carry: constants
(`cut`), exact (`stream`), or exact but for chunks that matter little (`skip`). `labels`: only labelled tokens are chosen among. Each arm has
the learning rate that was best for it on other held-out rows and another seed. ± is a 95 % confidence interval over seeds (Student's t).
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "quality.jsonl")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder to write to (default: docs)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if results.md is out of date")
    options = parser.parse_args(arguments)
    found, file = records.read(options.results), options.docs / "results.md"
    text = page(found, options.docs, options.results.parent)
    if options.check:
        return int(not file.exists() or file.read_text() != text)
    options.docs.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    draw(found, options.docs / "images")
    return 0


def draw(found: list[dict], folder: Path) -> None:
    from quality import plots

    for task in TASKS:
        if groups := finals(found, task):
            plots.finals_figure(groups, folder / f"quality-{task}.png")
    if arms := screened(found):
        plots.screening_figure(arms, folder / "quality-screening.png")


def page(found: list[dict], docs: Path, results: Path) -> str:
    """The whole page, with what the folder `results` has on gradients. A part of which nothing was measured yet is left out."""
    discussion = docs / "discussion.md"
    parts = [
        INTRODUCTION,
        *(task_section(task, groups) for task in TASKS if (groups := finals(found, task))),
        *([screening_section(arms)] if (arms := screened(found)) else []),
        *([f"## Discussion\n\n{discussion.read_text().strip()}\n"] if discussion.exists() else []),
        conditions_section(found),
        *gradients.sections(results),
    ]
    return "\n".join(parts)


# --- a task


def task_section(task: str, groups: list[Group]) -> str:
    described = groups[0].any_run["conditions"]
    return "\n".join([
        f"## {task}\n",
        f"{described['model']}; {described['data']}.\n",
        f"![Held-out loss against steps, seconds and bytes](images/quality-{task}.png)\n",
        finals_table(groups),
        "",
        " ".join(sentence for sentence in (*_overall(groups), *_near_plain(groups), *_against_tokentune(groups), *_check(groups))),
        "",
    ])  # fmt: skip


def finals_table(groups: list[Group]) -> str:
    """One row an arm: what it learned, against plain on the same seeds, and what it cost."""
    scored = all(group.any_run["accuracies"] for group in groups)
    columns = [
        "arm",
        "rate",
        "held-out loss",
        "minus plain",
        *(["accuracy", "minus plain"] if scored else []),
        "kept",
        "learned",
        "peak MiB",
        "s a step",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join(lines + [_row(group, baseline(groups, group), scored) for group in groups])


def _row(group: Group, plain: Group | None, scored: bool) -> str:
    against = plain if group.arm != PLAIN else None
    fields = ["losses", "accuracies"] if scored else ["losses"]
    learned = [cell for field in fields for cell in (_shown(group.final(field)), _shown(group.minus(against, field), signed=True))]
    cost = [_percent(group.share("kept_share")), _percent(group.share("learned_share")), f"{group.peak_bytes / MIB:,.0f}"]
    cells = [group.label, f"{group.any_run['learning_rate']:g}", *learned, *cost, f"{group.seconds:.2f}" + ("" if group.alone else "*")]
    return "| " + " | ".join(cells) + " |"


def _shown(value: Interval | None, signed: bool = False) -> str:
    return "-" if value is None else value.signed if signed else str(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _overall(groups: list[Group]) -> list[str]:
    """How many arms end above plain training, below it, and too near to tell."""
    plain = next((group for group in groups if group.arm == PLAIN and group.ended), None)
    if plain is None:
        return []
    run, seeds = plain.any_run, len(plain.runs)
    start, end = plain.curve()[0][1].mean, plain.final()
    found = [d for group in groups if is_seeking(group.arm) and (d := group.minus(baseline(groups, group))) is not None]
    differences = [d for d in found if d.half is not None]
    above, below = (sum(d.differs_from_zero and sign * d.mean > 0 for d in differences) for sign in (1, -1))
    counts = f"{above} end above plain by more than the interval, {below} below, {len(differences) - above - below} within it."
    return [
        f"In {run['steps']} steps of {run['rows']} rows plain training takes the loss from {start:.3f} to {end} ({seeds} seeds).",
        f"Of {len(differences)} arms of token seeking with two seeds or more, {counts}",
        *(["Seconds marked * were measured while other work ran."] if not all(group.alone for group in groups) else []),
    ]


def _near_plain(groups: list[Group]) -> list[str]:
    """The arm that ends lowest against plain training."""
    compared = [
        (d, group, plain) for group in groups if is_seeking(group.arm) and (plain := baseline(groups, group)) and (d := group.minus(plain))
    ]
    if not compared:
        return []
    difference, group, plain = min(compared, key=lambda item: item[0].mean)
    size, time = group.peak_bytes / plain.peak_bytes, group.seconds / plain.seconds
    return [
        f"The lowest against plain is `{group.label}` ({difference.signed}), with {size:.0%} of plain's peak bytes and {time:.0%} of its seconds a step."
    ]


def _against_tokentune(groups: list[Group]) -> list[str]:
    """Which arms do better, which worse, than the published random choice at a tenth of the tokens, seed by seed."""
    reference = next((group for group in groups if group.arm == f"{TOKENTUNE}/10%"), None)
    others = [group for group in groups if is_seeking(group.arm) and group is not reference]
    compared = [(group, d) for group in others if (d := group.minus(reference)) is not None and group.rows == reference.rows]
    sentences = []
    for word, sign in (("below", -1), ("above", 1)):
        told = [f"`{group.label}` ({d.signed})" for group, d in compared if d.differs_from_zero and sign * d.mean > 0]
        if told:
            sentences.append(f"By more than the interval {word} random tokens of the papers (`{reference.label}`): {', '.join(told)}.")
    return sentences or ([f"None differs from `{reference.label}` by more than the interval."] if compared else [])


def _check(groups: list[Group]) -> list[str]:
    largest = largest_streaming_difference(groups)
    if largest is None:
        return []
    return [f"Exact streaming ({STREAMING}) and plain training differ by at most {largest:.1e} of loss at any measured step of any seed."]


# --- the screening


def screening_section(arms: list[Screened]) -> str:
    """All arms, what speaks against each, and what each choice does by itself."""
    left_out = sum(bool(arm.reasons) for arm in arms)
    return "\n".join([
        "## What was screened out\n",
        f"Every combination at a small size, one seed, the best of a few learning rates: {len(arms)} arms, {left_out} screened out. The reason",
        f"is a loss more than {MARGIN:g} above that of random tokens as published at the same ratio, or above that of an arm which needs no",
        "more bytes. One seed: differences of that size between two arms are not to be believed by themselves.\n",
        "![Loss of every screened arm against its bytes](images/quality-screening.png)\n",
        effects_table(arms),
        "",
        screening_table(arms),
        "",
    ])  # fmt: skip


def effects_table(arms: list[Screened]) -> str:
    """One row a level of a factor. The interval is over pairs of arms, of one seed each."""
    lines = ["| choice | against | pairs of arms | change of the loss |", "|---|---|---:|---:|"]
    return "\n".join(lines + [f"| {e.factor} {e.value} | {e.against} | {e.pairs} | {e.difference.signed} |" for e in effects(arms)])


def screening_table(arms: list[Screened]) -> str:
    lines = ["| rows | arm | rate | loss | peak MiB | screened out |", "|---:|---|---:|---:|---:|---|"]
    return "\n".join(lines + [
        f"| {arm.rows} | {arm.arm} | {arm.learning_rate:g} | {arm.loss:.3f} | {arm.peak_bytes / MIB:,.0f} | {'; '.join(arm.reasons) or 'no'} |"
        for arm in arms
    ])  # fmt: skip


def conditions_section(found: list[dict]) -> str:
    """What the runs were made on; where they differ, every value."""
    values: dict[str, list[str]] = {}
    for run in found:
        for name, value in run["conditions"].items():
            if name not in ("model", "data") and str(value) not in values.setdefault(name, []):
                values[name].append(str(value))
    told = ", ".join(f"{name.replace('_', ' ')} {' / '.join(given)}" for name, given in values.items())
    return (
        f"## Conditions\n\n{told or 'Nothing measured yet.'}\n\nPeak bytes are the live bytes of all tensors that the second step makes.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
