"""How far the rebuilt input of the first layer is off, by depth: `python scripts/bench_inverse.py`.

Real weights, one batch of real texts, forward and backward as in training. Of a stack of L layers the lowest ones are reversible. Writes
results/inverse.jsonl, one line a run; what the file already has is not measured again.

    make assets NAMES="smollm2 minilm alpaca"
"""

import math
from functools import partial
from itertools import product
from pathlib import Path

import torch
from bench_start_point import MODELS, coupled, load
from options import one, parse, some_of
from store import measure, missing, read
from transformers import AutoTokenizer

from hf_memtune import ReversibleConfig, StreamOverflowError

DEPTHS = {"minilm": (2, 4, 6), "smollm2": (2, 4, 6, 12, 30)}
COUPLINGS = {"centred, 1/16": "centred", "meft1, published": "meft1", "meft3, published": "meft3"}
KEY = ("model", "coupling", "numerics", "layers", "dtype")


def main(given: list[str] | None = None) -> None:
    options = parse(__doc__, "inverse", given, models=some_of(DEPTHS), rows=one(4), tokens=one(48), assets=one(Path(".assets")))
    for model, dtype in product(options.models, ("float32", "bfloat16")):
        runs = [dict(zip(KEY, run)) for run in product([model], COUPLINGS, ("float", "exact"), DEPTHS[model], [dtype])]
        if missing(options.out, runs):
            batch = texts(options, options.assets / "models" / MODELS[model])
            found = partial(measured, model=load(options.assets, model, dtype), batch=batch)
            described = {"rows": len(batch["input_ids"]), "tokens": batch["input_ids"].shape[1], "threads": torch.get_num_threads()}
            measure(options.out, runs, found, f"{model}, {dtype}", device="cpu", **described)


def texts(options, folder: Path) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = read(options.assets / "data" / "alpaca" / "train.jsonl")[: options.rows]
    given = [f"{row['instruction']}\n{row['output']}" for row in rows]
    batch = tokenizer(given, return_tensors="pt", padding=True, truncation=True, max_length=options.tokens)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def measured(run: dict, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict:
    coupling = COUPLINGS[run["coupling"]]
    config = ReversibleConfig(reversible=coupling, reversible_numerics=run["numerics"], reversible_layers=run["layers"]).filled()
    factors = [factor for factor in (config.reversible_scale, config.reversible_beta) if factor is not None]
    error, overflow = None, None
    with coupled(model, config) as handle:
        try:
            error = handle.verify(batch | ({"use_cache": False} if run["model"] == "smollm2" else {})).inverse_error
        except StreamOverflowError as raised:
            overflow = str(raised)
    is_finite = error is not None and math.isfinite(error)
    shown = None if error is None or math.isinf(error) else error
    return {"inverse_error": shown, "is_finite": is_finite, "divisor": math.prod(factors), "overflow": overflow}


if __name__ == "__main__":
    main()
