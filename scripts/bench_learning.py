"""How well methods learn: one model trained many ways on the same rows, one line a run in results/STUDY.jsonl.

    make assets NAMES="smollm2 alpaca stories15m minilm movie_reviews boolq mmlu"
    python scripts/bench_learning.py quality --stage tune --list       what would be run
    python scripts/bench_learning.py quality --stage tune              then final, in this order
    python scripts/bench_learning.py quality --stage time --timed      alone on the machine; then race
    python scripts/bench_learning.py quality --stage screen --tasks stories-imdb --learning_rates 5e-4 \\
        --arms plain {random,combined}/{top,sample}/{cut,stream,skip}/10%    whatever arms you like
    python scripts/tables.py                                           the pages, from what was measured

STUDY: quality (token seeking; docs/results.md), glue (reversible adapters, by `hf-memtune glue`; docs/reversible-glue.md) or qa (questions with
choices, by `hf-memtune qa`; docs/evaluation.md). What the file has is not run again, so a stage may be stopped and started at will. Two processes may write to one file,
as with --seeds 1 2 and --seeds 3. What a name of an arm means: scripts/learning/arms.py. Which arms, sizes, learning rates and seeds a
stage has: scripts/learning/plans.py.
"""

import argparse
import logging
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path

from learning.plans import PLANS, STAGES, Cell, cells, latest, pending
from store import append, read


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(PLANS))
    parser.add_argument("--stage", required=True, choices=list(STAGES))
    parser.add_argument("--list", action="store_true", help="print what is left to run, and stop")
    parser.add_argument("--timed", action="store_true", help="note that nothing else runs, so that seconds a step are valid")
    parser.add_argument("--threads", type=int, default=1, help="threads of this process (default: 1)")
    parser.add_argument("--device", default="cpu", help="of quality (default: cpu)")
    parser.add_argument("--assets", type=Path, default=Path(".assets"), help="folder of models and data (default: .assets)")
    parser.add_argument("--out", type=Path, help="default: results/STUDY.jsonl")
    parser.add_argument("--held_out_rows", type=int, help="measure on this many rows at most")
    plan = parser.add_argument_group("in place of what the plans say")
    plan.add_argument("--tasks", nargs="+", help="these tasks only")
    plan.add_argument("--arms", nargs="+", help="these arms, by name, of every task")
    plan.add_argument("--rows", type=int, help="rows of a batch")
    plan.add_argument("--steps", type=int)
    plan.add_argument("--measured", type=int, help="times the held-out loss is measured after the start")
    plan.add_argument("--learning_rates", nargs="+", type=float)
    plan.add_argument("--seeds", nargs="+", type=int)
    options = parser.parse_args(arguments)
    options.out = options.out or Path(f"results/{options.study}.jsonl")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run, or list, what is left of a stage. Returns the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; must be set before transformers is imported
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU, that an optional kernel is missing
    options = parse(arguments)
    try:
        wanted = cells(options.study, options)
        if options.list:
            print(listing(wanted, latest(read(options.out))))
        else:
            go(options, wanted)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def listing(wanted: list[Cell], done: list[dict]) -> str:
    """A line a run that is left, then how many are done, and what waits for its learning rate."""
    left, named = pending(wanted, done), [cell.runs(done) for cell in wanted]
    finished = sum(map(len, named)) - len(left)
    return "\n".join(
        [*map(str, left), f"{len(left)} to run; {finished} done; {named.count([])} wait for the tuning of their learning rate"]
    )


def go(options: argparse.Namespace, wanted: list[Cell]) -> None:
    """Until nothing is left. The file is read again before each run: others write to it too."""
    import datasets
    import torch
    import transformers
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # that a head is new
    datasets.disable_progress_bars()
    logging.getLogger("hf_memtune").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    bench, ended = import_module(f"learning.{options.study}").Bench(options), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, speed_estimate_period=3600) as progress:
        bar = progress.add_task("starting")
        while left := pending(wanted, read(options.out)):
            progress.update(bar, description=str(left[0]), completed=ended, total=ended + len(left))
            record = bench.train(left[0])
            append(options.out, record)
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
