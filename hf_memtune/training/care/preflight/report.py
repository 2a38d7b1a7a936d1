"""What a preflight found, in bytes, and in words for the one who waits for the run to begin."""

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

from hf_memtune.memory import MemoryAccount, PhaseBytes
from hf_memtune.training.care.savings import BatchShape, savings_of
from hf_memtune.training.running import RunningTrainer
from hf_memtune.units import format_bytes

logger = logging.getLogger(__name__)

_TIGHT = 0.92  # of the device's memory


@dataclass
class PreflightReport:
    """Bytes of one step on the batch that needs most.

    rows, tokens: of that batch (tokens: of its longest row, padding left out; None where rows have none); why: how it was found;
    shape: as the model gets it, None without input_ids.
    account: live bytes of tensors, by phase and category; the optimizer's state is there from the beginning of the step.
    allocator_peaks: on a GPU, `max_memory_allocated` by phase; None elsewhere. device_bytes: all the memory it has.
    predicted: a MemoryEstimate, or None.
    notes: what was not tried, and why.
    """

    device: str
    rows: int
    tokens: int | None
    why: str
    shape: BatchShape | None = None
    account: MemoryAccount | None = None
    allocator_peaks: dict[str, int] | None = None
    device_bytes: int | None = None
    predicted: Any = None
    notes: list[str] = field(default_factory=list)

    @property
    def measured_bytes(self) -> int:
        """The peak: the allocator's where there is one, and that of live tensors elsewhere."""
        return max(self.allocator_peaks.values()) if self.allocator_peaks else self.account.peak_bytes

    @property
    def batch_in_words(self) -> str:
        tokens = "" if self.tokens is None else f" of up to {self.tokens} tokens"
        return f"{self.rows} row{'s' * (self.rows != 1)}{tokens} ({self.why})"

    def add_evaluation(self, account: MemoryAccount, logits_bytes: int, batches: int) -> None:
        """The pass of one evaluation batch joins the account; of several sets, the one that needs most."""
        found = account.phase("evaluation")
        others = {phase.phase: phase for phase in self.account.phases}
        if found.peak_bytes > others.get("evaluation", PhaseBytes("evaluation", {})).peak_bytes:
            phases = tuple((others | {"evaluation": found}).values())
            self.account = MemoryAccount(phases, self.account.tensors, self.account.timeline)
        if logits_bytes and batches > 1:
            self.notes.append(
                f"evaluation keeps the logits of all batches until its end: about {format_bytes(logits_bytes * batches)}, which is not in "
                "the figures. preprocess_logits_for_metrics or eval_accumulation_steps make it less."
            )

    def predict(self, trainer: RunningTrainer) -> None:
        """Fill in `predicted`, or a note that says why there is none."""
        if (savings := savings_of(trainer, self.shape, self.notes)) is not None:
            self.predicted = savings.predicted

    def lines(self) -> list[str]:
        """One line a fact."""
        found = [f"preflight on {self.batch_in_words}:"]
        peak = self.account.peak_bytes
        found.append(f"  peak of live tensors {format_bytes(peak)}, in {self.account.peak_phase.replace('_', ' ')}")
        if self.allocator_peaks:
            worst = max(self.allocator_peaks, key=self.allocator_peaks.get)
            found.append(f"  peak of the allocator {format_bytes(self.allocator_peaks[worst])}, in {worst}{self._of_the_device}")
        if self.predicted is not None:
            predicted = self.predicted.account.peak_bytes
            found.append(f"  predicted {format_bytes(predicted)}, {100 * (predicted / peak - 1):+.1f} % of the tensors measured")
        return found + [f"  {note}" for note in self.notes]

    @property
    def _of_the_device(self) -> str:
        """Fragmentation and the device's context take some of it: near the end is not safe."""
        if self.device_bytes is None:
            return ""
        share = self.measured_bytes / self.device_bytes
        hint = ": little is left for fragmentation, so that memory may run out later" if share > _TIGHT else ""
        return f", {100 * share:.0f} % of the device{hint}"

    def tell(self, trainer: RunningTrainer) -> None:
        """Print it, once, as the Trainer prints its logs; where its bars are off, to the log."""
        if not trainer.is_world_process_zero():
            return
        if trainer.args.disable_tqdm:
            logger.info("\n".join(self.lines()))
            return
        from tqdm.auto import tqdm

        tqdm.write("\n".join(self.lines()), file=sys.stderr)  # above the bar of the Trainer, which is there already
