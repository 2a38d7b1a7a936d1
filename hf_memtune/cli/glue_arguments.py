"""What `hf-memtune glue` takes about its data: a task of GLUE by name, files of one's own, or both."""

from dataclasses import dataclass, field
from pathlib import Path

from hf_memtune.cli.arguments import changed, problems_of_max_length, problems_of_row_limits
from hf_memtune.cli.data import BUILDERS
from hf_memtune.cli.glue_tasks import CLASS_METRICS, SCORE_METRICS, TASKS, GlueTask
from hf_memtune.settings.protocol import setting

DESCRIBING = ("sentence_column", "second_sentence_column", "regression", "metrics")


def part_name(file: str) -> str:
    """What a held-out set is called, in its scores too: its file, but `train` are the rows to train on."""
    stem = Path(file).stem
    return "held_out" if stem == "train" else stem


@dataclass
class GlueArguments:
    """Which task, which rows, and how a row becomes tokens."""

    _argument_group_name = "data"
    task = "sequence_classification"  # no setting: what the functions that load models ask for

    task_name: str | None = setting(
        None,
        f"Task of GLUE: {', '.join(TASKS)}. It names columns, classes and metrics; rows come from the hub (nyu-mll/glue), or from "
        "train_file and validation_file. Default: none, and files of your own.",
        choices=list(TASKS),
    )
    train_file: str | None = setting(None, "Rows to train on: a csv, json, jsonl or parquet file. Default: those of the task on the hub.")
    validation_file: list[str] = field(
        default_factory=list,
        metadata={"help": "Held-out rows, in files as train_file; of several, each is measured by itself, and the first is eval_loss."},
    )
    sentence_column: str = setting("sentence", "Column of the text. A task of GLUE has its own.")
    second_sentence_column: str | None = setting(None, "Column of a second text. Default: none, or that of the task.")
    label_column: str = setting("label", "Column of the label: a whole number or a name of a class; a number with regression.")
    regression: bool = setting(False, "The label is a number to predict. A task of GLUE says by itself.")
    metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Of classes {', '.join(CLASS_METRICS)} (f1 of the second of two classes, or the mean over more); with regression "
            f"{', '.join(SCORE_METRICS)}. Default: accuracy, or both of regression, or those of the task."
        },
    )
    max_length: int = setting(128, "Most tokens of a row; what is beyond is cut off, of two texts from the longer one.")
    max_train_rows: int | None = setting(None, "Train on this many rows at most, the first ones. Default: all.")
    max_eval_rows: int | None = setting(None, "Measure on this many rows of each held-out set at most, the first ones. Default: all.")

    @property
    def resolved(self) -> GlueTask:
        """The task by its name, or what the columns describe."""
        if self.task_name is not None:
            return TASKS[self.task_name]
        second = () if self.second_sentence_column is None else (self.second_sentence_column,)
        labels, usual = ((), SCORE_METRICS) if self.regression else (None, ("accuracy",))
        return GlueTask((self.sentence_column, *second), labels, tuple(self.metrics) or usual, ())

    def problems(self) -> list[str]:
        """Every setting that cannot work, as one message each: setting, got, expected."""
        found = [] if self.task_name in (None, *TASKS) else [f"task_name: got {self.task_name!r}, expected one of {', '.join(TASKS)}."]
        if self.task_name is None and self.train_file is None:
            own = "rows of your own (--train_file F --validation_file F)"
            found.append(f"task_name: got nothing, expected a task of GLUE ({', '.join(TASKS)}), or {own}.")
        return [*found, *self._file_problems(), *problems_of_max_length(self), *problems_of_row_limits(self), *self._metric_problems()]

    def _file_problems(self) -> list[str]:
        found = []
        if (self.train_file is None) != (not self.validation_file):
            lacking, given = ("train_file", "validation_file") if self.train_file is None else ("validation_file", "train_file")
            found.append(f"{lacking}: got nothing beside {given}, expected a file: both are needed, or none with task_name.")
        named = [("train_file", self.train_file), *(("validation_file", file) for file in self.validation_file)]
        for name, file in named:
            if file is not None and Path(file).suffix.lower() not in BUILDERS:
                found.append(f"{name}: got {file!r}, expected a name that ends in one of {', '.join(BUILDERS)}.")
            elif file is not None and not Path(file).is_file():
                found.append(f"{name}: {file!r} is not a file.")
        names = [part_name(file) for file in self.validation_file]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            found.append(f"validation_file: got several files called {twice[0]!r}, by which their scores are told apart. Rename one.")
        return found

    def _metric_problems(self) -> list[str]:
        known = SCORE_METRICS if self.regression else CLASS_METRICS
        wrong = [name for name in self.metrics if name not in known]
        kind = "regression" if self.regression else "classes"
        return [f"metrics: got {', '.join(wrong)} for {kind}, expected some of {', '.join(known)}."] if wrong and not self.task_name else []

    def ineffective(self) -> dict[str, str]:
        if self.task_name is None:
            return {}
        return dict.fromkeys(changed(self, DESCRIBING), f"with task_name={self.task_name}, which has its own")
