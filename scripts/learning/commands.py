"""What the studies of whole commands share: a run is one command of hf-memtune, from its flags to its summary."""

import math
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from conditions import conditions

from learning.plans import Run

ALWAYS = (
    "--dtype float32 --logging_strategy no --save_strategy no --report_to none --disable_tqdm true --use_cpu true "
    "--lr_scheduler_type linear --warmup_steps 0.06 --memory_trace_steps 1000000 --dataloader_pin_memory false"
).split()
OPTIMIZER = "AdamW without weight decay, learning rate falling linearly after 6% warm-up, gradients clipped at 1.0"


class CommandBench(ABC):
    """score: what the command calls the accuracy on held-out rows."""

    score = "accuracy"

    def __init__(self, options):
        self.options = options

    @abstractmethod
    def command(self) -> Any:
        """The module of the command, with parse and make_trainer."""

    @abstractmethod
    def arguments(self, run: Run) -> dict[str, Any]:
        """Flags of a run and their values, beside those of all runs."""

    @abstractmethod
    def flags(self, run: Run) -> Iterable[str]:
        """Those of its task and arm."""

    @abstractmethod
    def described(self, run: Run) -> dict[str, str]:
        """Model and data in words."""

    @abstractmethod
    def measure(self, run: Run, rows: Any) -> Callable[[Any], dict]:
        """What is measured of a trainer, before and after training."""

    def prepare(self, run: Run, model: torch.nn.Module) -> None:
        """What no flag does."""

    def train(self, run: Run) -> dict:
        """The record of one run. Rows and their order depend on the seed alone, not on the arm."""
        from transformers import PrinterCallback

        from hf_memtune.cli.train import fit

        command = self.command()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="reversible_numerics=float")  # what it says is what is measured
            settings = command.parse([*self._line(run), "--output_dir", folder])
            trainer, rows = command.make_trainer(settings)
            trainer.remove_callback(PrinterCallback)
            self.prepare(run, trainer.model)
            summary = fit(trainer, settings, self.measure(run, rows) if run.measured else lambda trainer: {})
        losses = [loss if loss is not None and math.isfinite(loss) else None for loss in summary.held_out_loss]
        scores = {name: summary.held_out_scores.get(name, (None, None)) for name in (self.score, f"{self.score}_stderr")}
        report = getattr(trainer.reversible_callback, "report", None)  # of reversible layers, from before the first step
        return {
            **asdict(run),
            "losses": list(zip((0, run.steps), losses)) if run.measured else [],
            "accuracies": list(zip((0, run.steps), scores[self.score])) if run.measured else [],
            "standard_error": scores[f"{self.score}_stderr"][1],
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
                **self.described(run),
                optimizer=OPTIMIZER,
                rows_to_train_on=len(rows.train),
                held_out_rows=len(rows.held_out),
            ),
        }

    def _line(self, run: Run) -> list[str]:
        """The command line of a run."""
        given = self.arguments(run) | {
            "max_steps": run.steps, "learning_rate": run.learning_rate, "seed": run.seed, "per_device_train_batch_size": run.rows,
        }  # fmt: skip
        return [*(word for name, value in given.items() for word in (f"--{name}", str(value))), *ALWAYS, *self.flags(run)]


def in_parts(rows: Any, held_out: dict[str, int], at_most: int | None, length: Callable[[dict], int], folder: Path) -> dict[str, Path]:
    """A file a part of shuffled rows: so many of each, `at_most` of any, and what is left as `train`.

    Held-out rows by length, so that little of a batch is padding.
    """
    import datasets

    sizes = {part: min(count, at_most or count) for part, count in held_out.items()}
    rows, files, start = rows.shuffle(seed=0), {}, 0
    for part, size in (sizes | {"train": len(rows) - sum(sizes.values())}).items():
        chosen = sorted(rows.select(range(start, start + size)), key=lambda row: 0 if part == "train" else length(row))
        files[part], start = folder / f"{part}.parquet", start + size
        datasets.Dataset.from_list(chosen).to_parquet(files[part])
    return files
