"""The ladder of `hf-memtune plan` for known models, every rung: `python scripts/bench_ladder.py`. Writes results/ladder.jsonl.

Predicted bytes of a whole step (weights, gradients, optimizer state and all else), full fine-tuning in bfloat16 as the settings given. What the
file has already is not predicted again.
"""

import argparse
import time
import warnings
from pathlib import Path

from conditions import conditions
from store import measure

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
    described = conditions(dtype="bfloat16", rows=ROWS, tokens=TOKENS, attention="sdpa")
    rungs = {(model, rung.name): rung for model in arguments.models for rung in ladder(forecast.run_of(read(model, {})))}
    wanted = [{"model": model, "rung": name, "gradient": rung.gradient, "changes": rung.changes} for (model, name), rung in rungs.items()]
    found = lambda row: predicted(row["model"], rungs[row["model"], row["rung"]]) | {"conditions": described}  # noqa: E731
    measure(arguments.out, wanted, found, _said, "Predicting")


def _said(row: dict) -> str:
    return f"{row['model']:14} {row['rung']:32} {row.get('peak_bytes', 0) / 2**30:8.2f} GiB {row.get('seconds', 0):6.1f} s"


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
