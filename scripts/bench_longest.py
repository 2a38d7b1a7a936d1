"""How many tokens a row may have on a card, predicted: `python scripts/bench_longest.py`. Writes results/longest.jsonl.

Each line is a model, what is trained, and a method, with the predicted peak of a step for one row of several lengths. What the file has
already is not predicted again. scripts/tables.py reads lengths for cards off these lines: between two lengths the bytes lie on or below the
straight line, for they are the largest of several straight lines; beyond the last one the line goes on, where the last three lie on one.
"""

import argparse
import warnings
from pathlib import Path

from conditions import conditions
from store import measure

from hf_memtune.cli import budget, forecast
from hf_memtune.errors import MemTuneError

MODELS = ("Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B", "Qwen3-4B")
TRAIN = {"full": {}, "LoRA": {"lora_r": 16}, "QLoRA": {"lora_r": 16, "load_in_4bit": True}}
CHUNK = 2048
CHECKPOINTING = {"activation_checkpointing": True}
METHODS = {
    "plain": {},
    "checkpointing + logit-free loss": CHECKPOINTING | {"sequence_chunk_size": 2**20},
    "streaming 2048 + checkpointing": CHECKPOINTING | {"sequence_chunk_size": CHUNK},
    "the same, keys and values offloaded": CHECKPOINTING | {"sequence_chunk_size": CHUNK, "kv_offload": True},
}
LENGTHS = {
    True: (2, 4, 8, 16, 32, 64),
    False: (1, 2, 4, 16, 64, 128),
}  # in chunks; by whether the method streams: then a trace takes longer with its length


def read(model: str, changes: dict, tokens: int):
    """The settings of one run. Rows may be longer than the model has positions for: what they need is asked, not what they are good for."""
    given = ["--model", model, "--dtype", "bfloat16", "--sequence_length", str(tokens), "--max_length", "2"]
    given += ["--per_device_train_batch_size", "1", "--config_overrides", f"max_position_embeddings={2**21}", "--report_to", "none"]
    given += budget.flags(changes)
    return forecast.parse(given, forecast.make_parser("estimate"))


def predicted(model: str, train: str, method: str) -> dict:
    """Peak bytes by length, or why there are none."""
    changes, knots = TRAIN[train] | METHODS[method], {}
    for count in LENGTHS["streaming" in method or "offloaded" in method]:
        try:
            knots[count * CHUNK] = forecast.predict(read(model, changes, count * CHUNK)).peak_bytes
        except MemTuneError as error:
            return {"left_out": str(error)}
    return {"peak_bytes": knots}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("results/longest.jsonl"))
    arguments = parser.parse_args()
    described = conditions(dtype="bfloat16", rows=1, lora_rank=16, attention="sdpa")
    wanted = [{"model": model, "train": train, "method": method} for method in METHODS for train in TRAIN for model in arguments.models]
    found = lambda row: predicted(**row) | {"conditions": described}  # noqa: E731
    measure(arguments.out, wanted, found, _said, "Predicting")


def _said(row: dict) -> str:
    return f"{row['model']:14} {row['train']:6} {row['method']:38} {row.get('peak_bytes', row.get('left_out'))}"


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
