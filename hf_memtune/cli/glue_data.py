"""Rows of sentences and labels, from the hub or from files, checked and tokenised."""

import math
from dataclasses import dataclass
from typing import Any

from hf_memtune.cli.arguments import DataSource, ModelSource
from hf_memtune.cli.data import load_rows, mapped
from hf_memtune.cli.data.classes import SHOWN, is_nameless, known_classes, relabelled
from hf_memtune.cli.data.kinds import class_names
from hf_memtune.cli.glue_arguments import GlueArguments, part_name
from hf_memtune.cli.glue_tasks import HUB_NAME, GlueTask
from hf_memtune.errors import ConfigError

VALUE_NAME = "value"  # of the one output of a regression head


@dataclass
class GlueRows:
    """Tokenised rows. held_outs: every held-out set by its name, the first one first. classes: in order; of regression one name."""

    train: Any
    held_outs: dict[str, Any]
    classes: list
    dropped: int = 0

    @property
    def held_out(self) -> Any:
        return next(iter(self.held_outs.values()))


def prepare(data: GlueArguments, tokenizer, model: ModelSource | None = None) -> GlueRows:
    """Rows to train on and rows held out, tokenised. Raises ConfigError with every problem of the columns and labels.

    model: a trained classifier has classes of its own: rows of one's own are labelled by them, those of a task of GLUE must be the same.
    """
    task, parts = data.resolved, load_parts(data)
    check_columns(data, task, parts)
    known = None if model is None or task.is_regression else known_classes(model)
    if task.labels is None:
        parts = dict(zip(parts, relabelled(data, known, *parts.values())))
    elif known is not None:
        _require_same(data, task.labels, known)
    train, *held_out = parts
    classes, numbers = (_regression if task.is_regression else _classes)(data, task, parts)
    options = {"task": task, "label": data.label_column, "numbers": numbers, "tokenizer": tokenizer, "max_length": data.max_length}
    done = {name: _tokenised(rows, options) for name, rows in parts.items()}
    return GlueRows(done[train], {name: done[name] for name in held_out}, classes)


def _require_same(data: GlueArguments, labels: tuple[str, ...], known: list[str]) -> None:
    """Refuse a classifier that has other classes than the task, or has them in another order: what it learned would be taken for another."""
    if len(known) == len(labels) and (is_nameless(known) or [name.casefold() for name in known] == list(labels)):
        return
    wrong = f"the classes of {data.task_name} are {', '.join(labels)}, but the model tells {', '.join(known[:SHOWN])} apart, in this order"
    remedy = "Name a model without a head for classes, which learns them"
    if {name.casefold() for name in known} == set(labels):
        remedy += (
            "; or give the rows as your own, labelled by name: --train_file, --validation_file and --sentence_column without task_name"
        )
    raise ConfigError([f"task_name: {wrong}. {remedy}."])


def load_parts(data: GlueArguments) -> dict[str, Any]:
    """The rows to train on under "train", then every held-out set under its own name, as they are stored."""
    if data.train_file is None:
        found = {split: _from_hub(data, split) for split in ("train", *data.resolved.validation)}
        found = {name.removeprefix("validation_"): rows for name, rows in found.items()}
    else:
        files = {"train": ("train_file", data.train_file)}
        files |= {part_name(file): ("validation_file", file) for file in data.validation_file}
        found = {name: _from_file(*source, data.label_column) for name, source in files.items()}
    limits = {name: data.max_train_rows if name == "train" else data.max_eval_rows for name in found}
    return {name: rows if limits[name] is None else rows.select(range(min(limits[name], len(rows)))) for name, rows in found.items()}


def _from_hub(data: GlueArguments, split: str):
    try:
        return load_rows(DataSource(dataset_name=HUB_NAME, dataset_config=data.task_name), split)
    except ConfigError as error:
        remedy = "Without the hub, give the rows by --train_file and --validation_file, with the columns that the task has there."
        raise ConfigError([f"task_name: {error.problems[0]} {remedy}"]) from error


def _from_file(setting: str, file: str, label_column: str):
    try:
        return load_rows(DataSource(dataset_name=file, label_column=label_column), "train")
    except ConfigError as error:
        raise ConfigError([f"{setting}: {error.problems[0].removeprefix('dataset_name: ')}"]) from error


def check_columns(data: GlueArguments, task: GlueTask, parts: dict[str, Any]) -> None:
    """Raises ConfigError for every column that a part lacks, every part without rows, and texts that are missing."""
    settings = [f"task_name={data.task_name}"] * 2 if data.task_name else ["sentence_column", "second_sentence_column"]
    wanted = [*zip(settings, task.sentences), ("label_column", data.label_column)]
    found = [f"{name}: has no rows." for name, rows in parts.items() if not len(rows)]
    found += [
        f"{setting}: {name} has no column {column!r}, expected one of: {', '.join(rows.column_names)}."
        for name, rows in parts.items()
        for setting, column in wanted
        if column not in rows.column_names
    ]
    if not found:
        nulls = ((name, setting, column, _nulls(rows, column)) for name, rows in parts.items() for setting, column in wanted[:-1])
        found = [
            f"{setting}: {name} has {count} rows without a {column!r} (null). Leave them out, or write what is to be read."
            for name, setting, column, count in nulls
            if count
        ]
    if found:
        raise ConfigError(found)


def _nulls(rows, column: str) -> int:
    return rows.select_columns([column]).with_format("arrow")[:][column].null_count


def _regression(data: GlueArguments, task: GlueTask, parts: dict[str, Any]) -> tuple[list, None]:
    """Raises ConfigError for every part that has a label which is no number."""
    found = []
    for name, rows in parts.items():
        wrong = [value for value in rows.unique(data.label_column) if not isinstance(value, (int, float)) or math.isnan(value)]
        if wrong:
            found.append(f"label_column: {name} has {wrong[0]!r} in {data.label_column!r}, expected numbers: the label is to be predicted.")
    if found:
        raise ConfigError(found)
    return [VALUE_NAME], None


def _classes(data: GlueArguments, task: GlueTask, parts: dict[str, Any]) -> tuple[list, dict]:
    """The classes, and their numbers by what is stored. Raises ConfigError for every part that has another label."""
    train = next(iter(parts.values()))
    if task.labels:
        classes = list(task.labels)
        numbers = {value: number for number, name in enumerate(classes) for value in (number, name)}
    else:
        classes = class_names(data, train)
        stored = range(len(classes)) if getattr(train.features[data.label_column], "names", None) else classes
        numbers = {value: number for number, value in enumerate(stored)}
    named = {name: getattr(rows.features[data.label_column], "names", None) for name, rows in parts.items()}
    wrong = {name: [value for value in rows.unique(data.label_column) if value not in numbers] for name, rows in parts.items()}
    expected = ", ".join(map(str, numbers))
    found = [
        f"label_column: {name} has the classes {names} in {data.label_column!r}, expected {classes}: the same numbers are others. Store the names as "
        "text, or in this order."
        for name, names in named.items()
        if names is not None and list(names) != list(classes) and set(names) & set(map(str, classes))
    ]
    found += [
        f"label_column: {name} has {values[0]!r} in {data.label_column!r}, expected one of: {expected}."
        + (" On the hub, rows of GLUE to be submitted have no labels (-1)." if values[0] == -1 else "")
        for name, values in wrong.items()
        if values
    ]
    if found:
        raise ConfigError(found)
    return classes, numbers


def _tokenised(rows, options: dict):
    return mapped(rows, tokenised_batch, options, batched=True)


def tokenised_batch(batch: dict, task: GlueTask, label: str, numbers: dict | None, tokenizer, max_length: int) -> dict:
    """One text or two a row as the tokenizer joins them; labels: numbers of classes (int), or, numbers None, values (float)."""
    texts = [[str(text) for text in batch[column]] for column in task.sentences]
    labels = [float(value) for value in batch[label]] if numbers is None else [numbers[value] for value in batch[label]]
    return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": labels}
