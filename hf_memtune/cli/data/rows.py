"""Rows to train on and rows held out, tokenised; what is dropped is counted by its reason."""

import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from hf_memtune.cli.arguments import CLASSES, DataArguments, DataSource, ModelSource
from hf_memtune.cli.data.chats import without_nones
from hf_memtune.cli.data.classes import known_classes, relabelled
from hf_memtune.cli.data.collating import packed
from hf_memtune.cli.data.kinds import COMPLETION, Unread, check_columns, class_names, kind_of, resolved, unread
from hf_memtune.cli.data.making import CUT, IGNORED, BadRow, classified_row, language_row
from hf_memtune.cli.data.mapping import mapped
from hf_memtune.cli.data.mixed import as_stored, written
from hf_memtune.cli.data.reading import load_rows
from hf_memtune.cli.traps import Lengths
from hf_memtune.errors import ConfigError

BAD_ROWS_TOLD, LOOKED_THROUGH = 5, 1000  # rows
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
    unread: Unread = Unread([])

    @property
    def dropped(self) -> int:
        return sum(self.reasons.values())


def prepare(data: DataArguments, tokenizer, model: ModelSource | None = None) -> Rows:
    """Rows to train on and rows held out, tokenised; the former packed where that is asked for. model: whose classes the rows have."""
    (stored, *rest), data, classes, _, not_read = understood(data, tokenizer, model, *_split(data))
    train, reasons = tokenised(stored, data, tokenizer, classes, "rows to train on")
    held_out = None
    for rows in rest:
        held_out, more = tokenised(rows, data, tokenizer, classes, "held-out rows (eval_split, eval_fraction)")
        reasons += more
    return Rows(packed(train, data), held_out, data, dict(reasons), classes, not_read)


class Understood(NamedTuple):
    """Rows as they are stored, in parts. data: the settings, with the task that they are for. classes: of sequence classification, in order.
    known: those that the model tells apart already."""

    parts: tuple
    data: DataSource
    classes: list | None
    known: list | None
    unread: Unread

    def makes_head(self, model: ModelSource) -> bool:
        """Whether the model gets a new head for these classes: it has none, and no reversible adapters, which may hold one."""
        return bool(self.classes) and self.known is None and model.reversible_adapters is None


def understood(data: DataSource, tokenizer, model: ModelSource | None, *parts) -> Understood:
    """What parts of rows are for, and whether they can be read. The tokenizer gets its chat template. model: whose classes the rows have."""
    columns = parts[0].column_names
    data = resolved(data, columns)
    check_columns(data, columns)
    not_read = unread(data, parts[0])
    _use_template(data, tokenizer)
    known = known_classes(model) if data.task == CLASSES and model is not None else None
    parts = tuple(relabelled(data, known, *parts))
    return Understood(parts, data, class_names(data, parts[0]), known, not_read)


def _use_template(data: DataSource, tokenizer) -> None:
    """Give the tokenizer the chat template that the settings name: a Jinja file, or that of another tokenizer."""
    if data.chat_template_path is None:
        return
    if Path(data.chat_template_path).is_file():
        tokenizer.chat_template = Path(data.chat_template_path).read_text(encoding="utf-8")
        return
    from transformers import AutoTokenizer

    try:
        template = AutoTokenizer.from_pretrained(data.chat_template_path).chat_template
    except (OSError, ValueError) as error:
        wrong = f"{data.chat_template_path!r} is neither a Jinja file nor the folder or hub name of a tokenizer ({error})"
        raise ConfigError([f"chat_template_path: {wrong}."]) from error
    if template is None:
        wrong = f"the tokenizer of {data.chat_template_path!r} has no chat template"
        raise ConfigError([f"chat_template_path: {wrong}. Name one that was tuned for chats, or a Jinja file."])
    tokenizer.chat_template = template


def _split(data: DataArguments) -> list:
    """Rows to train on, and where some are held out, those."""
    rows, held_out = load_rows(data, data.dataset_split), None
    if data.eval_split is not None:
        held_out = load_rows(data, data.eval_split)
        _warn_of_trained(data, rows)
    elif data.eval_fraction:
        if len(rows) < 2:
            raise ConfigError([f"eval_fraction: cannot hold out any of {len(rows)} row(s). Set it to 0."])
        count = min(max(1, round(len(rows) * data.eval_fraction)), len(rows) - 1)
        parts = rows.train_test_split(test_size=count, seed=HOLD_OUT_SEED)
        rows, held_out = parts["train"], parts["test"]
    parts = [_first(rows, data.max_train_rows)]
    return parts if held_out is None else [*parts, _first(held_out, data.max_eval_rows)]


def _warn_of_trained(data: DataArguments, rows) -> None:
    """Say so where held-out rows are rows to train on, too."""
    from datasets import ReadInstruction

    sizes = {name: split.num_examples for name, split in (rows.info.splits or {}).items()}
    try:
        train, held_out = (ReadInstruction.from_spec(spec).to_absolute(sizes) for spec in (data.dataset_split, data.eval_split))
    except (ValueError, AssertionError, TypeError):  # of data whose splits have no known sizes: whole ones, by name
        both = len(rows) if data.dataset_split == data.eval_split else 0
    else:
        pairs = product(_taken(train, data.max_train_rows), _taken(held_out, data.max_eval_rows))
        both = sum(len(range(max(a.start, b.start), min(a.stop, b.stop))) for (split, a), (other, b) in pairs if split == other)
    if both:
        warnings.warn(
            f"eval_split: {both} of the rows of {data.eval_split!r} are trained on, too (dataset_split={data.dataset_split!r}), so their loss is not "
            "that of rows that were held out. Name parts that do not overlap, such as --dataset_split 'train[200:]' --eval_split 'train[:200]'.",
            stacklevel=2,
        )


def _taken(parts, most: int | None) -> list[tuple[str, range]]:
    """Parts of splits, each with the name of its split and the numbers of its rows, as far as the first `most` rows of all go."""
    found, left = [], sys.maxsize if most is None else most
    for part in parts:
        rows = range(part.from_, part.to)[:left]
        found.append((part.splitname, rows))
        left -= len(rows)
    return found


def _first(rows, count: int | None):
    return rows if count is None or count >= len(rows) else rows.select(range(count))


def tokenised(rows, data: DataSource, tokenizer, classes: list | None, name: str = "rows"):
    """Rows as tokens, and how many were dropped for what reason, a Counter. At least one remains. data: resolved. name: of these rows."""
    rows, mixed = as_stored(rows)
    options = {"data": data, "tokenizer": tokenizer, "mixed": mixed}
    if classes:
        options |= {"classes": _numbers(rows, data, classes)}
        done = mapped(rows, classified_row, options, features=_features(tokenizer("a"), one_label=True))
    else:
        options |= {"kind": (kind := kind_of(data, rows.column_names)), "of": name}
        _refuse_bad_completions(rows, kind)
        try:
            done = mapped(rows, language_row, options, with_indices=True, features=_features(("input_ids", "attention_mask")))
        except BadRow as first:
            raise ConfigError(_bad_rows(rows, options)) from first
    reasons = Counter(reason for reason in done["dropped"] if reason)
    if reasons:
        done = done.filter(lambda reason: not reason, input_columns="dropped", desc="Dropping rows that teach nothing")
    if not len(done):
        raise ConfigError([_nothing_left(name, reasons, data)])
    return done.remove_columns("dropped"), reasons


def _bad_rows(rows, options: dict[str, Any]) -> list[str]:
    """What is wrong with the first bad rows, and how each begins, by which it is found in its file: they are counted from 0 after the split."""
    found: list[str] = []
    for number, row in enumerate(rows):
        try:
            language_row(row, number, **options)
        except BadRow as error:
            begins = json.dumps(without_nones(written(row, options["mixed"])), ensure_ascii=False, default=str)[:100]
            found += [f"{problem} The row begins {begins}" for problem in error.problems]
        if len(found) >= BAD_ROWS_TOLD or (found and number >= LOOKED_THROUGH):
            break
    return found


def _refuse_bad_completions(rows, kind: str) -> None:
    """Rows for KTO have good and bad completions, told apart by a column that nothing here reads."""
    dtype = getattr(rows.features.get("label"), "dtype", None) if kind == COMPLETION else None
    of_text = dtype == "string" and {str(value).lower() for value in rows.unique("label")} <= {"true", "false"}
    if dtype == "bool" or of_text:
        wrong = "the rows have completions with a label of true or false, as for KTO, and all of them would be learned"
        raise ConfigError(
            [f"dataset_name: {wrong}. Leave out the bad ones and the column `label`; or train with trl's KTOTrainer and a callback."]
        )


def _features(names: Iterable[str], one_label: bool = False):
    """Of tokenised rows: of a thousand that are dropped, with which a file may begin, no type can be told."""
    from datasets import Features, Sequence, Value

    tokens = {name: Sequence(Value("int64")) for name in names}
    return Features({**tokens, "labels": Value("int64") if one_label else Sequence(Value("int64")), "dropped": Value("string")})


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
    if (names := getattr(rows.features[data.label_column], "names", None)) is not None:
        if without := [value for value in rows.unique(data.label_column) if value is None or not 0 <= value < len(names)]:
            raise ConfigError(
                [f"label_column: held-out rows have {without[0]!r} in {data.label_column!r}, expected 0 to {len(names) - 1}."]
            )
        if isinstance(classes[0], str) and list(names) != list(classes):
            wrong = (
                f"held-out rows have the classes {names} in {data.label_column!r}, rows to train on {classes}: the same numbers are others"
            )
            raise ConfigError([f"label_column: {wrong}. Store the names as text, or in one order."])
        return {number: number for number in range(len(classes))}
    numbers = {label: number for number, label in enumerate(classes)}
    unknown = [label for label in rows.unique(data.label_column) if label not in numbers]
    if unknown:
        raise ConfigError([f"label_column: held-out rows have the class {unknown[0]!r}, rows to train on only {classes}."])
    return numbers
