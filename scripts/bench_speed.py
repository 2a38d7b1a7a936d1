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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from conditions import conditions
from rich.progress import Progress
from store import append
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_memtune import Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig

Made = Callable[[], AbstractContextManager]
"""Puts a method on the model, for as long as the context is open."""

SEEKING: dict[str, dict] = {
    "seeking 10 %": {"token_ratio": 0.1},
    "seeking 30 %": {"token_ratio": 0.3},
    "TokenTune 10 %": {"preset": "tokentune"},
    "TokenSeek 10 %": {"preset": "tokenseek", "seek_schedule": "step"},
}
STREAMING = {f"exact streaming, chunks of {chunk}": chunk for chunk in (128, 192, 256, 512)}
BY_LAYERS = {f"exact streaming {chunk} + checkpointing": chunk for chunk in (512, 1024)}
BY_CHUNKS = f"{next(iter(BY_LAYERS))}, by chunks"
PROFILED = 12  # operators of a profile
LOGIT_FREE = "checkpointing + logit-free loss"  # a stream of one chunk


def main() -> None:
    arguments = _arguments()
    for train in arguments.train:
        model, batch = _model(arguments, train), _batch(arguments)
        methods = {name: made for name, made in _methods(model, arguments).items() if name in arguments.methods}
        if arguments.profile:
            _profile(arguments, train, methods, model, batch)
            continue
        seconds = _interleaved(methods, _step(model, batch), arguments.repeats, arguments.untimed)
        plain = statistics.median(seconds["plain"]) if "plain" in seconds else None
        for method, measured in seconds.items():
            row = _row(arguments, train, method, measured, plain, batch)
            append(arguments.out, row)
            print(f"{train:5} {method:32} {row['seconds']:8.3f} s  {row['relative'] or float('nan'):5.2f} x plain")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".assets/models/smollm2-135m-instruct"))
    parser.add_argument("--data", type=Path, default=Path(".assets/data/alpaca/train.jsonl"))
    parser.add_argument("--train", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    every = ["plain", "checkpointing", LOGIT_FREE, *SEEKING, *STREAMING, *BY_LAYERS, BY_CHUNKS]
    parser.add_argument(
        "--methods", nargs="+", default=every, choices=every, metavar="METHOD", help="among " + ", ".join(every).replace("%", "%%")
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--untimed", type=int, default=1, help="steps before each timed one; 0 where a step takes minutes")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--random_weights", help="name of hf_memtune.memory.shapes: time that shape with random weights instead")
    parser.add_argument(
        "--profile", action="store_true", help="in place of timing: share of each operator in one step, in results/profile.jsonl"
    )
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


def _methods(model: torch.nn.Module, arguments: argparse.Namespace) -> dict[str, Made]:
    """All of them, by name; a stream of one chunk is no stream."""
    sizes = (STREAMING | BY_LAYERS).items()
    streaming = {name: StreamingConfig(sequence_chunk_size=n) for name, n in sizes if n < arguments.tokens}
    if arguments.tokens > 512:
        streaming[BY_CHUNKS] = StreamingConfig(sequence_chunk_size=512, stream_order="chunks")
    streaming[LOGIT_FREE] = StreamingConfig(sequence_chunk_size=arguments.tokens)
    seeking = {name: TokenSeekingConfig(token_seeking=True, **settings) for name, settings in SEEKING.items()}
    found: dict[str, Made] = {"plain": nullcontext, "checkpointing": partial(checkpointed, model, nullcontext)}
    found |= {name: partial(Streaming, model, config) for name, config in streaming.items()}
    found |= {name: partial(TokenSeeking, model, config) for name, config in seeking.items()}
    return found | {n: partial(checkpointed, model, found[n]) for n in (*BY_LAYERS, BY_CHUNKS, LOGIT_FREE) if n in found}


@contextmanager
def checkpointed(model: torch.nn.Module, method: Made) -> Iterator[None]:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # as enable_input_require_grads does, whose hook is lost, and stays, where it is called twice
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        with method():
            yield
    finally:
        hook.remove()
        model.gradient_checkpointing_disable()


def _step(model: torch.nn.Module, batch: dict) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _interleaved(methods: dict[str, Made], step: Callable[[], None], repeats: int, untimed: int) -> dict[str, list[float]]:
    """Every turn times one step under each method, after untimed ones, which get their memory from the system."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("Timing", total=repeats * len(methods))
        for _ in range(repeats):
            for name, method in methods.items():
                with method():
                    for _ in range(untimed):
                        step()
                    _synchronise()
                    began = time.perf_counter()
                    step()
                    _synchronise()
                    seconds[name].append(time.perf_counter() - began)
                progress.advance(task)
    return seconds


def _profile(arguments: argparse.Namespace, train: str, methods: dict[str, Made], model: torch.nn.Module, batch: dict) -> None:
    """One line a method: the operators in which its step spends the most time of its own, and their share of the whole."""
    step = _step(model, batch)
    for method, made in methods.items():
        with made():
            for _ in range(arguments.untimed):
                step()
            with torch.profiler.profile() as profiled:
                step()
        found = sorted(profiled.key_averages(), key=lambda entry: entry.self_cpu_time_total, reverse=True)
        whole = sum(entry.self_cpu_time_total for entry in found)
        shares = {entry.key: [round(entry.self_cpu_time_total / whole, 4), entry.count] for entry in found[:PROFILED]}
        told = {"model": arguments.random_weights or arguments.model.name, "train": train, "method": method, "tokens": arguments.tokens}
        append(arguments.out.with_name("profile.jsonl"), {**told, "operators": shares, "conditions": _conditions(arguments)})
        print(method, *(f"{share:6.1%} {count:6} x {name}" for name, (share, count) in shares.items()), sep="\n  ", flush=True)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _row(arguments, train: str, method: str, measured: list[float], plain: float | None, batch: dict) -> dict:
    median = statistics.median(measured)
    return {
        "model": arguments.random_weights or arguments.model.name,
        "train": train,
        "method": method,
        "tokens": arguments.tokens,
        "seconds": round(median, 4),
        "spread": [round(min(measured), 4), round(max(measured), 4)],
        "relative": None if plain is None else round(median / plain, 3),
        "conditions": _conditions(arguments),
    }


def _conditions(arguments: argparse.Namespace) -> dict:
    described = conditions(
        device=arguments.device,
        dtype=arguments.dtype,
        rows=arguments.rows,
        threads=torch.get_num_threads(),
        repeats=arguments.repeats,
        untimed=arguments.untimed,
    )
    if arguments.device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name()
    return described


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
