"""The runs of this study: each in a loop of its own, on a task that stays loaded."""

from quality.tasks import Task
from quality.training import Run, train


class Bench:
    """What its runs share."""

    def __init__(self, options):
        self.options = options
        self.tasks: dict[str, Task] = {}

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *error) -> None:
        self.tasks.clear()

    def train(self, run: Run) -> dict:
        """The record of one run. One task at a time stays loaded: stages go through them in order."""
        if run.task not in self.tasks:
            self.tasks = {run.task: Task(run.task, self.options.assets, self.options.device, self.options.held_out_rows)}
        return train(run, self.tasks[run.task], self.options.timed)
