"""The ladder of `hf-memtune plan` for known models, every rung: `python scripts/bench_ladder.py`. Writes results/ladder.jsonl.

Predicted bytes of a whole step (weights, gradients, optimizer state and all else), full fine-tuning in bfloat16 as the settings given. What the
file has already is not predicted again.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

from conditions import conditions
from rich.progress import track

from hf_memtune.cli import budget, forecast
from hf_memtune.cli.plan import PlanArguments, make_parser
from hf_memtune.errors import MemTuneError
from hf_memtune.forecast.ladder import ladder

MODELS, TOKENS, ROWS = ("Llama-3.1-8B", "Llama-3.2-1B"), 2048, 2


def read(model: str, changes: dict):
    given = ["--model", model, "--dtype", "bfloat16", "--sequence_length", str(TOKENS), "--per_device_train_batch_size", str(ROWS)]
    given += ["--budget", "1GiB", "--max_length", str(TOKENS)]
    return forecast.parse([*given, *budget.flags(changes)], make_parser(), PlanArguments)


def predicted(model: str, rung) -> dict:
    began = time.perf_counter()
    try:
        found = forecast.predict(read(model, rung.changes))
    except MemTuneError as error:
        return {"left_out": str(error)}
    seconds = round(time.perf_counter() - began, 1)
    categories = {phase.phase: phase.by_category for phase in found.account.phases}
    return {"peak_bytes": found.peak_bytes, "peak_phase": found.peak_phase, "phases": categories, "flops": found.flops, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("results/ladder.jsonl"))
    arguments = parser.parse_args()
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    known = {(row["model"], row["rung"]) for row in map(json.loads, lines)}
    described = conditions(dtype="bfloat16", rows=ROWS, tokens=TOKENS, attention="sdpa")
    wanted = [(model, rung) for model in arguments.models for rung in ladder(forecast.run_of(read(model, {})))]
    todo = [(model, rung) for model, rung in wanted if (model, rung.name) not in known]
    for model, rung in track(todo, description="Predicting", disable=not sys.stderr.isatty()):
        row = {"model": model, "rung": rung.name, "gradient": rung.gradient, "changes": rung.changes}
        row |= predicted(model, rung) | {"conditions": described}
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{model:14} {rung.name:32} {row.get('peak_bytes', 0) / 2**30:8.2f} GiB {row.get('seconds', 0):6.1f} s", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
