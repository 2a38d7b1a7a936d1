"""Seconds of one training step on a real model: `python scripts/bench_speed.py --model .assets/models/smollm2-135m-instruct`.

All methods take turns within one run, so that whatever else the machine does falls on all of them; medians are reported.
A step is forward, backward and AdamW. Rows are unpadded text of the real data, every token labelled. What a method is called:
scripts/methods.py. Writes results/speed.jsonl, one line a method with its conditions; of runs of the same step the tables have the last.
"""

import sys
from pathlib import Path
from statistics import median

import torch
from causal_lm_step import CausalLMStep
from conditions import conditions
from methods import LOGIT_FREE, chunk_of, options_of, text_ids
from options import one, parse, several, some_of
from rich.progress import track
from store import append
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_memtune.memory.shapes import SHAPES

METHODS = (
    "plain", "checkpointing", LOGIT_FREE, "seeking 0.1", "seeking 0.3", "TokenTune 0.1", "TokenSeek 0.1", "exact streaming 128",
    "exact streaming 256", "exact streaming 512", "exact streaming 512 + checkpointing", "exact streaming 512 + checkpointing, by chunks",
    "exact streaming 512 + checkpointing, attention kept",
)  # fmt: skip
PROFILED = 12  # operators of a profile


def main(given: list[str] | None = None) -> None:
    options = parse(
        __doc__, "speed", given, model=one(Path(".assets/models/smollm2-135m-instruct")), data=one(Path(".assets/data/alpaca/train.jsonl")),
        train=some_of(("full", "lora")), rows=one(2, "of a batch"), tokens=one(512, "of a row"),
        methods=several(METHODS, "names as in scripts/methods.py") | {"default": None},
        repeats=one(5, "timed steps of each method"), untimed=one(1, "steps before each timed one; 0 where a step takes minutes"),
        dtype=some_of(("float32", "bfloat16")) | {"nargs": None, "default": "float32"},
        random_weights={"choices": list(SHAPES), "help": "time this shape with random weights, in place of a model"},
        profile={"action": "store_true", "help": "in place of timing: share of each operator in one step, in results/profile.jsonl"},
    )  # fmt: skip
    methods, told = named(options), options.random_weights or options.model.name
    met = {"device": "cpu", "dtype": options.dtype, "rows": options.rows, "threads": torch.get_num_threads()}
    met = conditions(**met, repeats=options.repeats, untimed=options.untimed)
    for train in options.train:
        bench = Bench(model_of(options, train), ids_of(options), options.untimed)
        row = {"model": told, "train": train, "tokens": options.tokens}
        if options.profile:
            for name in methods:
                append(
                    options.out.with_name("profile.jsonl"), row | {"method": name, "operators": bench.operators(name), "conditions": met}
                )
            continue
        seconds = bench.interleaved(methods, options.repeats)
        for name, found in seconds.items():
            relative = round(median(found) / median(seconds["plain"]), 3) if "plain" in seconds else None
            said = {"seconds": round(median(found), 4), "spread": [round(min(found), 4), round(max(found), 4)], "relative": relative}
            append(options.out, row | {"method": name} | said | {"conditions": met})
            print(f"{train:5} {name:50} {median(found):8.3f} s", flush=True)


def named(options) -> list[str]:
    """The methods to run; all that cut these rows where none was named. A stream of one chunk is no stream."""
    try:
        short = [name for name in options.methods or METHODS if (chunk_of(name) or 0) >= options.tokens]
    except ValueError as error:
        sys.exit(str(error))
    if options.methods and short:
        sys.exit(
            f"--methods: rows of {options.tokens} tokens are one chunk of {', '.join(short)}. Expected longer rows, or smaller chunks."
        )
    return [name for name in options.methods or METHODS if name not in short]


def model_of(options, train: str) -> nn.Module:
    dtype = getattr(torch, options.dtype)
    if options.random_weights:
        model = AutoModelForCausalLM.from_config(SHAPES[options.random_weights](), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    if train == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train()


def ids_of(options) -> Tensor:
    if options.random_weights:
        return torch.randint(1000, (options.rows, options.tokens))
    return text_ids(options.model, options.data, options.rows, options.tokens)


class Bench:
    """Steps of one model on one batch. untimed: steps before one that counts, which get their memory from the system."""

    def __init__(self, model: nn.Module, ids: Tensor, untimed: int):
        self._model, self._ids, self._untimed = model, ids, untimed
        self._optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def interleaved(self, methods: list[str], repeats: int) -> dict[str, list[float]]:
        """Seconds of a step under each method, which take turns. A step goes before them that is not timed: it pays for what happens once."""
        with self._step(methods[0]) as step:
            step.seconds(self._update)
        turns = [name for _ in range(repeats) for name in methods]
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for name in track(turns, "Timing", disable=not sys.stderr.isatty()):
            with self._step(name) as step:
                self._warm(step)
                seconds[name].append(step.seconds(self._update))
        return seconds

    def operators(self, name: str) -> dict[str, list]:
        """Those in which a step spends the most time of its own, with their share of the whole, and how often they run."""
        with self._step(name) as step:
            self._warm(step)
            with torch.profiler.profile() as profiled:
                step.seconds(self._update)
        found = sorted(profiled.key_averages(), key=lambda entry: entry.self_cpu_time_total, reverse=True)
        whole = sum(entry.self_cpu_time_total for entry in found)
        shares = {entry.key: [round(entry.self_cpu_time_total / whole, 4), entry.count] for entry in found[:PROFILED]}
        print(name, *(f"{share:6.1%} {count:6} x {operator}" for operator, (share, count) in shares.items()), sep="\n  ", flush=True)
        return shares

    def _step(self, name: str) -> CausalLMStep:
        return CausalLMStep(self._model, self._ids, **options_of(name))

    def _warm(self, step: CausalLMStep) -> None:
        for _ in range(self._untimed):
            step.seconds(self._update)

    def _update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


if __name__ == "__main__":
    main()
