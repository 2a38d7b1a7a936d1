"""Write docs/reversible-glue.md and its picture from results/glue.jsonl: `python scripts/glue_page.py` (--check only compares).

Every number and every sentence follows from the file. What a person makes of them is in docs/reversible-glue-discussion.md.
"""

import argparse
import sys
from pathlib import Path

from glue.analysis import Group, groups_of, named, sentences
from glue.arms import DESCRIBED, FULL
from quality import records
from quality.analysis import Interval
from quality_page import conditions_section

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
NAME, PICTURE = "reversible-glue.md", "images/reversible-glue.png"
INTRODUCTION = """# Reversible adapters on a classification set

Ways to fine-tune one encoder on the same rows in the same order, by `scripts/bench_glue.py`, which runs `hf-memtune glue`:

{arms}

Each arm has the learning rate whose held-out loss was lowest for it on other rows and another seed. ± is a 95 % confidence interval over
seeds (Student's t); it says nothing of the choice of the {held_out} held-out rows, which are the same for every arm and seed.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "glue.jsonl")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder to write to (default: docs)")
    parser.add_argument("--check", action="store_true", help=f"write nothing; exit 1 if {NAME} is out of date")
    options = parser.parse_args(arguments)
    found, file = records.read(options.results), options.docs / NAME
    groups = groups_of(found)
    if not groups:
        print(f"{options.results}: no final runs; scripts/bench_glue.py makes them", file=sys.stderr)
        return 2
    text = page(found, groups, options.docs)
    if options.check:
        return int(not file.exists() or file.read_text() != text)
    options.docs.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    from glue.plots import accuracy_figure

    accuracy_figure(groups, options.docs / PICTURE)
    return 0


def page(found: list[dict], groups: list[Group], docs: Path) -> str:
    """The whole page."""
    run, discussion = groups[0].any_run, docs / "reversible-glue-discussion.md"
    described = run["conditions"]
    arms = "\n".join(f"- `{group.arm}`: {DESCRIBED[group.arm]}" for group in groups)
    return "\n".join([
        INTRODUCTION.format(arms=arms, held_out=described["held_out_rows"]),
        f"{described['model']}; {described['data']}; {run['steps']} steps of {run['rows']} rows.\n",
        f"![Accuracy against peak bytes]({PICTURE})\n",
        table(groups),
        "",
        " ".join(sentences(groups)),
        "",
        *([f"## Discussion\n\n{discussion.read_text().strip()}\n"] if discussion.exists() else []),
        conditions_section(records.of(found, stage="final")),
    ])  # fmt: skip


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


if __name__ == "__main__":
    sys.exit(main())
