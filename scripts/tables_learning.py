"""Tables and sentences on how well each way of token seeking learns, from results/quality.jsonl. All follow from the file."""

from collections.abc import Callable, Iterator
from functools import partial

from learning.arms import EVERY_LABEL, PLAIN, STREAMING, TOKENTUNE, is_seeking
from learning.groups import BESIDE, CONFIDENCE, Group, baseline, finals, left_out, listed, named, shown
from learning.plans import TASKS
from pages import UNMEASURED, Rows, conditions_of, table

SUMMARY_TASKS = {
    "stories-imdb": "reviews, every token labelled; stories15M, all parameters",
    "smollm2-alpaca": "instructions, prompts masked; SmolLM2-135M, LoRA",
}
SCORED_ANEW = "`--preset tokenseek --seek_schedule step`"  # the loop of the study has no pass over the rows before training
SUMMARY_ARMS = {
    "plain": ("plain",),
    "exact streaming": ("streaming",),
    "`token_seeking`, ratio 0.3": ("random/sample/cut/30%", "random/sample/cut/30%/labels"),
    "the same with `token_scorer=true_gradient`": ("true_gradient/sample/cut/30%", "true_gradient/sample/cut/30%/labels"),
    "and with `token_gradient=stream`": ("true_gradient/sample/stream/30%", "true_gradient/sample/stream/30%/labels"),
    "`token_selection=labelled`": (EVERY_LABEL,),
    "`token_seeking`, ratio 0.1": ("random/sample/cut/10%", "random/sample/cut/10%/labels"),
    "the same with `token_gradient=stream`": ("random/sample/stream/10%", "random/sample/stream/10%/labels"),
    "`--preset tokentune`": ("random/top/cut/10%",),
    SCORED_ANEW: ("combined/top/cut/10%",),
}


def sections(rows_of: Callable[[str], Rows]) -> dict[str, Callable[[], str]]:
    """What stands between the markers of each name. rows_of: of a result file."""
    quality = partial(rows_of, "quality")
    return {
        **{f"quality-{task}": lambda task=task: quality_section(finals(quality(), task)) for task in TASKS},
        "quality": lambda: summary_table(quality()),
        "quality-sentence": lambda: summary_sentence(quality()),
        "quality-conditions": lambda: conditions_of(quality(), leave_out=("model", "data")),
    }


def quality_section(groups: list[Group]) -> str:
    """What is trained on what, the table of the arms, and what it says."""
    if not groups:
        return UNMEASURED
    described = groups[0].any_run["conditions"]
    return "\n\n".join([f"{described['model']}; {described['data']}.", quality_table(groups), " ".join(quality_sentences(groups))])


def quality_table(groups: list[Group]) -> str:
    """One row an arm: what it learned, against plain on the same seeds, and what it cost."""
    fields = {"losses": "held-out loss", "accuracies": "accuracy"}
    fields = {field: head for field, head in fields.items() if all(group.any_run[field] for group in groups)}
    lines = []
    for group in groups:
        plain = baseline(groups, group)
        learned = [cell for field in fields for cell in (shown(group.at(-1, field)), shown(group.minus(plain, field), "+"))]
        shares = ["-" if share is None else f"{100 * share:.1f} %" for share in map(group.mean_of, ("kept_share", "learned_share"))]
        lines.append([group.arm, group.rate, *learned, *shares, *group.costs])
    heads = [head for field in fields.values() for head in (field, "minus plain")]
    return table(["arm", "rate", *heads, "kept", "learned", "peak MiB", "s a step"], lines)


def quality_sentences(groups: list[Group]) -> Iterator[str]:
    """What the table says, in words that follow from its numbers."""
    compared = [(group, d) for group in groups if is_seeking(group.arm) and (d := group.minus(baseline(groups, group)))]
    if (plain := named(groups, PLAIN)) and plain.ended:
        run, sure = plain.any_run, [d for _, d in compared if d.half is not None]
        above, below = (sum(d.is_clear and sign * d.mean > 0 for d in sure) for sign in (1, -1))
        yield (
            f"In {run['steps']} steps of {run['rows']} rows plain training takes the loss from {plain.at(0).mean:.3f} to {plain.at(-1)} "
            f"({len(plain.runs)} seeds). Of {len(sure)} arms of token seeking with two seeds or more, {above} end above plain by more than "
            f"the interval, {below} below, {len(sure) - above - below} within it."
        )
        if not all(group.alone for group in groups):
            yield BESIDE
    yield from left_out(groups)
    if compared:
        group, difference = min(compared, key=lambda pair: pair[1].mean)
        size, time = (getattr(group, name) / getattr(baseline(groups, group), name) for name in ("peak_bytes", "seconds"))
        yield (
            f"The lowest against plain is `{group.arm}` ({difference:+}), with {size:.0%} of plain's peak bytes and {time:.0%} of its "
            "seconds a step."
        )
    yield from _against_tokentune(groups)
    if differences := list(streaming_differences(groups)):
        largest = max(differences)
        yield f"Exact streaming ({STREAMING}) and plain training differ by at most {largest:.1e} of loss at any measured step of any seed."


def _against_tokentune(groups: list[Group]) -> Iterator[str]:
    """Which arms do better, which worse, than the published random choice at a tenth of the tokens."""
    if reference := named(groups, f"{TOKENTUNE}/10%"):
        alike = [group for group in groups if is_seeking(group.arm) and group.rows == reference.rows]
        compared = [(group, d) for group in alike if (d := group.minus(reference))]
        found = {word: listed(compared, sign) for word, sign in (("below", -1), ("above", 1))}
        for word, arms in found.items():
            if arms:
                yield f"By more than the interval {word} random tokens of the papers (`{reference.arm}`): {arms}."
        if compared and not any(found.values()):
            yield f"None differs from `{reference.arm}` by more than the interval."


def streaming_differences(groups: list[Group]) -> Iterator[float]:
    """Between exact streaming and plain training, at every step and seed."""
    for group in groups:
        if group.arm == STREAMING and (plain := baseline(groups, group)):
            for seed in group.ended.keys() & plain.ended.keys():
                for (_, streamed), (_, ordinary) in zip(group.runs[seed]["losses"], plain.runs[seed]["losses"]):
                    yield abs(streamed - ordinary)


# --- in short


def summary_table(found: Rows) -> str:
    """Of few arms the held-out loss above that of plain training, with bytes and seconds relative to it, by task."""
    lines = []
    for task, described in SUMMARY_TASKS.items():
        groups = finals(found, task)
        for title, group in ((title, named(groups, arm)) for title, arms in SUMMARY_ARMS.items() for arm in arms):
            if group:
                plain = baseline(groups, group)
                above = "0" if group is plain else f"{group.minus(plain):+}"
                shares = (
                    f"{ours / theirs:.2f} x" for ours, theirs in ((group.peak_bytes, plain.peak_bytes), (group.seconds, plain.seconds))
                )
                lines.append([described, title, above, *shares])
    return table("data | method | held-out loss minus plain | peak bytes | step time", lines, "ll")


def summary_sentence(found: Rows, task: str = "smollm2-alpaca") -> str:
    """What a few arms of one task lose, for who reads one sentence."""
    groups = finals(found, task)
    if (plain := named(groups, PLAIN)) is None:
        return UNMEASURED
    run, told = plain.any_run, []
    for title in (
        "exact streaming",
        "`token_seeking`, ratio 0.3",
        "`token_seeking`, ratio 0.1",
        "`--preset tokentune`",
        SCORED_ANEW,
    ):
        group = next(filter(None, (named(groups, arm) for arm in SUMMARY_ARMS[title])))
        told.append(f"{title.replace(',', ' at')}: {group.minus(plain):+}")
    return (
        f"Held-out loss minus that of plain training ({SUMMARY_TASKS[task]}; {run['steps']} steps of {run['rows']} short rows; ± a {CONFIDENCE:.0%} "
        f"interval over {len(plain.runs)} seeds, on {run['conditions']['held_out_rows']} rows): "
        f"{'; '.join(told)}."
    )
