"""The few-shot suite of TokenSeek (arXiv 2601.19739): its tasks, scores on them, and the learning rate that a search chose."""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import NamedTuple


class Task(NamedTuple):
    """A task or group of lm-eval: examples before each question, and the metric that counts."""

    name: str
    num_fewshot: int = 0
    metric: str = "acc"


SUITE = (
    Task("arc_challenge", 25, "acc_norm"),
    Task("hellaswag", 10, "acc_norm"),
    Task("mmlu", 5),
    Task("truthfulqa_mc2"),
    Task("winogrande"),  # with 5 in lm-eval's `openllm`
)
TUNED_BY = 0  # the seed of a search for a learning rate; those of the finals are others
SAME = ("arm", "model", "data", "setup", "settings")  # what a search and its finals have in common


def tasks_of(names: list[str], num_fewshot: list[int] | None, metric: list[str] | None) -> tuple[list[Task], list[str]]:
    """Tasks by name, with what is given of each, or as the suite has them; and what is not given once a task, or is a task given twice."""
    suite = {task.name: task for task in SUITE}
    columns, wrong = [*zip(*(suite.get(name, Task(name)) for name in names))], []
    for place, (name, given) in enumerate((("num_fewshot", num_fewshot), ("metric", metric)), 1):
        if given and len(given) != len(names):
            wrong.append(f"{name}: got {len(given)}, expected one for each of {len(names)} tasks")
        elif given:
            columns[place] = given
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        wrong.append(f"tasks: got {', '.join(twice)} more than once, and a run has one score of each")
    return [Task(*each) for each in zip(*columns)], wrong


def short_name(path: str | Path) -> str:
    """As the result file has it: on another machine the folders above are others."""
    return "/".join(Path(path).parts[-2:])


def digests_of(*named: str | None) -> dict[str, str]:
    """By name, of the files among what is named and of those in its folders. What is on the hub has none."""
    from hf_memtune.files import digest_of

    paths = [Path(name) for name in named if name]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*"))) if file.is_file()]
    return {short_name(file): digest_of(file) for file in files}


def chosen_rate(rows: Iterable[dict], run: dict) -> float | None:
    """The learning rate with the lowest held-out loss in the search that belongs to a run; None where there is none, or all diverged."""
    searched = [row for row in rows if row["stage"] == "tune" and all(row[name] == run[name] for name in SAME)]
    found = [row for row in searched if row["held_out_loss"] is not None]
    return min(found, key=lambda row: row["held_out_loss"])["learning_rate"] if found else None


def score(
    folder: str, task: Task, tasks_folder: str | None, limit: int | None, batch_size: int, dtype: str = "auto"
) -> dict[str, float | None]:
    """By `hf-memtune evaluate --tasks`: the metric that counts, and its standard error. dtype: of the weights."""
    from hf_memtune.cli.arguments import ModelSource
    from hf_memtune.cli.task_scores import TaskArguments, scored
    from hf_memtune.evaluation.harness import scores_of

    found = scores_of(scored(ModelSource(folder, dtype), TaskArguments([task.name], task.num_fewshot, limit, tasks_folder), batch_size))
    return next({"score": each.value, "stderr": each.stderr} for each in found if (each.task, each.name) == (task.name, task.metric))


def together(scores: dict[str, dict]) -> dict[str, float | None]:
    """The mean of scores on tasks, and its standard error, where every one has one."""
    errors = [each["stderr"] for each in scores.values()]
    known = bool(errors) and None not in errors
    return {
        "mean": mean(each["score"] for each in scores.values()) if scores else None,
        "mean_stderr": math.hypot(*errors) / len(errors) if known else None,
    }


def problems_of(tasks: Iterable[Task], tasks_folder: str | None, limit: int | None) -> list[str]:
    """What `evaluate` would refuse after training, and metrics that a task does not have. Loads the tasks, and no model."""
    from hf_memtune.cli.task_scores import TaskArguments
    from hf_memtune.errors import ConfigError
    from hf_memtune.evaluation.harness_tasks import load_tasks

    found: list[str] = []
    for task in tasks:
        wrong = TaskArguments([task.name], task.num_fewshot, limit, tasks_folder).problems()
        found += wrong
        try:
            metrics = [] if wrong else _metrics_of(load_tasks([task.name], tasks_folder, task.num_fewshot).found, task.name)
        except ConfigError as error:
            found += error.problems
            continue
        if not wrong and task.metric not in metrics:
            found.append(
                f"metric: {task.name} has no {task.metric}, expected one of {', '.join(metrics) or 'a task or a group with scores'}"
            )
    return found


def _metrics_of(found: dict, name: str) -> list[str]:
    """Names of the scores of a task, or of a group that has some of its own; of a tag none."""
    if name in found["tasks"]:
        task = found["tasks"][name]
        return _named(task.aggregation(), _filters_of([task]))
    if (group := found.get("groups", {}).get(name)) is None:
        return []
    metrics = group.aggregate_metric_list or ()
    return [metric for each in metrics for metric in _named([each.metric], each.filter_list or _filters_of(group.get_all_tasks()))]


def _named(metrics: Iterable[str], filters: Iterable[str]) -> list[str]:
    """As scores are: by the metric, and what of an answer it looks at, where that is not all."""
    from hf_memtune.evaluation.harness import Score

    return [Score("", metric, kind, 0.0, None).name for metric in metrics for kind in filters]


def _filters_of(tasks: Iterable) -> list[str]:
    """Names of what cuts an answer to what is scored, in the task files."""
    return list(dict.fromkeys(each["name"] for task in tasks for each in task.config.filter_list or [{"name": "none"}]))
