"""Tables and sentences on what whole commands learn, from results/glue.jsonl and results/qa.jsonl. All follow from the files."""

from collections.abc import Callable, Iterable, Iterator
from statistics import median

from learning.arms import ADAPTERS, DESCRIBED, FLAGS, FULL, PLAIN, QA
from learning.groups import BESIDE, Group, finals, left_out, listed, named, shown
from learning.plans import PLANS
from pages import UNMEASURED, Rows, conditions_of, of, table, unique

QA_TASKS = tuple(plan.task for plan in PLANS["qa"])
CHANCE_MARGIN = 0.05  # of accuracy: an arm that ends this near to where it began has learned nothing to speak of


def sections(rows_of: Callable[[str], Rows]) -> dict[str, Callable[[], str]]:
    """What stands between the markers of each name. rows_of: of a result file."""

    def glue() -> list[Group]:
        return groups_of(rows_of("glue"), FLAGS)

    def qa(task: str) -> list[Group]:
        return groups_of(of(rows_of("qa"), task=task), QA)

    return {
        **{f"qa-{task}": lambda task=task: section(qa(task), PLAIN) for task in QA_TASKS},
        "qa-conditions": lambda: conditions_of(of(rows_of("qa"), stage="final"), leave_out=("model", "data")),
        "glue-arms": lambda: "\n".join(f"- `{group.arm}`: {DESCRIBED[group.arm]}" for group in glue()),
        "glue": lambda: section(glue(), FULL),
        "glue-conditions": lambda: conditions_of(of(rows_of("glue"), stage="final"), leave_out=("model", "data")),
    }


def groups_of(found: Rows, order: Iterable[str]) -> list[Group]:
    """In the order of their table."""
    order = [*order]
    groups = [group for task in unique(found, "task") for group in finals(found, task)]
    return sorted(groups, key=lambda group: order.index(group.arm))


def section(groups: list[Group], base: str) -> str:
    """What is trained on what, the table of the arms, and what it says. base: the arm that the others are compared with."""
    if not groups:
        return UNMEASURED
    run, full, lines = groups[0].any_run, named(groups, base), []
    for group in groups:
        accuracies = [group.at(0, "accuracies"), group.at(-1, "accuracies")]
        cells = [*map(shown, accuracies), shown(group.minus(full, "accuracies"), "+"), shown(group.at(-1)), shown(group.minus(full), "+")]
        lines.append([group.arm, group.rate, len(group.ended), *cells, f"{group.any_run['trainable_parameters']:,}", *group.costs])
    model, data, held_out = (run["conditions"][name] for name in ("model", "data", "held_out_rows"))
    told = f"{model}; {data}; {run['steps']} steps of {run['rows']} rows, {held_out} rows held out."
    heads = f"arm | rate | seeds | accuracy before | after | minus {base} | held-out loss | minus {base} | trained parameters | peak MiB | s a step"
    return "\n\n".join([told, table(heads, lines), " ".join(sentences(groups, base))])


def sentences(groups: list[Group], base: str) -> Iterator[str]:
    """What the table says, in words that follow from its numbers."""
    full, ordinary = named(groups, base), named(groups, ADAPTERS)
    if errors := [run["standard_error"] for group in groups for run in group.ended.values() if run.get("standard_error")]:
        yield f"The rows that are scored give one score a standard error of {max(errors):.3f}, which no number of seeds lowers."
    compared = [(group, d) for group in groups if (d := group.minus(full, "accuracies")) and d.half is not None]
    for word, sign in (("Above", 1), ("Below", -1)):
        if arms := listed(compared, sign):
            yield f"{word} `{base}` by more than the interval: {arms}."
    if within := [f"`{group.arm}`" for group, d in compared if not d.is_clear]:
        yield f"Within the interval of `{base}`: {', '.join(within)}."
    yield from left_out(groups)
    ends = [(group, group.at(0, "accuracies"), group.at(-1, "accuracies")) for group in groups if group.ended]
    if still := [f"`{group.arm}` ({start} to {end})" for group, start, end in ends if start and end.mean - start.mean < CHANCE_MARGIN]:
        yield f"Learned next to nothing in so many steps: {', '.join(still)}."
    reversible = [group for group in groups if group.mean_of("inverse_error") is not None]
    if ordinary and (against := [f"`{g.arm}` {_share(g, ordinary):.0%} of the peak bytes at {d:+} of accuracy"
                                 for g in reversible if (d := g.minus(ordinary, "accuracies"))]):  # fmt: skip
        yield f"Against ordinary adapters: {'; '.join(against)}."
    if told := [f"`{g.arm}` {g.mean_of('state_change'):.2f} and {g.mean_of('inverse_error'):.1g}" for g in reversible]:
        yield (
            "On the first batch, the relative change of the last hidden states by the coupling, and the relative error of the input of the "
            f"first layer that backward rebuilds: {'; '.join(told)}."
        )
    if not all(group.alone for group in groups):
        yield BESIDE


def _share(group: Group, other: Group) -> float:
    """Of its bytes; the median over common seeds, for the traced batch is that of the seed."""
    return median(group.runs[seed]["peak_bytes"] / other.runs[seed]["peak_bytes"] for seed in group.runs.keys() & other.runs.keys())
