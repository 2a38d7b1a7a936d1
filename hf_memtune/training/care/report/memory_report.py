"""The account after a run: memory_report.html and memory_report.json in output_dir."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_memtune.files import write_text
from hf_memtune.levers.facts import optimizer_name
from hf_memtune.memory import MemoryAccount
from hf_memtune.training.care.preflight.preflight import Preflight
from hf_memtune.training.care.preflight.report import PreflightReport
from hf_memtune.training.care.recovery.halving import HalvingSteps
from hf_memtune.training.care.report.step_account import StepAccountCallback
from hf_memtune.training.care.savings import Advice, BatchShape, LeverSaving, savings_of
from hf_memtune.training.memory_callback import MemoryCallback
from hf_memtune.training.running import RunningTrainer

logger = logging.getLogger(__name__)

FILES = ("memory_report.json", "memory_report.html")


@dataclass(frozen=True)
class MemoryReport:
    """Where the bytes of one step went, what was predicted, and what the settings saved.

    measured: of live tensors, by phase and category. predicted: a MemoryEstimate of the same batch, or None (`notes` says why).
    allocator_peaks: on a GPU, bytes by phase. batch: in words. levers, advice: see savings.py.
    """

    measured: MemoryAccount
    predicted: Any
    allocator_peaks: dict[str, int] | None
    batch: str
    conditions: dict[str, Any]
    levers: list[LeverSaving]
    advice: Advice | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """What memory_report.json holds, and the page is drawn from."""
        return {
            "measured": self.measured.to_dict(),
            "predicted": None if self.predicted is None else self.predicted.to_dict(),
            "allocator_peaks": self.allocator_peaks,
            "batch": self.batch,
            "conditions": self.conditions,
            "levers": [asdict(lever) | {"saved_bytes": lever.saved_bytes} for lever in self.levers],
            "advice": None if self.advice is None else asdict(self.advice),
            "notes": self.notes,
        }

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """The two files, JSON first."""
        from hf_memtune.visualization import write_memory_report_html

        plain, (data, page) = self.to_dict(), (Path(folder) / name for name in FILES)
        write_text(data, json.dumps(plain, indent=1))
        return data, write_memory_report_html(plain, page)


class MemoryReportCallback(TrainerCallback):
    """Takes the account of the second step of a training without preflight, and writes the report when training is over.

    `report`: what was written last, or None. MemEfficientTrainer adds it by itself.
    """

    def __init__(self, trainer: RunningTrainer, memory: MemoryCallback, preflight: Preflight, halving: HalvingSteps):
        self.trainer, self.memory, self.preflight, self.halving = trainer, memory, preflight, halving
        self.report: MemoryReport | None = None
        self._taken: StepAccountCallback | None = None
        self._shape: BatchShape | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.close()  # training begins again where a batch size that did not fit was halved, perhaps in the middle of the step
        self._taken = None
        if args.reports and not args.preflights:
            self._take(state)

    def _take(self, state) -> None:
        """The second step, or the only one."""
        step = state.global_step + (state.max_steps - state.global_step > 1)
        self._taken = StepAccountCallback(self.trainer, step)
        self.memory.left_out = {step}  # two traces of one step would have to end in the order they do not

    def on_step_begin(self, args, state, control, **kwargs):
        if args.reports and self._taken is None and self.preflight.why_none is not None:  # known only now, of the first batch
            self._take(state)
        if self._taken is not None:
            if state.global_step == self._taken.step:
                self._shape = BatchShape.of(self.trainer.batches_of_step[0])
            self._taken.on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """End an account that is still open (training failed in the middle of its step). May be called twice."""
        if self._taken is not None:
            self._taken.close()

    def write(self) -> None:
        """After training, by one process; nothing where no step was measured."""
        if not self.trainer.args.reports or not self.trainer.is_world_process_zero():
            return
        self.report = self._report()
        if self.report is None:
            logger.warning("memory_report: no step was measured, so there is no report.")
            return
        _, page = self.report.write(self.trainer.args.output_dir)
        logger.info("memory report: %s", page)
        if not self.trainer.args.disable_tqdm:
            print(f"memory report: {page}", file=sys.stderr)

    def _report(self) -> MemoryReport | None:
        if (found := self._measured()) is None:
            return None
        notes = list(found.notes)
        predicted, levers, advice = self._savings(found, notes)
        if (at_most := self.halving.rows_at_most) is not None:
            notes.append(f"Memory ran out later on: since then {at_most} rows ran at a time.")
        words = found.batch_in_words
        return MemoryReport(found.account, predicted, found.allocator_peaks, words, self._conditions(), levers, advice, notes)

    def _measured(self) -> PreflightReport | None:
        """Of the preflight; without one, of the step that was taken account of, in the same form."""
        taken, shape = self._taken, self._shape
        if taken is None or taken.account is None:
            return self.preflight.report
        rows = self.trainer.args.per_device_train_batch_size if shape is None else shape.rows
        tokens = None if shape is None else shape.tokens
        notes = [] if self.preflight.why_none is None else [self.preflight.why_none]
        return PreflightReport(str(self.trainer.args.device), rows, tokens, f"step {taken.step}", shape, taken.account, notes=notes)

    def _savings(self, found: PreflightReport, notes: list[str]) -> tuple[Any, list[LeverSaving], Advice | None]:
        savings = savings_of(self.trainer, found.shape, notes, found.predicted)
        if savings is None:
            return None, [], None
        if self.trainer.args.disable_tqdm:
            return savings.predicted, list(savings.levers()), savings.advice()
        from rich.console import Console

        with Console(stderr=True).status("memory report: tracing the step without and with each setting"):
            return savings.predicted, list(savings.levers()), savings.advice()

    def _conditions(self) -> dict[str, Any]:
        trainer, args = self.trainer, self.trainer.args
        config = getattr(trainer.model, "config", None)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()})
        return {
            "model": _without_folders(getattr(config, "name_or_path", None)) or type(trainer.model).__name__,
            "device": str(args.device),
            "weights": ", ".join(dtypes),
            "rows of a micro-batch": args.per_device_train_batch_size,
            "micro-batches": args.gradient_accumulation_steps,
            "optimizer": optimizer_name(args),
            **{name: version(name) for name in ("torch", "transformers")},
        }


def _without_folders(name: str | None) -> str | None:
    """A name on the hub as it is, of a folder its last part: where it lies on this machine is nobody else's concern."""
    return Path(name).name if name and Path(name).exists() else name
