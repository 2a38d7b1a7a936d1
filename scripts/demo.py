"""Fine-tune a small real model five ways, and compare what each costs and how well it learns. `make demo` runs this.

    python scripts/demo.py [--minutes 7 | --steps 30] [--rows 48] [--quick]

Plain training, activation checkpointing, exact streaming, the best-scored tenth of the tokens (TokenSeek), and token seeking as this library
sets it: the same model, adapters, rows in the same order, optimizer and seed. Writes report.html, tokens.html and results.json to out/demo.
"""

import argparse
import json
import logging
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from conditions import conditions

ASSETS = Path(__file__).resolve().parents[1] / ".assets"
SEED, BATCH, MAX_LENGTH, LORA_R = 0, 4, 160, 8
STEPS, FEWEST_STEPS, ROWS, EVALUATIONS = 30, 6, 48, 4  # evaluations of a method: before training, and thrice while it goes on
RELATIVE = 1.0 + 1.4 + 1.55 + 0.75 + 0.75  # time of a step of each method, relative to plain training: results/demo.json
FORWARD = 0.7  # of a batch of 8 held-out rows, relative to a step of plain training
LEARNING_RATE = 1.5e-3  # the best of three for every method on this model and these rows: docs/results.md
TRACED_STEP = 1  # counted from 0: in the first one the optimizer makes its state, which belongs to no step
CHUNK = 64  # tokens of a chunk of streaming: these rows are short
SEEKING, PUBLISHED = "token seeking, 30%", "TokenSeek, 10%"

METHODS = {
    "plain training": {},
    "activation checkpointing": {"activation_checkpointing": True},
    f"exact streaming, chunks of {CHUNK}": {"sequence_chunk_size": CHUNK},
    PUBLISHED: {"token_seeking": True, "token_ratio": 0.1, "preset": "tokenseek", "seek_schedule": "step"},
    SEEKING: {"token_seeking": True, "token_ratio": 0.3},
}
CAVEAT = (
    "One seed, one small model, few steps: the loss curves show that the methods learn, not which of them learns best. "
    "Memory and time are of this machine and these short rows; longer rows widen the differences in memory."
)

NOTES = f"""<p>The same model, adapters, rows in the same order, optimizer and seed; only the method differs. The loss is that of
all labelled tokens of rows held out, whatever tokens a method learns from.</p><p><strong>{CAVEAT}</strong></p>
<p><a href="tokens.html">Which tokens TokenSeek keeps of two held-out examples</a>, and why.</p>"""


@dataclass
class Result:
    """What one method cost, and how the held-out loss fell: (optimizer steps done, loss) pairs."""

    name: str
    held_out_losses: list[tuple[int, float]]
    step_seconds: float = 0.0
    peak_bytes: int = 0
    tokens_kept: int = 0
    tokens_seen: int = 0
    settings: dict = field(default_factory=dict)

    def row(self) -> dict:
        """As the table and the page want it."""
        return {
            "method": self.name,
            "loss_before": self.held_out_losses[0][1],
            "loss_after": self.held_out_losses[-1][1],
            "losses": self.held_out_losses,
            "peak_bytes": self.peak_bytes,
            "seconds_per_step": self.step_seconds,
            "tokens_kept_share": self.tokens_kept / self.tokens_seen if self.tokens_kept else None,
            "settings": self.settings,
        }


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; a model or data folder that is missing ends the program with a word on how to get it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, help=f"optimizer steps of each method (default: as many as the minutes allow, {STEPS} at most)"
    )
    parser.add_argument("--minutes", type=float, default=7.0, help="minutes for all methods, where no steps are given (default: 7)")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"held-out rows, for the loss (default: {ROWS})")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 4 steps, 8 held-out rows")
    parser.add_argument("--model", default=str(ASSETS / "models/smollm2-135m-instruct"), help="folder of a causal model")
    parser.add_argument("--data", default=str(ASSETS / "data/alpaca/train.jsonl"), help="rows of instruction, input, output")
    parser.add_argument("--out", default="out/demo", help="folder to write to (default: out/demo)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.rows = 4, 8
    if (options.steps is not None and options.steps < 3) or options.rows < 2 or options.minutes <= 0:
        parser.error("--steps must be 3 or more (the first two are not timed), --rows 2 or more, --minutes more than 0")
    for path in (options.model, options.data):
        if not Path(path).exists():
            parser.error(f"{path} does not exist; `make assets` fetches the model and the data")
    return options


def main(arguments: list[str]) -> int:
    """Train every method, then write the report and print the table."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; must be set before transformers is imported
    options, began = parse(arguments), time.perf_counter()
    quiet()
    from rich.console import Console

    console = Console()
    demo = Demo(options, console)
    results = [demo.run(name, settings) for name, settings in METHODS.items()]
    report = demo.write(results)
    from hf_memtune.visualization import comparison_table

    print(f"\n{comparison_table([result.row() for result in results])}\n\n{CAVEAT}\n")
    print(f"report: {report}\n{(time.perf_counter() - began) / 60:.1f} minutes in all")
    return 0


def quiet() -> None:
    """Leave out what libraries say to their developers: it would bury the results."""
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU, that an optional kernel is missing


def affordable(step_seconds: float, minutes: float, rows: int) -> tuple[int, int]:
    """Steps of each method, and held-out rows, for which there is time on a machine that takes so long for a step of plain training.

    Fewer rows are measured before there are very few steps.
    """
    for share in (1, 2, 3):
        measured = max(2, rows // share)
        evaluations = len(METHODS) * EVALUATIONS * FORWARD * measured / 8
        steps = min(STEPS, int((60 * minutes / step_seconds - evaluations) / RELATIVE))
        if steps >= 2 * FEWEST_STEPS:
            break
    return max(FEWEST_STEPS, steps), measured


class Demo:
    """What all methods share: the rows, the tokenizer, the settings, and where the results go."""

    def __init__(self, options: argparse.Namespace, console):
        import datasets
        import transformers

        from hf_memtune.cli.arguments import DataArguments, ModelArguments
        from hf_memtune.cli.data import prepare
        from hf_memtune.cli.model import load_tokenizer

        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        self.options, self.console, self.out = options, console, Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.model_settings = ModelArguments(options.model, dtype="float32", lora_r=LORA_R)
        self.tokenizer = load_tokenizer(self.model_settings)
        self.data_settings = DataArguments(options.data, max_length=MAX_LENGTH, eval_fraction=0.1, max_eval_rows=options.rows)
        rows = prepare(self.data_settings, self.tokenizer)
        # by length, so that little of a batch is padding; the loss of all rows is the same in any order
        order = sorted(range(len(rows.held_out)), key=lambda n: len(rows.held_out[n]["input_ids"]))
        self.data_settings = rows.data
        self.train, self.held_out = rows.train, rows.held_out.select(order)
        self.loss_before: float | None = None
        self.fewer = ""
        if options.steps is None:
            self._choose_steps()

    def _choose_steps(self) -> None:
        """As many steps as the machine has time for: it is measured first."""
        from hf_memtune.cli.model import load_trainable

        seconds = self._seconds_of_a_step(load_trainable(self.model_settings, self.data_settings, self.tokenizer))
        self.options.steps, rows = affordable(seconds, self.options.minutes, len(self.held_out))
        self.held_out = self.held_out.select(range(0, len(self.held_out), max(1, len(self.held_out) // rows)))  # of all lengths
        if self.options.steps < STEPS:
            self.fewer = f", fewer than {STEPS} since this machine takes {seconds:.1f} s for a step of plain training"
        self.console.print(f"a step of plain training takes {seconds:.1f} s here: {self.options.steps} steps of each method")

    def _seconds_of_a_step(self, model) -> float:
        """Forward and backward of the first rows; the second time counts."""
        from hf_memtune.cli.data import collator

        batch, seconds = collator(self.data_settings, self.tokenizer)([self.train[n] for n in range(BATCH)]), 0.0
        for _ in range(2):
            began = time.perf_counter()
            model.train()(**{name: value.to(model.device) for name, value in batch.items()}).loss.backward()
            seconds = time.perf_counter() - began
        return seconds

    def run(self, name: str, settings: dict) -> Result:
        """Train with one method, from the same pre-trained model as the others."""
        from transformers import set_seed

        from hf_memtune.cli.model import load_trainable

        set_seed(SEED)
        model = load_trainable(self.model_settings, self.data_settings, self.tokenizer)
        trainer = self.trainer(model, settings)
        if self.loss_before is None:  # new adapters add nothing, so that all methods start from the same loss
            self.console.print(f"measuring the held-out loss before training on {len(self.held_out)} rows")
            self.loss_before = trainer.evaluate()["eval_loss"]
        if name == PUBLISHED:
            self.write_token_maps(model, trainer)
        result = Result(name, [(0, self.loss_before)], settings=settings)
        self.fit(trainer, result)
        fell = f"held-out loss {self.loss_before:.3f} to {result.held_out_losses[-1][1]:.3f}"
        self.console.print(f"{name}: {fell}, {result.step_seconds:.2f} s a step")
        return result

    def trainer(self, model, settings: dict):
        from transformers import PrinterCallback

        from hf_memtune import MemEfficientTrainer, MemEfficientTrainingArguments
        from hf_memtune.cli.data import collator

        every = max(1, self.options.steps // 3)
        arguments = MemEfficientTrainingArguments(
            output_dir=str(self.out), max_steps=self.options.steps, learning_rate=LEARNING_RATE, seed=SEED,
            per_device_train_batch_size=BATCH, per_device_eval_batch_size=8, train_sampling_strategy="sequential",
            eval_strategy="steps", eval_steps=every, prediction_loss_only=True, save_strategy="no", logging_strategy="no",
            memory_trace_steps=0, disable_tqdm=True, dataloader_pin_memory=False, **settings,
        )  # fmt: skip
        trainer = MemEfficientTrainer(
            model=model, args=arguments, train_dataset=self.train, eval_dataset=self.held_out,
            data_collator=collator(self.data_settings, self.tokenizer), processing_class=self.tokenizer,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        return trainer

    def fit(self, trainer, result: Result) -> None:
        """Train, with a progress bar, and fill in the result."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        name, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
        with Progress(name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note, console=self.console) as progress:
            bar = progress.add_task(result.name, total=self.options.steps, note="")
            watch = make_watch(result, lambda **news: progress.update(bar, **news))
            trainer.add_callback(watch)
            trainer.train()
            if result.held_out_losses[-1][0] < self.options.steps:
                trainer.evaluate()
        result.step_seconds, result.peak_bytes = median(watch.seconds), watch.peak_bytes
        counted = trainer.memory_callback.since_last_log()
        result.tokens_kept, result.tokens_seen = counted.get("tokens_kept", 0), counted.get("tokens_seen", 0)

    def write_token_maps(self, model, trainer) -> None:
        """A page of what TokenSeek keeps of two held-out examples, with the model as it is before training."""
        from hf_memtune import TokenSeekingConfig
        from hf_memtune.training.token_maps import token_maps
        from hf_memtune.visualization import write_token_map_html

        middle = len(self.held_out) // 3  # sorted by length: neither the shortest nor cut at the end
        rows = [self.held_out[n] for n in (middle, min(middle + 1, len(self.held_out) - 1))]
        config = TokenSeekingConfig.of(trainer.args)
        batch = {key: value.to(trainer.args.device) for key, value in trainer.data_collator(rows).items()}
        titles = ["held-out example 1", "held-out example 2"]
        shown = {"model": Path(self.options.model).name}
        write_token_map_html(token_maps(model, batch, config, self.tokenizer, titles=titles), self.out / "tokens.html", shown)

    def write(self, results: list[Result]) -> Path:
        """results.json and report.html. Returns the report."""
        from hf_memtune.files import write_text
        from hf_memtune.visualization import write_comparison_html

        conditions = self.conditions()
        rows = [result.row() for result in results]
        content = {"conditions": conditions, "caveat": CAVEAT, "results": rows}
        write_text(self.out / "results.json", json.dumps(content, indent=2) + "\n")
        return write_comparison_html(rows, self.out / "report.html", "Five ways to fine-tune one model", conditions, NOTES)

    def conditions(self) -> dict:
        """Everything a reader needs to judge the numbers, or to measure them again."""
        import torch

        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        steps, rows = self.options.steps, len(self.held_out)
        return conditions(
            device=str(device),
            threads=torch.get_num_threads(),
            model=f"{Path(self.options.model).name}, LoRA r={LORA_R} on all linear layers but the head, float32",
            data=f"{Path(self.options.data).parent.name}, prompts masked out, rows of {MAX_LENGTH} tokens at most",
            training=f"{steps} steps of {BATCH} rows{self.fewer}, AdamW, learning rate {LEARNING_RATE} falling linearly, seed {SEED}",
            held_out_loss=f"all labelled tokens of {rows} rows, plain forward passes (mean over batches of 8 rows)",
            peak_memory="live bytes of all tensors that the second training step makes, above weights and optimizer state",
            seconds_a_step="median of all steps but the first two, evaluations excluded",
        )


def make_watch(result: Result, tell):
    """A callback that times the steps, traces the memory of one of them, and notes held-out losses.

    Made in a function because its base class comes with transformers, which `--help` need not load.
    """
    import torch
    from transformers import TrainerCallback

    from hf_memtune import LiveBytes

    class Watch(TrainerCallback):
        seconds: list[float] = []
        peak_bytes = 0

        def on_step_begin(self, args, state, control, **kwargs):
            self.tracer = LiveBytes() if state.global_step == TRACED_STEP else None
            if self.tracer is not None:
                self.tracer.__enter__()
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if args.device.type not in ("cpu", "mps"):
                torch.accelerator.synchronize()
            seconds = time.perf_counter() - self.began
            if self.tracer is not None:
                self.tracer.__exit__(None, None, None)
                self.peak_bytes = self.tracer.peak_bytes
            elif state.global_step > 1:  # the first step pays for what is set up once
                self.seconds = [*self.seconds, seconds]
            tell(advance=1)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            result.held_out_losses.append((state.global_step, metrics["eval_loss"]))
            tell(note=f"held-out loss {metrics['eval_loss']:.3f}")

    return Watch()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
