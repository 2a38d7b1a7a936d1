"""Questions with their right answers, as tokens that lm-eval would score; and the task that scores them."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_memtune.cli.arguments import DataSource
from hf_memtune.cli.data import BUILDERS, IGNORED, load_rows, mapped, opened
from hf_memtune.cli.qa_arguments import QaArguments
from hf_memtune.cli.qa_tasks import TASKS
from hf_memtune.errors import ConfigError

NOTHING = "without a token of the answer"


@dataclass
class QaRows:
    """Tokenised rows. held_out: those that are scored, with the right answer. reasons: of rows that were dropped, how many for each.

    tasks: what lm-eval scores, hf_memtune.evaluation.harness_tasks.Tasks, the first `limit` rows of it (None: all). tokenizer: of both.
    """

    train: Any
    held_out: Any
    reasons: dict[str, int]
    tasks: Any
    tokenizer: Any
    limit: int | None = None
    classes: None = None

    @property
    def dropped(self) -> int:
        return sum(self.reasons.values())


def prepare(data: QaArguments, tokenizer) -> QaRows:
    """Rows to train on and rows that are scored. Raises ConfigError for files without the columns, and rows without a right answer."""
    from hf_memtune.evaluation.harness_tasks import Tasks

    _check_files(data)
    manager, config = _config_of(data)
    found = _loaded(manager, config)
    task = found["tasks"][data.task_name]
    parts = {"rows to train on": (task.training_docs(), data.max_train_rows), "rows to score": (task.eval_docs, data.max_eval_rows)}
    (train, reasons), (held_out, _) = (_tokenised(name, *part, task, tokenizer, data.max_length) for name, part in parts.items())
    return QaRows(train, held_out, dict(reasons), Tasks(manager, found), tokenizer, data.max_eval_rows)


def _config_of(data: QaArguments) -> tuple[Any, dict]:
    """lm-eval's TaskManager of this one task, and its config, with files in place of the hub where there are some."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / TASKS[data.task_name].folder
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    config = dict(manager.task_index[data.task_name].cfg)
    if data.train_file is not None:
        files = {"train": str(Path(data.train_file).resolve()), "test": str(Path(data.test_file).resolve())}
        config |= {
            "custom_dataset": rows_of_files,
            "dataset_path": BUILDERS[Path(data.train_file).suffix.lower()],
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }
        config |= {"training_split": "train", "validation_split": None, "test_split": "test"}
    if data.scored_split is not None:
        config |= {"test_split": data.scored_split}
    return manager, config


def rows_of_files(data_files: dict[str, str], **metadata: Any):
    """The rows of each split, for lm-eval: each file by itself, as `train` reads it, texts as they are written. metadata: of the task file."""
    import datasets

    return datasets.DatasetDict({split: load_rows(DataSource(dataset_name=file), "train") for split, file in data_files.items()})


def _loaded(manager, config: dict) -> dict:
    from hf_memtune.evaluation.harness_tasks import load_specs, silenced

    try:
        with silenced("lm_eval.api.task"):  # which explains what a function that gives rows can be given
            return load_specs(manager, [config], "give its rows by --train_file and --test_file, with the columns that the task has there")
    except ConfigError as error:
        raise ConfigError([message.replace("tasks:", "task_name:", 1) for message in error.problems]) from error


def _check_files(data: QaArguments) -> None:
    """Raises ConfigError for every column that a file lacks."""
    found = []
    for setting in ("train_file", "test_file"):
        if (file := getattr(data, setting)) is None:
            continue
        try:
            columns = load_rows(DataSource(dataset_name=file), "train").column_names
        except ConfigError as error:
            found += [f"{setting}: {message.removeprefix('dataset_name: ')}" for message in error.problems]
            continue
        if missing := [name for name in TASKS[data.task_name].columns if name not in columns]:
            wanted = f"Expected those of {data.task_name}: {', '.join(TASKS[data.task_name].columns)}"
            found.append(f"{setting}: {file!r} has no column {', '.join(missing)}; it has {', '.join(columns)}. {wanted}.")
    if found:
        raise ConfigError(found)


def _tokenised(name: str, rows, count: int | None, task, tokenizer, max_length: int) -> tuple[Any, Counter]:
    rows = rows if count is None else rows.select(range(min(count, len(rows))))
    options = {"name": name, "task": task, "tokenizer": tokenizer, "max_length": max_length}
    done = mapped(rows, row_of, options, with_indices=True)
    kept = done.filter(lambda labels: any(label != IGNORED for label in labels[1:]), input_columns="labels", desc="Dropping empty answers")
    if not len(kept):
        raise ConfigError([f"task_name: none of the {name} has a token of the answer."])
    return kept, Counter({NOTHING: len(done) - len(kept)} if len(kept) < len(done) else {})


def row_of(doc: dict, number: int, name: str, task, tokenizer, max_length: int) -> dict:
    """The question and the right answer, as lm-eval writes them for this task; the answer alone carries labels, no end token follows."""
    if missing := [column for column in TASKS[task.config.task].columns if doc.get(column) is None]:
        raise ConfigError([f"task_name: row {number} of the {name} has no {', '.join(missing)} (null). Leave it out, or write what it is."])
    try:
        requests = task.construct_requests(doc, ctx=task.fewshot_context(doc, 0))
        prompt, answer = requests[range(len(requests)).index(task.doc_to_target(doc))].args  # -1, of rows without an answer, is none
    except Exception as error:  # whatever a template raises of a row that is not as the task has it
        wrong = f"row {number} of the {name} has no right answer among its choices ({type(error).__name__}: {error})"
        raise ConfigError([f"task_name: {wrong}. Expected rows as {task.config.task} has them on the hub; got {doc}."]) from error
    return answered(prompt, answer, tokenizer, max_length)


def answered(prompt: str, answer: str, tokenizer, max_length: int) -> dict:
    """Tokens of both, split as lm-eval splits what it scores: what the tokenizer makes of the whole, after what it makes of the prompt."""
    whole, before = (opened(text, tokenizer)[0] for text in (prompt + answer, prompt.rstrip()))  # spaces at its end belong to the answer
    start = len(before)
    labels = [IGNORED] * start + whole[start:] if answer.strip() else [IGNORED] * len(whole)
    whole, labels = whole[-max_length:], labels[-max_length:]
    return {"input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels}
