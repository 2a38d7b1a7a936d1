"""Runs what is left of a stage, one after another, and says how long it will take."""

from pathlib import Path
from statistics import median

import store

from quality import records
from quality.arms import is_seeking, parts_of
from quality.plans import Cell, pending
from quality.tasks import TASKS, Task
from quality.training import Run, train

# Seconds of one thread of a server processor: a plain step of one row, and a forward pass of one held-out row. Until a run of the
# same kind was measured, estimates come from these.
SECONDS_A_ROW = {"stories-imdb": (0.18, 0.05), "smollm2-alpaca": (1.2, 0.35), "minilm-reviews": (0.03, 0.008)}
RELATIVE = {"cut": 0.5, "stream": 1.4, "skip": 1.1}  # seconds of a step against plain
LOADING_SECONDS = 2.0


def estimate(run: Run, done: list[dict]) -> float:
    """Seconds that a run will take, from runs like it where there are some."""
    a_row, a_held_out_row = SECONDS_A_ROW[run.task]
    alike = [r["seconds_per_step"] for r in records.of(done, task=run.task, arm=run.arm, rows=run.rows) if r["seconds_per_step"]]
    step = median(alike) if alike else a_row * run.rows * _relative(run.arm)
    rows = TASKS[run.task].tuning_rows if run.held_out == "tuning" else TASKS[run.task].test_rows
    return LOADING_SECONDS + step * (run.steps + 1) + a_held_out_row * rows * len(run.measured_steps)


def _relative(arm: str) -> float:
    return RELATIVE[parts_of(arm)[2]] if is_seeking(arm) else 1.0


def listing(share: list[Cell], done: list[dict]) -> str:
    """A line a run that is left, then the sums, and what waits for its learning rate."""
    left = pending(share, done)
    lines = [f"{estimate(run, done):7.0f} s  {_described(run)}" for run in left]
    waiting = sum(not cell.runs(done) for cell in share)
    finished = sum(len(cell.runs(done)) for cell in share) - len(left)
    total = sum(estimate(run, done) for run in left)
    lines.append(
        f"{len(left)} to run, about {total / 60:.0f} minutes; {finished} done; {waiting} wait for the tuning of their learning rate"
    )
    return "\n".join(lines)


def _described(run: Run) -> str:
    return f"{run.stage} {run.task} {run.rows} rows {run.steps} steps {run.arm} rate {run.learning_rate:g} seed {run.seed}"


class Bench:
    """One worker: its share, the tasks it has loaded, its progress bar."""

    def __init__(self, options, share: list[Cell]):
        import datasets
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        torch.set_num_threads(options.threads)
        self.options, self.share, self.out = options, share, Path(options.out)
        self.tasks: dict[str, Task] = {}

    def go(self) -> None:
        """Until nothing is left. The file is read again before each run: others write to it too."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, speed_estimate_period=3600) as progress:
            bar, spent = progress.add_task("starting"), 0.0
            while left := pending(self.share, done := records.read(self.out)):
                costs = [estimate(run, done) for run in left]
                progress.update(bar, description=f"{len(left)} left: {_described(left[0])}", completed=spent, total=spent + sum(costs))
                record = train(left[0], self.task(left[0].task), self.options.timed)
                store.append(self.out, record)
                spent += costs[0]
                progress.console.print(_told(record))
            progress.update(bar, description="done", completed=spent, total=spent)

    def task(self, name: str) -> Task:
        """One at a time stays loaded: stages go through them in order."""
        if name not in self.tasks:
            self.tasks = {name: Task(name, self.options.assets, self.options.device, self.options.held_out_rows)}
        return self.tasks[name]


def _told(record: dict) -> str:
    """A line on a finished run."""
    run = Run(**{name: record[name] for name in Run.__dataclass_fields__})
    fell = "diverged" if record["diverged"] else " ".join(f"{loss:.3f}" for _, loss in record["losses"])
    return f"{_described(run)}: {fell}, {record['seconds_per_step'] or 0:.2f} s a step, {record['peak_bytes'] / 2**20:,.0f} MiB"
