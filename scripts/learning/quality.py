"""One run of the study `quality`: a model trained one way in a loop of its own, what it learned, and what it cost."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from statistics import median

import torch
from conditions import conditions

from hf_memtune.methods.events import Listener
from learning.arms import BY_LAYERS, CHECKPOINTING, at_once, is_seeking, settings_of, way_of
from learning.plans import Run
from learning.tasks import TASKS, Task

CLIP, WARM_UP_SHARE = 1.0, 0.05
TRACED_STEP = 1  # counted from 0: in the first one the optimizer makes its state, which belongs to no step
OPTIMIZER = f"AdamW without weight decay, learning rate falling linearly after {WARM_UP_SHARE:.0%} warm-up, gradients clipped at {CLIP}"


class Bench:
    """What the runs share: the task, which stays loaded. Stages go through tasks in order."""

    def __init__(self, options):
        self.options, self.name, self.task = options, "", None

    def train(self, run: Run) -> dict:
        """The record of one run."""
        if run.task != self.name:
            self.name, self.task = run.task, Task(TASKS[run.task], self.options.assets, self.options.device, self.options.held_out_rows)
        return train(run, self.task, self.options.timed)


def train(run: Run, task: Task, timed: bool = False, watched: Callable[[Iterable[int]], Iterable[int]] = iter) -> dict:
    """The record of one run. Rows, their order and every new weight depend on the seed alone, not on the arm.

    timed: whether nothing else runs. watched: the steps, shown to whoever waits.
    """
    from transformers import set_seed

    set_seed(run.seed)
    model = task.fresh_model()
    set_seed(run.seed)  # loading may draw more random numbers for one head than for another
    settings = settings_of(run.arm, task.settings.max_length)
    installed = install(run.arm, model, settings)
    try:
        training = Training(run, task, model)
        if is_seeking(run.arm):
            installed.listeners.add(training.counts)
        training.go(watched)
    finally:
        if installed is not None:
            installed.remove()
    return training.record(timed)


def install(arm: str, model: torch.nn.Module, settings: dict):
    """The strategy of this arm on the model, to be removed after use; None where there is none."""
    from hf_memtune import Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig

    if is_seeking(arm):
        return TokenSeeking(model, TokenSeekingConfig(token_seeking=True, **settings))
    if way_of(arm) in (CHECKPOINTING, BY_LAYERS):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Streaming(model, StreamingConfig(**settings)) if settings else None


class Counts(Listener):
    """All that was told since it was made, by name: seen, kept, learned, recomputed."""

    def __init__(self):
        self.by_name: Counter = Counter()

    def counted(self, **counts):
        self.by_name.update({name: int(count) for name, count in counts.items()})

    def share(self, part: str, whole: str) -> float | None:
        return round(self.by_name[part] / self.by_name[whole], 4) if self.by_name[whole] else None


class Training:
    """The loop, and what it notes."""

    def __init__(self, run: Run, task: Task, model: torch.nn.Module):
        self.run, self.task, self.model, self.counts = run, task, model, Counts()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=run.learning_rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.held_out = task.held_out(run.held_out) if run.measured else []
        self.losses: list[tuple[int, float | None]] = []
        self.scores: list[tuple[int, float]] = []
        self.seconds: list[float] = []
        self.peak_bytes, self.diverged = 0, False

    def _rate(self, step: int) -> float:
        """Factor of the learning rate: up within a few steps, then down to 0 in a straight line."""
        warm_up = max(1, round(WARM_UP_SHARE * self.run.steps))
        return min((step + 1) / warm_up, (self.run.steps - step) / max(1, self.run.steps - warm_up))

    def go(self, watched: Callable[[Iterable[int]], Iterable[int]]) -> None:
        measured = {round(self.run.steps * n / self.run.measured) for n in range(1, self.run.measured + 1)} - {0}
        self._measure(0)
        for step, batch in zip(watched(range(self.run.steps)), self.task.batches(self.run.rows, self.run.seed)):
            self._watched(step, batch)
            if step + 1 in measured or self.diverged:
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
        if self.task.device != "cpu":
            torch.accelerator.synchronize()
        if step > TRACED_STEP:
            self.seconds.append(time.perf_counter() - began)

    def _step(self, batch: dict) -> None:
        for part, share in self._parts(batch):
            (self.model(**part).loss * share).backward()
        if self.counts.by_name and not self.task.loss_per_row:
            self.counts.counted(labelled=self.task.labelled(batch))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.diverged = not math.isfinite(norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def _parts(self, batch: dict) -> Iterator[tuple[dict, float]]:
        """What the model is called with: the batch, or the rows that are run at a time, as a Trainer that accumulates gradients runs them.

        A part has no column of padding alone. Beside it the factor of its loss; a loss of tokens is told the labels of the whole batch instead.
        """
        per_row, rows = self.task.loss_per_row, at_once(self.run.arm)
        settings = {} if per_row else {"use_cache": False}
        if rows is None:
            yield batch | settings, 1.0
            return
        if not per_row:
            settings["num_items_in_batch"] = self.task.labelled(batch)
        for start in range(0, self.run.rows, rows):
            part = {name: value[start : start + rows] for name, value in batch.items()}
            longest = int(part["attention_mask"].sum(-1).max())
            part = {name: value[:, :longest] if value.dim() > 1 else value for name, value in part.items()}
            yield part | settings, len(part["labels"]) / self.run.rows if per_row else 1.0

    def _measure(self, step: int) -> None:
        """The held-out loss. All runs of a seed begin with the same weights, so what is measured before the first step is measured once."""
        if not self.held_out:
            return
        start, before = (self.run.held_out, self.run.seed), self.task.before
        if self.diverged:
            loss, score = math.nan, None
        elif step > 0:
            loss, score = self.task.measure(self.model, self.held_out)
        else:
            if start not in before:
                before[start] = self.task.measure(self.model, self.held_out)
            loss, score = before[start]
        self.losses.append((step, loss if math.isfinite(loss) else None))
        if score is not None:
            self.scores.append((step, score))

    def record(self, timed: bool) -> dict:
        """Everything noted, as one JSON object."""
        return {
            **asdict(self.run),
            "settings": settings_of(self.run.arm, self.task.settings.max_length),
            "losses": self.losses,
            "accuracies": self.scores,
            "diverged": self.diverged,
            "seconds_per_step": round(median(self.seconds), 4) if self.seconds else None,
            "timed": timed,
            "peak_bytes": self.peak_bytes,
            "kept_share": self.counts.share("kept", "seen"),
            "learned_share": self.counts.share("learned", "labelled"),
            "conditions": conditions(
                device=str(self.task.device),
                threads=torch.get_num_threads(),
                **self.task.settings.described,
                optimizer=OPTIMIZER,
                held_out_rows=sum(len(batch["labels"]) for batch in self.held_out),
            ),
        }
