"""Tables and sentences of docs/results.md, from results/quality.jsonl and the results on gradients beside it. All follow from the files."""

from collections.abc import Callable

from pages import MIB, conditions_of

from quality import records
from quality.analysis import MARGIN, Group, Interval, Screened, baseline, effects, finals, largest_streaming_difference, screened
from quality.arms import PLAIN, STREAMING, TOKENTUNE, is_seeking
from quality.tasks import TASKS

Rows = list[dict]


def sections(runs: Rows, gradient: Rows, precision: Rows) -> dict[str, Callable[[], str]]:
    """What stands between the markers of each name. The last record of a run counts."""
    found = records.latest(runs)
    return {
        **{f"quality-{task}": lambda task=task: task_section(finals(found, task)) for task in TASKS},
        "quality-screening": lambda: screening_section(screened(found)),
        "quality-conditions": lambda: conditions_of(found, leave_out=("model", "data")),
        "gradient": lambda: selection_table(gradient),
        "precision": lambda: precision_table(precision),
    }


# --- a task


def task_section(groups: list[Group]) -> str:
    """What is trained on what, the table of the arms, and what it says."""
    if not groups:
        return "Not measured yet."
    described = groups[0].any_run["conditions"]
    sentences = (*_overall(groups), *_near_plain(groups), *_against_tokentune(groups), *_check(groups))
    return "\n\n".join([f"{described['model']}; {described['data']}.", finals_table(groups), " ".join(sentences)])


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
    counted = f"{len(arms)} arms, {left_out} screened out; a difference counts from {MARGIN:g} of loss."
    return "\n\n".join([counted, effects_table(arms), screening_table(arms)])


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


# --- gradients themselves


def selection_table(rows: Rows) -> str:
    """Ways to choose tokens: how far from the gradient of all of them."""
    lines = ["| tokens | error | cosine | cosine of sums | tokens run |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {row['arm']} | {row['error']:.3f} | {row['cosine']:.3f} | {row['cosine_of_sums']:.3f} | {row['tokens_with_gradient']:.2f} |"
        for row in rows
    ]
    return "\n".join([*lines, "", *(f"{row['task']}. {conditions_of([row])}" for row in rows[:1])])


def precision_table(rows: Rows) -> str:
    """Sums in bfloat16 and float32, by the tokens of a chunk."""
    lines = ["| method | tokens of a chunk | sums | error |", "|---|---:|---|---:|"]
    lines += [f"| {row['method']} | {row['chunk'] or '-'} | {row['sums'] or '-'} | {row['error']:.4f} |" for row in rows]
    return "\n".join([*lines, "", conditions_of(rows)])
