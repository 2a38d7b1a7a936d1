"""How many tokens a row may have on a card, predicted: `python scripts/bench_longest.py`. Writes results/longest.jsonl.

Each line is a model, what is trained, and a method, with the predicted peak of a step for one row of several lengths. What the file has
already is not predicted again. scripts/tables.py reads lengths for cards off these lines: between two lengths the bytes lie on or below the
straight line, for they are the largest of several straight lines; beyond the last one the line goes on, where the last three lie on one, and
where they do not it is said how far was predicted.
"""

from options import parse, several
from store import measure

from hf_memtune.cli import budget, forecast
from hf_memtune.errors import MemTuneError

MODELS = ("Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B", "Qwen3-4B")
TRAIN = {"full": {}, "LoRA": {"lora_r": 16}, "QLoRA": {"lora_r": 16, "load_in_4bit": True}}
CHUNK = 2048
CHECKPOINTING = {"activation_checkpointing": True}
METHODS = {  # with checkpointing, streaming goes layer by layer in all of these models; offloaded are the inputs of the layers
    "plain": {},
    "checkpointing + logit-free loss": CHECKPOINTING | {"sequence_chunk_size": 2**20},
    "streaming 2048 + checkpointing": CHECKPOINTING | {"sequence_chunk_size": CHUNK},
    "the same, offloaded": CHECKPOINTING | {"sequence_chunk_size": CHUNK, "kv_offload": True},
}
# in chunks; by whether the method streams: then a trace takes longer with its length
LENGTHS = {False: (2, 4, 8, 16, 32, 64), True: (2, 4, 8, 16)}


def main(given: list[str] | None = None) -> None:
    options = parse(__doc__, "longest", given, models=several(MODELS))
    wanted = [{"model": model, "train": train, "method": method} for method in METHODS for train in TRAIN for model in options.models]
    measure(options.out, wanted, predicted, "Predicting", dtype="bfloat16", rows=1, lora_rank=16, attention="sdpa")


def settings(model: str, changes: dict, tokens: int):
    """The settings of one run. Rows may be longer than the model has positions for: what they need is asked, not what they are good for."""
    flags = {"model": model, "dtype": "bfloat16", "sequence_length": tokens, "max_length": 2, "per_device_train_batch_size": 1}
    flags |= {"config_overrides": f"max_position_embeddings={2**21}", "report_to": "none"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return forecast.parse([*words, *budget.flags(changes)], forecast.make_parser("estimate"))


def predicted(run: dict) -> dict:
    """Peak bytes by length, or why there are none."""
    changes, knots = TRAIN[run["train"]] | METHODS[run["method"]], {}
    for count in LENGTHS["sequence_chunk_size" in changes and changes["sequence_chunk_size"] == CHUNK]:
        try:
            knots[str(count * CHUNK)] = forecast.predict(settings(run["model"], changes, count * CHUNK)).peak_bytes
        except MemTuneError as error:
            return {"left_out": str(error)}
    return {"peak_bytes": knots}


if __name__ == "__main__":
    main()
