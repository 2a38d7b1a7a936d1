"""The ladder of `hf-memtune plan` for known models, every rung: `python scripts/bench_ladder.py`. Writes results/ladder.jsonl.

Predicted bytes of a whole step (weights, gradients, optimizer state and all else), full fine-tuning in bfloat16 as the settings given.
What the file has already is not predicted again.
"""

import time

from options import parse, several
from store import measure

from hf_memtune.cli import budget, forecast
from hf_memtune.cli.plan import PlanArguments, make_parser
from hf_memtune.errors import MemTuneError
from hf_memtune.forecast.ladder import ladder

MODELS, TOKENS, ROWS = ("Llama-3.1-8B", "Llama-3.2-1B"), 2048, 2


def main(given: list[str] | None = None) -> None:
    options = parse(__doc__, "ladder", given, models=several(MODELS))
    rungs = [{"model": model} | vars(rung) for model in options.models for rung in ladder(forecast.run_of(settings(model, {})))]
    wanted = [{"model": rung["model"], "rung": rung["name"], "gradient": rung["gradient"], "changes": rung["changes"]} for rung in rungs]
    measure(options.out, wanted, predicted, "Predicting", dtype="bfloat16", rows=ROWS, tokens=TOKENS, attention="sdpa")


def settings(model: str, changes: dict):
    flags = {"model": model, "dtype": "bfloat16", "sequence_length": TOKENS, "max_length": TOKENS, "per_device_train_batch_size": ROWS}
    words = [word for name, value in (flags | {"budget": "1GiB"}).items() for word in (f"--{name}", str(value))]
    return forecast.parse([*words, *budget.flags(changes)], make_parser(), PlanArguments)


def predicted(run: dict) -> dict:
    began = time.perf_counter()
    try:
        found = forecast.predict(settings(run["model"], run["changes"]))
    except MemTuneError as error:
        return {"left_out": str(error)}
    seconds = round(time.perf_counter() - began, 1)
    categories = {phase.phase: phase.by_category for phase in found.account.phases}
    return {"peak_bytes": found.peak_bytes, "peak_phase": found.peak_phase, "phases": categories, "flops": found.flops, "seconds": seconds}


if __name__ == "__main__":
    main()
