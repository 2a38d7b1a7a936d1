"""One run: a model trained one way for a number of steps, what it learned, and what it cost."""

import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from statistics import median

import torch
from conditions import conditions

from quality.arms import install, is_seeking, settings_of
from quality.tasks import Task

CLIP, WARM_UP_SHARE = 1.0, 0.05
TRACED_STEP = 1  # counted from 0: in the first one the optimizer makes its state, which belongs to no step


@dataclass(frozen=True)
class Run:
    """held_out: the rows the loss is measured on, tuning or test. measured: how many times after the start; 0: never."""

    stage: str
    task: str
    arm: str
    rows: int
    steps: int
    learning_rate: float
    seed: int
    held_out: str = "tuning"
    measured: int = 4

    def __str__(self) -> str:
        return f"{self.stage} {self.task} {self.rows} rows {self.steps} steps {self.arm} rate {self.learning_rate:g} seed {self.seed}"

    @property
    def measured_steps(self) -> list[int]:
        """Evenly spaced, the last one always among them."""
        return sorted({round(self.steps * n / self.measured) for n in range(1, self.measured + 1)} - {0})


def train(run: Run, task: Task, timed: bool = False) -> dict:
    """The record of one run. Rows, their order and every new weight depend on the seed alone, not on the arm."""
    from transformers import set_seed

    set_seed(run.seed)
    model = task.fresh_model()
    set_seed(run.seed)  # loading may draw more random numbers for one head than for another
    installed = install(run.arm, model)
    try:
        training = Training(run, task, model, installed)
        training.go()
    finally:
        if installed is not None:
            installed.remove()
    return training.record(timed)


class Training:
    """The loop, and what it notes."""

    def __init__(self, run: Run, task: Task, model: torch.nn.Module, installed):
        self.run, self.task, self.model, self.installed = run, task, model, installed
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=run.learning_rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.held_out = task.held_out(run.held_out) if run.measured else []
        self.losses: list[tuple[int, float | None]] = []
        self.scores: list[tuple[int, float]] = []
        self.seconds: list[float] = []
        self.counts: Counter = Counter()
        if installed is not None and is_seeking(run.arm):
            self._listen()
        self.peak_bytes, self.diverged = 0, False

    def _rate(self, step: int) -> float:
        """Factor of the learning rate: up within a few steps, then down to 0 in a straight line."""
        warm_up = max(1, round(WARM_UP_SHARE * self.run.steps))
        return min((step + 1) / warm_up, (self.run.steps - step) / max(1, self.run.steps - warm_up))

    def go(self) -> None:
        self._measure(0)
        for step, batch in zip(range(self.run.steps), self.task.batches(self.run.rows, self.run.seed)):
            self._watched(step, batch)
            if step + 1 in self.run.measured_steps or self.diverged:
                self._measure(step + 1)
            if self.diverged:
                return

    def _watched(self, step: int, batch: dict) -> None:
        """One optimizer step, traced or timed: tracing takes time of its own."""
        from hf_memtune import LiveBytes

        if step == TRACED_STEP:
            with LiveBytes() as live:
                self._step(batch)
            self.peak_bytes = live.peak_bytes
            return
        began = time.perf_counter()
        self._step(batch)
        self._synchronise()
        if step > TRACED_STEP:
            self.seconds.append(time.perf_counter() - began)

    def _synchronise(self) -> None:
        if self.task.device != "cpu":
            torch.accelerator.synchronize()

    def _step(self, batch: dict) -> None:
        self._backward(batch)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.diverged = not math.isfinite(norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def _backward(self, batch: dict) -> None:
        self.model(**batch, **self._without_cache()).loss.backward()
        if self.counts and not self.task.loss_per_row:
            self.counts["labelled"] += self.task.labelled(batch)

    def _without_cache(self) -> dict:
        return {} if self.task.loss_per_row else {"use_cache": False}

    def _listen(self) -> None:
        """Count the tokens seen, kept and learned from."""
        from quality.counting import Counts

        counts = Counts()
        self.installed.listeners.add(counts)
        self.counts = counts.by_name

    def _measure(self, step: int) -> None:
        if not self.held_out:
            return
        loss, score = (math.nan, None) if self.diverged else self._measured(step)
        self.losses.append((step, loss if math.isfinite(loss) else None))
        if score is not None:
            self.scores.append((step, score))

    def _measured(self, step: int) -> tuple[float, float | None]:
        """All runs of a seed begin with the same weights, so what is measured before the first step is measured once."""
        if step > 0:
            return self.task.measure(self.model, self.held_out)
        start = (self.run.held_out, self.run.seed)
        if start not in self.task.before:
            self.task.before[start] = self.task.measure(self.model, self.held_out)
        return self.task.before[start]

    def record(self, timed: bool) -> dict:
        """Everything noted, as one JSON object."""
        return {
            **asdict(self.run),
            "settings": settings_of(self.run.arm),
            "losses": self.losses,
            "accuracies": self.scores,
            "diverged": self.diverged,
            "seconds_per_step": round(median(self.seconds), 4) if self.seconds else None,
            "timed": timed,
            "peak_bytes": self.peak_bytes,
            "kept_share": self._share("kept", "seen"),
            "learned_share": self._share("learned", "labelled"),
            "conditions": self._conditions(),
        }

    def _share(self, part: str, whole: str) -> float | None:
        return round(self.counts[part] / self.counts[whole], 4) if self.counts[whole] else None

    def _conditions(self) -> dict:
        return conditions(
            device=str(self.task.device),
            threads=torch.get_num_threads(),
            **self.task.settings.described,
            optimizer=f"AdamW without weight decay, learning rate falling linearly after {WARM_UP_SHARE:.0%} warm-up, gradients clipped at {CLIP}",
            held_out_rows=sum(len(batch["labels"]) for batch in self.held_out),
        )
