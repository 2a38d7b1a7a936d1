"""Bytes of one training step, traced for the true shapes of known models: `python scripts/bench_memory.py`.

Writes results/memory.jsonl, one line a measurement with its conditions; what the file already has is not measured again.
On a GPU (--device cuda) the same steps run for real, with random weights, and the allocator is asked instead.
"""

import argparse
import time
import warnings
from pathlib import Path

import torch
from conditions import conditions
from store import measure

from hf_memtune import StreamingConfig, TokenSeekingConfig
from hf_memtune.memory.shapes import SHAPES
from hf_memtune.memory.trace import measure_causal_lm_step, trace_causal_lm_step

MODELS = ["Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B"]
METHODS = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "checkpointing + logit-free loss": {"checkpointing": True, "fused_loss": True},
    "exact streaming 192": {"strategy": StreamingConfig(sequence_chunk_size=192)},
    "exact streaming 256": {"strategy": StreamingConfig(sequence_chunk_size=256)},
    "exact streaming 512 + checkpointing": {"strategy": StreamingConfig(sequence_chunk_size=512), "checkpointing": True},
}
RATIOS = (0.1, 0.3, 0.5, 1.0)
SEEKING: dict[str, dict] = {f"seeking {ratio:g}": {"token_ratio": ratio} for ratio in RATIOS}
SEEKING["TokenSeek 0.1"] = {"preset": "tokenseek", "seek_schedule": "step"}
EVERY = (*METHODS, *SEEKING)


def main() -> None:
    arguments = _arguments()
    wanted = [
        {"model": model, "tokens": tokens, "train": train, "method": method, "device": arguments.device}
        for tokens in arguments.tokens
        for model in arguments.models
        for train in arguments.train
        for method in EVERY
        if method in arguments.methods
    ]
    measure(arguments.out, wanted, _measured, _said)


def _said(row: dict) -> str:
    return f"{row['model']:14} {row['tokens']:6} {row['train']:5} {row['method']:32} {row['peak_bytes'] / 2**20:10.1f} MiB"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 8192], help="tokens of the one row of a batch")
    parser.add_argument("--train", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--methods", nargs="+", default=EVERY, choices=EVERY, metavar="METHOD", help=f"among {', '.join(EVERY)}")
    parser.add_argument("--device", default="traced", choices=["traced", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("results/memory.jsonl"))
    return parser.parse_args()


def options_of(method: str) -> dict:
    """What `trace_causal_lm_step` is given for a method."""
    if method in SEEKING:
        return {"checkpointing": True, "strategy": TokenSeekingConfig(token_seeking=True, **SEEKING[method])}
    return dict(METHODS[method])


def _measured(row: dict) -> dict:
    options = options_of(row["method"])
    config, rank = SHAPES[row["model"]](), 8 if row["train"] == "lora" else None
    began = time.perf_counter()
    described = conditions(dtype="bfloat16", rows=1, lora_rank=rank, attention="sdpa")
    if row["device"] == "cuda":
        step = measure_causal_lm_step(config, row["tokens"], torch.device("cuda"), lora_rank=rank, **options)
        described["gpu"] = torch.cuda.get_device_name()
    else:
        step = trace_causal_lm_step(config, row["tokens"], lora_rank=rank, **options)
    found = {name: getattr(step, name) for name in ("peak_bytes", "weight_bytes", "gradient_bytes")}
    return {**found, "seconds": round(time.perf_counter() - began, 1), "conditions": described}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
