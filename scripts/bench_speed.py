"""Seconds of one training step on a real model: `python scripts/bench_speed.py --model .assets/models/smollm2-135m-instruct`.

All methods take turns within one run, so that whatever else the machine does falls on all of them; medians are reported.
A step is forward, backward and AdamW. Rows are unpadded text of the real data, every token labelled.
Writes results/speed.jsonl, one line a method with its conditions.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from conditions import conditions
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_memtune import Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig
from hf_memtune.methods.installed import InstalledStrategy

SEEKING: dict[str, dict] = {
    "seeking 10 %": {"token_ratio": 0.1},
    "seeking 30 %": {"token_ratio": 0.3},
    "TokenTune 10 %": {"preset": "tokentune"},
    "TokenSeek 10 %": {"preset": "tokenseek", "seek_schedule": "step"},
}
STREAMING = {f"exact streaming, chunks of {chunk}": chunk for chunk in (128, 192, 256, 512)}
STREAMING_CHECKPOINTED = "exact streaming 512 + checkpointing"
LOGIT_FREE = "checkpointing + logit-free loss"  # a stream of one chunk


def main() -> None:
    arguments = _arguments()
    for train in arguments.train:
        model, batch = _model(arguments, train), _batch(arguments)
        installed = _installed(model, arguments)
        methods = _methods(model, batch, installed)
        seconds = _interleaved({n: m for n, m in methods.items() if n in arguments.methods}, arguments.repeats)
        for strategy in installed.values():
            strategy.remove()
        plain = statistics.median(seconds["plain"])
        for method, measured in seconds.items():
            row = _row(arguments, train, method, measured, plain, batch)
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{train:5} {method:32} {row['seconds']:8.3f} s  {row['relative']:5.2f} x plain")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".assets/models/smollm2-135m-instruct"))
    parser.add_argument("--data", type=Path, default=Path(".assets/data/alpaca/train.jsonl"))
    parser.add_argument("--train", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    every = ["plain", "checkpointing", LOGIT_FREE, *SEEKING, *STREAMING, STREAMING_CHECKPOINTED]
    parser.add_argument("--methods", nargs="+", default=every, choices=every, metavar="METHOD", help="among " + ", ".join(every).replace("%", "%%"))
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each method, each after an untimed one")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--random_weights", help="name of hf_memtune.memory.shapes: time that shape with random weights instead")
    parser.add_argument("--out", type=Path, default=Path("results/speed.jsonl"))
    return parser.parse_args()


def _model(arguments: argparse.Namespace, train: str) -> torch.nn.Module:
    dtype = getattr(torch, arguments.dtype)
    if arguments.random_weights:
        from hf_memtune.memory.shapes import SHAPES

        with torch.device(arguments.device):
            model = AutoModelForCausalLM.from_config(SHAPES[arguments.random_weights](), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device)
    if train == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train()


def _batch(arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Rows cut from the text of the data set, end to end."""
    shape = (arguments.rows, arguments.tokens)
    if arguments.random_weights:
        ids = torch.randint(1000, shape)
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        lines = map(json.loads, arguments.data.read_text().splitlines())
        text = "\n\n".join(f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in lines)
        ids = torch.tensor(tokenizer(text[: 40 * shape[0] * shape[1]])["input_ids"][: shape[0] * shape[1]]).view(shape)
    ids = ids.to(arguments.device)
    return {"input_ids": ids, "labels": ids}


def _installed(model: torch.nn.Module, arguments: argparse.Namespace) -> dict[str, InstalledStrategy]:
    """The strategies asked for; a stream of one chunk is no stream."""
    streaming = {name: StreamingConfig(sequence_chunk_size=n) for name, n in STREAMING.items() if n < arguments.tokens}
    if arguments.tokens > 512:
        streaming[STREAMING_CHECKPOINTED] = StreamingConfig(sequence_chunk_size=512)
    streaming[LOGIT_FREE] = StreamingConfig(sequence_chunk_size=arguments.tokens)
    installed = {name: Streaming(model, config) for name, config in streaming.items() if name in arguments.methods}
    seeking = {name: settings for name, settings in SEEKING.items() if name in arguments.methods}
    return installed | {n: TokenSeeking(model, TokenSeekingConfig(token_seeking=True, **s)) for n, s in seeking.items()}


def _methods(model: torch.nn.Module, batch: dict, installed: dict[str, InstalledStrategy]) -> dict[str, Callable[[], None]]:
    """A function a method, each doing one step on the same model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def finish() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def plain() -> None:
        model(**batch, use_cache=False).loss.backward()
        finish()

    def checkpointed(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
            step()
            model.gradient_checkpointing_disable()

        return run

    def stepping(strategy: InstalledStrategy) -> Callable[[], None]:
        def step() -> None:
            with strategy.step(batch) as running:
                for _ in running.turns():
                    (running.loss_sum(model(**running.inputs)) / running.loss_tokens).backward()
            finish()

        return step

    found = {"plain": plain, "checkpointing": checkpointed(plain), **{name: stepping(s) for name, s in installed.items()}}
    return found | {name: checkpointed(found[name]) for name in (STREAMING_CHECKPOINTED, LOGIT_FREE) if name in found}


def _interleaved(methods: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Every turn each method does two steps, of which the second is timed: the first gets its memory from the system."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("Timing", total=repeats * len(methods))
        for _ in range(repeats):
            for name, step in methods.items():
                step()
                _synchronise()
                began = time.perf_counter()
                step()
                _synchronise()
                seconds[name].append(time.perf_counter() - began)
                progress.advance(task)
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _row(arguments, train: str, method: str, measured: list[float], plain: float, batch: dict) -> dict:
    median = statistics.median(measured)
    described = conditions(
        device=arguments.device, dtype=arguments.dtype, rows=arguments.rows, threads=torch.get_num_threads(), repeats=arguments.repeats
    )
    if arguments.device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name()
    return {
        "model": arguments.random_weights or arguments.model.name,
        "train": train,
        "method": method,
        "tokens": arguments.tokens,
        "seconds": round(median, 4),
        "spread": [round(min(measured), 4), round(max(measured), 4)],
        "relative": round(median / plain, 3),
        "conditions": described,
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
