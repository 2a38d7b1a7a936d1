"""Bytes of one training step, traced for the true shapes of known models: `python scripts/bench_memory.py`.

Writes results/memory.jsonl, one line a measurement with its conditions; what the file already has is not measured again. The bytes of
a GPU are compared with those of the trace by scripts/bench_gpu.py.
"""

import time
from itertools import product

from causal_lm_step import trace_causal_lm_step
from conditions import conditions
from methods import LOGIT_FREE, options_of
from options import parse, several, some_of
from store import measure

from hf_memtune.memory.shapes import SHAPES

MODELS = ("Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B")
METHODS = (
    "plain", "checkpointing", "checkpointing + fused loss", LOGIT_FREE, "exact streaming 192", "exact streaming 256",
    "exact streaming 512 + checkpointing", "exact streaming 512 + checkpointing, by chunks",
    *(f"seeking {ratio:g} + checkpointing" for ratio in (0.1, 0.3, 0.5, 1.0)), "TokenSeek 0.1 + checkpointing",
)  # fmt: skip


def main(given: list[str] | None = None) -> None:
    options = parse(
        __doc__, "memory", given, models=some_of(SHAPES, f"default: {', '.join(MODELS)}", MODELS), train=some_of(("lora", "full")),
        tokens=several((512, 2048, 8192), "tokens of the one row of a batch"), methods=several(METHODS, "names as in scripts/methods.py"),
    )  # fmt: skip
    wanted = [
        {"model": model, "tokens": tokens, "train": train, "method": method, "device": "traced"}
        for tokens, model, train, method in product(options.tokens, options.models, options.train, options.methods)
    ]
    measure(options.out, wanted, measured)


def measured(run: dict) -> dict:
    config, rank, began = SHAPES[run["model"]](), 8 if run["train"] == "lora" else None, time.perf_counter()
    step = trace_causal_lm_step(config, run["tokens"], lora_rank=rank, **options_of(run["method"]))
    found = {name: getattr(step, name) for name in ("peak_bytes", "weight_bytes", "gradient_bytes")}
    described = conditions(dtype="bfloat16", rows=1, lora_rank=rank, attention="sdpa")
    return {**found, "seconds": round(time.perf_counter() - began, 1), "conditions": described}


if __name__ == "__main__":
    main()
