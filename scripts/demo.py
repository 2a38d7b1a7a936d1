"""Fine-tune a small real model five ways, and compare what each costs and how well it learns. `make demo` runs this.

    python scripts/demo.py [--minutes 7 | --steps 30] [--rows 48] [--quick]

Plain training, activation checkpointing, exact streaming, the best-scored tenth of the tokens (TokenSeek), and token seeking as this
library sets it: the same model, adapters, rows in the same order, optimizer and seed. Writes report.html, tokens.html and results.json to
out/demo.
"""

import argparse
import json
import logging
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path

from conditions import conditions
from learning.arms import settings_of
from learning.plans import Run

ASSETS = Path(__file__).resolve().parents[1] / ".assets"
SEED, BATCH, MAX_LENGTH, LORA_R = 0, 4, 160, 8
STEPS, FEWEST_STEPS, ROWS, EVALUATIONS = 30, 6, 48, 4  # evaluations of a method: before training, and thrice while it goes on
RELATIVE = 1.0 + 1.4 + 1.55 + 0.75 + 0.75  # time of a step of each method, relative to plain training: results/demo.json
FORWARD = 0.7  # of a batch of 8 held-out rows, relative to a step of plain training
LEARNING_RATE = 1.5e-3  # the best of three for every method on this model and these rows: docs/results.md
PUBLISHED = "combined/top/cut/10%"  # TokenSeek
METHODS = {  # by the names of scripts/learning/arms.py
    "plain training": "plain",
    "activation checkpointing": "checkpointing",
    "exact streaming, chunks of 64": "streaming",
    "TokenSeek, 10%": PUBLISHED,
    "token seeking, 30%": "random/sample/cut/30%/labels",
}
CAVEAT = (
    "One seed, one small model, few steps: the loss curves show that the methods learn, not which of them learns best. "
    "Memory and time are of this machine and these short rows; longer rows widen the differences in memory."
)
NOTES = f"""<p>The same model, adapters, rows in the same order, optimizer and seed; only the method differs. The loss is that of
all labelled tokens of rows held out, whatever tokens a method learns from.</p><p><strong>{CAVEAT}</strong></p>
<p><a href="tokens.html">Which tokens TokenSeek keeps of two held-out examples</a>, and why.</p>"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; a model or data folder that is missing ends the program with a word on how to get it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    steps = f"optimizer steps of each method (default: as many as the minutes allow, {STEPS} at most)"
    parser.add_argument("--steps", type=int, help=steps)
    parser.add_argument("--minutes", type=float, default=7.0, help="minutes for all methods, where no steps are given (default: 7)")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"held-out rows, for the loss (default: {ROWS})")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 4 steps, 8 held-out rows")
    parser.add_argument("--model", type=Path, default=ASSETS / "models/smollm2-135m-instruct", help="folder of a causal model")
    parser.add_argument("--data", type=Path, default=ASSETS / "data/alpaca/train.jsonl", help="rows of instruction, input, output")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (default: out/demo)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.rows = 4, 8
    if (options.steps is not None and options.steps < 3) or options.rows < 2 or options.minutes <= 0:
        parser.error("--steps must be 3 or more (the first two are not timed), --rows 2 or more, --minutes more than 0")
    for path in (options.model, options.data):
        if not path.exists():
            parser.error(f"{path} does not exist; `make assets` fetches the model and the data")
    return options


def main(arguments: list[str]) -> int:
    """Train with every method, from the same pre-trained model; then write the report and print the table."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; must be set before transformers is imported
    options, began = parse(arguments), time.perf_counter()
    quiet()
    from learning.quality import train
    from rich.console import Console
    from rich.progress import track

    console, rows = Console(), []
    task = make_task(options)
    fewer = choose_steps(task, options, console)
    options.out.mkdir(parents=True, exist_ok=True)
    write_token_maps(task, options)
    for name, arm in METHODS.items():
        run = Run("demo", "demo", arm, BATCH, options.steps, LEARNING_RATE, SEED, "test", EVALUATIONS - 1)
        rows.append(row_of(name, train(run, task, watched=partial(track, description=name, console=console))))
        fell = f"held-out loss {rows[-1]['loss_before']:.3f} to {rows[-1]['loss_after']:.3f}"
        console.print(f"{name}: {fell}, {rows[-1]['seconds_per_step']:.2f} s a step")
    report = write(rows, options.out, described(task, options, fewer))
    from hf_memtune.visualization import comparison_table

    print(f"\n{comparison_table(rows)}\n\n{CAVEAT}\n")
    print(f"report: {report}\n{(time.perf_counter() - began) / 60:.1f} minutes in all")
    return 0


def quiet() -> None:
    """Leave out what libraries say to their developers: it would bury the results."""
    import datasets
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU, that an optional kernel is missing
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def make_task(options: argparse.Namespace):
    """The rows, of which some are held out, and the model, on the device that there is."""
    import torch
    from learning.tasks import Task, TaskSettings

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    of_rows = {"max_length": MAX_LENGTH, "tuning_rows": 0, "test_rows": options.rows}
    settings = TaskSettings(str(options.model), str(options.data), "smollm2 alpaca", lora_r=LORA_R, **of_rows)
    return Task(settings, Path(), str(device))


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


def choose_steps(task, options: argparse.Namespace, console) -> str:
    """As many steps as the machine has time for, where none are given: it is measured first. Returns a word on why there are few."""
    if options.steps is not None:
        return ""
    model, batch, seconds = task.fresh_model(), next(task.batches(BATCH, SEED)), 0.0
    for _ in range(2):  # the second time counts
        began = time.perf_counter()
        model(**batch).loss.backward()
        seconds = time.perf_counter() - began
    options.steps, task.held_out_rows = affordable(seconds, options.minutes, len(task.rows.held_out))
    console.print(f"a step of plain training takes {seconds:.1f} s here: {options.steps} steps of each method")
    return f", fewer than {STEPS} since this machine takes {seconds:.1f} s for a step of plain training" if options.steps < STEPS else ""


def row_of(name: str, record: dict) -> dict:
    """What one method cost, and how the held-out loss fell, as the table and the page want it."""
    losses = {"loss_before": record["losses"][0][1], "loss_after": record["losses"][-1][1], "losses": record["losses"]}
    cost = {name: record[name] for name in ("peak_bytes", "seconds_per_step", "settings")}
    return {"method": name, **losses, **cost, "tokens_kept_share": record["kept_share"]}


def write_token_maps(task, options: argparse.Namespace) -> None:
    """A page of what TokenSeek keeps of two held-out examples, with the model as it is before training."""
    from hf_memtune import TokenSeekingConfig
    from hf_memtune.training.token_maps import token_maps
    from hf_memtune.visualization import write_token_map_html

    rows = sorted(task.rows.held_out, key=lambda row: len(row["input_ids"]))
    middle = len(rows) // 3  # neither the shortest nor cut at the end
    config = TokenSeekingConfig(token_seeking=True, **settings_of(PUBLISHED))
    titles = ["held-out example 1", "held-out example 2"]
    maps = token_maps(task.fresh_model(), task.batch(rows[middle:][:2]), config, task.tokenizer, titles=titles)
    shown = {"model": options.model.name}
    write_token_map_html(maps, options.out / "tokens.html", shown)


def write(rows: list[dict], out: Path, conditions: dict) -> Path:
    """results.json and report.html. Returns the report."""
    from hf_memtune.files import write_text
    from hf_memtune.visualization import write_comparison_html

    write_text(out / "results.json", json.dumps({"conditions": conditions, "caveat": CAVEAT, "results": rows}, indent=2) + "\n")
    return write_comparison_html(rows, out / "report.html", "Five ways to fine-tune one model", conditions, NOTES)


def described(task, options: argparse.Namespace, fewer: str) -> dict:
    """Everything a reader needs to judge the numbers, or to measure them again."""
    import torch
    from learning.quality import OPTIMIZER

    rows = min(len(task.rows.held_out), task.held_out_rows or options.rows)
    return conditions(
        device=task.device,
        threads=torch.get_num_threads(),
        model=f"{options.model.name}, LoRA r={LORA_R} on all linear layers but the head, float32",
        data=f"{options.data.parent.name}, prompts masked out, rows of {MAX_LENGTH} tokens at most",
        training=f"{options.steps} steps of {BATCH} rows{fewer}, {OPTIMIZER}, at most {LEARNING_RATE}, seed {SEED}",
        held_out_loss=f"all labelled tokens of {rows} rows, plain forward passes",
        peak_memory="live bytes of all tensors that the second training step makes, above weights and optimizer state",
        seconds_a_step="median of all steps but the first two, evaluations excluded",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
