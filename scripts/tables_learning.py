"""Tables and sentences on how well token seeking learns, from results/quality.jsonl, and how near its gradient is. All follow from the files."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from learning.arms import EVERY_LABEL, PLAIN, STREAMING, TOKENTUNE, is_exact, is_seeking, parts_of
from learning.groups import BESIDE, Group, Interval, baseline, finals, interval, listed, named, shown
from learning.plans import RACED, TASKS, final_loss, latest
from pages import UNMEASURED, Cell, Rows, by, conditions_of, listing, mib, of, table, unique

MARGIN = 0.02  # of loss: a difference below it between two single runs is taken for noise
SAME_BYTES = 1.02  # as many bytes, to within what padding of the traced batch does
SUMMARY_TASKS = {
    "stories-imdb": "reviews, every token labelled; stories15M, all parameters",
    "smollm2-alpaca": "instructions, prompts masked; SmolLM2-135M, LoRA",
}
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
    "`--preset tokenseek`": ("combined/top/cut/10%",),
}

PAIRS = {  # by task and stage: arms of which one differs from the other by one choice, or that compete for the same seconds; also with other rows
    ("smollm2-alpaca", "final"): (
        ("combined/top/cut/10%", "random/top/cut/10%"),
        ("combined/top/cut/10%/labels", "combined/top/cut/10%"),
        ("combined/sample/cut/10%/labels", "combined/top/cut/10%/labels"),
        ("combined/sample/cut/10%/labels", "random/sample/cut/10%/labels"),
        ("random/sample/stream/10%/labels", "random/sample/cut/10%/labels"),
        ("random/sample/cut/30%/labels", "random/sample/cut/10%/labels"),
        ("true_gradient/sample/cut/10%/labels", "random/sample/cut/10%/labels"),
        ("true_gradient/top/cut/10%/labels", "true_gradient/sample/cut/10%/labels"),
        ("true_gradient/top/cut/30%/labels", "true_gradient/sample/cut/30%/labels"),
        ("true_gradient/sample/cut/30%/labels", "random/sample/cut/30%/labels"),
        ("softmax_residual/sample/cut/30%/labels", "random/sample/cut/30%/labels"),
        ("true_gradient/sample/stream/30%/labels", "true_gradient/sample/cut/30%/labels"),
    ),
    ("smollm2-alpaca", "race"): (
        ("true_gradient/sample/cut/30%/labels", "random/sample/cut/30%/labels"),
        ("checkpointing@1", "random/sample/cut/10%/labels"),
        ("checkpointing@1", "random/sample/cut/30%/labels"),
        ("checkpointing@1", "true_gradient/sample/cut/30%/labels"),
        ("streaming", "random/sample/cut/30%/labels"),
        ("streaming", "true_gradient/sample/cut/30%/labels"),
        ("plain@1", "random/sample/cut/30%/labels"),
        (("random/sample/cut/10%/labels", 8), ("random/sample/cut/10%/labels", 4)),
        (("random/sample/cut/30%/labels", 6), ("random/sample/cut/30%/labels", 4)),
        (("checkpointing@1", 2), ("checkpointing@1", 4)),
        (("plain@1", 2), ("plain@1", 4)),
        (("checkpointing@1", 4), ("random/sample/cut/10%/labels", 8)),
        (("streaming", 4), ("random/sample/cut/30%/labels", 6)),
        (("plain@1", 4), ("random/sample/cut/30%/labels", 6)),
    ),
    ("stories-imdb", "final"): (
        ("combined/top/cut/10%", "random/top/cut/10%"),
        ("combined/sample/cut/10%", "combined/top/cut/10%"),
        ("random/sample/cut/10%", "random/top/cut/10%"),
        ("combined/sample/cut/10%", "random/sample/cut/10%"),
        ("random/sample/stream/10%", "random/sample/cut/10%"),
        ("random/sample/stream/30%", "random/sample/cut/30%"),
        ("random/sample/cut/30%", "random/sample/cut/10%"),
        ("true_gradient/sample/cut/30%", "random/sample/cut/30%"),
        ("true_gradient/sample/stream/30%", "random/sample/stream/30%"),
    ),
    ("stories-imdb", "race"): (
        ("true_gradient/sample/cut/30%", "random/sample/cut/30%"),
        ("streaming", "random/sample/cut/30%"),
        ("streaming", "true_gradient/sample/cut/30%"),
        (("random/sample/cut/10%", 12), ("random/sample/cut/10%", 4)),
        (("random/sample/cut/30%", 8), ("random/sample/cut/30%", 4)),
        (("streaming", 2), ("streaming", 4)),
        (("streaming", 4), ("random/sample/cut/30%", 8)),
    ),
    ("minilm-reviews", "final"): (
        ("context/top/cut/10%", "random/top/cut/10%"),
        ("combined/top/cut/10%", "random/top/cut/10%"),
        ("context/top/cut/10%", "combined/top/cut/10%"),
    ),
}  # fmt: skip
AT = {"final": "steps", "race": "seconds"}


def sections(rows_of: Callable[[str], Rows]) -> dict[str, Callable[[], str]]:
    """What stands between the markers of each name. rows_of: of a result file. The last record of a run counts."""

    def quality() -> Rows:
        return latest(rows_of("quality"))

    return {
        **{f"quality-{task}": lambda task=task: quality_section(finals(quality(), task)) for task in TASKS},
        **{f"race-{task}": lambda task=task: race_section(race_of(quality(), task)) for task in RACED},
        "quality": lambda: summary_table(quality()),
        "quality-sentence": lambda: summary_sentence(quality()),
        "quality-pairs": lambda: pairs_table(quality()),
        "quality-screening": lambda: screening_section(screened(quality())),
        "quality-conditions": lambda: conditions_of(quality(), leave_out=("model", "data")),
        "skip": lambda: skip_table(rows_of("skip")),
        "estimator": lambda: estimator_table(rows_of("estimator")),
        "scorers": lambda: scorer_table(rows_of("scorers")),
        "precision": lambda: precision_table(rows_of("precision")),
    }


# --- token seeking


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


# --- the same seconds, the same bytes


class Raced(NamedTuple):
    """An arm with what its step costs, and its loss above that of plain training after as many steps, and in as many seconds (of `steps`).

    After as many steps: of batches of the same size only.
    """

    group: Group
    same_steps: Interval | None
    same_seconds: Interval | None
    steps: int | None

    @property
    def label(self) -> str:
        return f"{self.group.arm}, {self.group.rows} rows"


def race_of(found: Rows, task: str) -> list[Raced]:
    """By bytes, the fewest first; none where nothing was raced."""
    timed, ended, raced = (finals(found, task, stage) for stage in ("time", "final", "race"))
    plain, zero, race = named(ended, PLAIN), Interval(0.0, None), []
    for group in sorted(timed, key=lambda group: group.peak_bytes) if raced else ():
        steps, seconds = named(ended, group.arm, group.rows), named(raced, group.arm, group.rows)
        same_steps = zero if is_exact(group.arm) and plain and group.rows == plain.rows else steps and steps.minus(plain)
        if group.arm == PLAIN:
            race.append(Raced(group, zero, zero, plain and plain.any_run["steps"]))
        else:
            race.append(Raced(group, same_steps, seconds and seconds.minus(plain), seconds and seconds.any_run["steps"]))
    return race


def race_section(race: list[Raced]) -> str:
    """What a step of each arm costs, what as many steps learn, and what as many seconds learn."""
    if not race:
        return UNMEASURED
    lines = [
        [arm.group.arm, arm.group.rows, *arm.group.costs, shown(arm.same_steps, "+"), arm.steps or "-", shown(arm.same_seconds, "+")]
        for arm in race
    ]
    heads = "arm | rows | peak MiB | s a step | minus plain, same steps | steps in plain's seconds | minus plain, same seconds"
    return "\n\n".join([table(heads, lines), race_sentence(race)])


def race_sentence(race: list[Raced]) -> str:
    """The arms that learn more in the seconds of plain training than every arm that needs fewer bytes."""
    best, leading = math.inf, []
    for arm in race:
        if arm.same_seconds and arm.same_seconds.mean < best:
            best = arm.same_seconds.mean
            leading.append(f"from {mib(arm.group.peak_bytes)} MiB `{arm.group.arm}`, {arm.group.rows} rows ({arm.same_seconds:+})")
    return f"In the seconds of plain training the lowest loss ends with: {', '.join(leading)}."


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
        "`--preset tokenseek`",
    ):
        group = next(filter(None, (named(groups, arm) for arm in SUMMARY_ARMS[title])))
        told.append(f"{title.replace(',', ' at')}: {group.minus(plain):+}")
    return (
        f"Held-out loss minus that of plain training ({SUMMARY_TASKS[task]}; {run['steps']} steps of {run['rows']} short rows, {len(plain.runs)} seeds): "
        f"{'; '.join(told)}."
    )


def pairs_table(found: Rows) -> str:
    """Differences between arms, seed by seed, and whether they are larger than their interval; of each at the rate that was best for it."""
    lines = []
    for (task, stage), pairs in PAIRS.items():
        groups = finals(found, task, stage)
        for arms in pairs:
            sized = [arm if isinstance(arm, tuple) else (arm,) for arm in arms]
            one, other = (named(groups, *arm) for arm in sized)
            if one and other and (difference := one.minus(other)):
                rates = " / ".join(dict.fromkeys(f"{group.any_run['learning_rate']:g}" for group in (one, other)))
                cells = [f"{difference:+}", "yes" if difference.is_clear else "no"]
                told = (f"`{arm}`" + "".join(f", {rows} rows" for rows in size) for arm, *size in sized)
                lines.append([task, AT[stage], *told, rates, *cells])
    return table("data | the same | arm | minus | rates | difference of the loss | clear", lines, "llll") if lines else UNMEASURED


# --- the screening


def screened(found: Rows) -> Rows:
    """The run of every screened arm at its best rate, best first within a batch size. reasons: why it was left out, none where kept."""
    runs = of(found, stage="screen")
    best = [min(of(runs, task=task, rows=rows, arm=arm), key=final_loss) for task, rows, arm in unique(runs, "task rows arm")]
    best = [run | {"loss": final_loss(run)} for run in best]
    return sorted(
        (run | {"reasons": _reasons(run, of(best, rows=run["rows"]))} for run in best), key=lambda run: (run["rows"], run["loss"])
    )


def _reasons(run: dict, runs: Rows) -> list[str]:
    """Against random tokens (TokenTune) of the same ratio, and against the best that needs no more bytes."""
    if not is_seeking(run["arm"]):
        return []
    others = [other for other in runs if is_seeking(other["arm"]) and other is not run and other["arm"] != run["arm"]]
    against = [(other, "") for other in others if other["arm"] == f"{TOKENTUNE}/{parts_of(run['arm'])[3]}"]
    lighter = [other for other in others if other["peak_bytes"] <= SAME_BYTES * run["peak_bytes"]]
    if lighter and (least := min(lighter, key=final_loss)) not in (other for other, _ in against):
        against.append((least, ", which needs no more bytes"))
    return [f"{run['loss'] - o['loss']:.3f} above {o['arm']}{why}" for o, why in against if run["loss"] > o["loss"] + MARGIN]


def screening_section(runs: Rows) -> str:
    """All arms, what speaks against each, and what each choice does by itself."""
    counted = f"{len(runs)} arms, {sum(bool(run['reasons']) for run in runs)} screened out; a difference counts from {MARGIN:g} of loss."
    told = [run | {"reasons": "; ".join(run["reasons"]) or "no"} for run in runs]
    columns = {"rows": "{rows}", "arm": "{arm}", "rate": "{learning_rate:g}", "loss": "{loss:.3f}", "peak MiB": "{peak_bytes:mib}"}
    choices = table("choice | against | pairs of arms | change of the loss", effects(runs), "ll")
    return "\n\n".join([counted, choices, listing(told, columns | {"screened out": "{reasons}"}, "rlrrrl")])


REFERENCES = {"scorer": "random", "selection": "top", "gradient": "cut", "ratio": "10%"}  # in the order in which an arm names them


def effects(runs: Rows) -> list[list]:
    """What one choice does when all others stay: the mean difference over pairs of arms that differ in it alone, of one seed each."""
    losses = {(run["rows"], *parts_of(run["arm"])): run["loss"] for run in runs if is_seeking(run["arm"]) and math.isfinite(run["loss"])}
    lines = []
    for place, (factor, reference) in enumerate(REFERENCES.items(), start=1):
        for value in dict.fromkeys(arm[place] for arm in losses if arm[place] != reference):
            twins = [(arm, (*arm[:place], reference, *arm[place + 1 :])) for arm in losses if arm[place] == value]
            pairs = [losses[arm] - losses[twin] for arm, twin in twins if twin in losses]
            if pairs:
                lines.append([f"{factor} {value}", reference, len(pairs), f"{interval(pairs):+}"])
    return lines


# --- gradients themselves


def skip_table(rows: Rows) -> str:
    """Chunks left out of backward: how far from the gradient of all of them."""
    columns = {"tokens": "{arm}", "error": "{error:.3f}", "cosine": "{cosine:.3f}", "cosine of sums": "{cosine_of_sums:.3f}"}
    made = listing(rows, columns | {"tokens run": "{tokens_with_gradient:.2f}"})
    return "\n\n".join([made, *(f"{row['task']}. {conditions_of([row])}" for row in rows[:1])])


POINTS = ("beginning", "end")
BIAS_RANGE = "In brackets: the bias at two standard errors of its square below and above. Where there are none, these were not kept; 0.00 is then any mean of the square up to 0."
UNSCALED = (
    "`true_gradient/top` sends the kept tokens' part of the gradient of all tokens as it is; the gradient of other highest scores is that of the "
    "mean over the kept tokens."
)


def estimator_table(rows: Rows) -> str:
    """Bias and noise of every way to choose tokens, before and after training; the least error at the end first, by ratio."""
    if not rows:
        return UNMEASURED
    found, lines = by(rows, "arm point"), []
    for arm in sorted(unique(rows, "arm"), key=lambda arm: (_ratio(arm), *(found.get((arm, p), {}).get("rms", 9) for p in POINTS[::-1]))):
        cells = [found.get((arm, point), {}) for point in POINTS]
        values = [shown for cell in cells for shown in (_two_digits(cell.get("rms")), _bias(cell), _two_digits(cell.get("cosine")))]
        known = next(cell for cell in cells if cell)
        lines.append([f"`{arm}`", f"{100 * known['kept']:.0f} %", *values])
    heads = ["arm", "kept", *(f"{name}, {point}" for point in POINTS for name in ("rms", "bias", "cosine"))]
    notes = [UNSCALED] * any(arm.startswith("true_gradient/top") for arm in unique(rows, "arm"))
    notes += [BIAS_RANGE] * any(row.get("bias_squared_error") is not None for row in rows)
    return "\n\n".join([table(heads, lines), *notes, f"{rows[0]['task']}. {conditions_of(rows)}"])


def _two_digits(value: float | None) -> str:
    return Cell().format("{0:.2f}", value)


def _bias(cell: dict) -> str:
    """With what two standard errors of its square leave open, of rows in which they are."""
    shown, error = _two_digits(cell.get("bias")), cell.get("bias_squared_error")
    if error is None:
        return shown
    low, high = (math.sqrt(max(0.0, cell["bias_squared"] + sign * 2 * error)) for sign in (-1, 1))
    return f"{shown} ({low:.2f} to {high:.2f})"


def _ratio(arm: str) -> float:
    """Per cent of the tokens that an arm is to keep; of one without a number, all of them."""
    number = arm.removesuffix("/labels").rpartition("/")[2].removesuffix("%")
    return float(number) if number.isdigit() else 100.0


def precision_table(rows: Rows) -> str:
    """Sums in bfloat16 and float32, by the tokens of a row and of a chunk."""
    columns = {"tokens": "{tokens}", "method": "{method}", "tokens of a chunk": "{chunk}", "sums": "{sums}", "error": "{error:.4f}"}
    columns["error of keys' and values' weights"] = "{error_of_keys_and_values:.4f}"
    return f"{listing(rows, columns, 'rlrl')}\n\n{conditions_of(rows)}"


def scorer_table(rows: Rows) -> str:
    """Of what each scorer keeps, the share with a label, at either end of the row, and of each kind of token; that of all tokens on top."""
    if not rows:
        return UNMEASURED
    lines = []
    for who, row in (("all tokens", rows[0]), *((row["scorer"], row) for row in rows)):
        role, position, kinds = (list(row["shares"][name][who].values()) for name in ("role", "position", "token class"))
        name = who if who == "all tokens" else f"`{who}`"
        lines.append([name, *(f"{100 * share:.0f} %" for share in (role[0], position[0], position[-1], *kinds))])
    heads = ["", "with a label", "first tenth of the row", "last tenth", *rows[0]["shares"]["token class"]["all tokens"]]
    first = rows[0]
    said = f"{first['task']}: {first['rows']} rows, {first['of']:,.0f} tokens, of which the {100 * first['ratio']:.0f} % with the highest scores in each row are kept."
    return "\n\n".join([table(heads, lines), f"{said} {conditions_of(rows)}"])
