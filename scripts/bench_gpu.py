"""Whether it holds on a GPU, and what it gives there, without a network: `python scripts/bench_gpu.py`.

Parts: exactness (the gradient of exact streaming by kernel, dtype, chunk and order, offloaded too), step (seconds and peak bytes), longest row (on
smaller cards, by limiting the allocator); and trace (the bytes of the steps without a device), which is run where it is asked for, on any machine.
Weights are random, of true shapes. Writes results/gpu.jsonl, one line a measurement with its conditions. What the file has already of this card is
not measured again, and what finds no time is left for another call: nothing is begun that is expected to end after 400 seconds, and after 8 minutes
the process ends itself. Exits with 1 where that happens, a gradient is wrong or a measurement fails.

    python scripts/bench_gpu.py --parts trace --device cpu                  # before or after, elsewhere
    python scripts/bench_gpu.py --tiny --device cpu --out /tmp/gpu.jsonl    # the same code in small
"""

import argparse
import faulthandler
import sys
import time
import traceback
import warnings
from itertools import groupby
from pathlib import Path

import torch
from conditions import conditions
from gpu.exactness import Exactness
from gpu.longest import LongestRow
from gpu.machine import Machine
from gpu.sizes import LARGE, TINY
from gpu.steps import Steps
from gpu.traces import Traces
from store import append, missing, read

OF_A_CARD = {part.name: part for part in (Exactness, Steps, LongestRow)}
PARTS = OF_A_CARD | {Traces.name: Traces}
OUT = Path("results/gpu.jsonl")


def main(given: list[str] | None = None) -> None:
    options = _options(given)
    faulthandler.dump_traceback_later(options.at_most, exit=True, file=sys.__stderr__)  # a step on a card can be stopped by nothing else
    try:
        left, failed, wrong = _all(options)
    finally:
        faulthandler.cancel_dump_traceback_later()
    print(f"{len(left)} left for another call, {len(failed)} failed, {len(wrong)} wrong gradients")
    for row in (*left, *failed, *wrong):
        state = "left" if row in left else "failed" if row in failed else "WRONG"
        print(f"{state}: {_named(row)}")
    sys.exit(1 if failed or wrong else 0)


def _all(options: argparse.Namespace) -> tuple[list[dict], list[dict], list[dict]]:
    """What found no time, what failed, and wrong gradients. A part that takes more than its share leaves less to those after it."""
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # the limit of the allocator asks for a number
    machine = Machine(device, TINY if options.tiny else LARGE)
    deadline = time.perf_counter() + options.seconds
    left, failed = [], []
    for position, name in enumerate(options.parts):
        part, shares = PARTS[name](machine), [PARTS[each].share for each in options.parts[position:]]
        seconds = (deadline - time.perf_counter()) * part.share / sum(shares)
        unmeasured, problems = _measure(part, machine, options.out, seconds)
        left, failed = left + unmeasured, failed + problems
        machine.clear()
    return left, failed, [row for row in read(options.out) if row["gpu"] == machine.name and row.get("exact") is False]


def _options(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    of_a_card = ", ".join(OF_A_CARD)
    parser.add_argument(
        "--parts",
        nargs="+",
        default=list(OF_A_CARD),
        choices=list(PARTS),
        metavar="PART",
        help=f"among: {', '.join(PARTS)}; default: {of_a_card}",
    )
    parser.add_argument("--seconds", type=float, default=400, help="for all parts; no measurement is begun that is expected to take longer")
    parser.add_argument("--at_most", type=float, default=480, help="seconds after which the process ends itself, whatever it is doing")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(given)
    problems = []
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        problems.append(
            f"--device: got {options.device}, expected a device that is there: torch finds no CUDA. Try it with --tiny --device cpu."
        )
    needs_card = any(name in OF_A_CARD for name in options.parts)
    if options.out == OUT and (options.tiny or needs_card and not options.device.startswith("cuda")):
        problems.append(f"--out: got {OUT}, which is for true shapes on a GPU. Name another file.")
    if problems:
        parser.error(" ".join(problems))
    return options


def _measure(part, machine: Machine, out: Path, seconds: float) -> tuple[list[dict], list[dict]]:
    """Measure what the file lacks, models with equal parts of the time. Returns what found no time, and what failed."""
    gpu = machine.name if part.name in OF_A_CARD else None
    described = conditions(device=machine.device.type, gpu=gpu, **part.described)
    wanted = missing(out, [{"part": part.name, "gpu": gpu} | run for run in part.runs()])
    groups = [list(runs) for _, runs in groupby(wanted, key=lambda run: run.get("model"))]
    deadline, left, failed = time.perf_counter() + seconds, [], []
    for position, runs in enumerate(groups):
        now = time.perf_counter()
        ends = now + (deadline - now) / (len(groups) - position)
        for number, run in enumerate(runs):
            remaining = ends - time.perf_counter()
            if remaining <= part.expected_seconds(run):
                left.append(run)
                continue
            machine.empty()
            try:
                row = run | _found(part, machine, run, remaining / (len(runs) - number))
            except Exception:  # one kernel that fails must not cost the rest
                traceback.print_exc()
                failed.append(run)
                continue
            append(out, row | {"conditions": described})
            print(_named(row), flush=True)
    return left, failed


def _found(part, machine: Machine, run: dict, seconds: float) -> dict:
    try:
        return part.measured(run, seconds)
    except torch.OutOfMemoryError:
        return {"left_out": "out of memory"}


def _named(row: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("gpu", "conditions"))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
