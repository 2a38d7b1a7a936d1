"""How far the rebuilt input of the first layer is off, by depth: `python scripts/bench_inverse.py`.

Real weights, one batch of real texts, forward and backward as in training. Of a stack of L layers the lowest ones are reversible. Writes
results/inverse.jsonl, one line a run; what the file already has is not measured again.

    make assets NAMES="smollm2 minilm alpaca"
"""

import argparse
import json
import math
import warnings
from pathlib import Path

import torch
from conditions import conditions
from store import measure, missing
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_memtune import ReversibleConfig, StreamOverflowError, make_reversible

MODELS = {
    "minilm": ("all-MiniLM-L6-v2", AutoModel, (2, 4, 6)),
    "smollm2": ("smollm2-135m-instruct", AutoModelForCausalLM, (2, 4, 6, 12, 30)),
}
COUPLINGS = {
    "centred, 1/16": {"reversible": "centred"},
    "meft1, published": {"reversible": "meft1"},
    "meft3, published": {"reversible": "meft3"},
}
KEY = ("model", "coupling", "numerics", "layers", "dtype")


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    for model in options.models:
        folder, kind, depths = MODELS[model]
        for dtype in ("float32", "bfloat16"):
            runs = [(model, coupling, numerics, n, dtype) for coupling in COUPLINGS for numerics in ("float", "exact") for n in depths]
            todo = missing(options.out, [dict(zip(KEY, run)) for run in runs])
            if not todo:
                continue
            loaded = kind.from_pretrained(options.assets / "models" / folder, dtype=getattr(torch, dtype))
            batch = _batch(options, folder)
            measure(options.out, todo, lambda run, loaded=loaded, batch=batch: _measured(run, loaded, batch), title=f"{model}, {dtype}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--assets", type=Path, default=Path(".assets"))
    parser.add_argument("--out", type=Path, default=Path("results/inverse.jsonl"))
    return parser.parse_args(arguments)


def _batch(options: argparse.Namespace, folder: str) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(options.assets / "models" / folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = map(json.loads, (options.assets / "data" / "alpaca" / "train.jsonl").read_text().splitlines()[: options.rows])
    texts = [f"{row['instruction']}\n{row['output']}" for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=options.tokens)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _measured(run: dict, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict:
    config = ReversibleConfig(reversible_numerics=run["numerics"], reversible_layers=run["layers"], **COUPLINGS[run["coupling"]]).filled()
    factors = [factor for factor in (config.reversible_scale, config.reversible_beta) if factor is not None]
    torch.manual_seed(0)  # of the adapters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what the float inverse is off by is what is measured
        handle = make_reversible(model, config)
    try:
        error, overflow = handle.verify(batch | ({"use_cache": False} if run["model"] == "smollm2" else {})).inverse_error, None
    except StreamOverflowError as raised:
        error, overflow = None, str(raised)
    finally:
        handle.restore()
    found = {
        "inverse_error": None if error is None or math.isinf(error) else error,
        "is_finite": error is not None and math.isfinite(error),
    }
    described = conditions(device="cpu", rows=len(batch["input_ids"]), tokens=batch["input_ids"].shape[1], threads=torch.get_num_threads())
    return {**found, "divisor": math.prod(factors), "overflow": overflow, "conditions": described}


if __name__ == "__main__":
    main()
