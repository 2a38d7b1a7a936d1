"""`hf-memtune evaluate --model M --tasks sciq,piqa`: scores of a model on tasks of lm-eval, as a table, JSON and a picture.

hf-memtune evaluate --model M --tasks sciq,piqa --num_fewshot 5 --limit 200
hf-memtune evaluate --model M --reversible_adapters out --tasks mine --tasks_folder tasks
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_memtune.cli.arguments import DataSource, ModelSource, changed
from hf_memtune.settings.protocol import setting


@dataclass
class TaskArguments:
    """Which tasks of lm-eval, on how much of them, and where the scores go."""

    _argument_group_name = "tasks of lm-eval, in place of data"

    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Tasks, groups or tags of lm-eval by name, after one another or with commas: sciq,piqa. Needs pip install -e '.[eval]'."
        },
    )
    num_fewshot: int | None = setting(None, "Examples with their answers before each question. Default: as each task says, most often 0.")
    limit: int | None = setting(None, "Score this many rows of each task at most, the first ones. Default: all.")
    tasks_folder: str | None = setting(
        None, "Folder of task files (YAML) of your own, in lm-eval's format; no network is needed for those whose rows are local files."
    )
    out: str = setting("scores.json", "File to write, all that lm-eval returns; the picture goes beside it, ending in .png.")

    @property
    def names(self) -> list[str]:
        return [name for word in self.tasks for name in word.split(",") if name]

    def problems(self) -> list[str]:
        from hf_memtune.evaluation.harness_tasks import problems_of_installation, problems_of_tasks_folder

        if self.tasks and not self.names:
            return [f"tasks: got {' '.join(self.tasks)!r}, expected names of tasks of lm-eval, or of your task files."]
        if not self.names:
            idle = changed(self, ("num_fewshot", "limit", "tasks_folder", "out"))
            return [f"{name}: has no effect without tasks. Name some (--tasks sciq,piqa), or leave it out." for name in idle]
        found = [*problems_of_installation(), *problems_of_tasks_folder(self.tasks_folder)]
        for name, least in (("num_fewshot", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                found.append(f"{name}: got {value}, expected {least} or more.")
        if Path(self.out).suffix != ".json":
            found.append(f"out: got {self.out!r}, expected a name that ends in .json.")
        return found


def run(source: ModelSource, arguments: TaskArguments, batch_size: int) -> None:
    """Print the table, and write JSON and picture. Raises ConfigError for tasks that cannot be loaded, before the model is."""
    results = scored(source, arguments, batch_size)
    if results is not None:  # of several processes one writes
        show_and_write(results, arguments.out, Path(source.reversible_adapters or source.model_name_or_path).resolve().name)


def scored(source: ModelSource, arguments: TaskArguments, batch_size: int) -> dict[str, Any] | None:
    """What lm-eval returns of the model, with reversible adapters where they are named."""
    from hf_memtune.cli.model import load_on_device, load_tokenizer
    from hf_memtune.evaluation.harness import score
    from hf_memtune.evaluation.harness_tasks import load_tasks

    tokenizer = load_tokenizer(source)
    tasks = load_tasks(arguments.names, arguments.tasks_folder, arguments.num_fewshot)
    model = load_on_device(source, DataSource(task="causal_lm", max_length=1), tokenizer)
    return score(model, tokenizer, tasks, batch_size, arguments.limit)


def show_and_write(results: dict[str, Any], out: str | Path, title: str) -> None:
    """The table on standard output, the JSON file, and the picture beside it."""
    from hf_memtune.evaluation.harness import table_of, write_results

    print(table_of(results))
    written = write_results(results, out)
    picture = write_picture({"": results}, written, title)
    print(f"written: {written}, {picture}")


def write_picture(results: dict[str, dict], beside: Path, title: str) -> Path:
    """Scores as PNG beside a JSON file. results: by what is added to the names of their tasks."""
    from hf_memtune.evaluation.harness import scores_of
    from hf_memtune.visualization.task_scores import Point, write_scores_png

    points = [Point(s.task + added, s.name, s.value, s.stderr) for added, found in results.items() for s in scores_of(found)]
    return write_scores_png(points, beside.with_suffix(".png"), title)
