"""Rows to train on and rows held out, tokenised; what is dropped is counted by its reason."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_memtune.cli.arguments import CLASSES, DataArguments, DataSource, ModelSource
from hf_memtune.cli.data.classes import known_classes, relabelled
from hf_memtune.cli.data.collating import packed
from hf_memtune.cli.data.kinds import check_columns, class_names, kind_of, resolved
from hf_memtune.cli.data.making import CUT, IGNORED, classified_row, language_row
from hf_memtune.cli.data.mapping import mapped
from hf_memtune.cli.data.reading import load_rows
from hf_memtune.cli.traps import Lengths
from hf_memtune.errors import ConfigError

HOLD_OUT_SEED = 0  # not the seed of training: runs with different seeds are measured on the same rows


@dataclass
class Rows:
    """Tokenised rows. data: the settings, with the task that the rows are for. reasons: of the rows that were dropped, how many for each.
    classes: of sequence classification, in order."""

    train: Any
    held_out: Any | None
    data: DataSource
    reasons: dict[str, int]
    classes: list | None

    @property
    def dropped(self) -> int:
        return sum(self.reasons.values())


def prepare(data: DataArguments, tokenizer, model: ModelSource | None = None) -> Rows:
    """Rows to train on and rows held out, tokenised; the former packed where that is asked for. model: whose classes the rows have."""
    train, held_out = _split(data)
    asked, data = data, resolved(data, train.column_names)
    if data.task != asked.task and (idle := data.ineffective()):
        raise ConfigError([f"{message}, which the columns of these rows are for. Leave it out, or name the task." for message in idle])
    check_columns(data, train.column_names)
    use_template(data, tokenizer)
    if data.task == CLASSES and model is not None:
        parts = relabelled(data, known_classes(model), *(rows for rows in (train, held_out) if rows is not None))
        train, held_out = parts[0], parts[-1] if held_out is not None else None
    classes = class_names(data, train)
    train, reasons = tokenised(train, data, tokenizer, classes, "rows to train on")
    if held_out is not None:
        held_out, more = tokenised(held_out, data, tokenizer, classes, "held-out rows (eval_split, eval_fraction)")
        reasons += more
    return Rows(packed(train, data), held_out, data, dict(reasons), classes)


def use_template(data: DataSource, tokenizer) -> None:
    """Give the tokenizer the chat template that the settings name: a Jinja file, or that of another tokenizer."""
    if data.chat_template_path is None:
        return
    if Path(data.chat_template_path).is_file():
        tokenizer.chat_template = Path(data.chat_template_path).read_text(encoding="utf-8")
        return
    from transformers import AutoTokenizer

    try:
        tokenizer.chat_template = AutoTokenizer.from_pretrained(data.chat_template_path).chat_template
    except (OSError, ValueError) as error:
        wrong = f"{data.chat_template_path!r} is neither a Jinja file nor the folder or hub name of a tokenizer ({error})"
        raise ConfigError([f"chat_template_path: {wrong}."]) from error


def _split(data: DataArguments):
    rows, held_out = load_rows(data, data.dataset_split), None
    if data.eval_split is not None:
        held_out = load_rows(data, data.eval_split)
    elif data.eval_fraction:
        if len(rows) < 2:
            raise ConfigError([f"eval_fraction: cannot hold out any of {len(rows)} row(s). Set it to 0."])
        count = min(max(1, round(len(rows) * data.eval_fraction)), len(rows) - 1)
        parts = rows.train_test_split(test_size=count, seed=HOLD_OUT_SEED)
        rows, held_out = parts["train"], parts["test"]
    if held_out is not None:
        held_out = _first(held_out, data.max_eval_rows)
    return _first(rows, data.max_train_rows), held_out


def _first(rows, count: int | None):
    return rows if count is None or count >= len(rows) else rows.select(range(count))


def tokenised(rows, data: DataSource, tokenizer, classes: list | None, name: str = "rows"):
    """Rows as tokens, and how many were dropped for what reason, a Counter. At least one remains. data: resolved. name: of these rows."""
    if classes:
        options = {"data": data, "tokenizer": tokenizer, "classes": _numbers(rows, data, classes)}
        done = mapped(rows, classified_row, options)
    else:
        options = {"kind": kind_of(data, rows.column_names), "data": data, "tokenizer": tokenizer}
        done = mapped(rows, language_row, options, with_indices=True)
    reasons = Counter(reason for reason in done["dropped"] if reason)
    if reasons:
        done = done.filter(lambda reason: not reason, input_columns="dropped", desc="Dropping rows that teach nothing")
    if not len(done):
        raise ConfigError([_nothing_left(name, reasons, data)])
    return done.remove_columns("dropped"), reasons


def lengths_of(rows, together: int = 1) -> Lengths:
    """Of tokenised rows of a language model, so many of which become one row."""
    labelled = [sum(label != IGNORED for label in labels) for labels in rows["labels"]]
    return Lengths([len(ids) for ids in rows["input_ids"]], labelled, together)


def _nothing_left(name: str, reasons: Counter, data: DataSource) -> str:
    if set(reasons) == {CUT}:
        return f"max_length: none of the {sum(reasons.values())} {name} has a labelled token within {data.max_length} tokens. Raise it."
    told = ", ".join(f"{count} ({reason})" for reason, count in reasons.items())
    return f"dataset_name: none of the {name} of {data.dataset_name!r} can be learned from; dropped: {told}."


def _numbers(rows, data: DataSource, classes: list) -> dict:
    """Class number by stored value. Raises ConfigError for a class that the rows to train on lack."""
    if getattr(rows.features[data.label_column], "names", None):
        return {number: number for number in range(len(classes))}
    numbers = {label: number for number, label in enumerate(classes)}
    unknown = [label for label in rows.unique(data.label_column) if label not in numbers]
    if unknown:
        raise ConfigError([f"label_column: held-out rows have the class {unknown[0]!r}, rows to train on only {classes}."])
    return numbers
