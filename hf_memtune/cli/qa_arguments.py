"""What `hf-memtune qa` takes about its data: a task by name, with rows from the hub or from files."""

from dataclasses import dataclass
from pathlib import Path

from hf_memtune.cli.arguments import problems_of_max_length, problems_of_row_limits
from hf_memtune.cli.data import BUILDERS
from hf_memtune.cli.qa_tasks import TASKS
from hf_memtune.settings.protocol import setting

KINDS = [suffix for suffix in BUILDERS if suffix != ".txt"]


@dataclass
class QaArguments:
    """Which task, which rows, and how a row becomes tokens."""

    _argument_group_name = "data"
    task, packing = "causal_lm", False  # no settings: what the functions that load models and make batches ask for

    task_name: str | None = setting(
        None, f"Required. One of {', '.join(TASKS)}. Its prompts are lm-eval's; rows come from the hub or from files."
    )
    train_file: str | None = setting(
        None, f"Rows to train on: a file ({', '.join(KINDS)}) with the columns that the task has on the hub. Default: those on the hub."
    )
    test_file: str | None = setting(None, "Rows that are scored, in a file of the same kind as train_file. Default: those on the hub.")
    scored_split: str | None = setting(
        None,
        "Split of the hub that is scored. Default: that of lm-eval, which is test, of piqa validation. Learning rates and epochs are to be "
        "chosen on another one: validation.",
    )
    max_length: int = setting(
        128, "Most tokens of a row. What is beyond is cut off at its beginning, so that question and answer stay, as lm-eval cuts."
    )
    max_train_rows: int | None = setting(None, "Train on this many rows at most, the first ones. Default: all.")
    max_eval_rows: int | None = setting(None, "Score this many rows at most, the first ones. Default: all.")

    def problems(self) -> list[str]:
        """Every setting that cannot work, as one message each: setting, got, expected."""
        from hf_memtune.evaluation.harness_tasks import problems_of_installation

        found = [message.replace("tasks:", "task_name:", 1) for message in problems_of_installation()]
        if self.task_name not in TASKS:
            found.append(f"task_name: got {self.task_name!r}, expected one of {', '.join(TASKS)}.")
        return [*found, *self._file_problems(), *problems_of_max_length(self), *problems_of_row_limits(self)]

    def _file_problems(self) -> list[str]:
        files = {name: file for name in ("train_file", "test_file") if (file := getattr(self, name)) is not None}
        found = []
        if len(files) == 1:
            (given,) = files
            (lacking,) = {"train_file", "test_file"} - {given}
            found.append(f"{lacking}: got nothing beside {given}, expected a file: both are needed, or none for those of the hub.")
        for name, file in files.items():
            if Path(file).suffix.lower() not in KINDS:
                found.append(f"{name}: got {file!r}, expected a name that ends in one of {', '.join(KINDS)}.")
            elif not Path(file).is_file():
                found.append(f"{name}: {file!r} is not a file.")
        kinds = {BUILDERS[Path(file).suffix.lower()] for file in files.values() if Path(file).suffix.lower() in KINDS}
        if len(kinds) > 1:
            found.append(f"test_file: got {self.test_file!r} beside {self.train_file!r}, expected files of one kind.")
        return found

    def ineffective(self) -> dict[str, str]:
        given = self.test_file is not None and self.scored_split is not None
        return {"scored_split": "with test_file, whose rows are scored"} if given else {}
