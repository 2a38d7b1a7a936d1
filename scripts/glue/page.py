"""Tables and sentences of docs/reversible-glue.md, from results/glue.jsonl. All follow from the file."""

from collections.abc import Callable

from pages import MIB, conditions_of
from quality import records
from quality.analysis import Interval

from glue.analysis import Group, groups_of, named, sentences
from glue.arms import DESCRIBED, FULL


def sections(runs: list[dict]) -> dict[str, Callable[[], str]]:
    """What stands between the markers of each name. The last record of a run counts."""
    found = records.latest(runs)
    return {
        "glue-arms": lambda: "\n".join(f"- `{group.arm}`: {DESCRIBED[group.arm]}" for group in groups_of(found)),
        "glue": lambda: task_section(groups_of(found)),
        "glue-conditions": lambda: conditions_of(records.of(found, stage="final"), leave_out=("model", "data")),
    }


def task_section(groups: list[Group]) -> str:
    """What is trained on what, the table of the arms, and what it says."""
    if not groups:
        return "Not measured yet."
    run = groups[0].any_run
    described = run["conditions"]
    told = f"{described['model']}; {described['data']}; {run['steps']} steps of {run['rows']} rows, {described['held_out_rows']} rows held out."
    return "\n\n".join([told, table(groups), " ".join(sentences(groups))])


def table(groups: list[Group]) -> str:
    """One row an arm: what it learned, against full fine-tuning on the same seeds, and what it cost."""
    columns = [
        "arm", "rate", "accuracy before", "after", "minus full", "held-out loss", "trained parameters", "peak MiB", "s a step"
    ]  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join(lines + [_row(group, named(groups, FULL)) for group in groups])


def _row(group: Group, full: Group | None) -> str:
    run, difference = group.any_run, group.minus(full)
    cells = [
        group.arm, f"{run['learning_rate']:g}", _shown(group.at(0)), _shown(group.at(-1)), "-" if difference is None else difference.signed,
        _shown(group.at(-1, "losses")), f"{run['trainable_parameters']:,}", f"{group.peak_bytes / MIB:,.0f}",
        f"{group.seconds:.2f}" + ("" if group.alone else "*"),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _shown(value: Interval | None) -> str:
    return "-" if value is None else str(value)
