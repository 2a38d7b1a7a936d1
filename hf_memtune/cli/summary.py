"""What a training run cost and gained, in a few lines."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from transformers import TrainerCallback

from hf_memtune._compat import wait_for
from hf_memtune.files import write_text
from hf_memtune.units import format_bytes


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step of this process, evaluation and saving excluded."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        wait_for(args.device)
        self.seconds.append(time.perf_counter() - self._began)


@dataclass(frozen=True)
class Summary:
    """Numbers of one run. Bytes, seconds and tokens are those of this process; None where not measured.

    held_out_*: before and after training; scores: of classifiers, by their names. step_seconds: median. peak_bytes: with weights if
    on_device, else of the tensors that one traced step makes. loss_of_kept: whether the training loss is that of the kept tokens alone.
    tokens_*: over all steps, 0 where not counted.
    """

    steps: int
    trainable_parameters: int
    parameters: int
    training_loss: float
    held_out_loss: tuple[float | None, float | None]
    held_out_scores: dict[str, tuple[float | None, float | None]]
    step_seconds: float | None
    peak_bytes: int | None
    on_device: bool
    loss_of_kept: bool
    tokens_kept: int
    tokens_seen: int

    @classmethod
    def of(cls, trainer, logs: list[dict], seconds: list[float], training_loss: float, held_out: tuple[dict, dict]) -> "Summary":
        peaks = [entry["peak_memory_bytes"] for entry in logs if entry.get("peak_memory_bytes") is not None]
        parameters = list(trainer.model.parameters())
        return cls(
            steps=trainer.state.global_step,
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            parameters=sum(p.numel() for p in parameters),
            training_loss=training_loss,
            held_out_loss=tuple(metrics.get("eval_loss") for metrics in held_out),
            held_out_scores={
                name.removeprefix("eval_"): tuple(metrics.get(name) for metrics in held_out) for name in held_out[1] if _is_score(name)
            },
            step_seconds=median(seconds) if seconds else None,
            peak_bytes=max(peaks, default=None),
            on_device=trainer.args.device.type not in ("cpu", "mps"),
            loss_of_kept=trainer.full_loss.is_of_kept,
            tokens_kept=sum(entry.get("tokens_kept", 0) for entry in logs),
            tokens_seen=sum(entry.get("tokens_seen", 0) for entry in logs),
        )


def _is_score(name: str) -> bool:
    """Of what Trainer.evaluate returns: neither the loss, nor how long it took."""
    return name.startswith("eval_") and not name.endswith(("_loss", "_runtime", "_per_second", "_preparation_time"))


def write_summary(summary: Summary, folder: str) -> None:
    """The numbers as summary.json, beside the trained model."""
    write_text(Path(folder, "summary.json"), json.dumps(asdict(summary), indent=2) + "\n")


def print_summary(summary: Summary, settings, rows) -> None:
    """The summary as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Training finished", show_header=False, title_justify="left")
    for name, value in _lines(summary, settings, rows):
        table.add_row(name, value)
    Console().print(table)


def _lines(summary: Summary, settings, rows) -> list[tuple[str, str]]:
    held_out = len(rows.held_out) if rows.held_out is not None else 0
    told = ", ".join(f"{count} {reason}" for reason, count in getattr(rows, "reasons", {}).items())
    dropped = f", {rows.dropped} dropped ({told})" if rows.dropped else ""
    share = summary.trainable_parameters / summary.parameters
    lines = [
        ("model", str(settings.model.model_name_or_path)),
        ("rows", f"{len(rows.train)} to train on, {held_out} held out{dropped}"),
        ("trainable parameters", f"{summary.trainable_parameters:,} ({share:.2%})"),
        ("optimizer steps", f"{summary.steps}"),
        ("held-out loss", _before_and_after(summary.held_out_loss)),
        ("mean training loss", f"{summary.training_loss:.4f}" + of_kept(summary)),
        ("peak memory", _peak(summary)),
        ("seconds per step", "not measured" if summary.step_seconds is None else f"{summary.step_seconds:.3g} (median)"),
    ]
    if summary.tokens_kept:
        kept = summary.tokens_kept / summary.tokens_seen
        lines.append(("tokens kept", f"{summary.tokens_kept:,} of {summary.tokens_seen:,} ({kept:.1%})"))
    lines += [(f"held-out {name.replace('_', ' ')}", _before_and_after(values)) for name, values in summary.held_out_scores.items()]
    return [*lines, ("saved in", str(settings.training.output_dir))]


def of_kept(summary: Summary) -> str:
    """What the training loss is, behind it, where it neither is that of all labels nor stands for it."""
    return " (of the kept tokens)" if summary.loss_of_kept else ""


def _before_and_after(values: tuple[float | None, float | None]) -> str:
    before, after = ("not measured" if value is None else f"{value:.4f}" for value in values)
    return f"{before} before, {after} after"


def _peak(summary: Summary) -> str:
    if summary.peak_bytes is None:
        return "not measured (memory_trace_steps says when)"
    traced = "tensors of a traced step, above weights and optimizer state"
    what = "on the device, weights included" if summary.on_device else traced
    return f"{format_bytes(summary.peak_bytes)} ({what})"
