"""What kind of rows a data set has, by its columns; settings that name columns come first."""

from dataclasses import replace
from typing import NamedTuple

from hf_memtune.cli.arguments import CLASSES, COLUMNS, DataSource, changed
from hf_memtune.cli.data.mixed import require_one_kind
from hf_memtune.errors import ConfigError
from hf_memtune.settings.protocol import no_effect

CHAT, SHAREGPT, COMPLETION, INSTRUCTION, TEXT = "messages", "conversations", "prompt and completion", "instructions", "text"
_RECOGNISED = (
    ("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",), ("text", "label")
)  # fmt: skip

_OF_MEANING = ("system", "system_prompt", "system_message", "history", "context", "input", "tools", "functions", "documents")
_NOTHING = (None, "", [], {})
_REMEDY = {
    CHAT: "Put them into the messages (a system prompt is a first message of the role system)",
    SHAREGPT: "Put them into the conversations (a system prompt is a first message from system)",
    COMPLETION: "Put them into the prompt, which may be a list of messages",
    INSTRUCTION: "Put them into the instruction; or name one more column of the request (--input_column); or write the rows as messages",
}


def resolved(data: DataSource, columns: list[str]) -> DataSource:
    """The settings with the task that the rows are for, where it was left to them."""
    if data.task != "auto":
        return data
    classifies = {data.text_column or "text", data.label_column} <= set(columns) and not _of_language(columns)
    if classifies and data.text_column is not None and "label_column" not in changed(data, ["label_column"]):
        classifies = False  # a column of text was asked for, and none of classes
    found = replace(data, task=CLASSES if classifies else "causal_lm")
    told = data.ineffective()
    if idle := {name: reason for name, reason in found.ineffective().items() if name not in told}:
        remedy = "which the columns of these rows are for. Leave it out, or name the task."
        raise ConfigError([f"{no_effect(name, reason)}, {remedy}" for name, reason in idle.items()])
    return found


def _of_language(columns: list[str]) -> bool:
    return any(set(names) <= set(columns) for names in _RECOGNISED[:4])


def kind_of(data: DataSource, columns: list[str]) -> str:
    """Which of the kinds above rows of a language model have. Raises ConfigError where none is recognised."""
    if data.text_column is not None:
        return TEXT
    if changed(data, COLUMNS):
        return INSTRUCTION
    for kind, names in zip((CHAT, SHAREGPT, COMPLETION), _RECOGNISED):
        if set(names) <= set(columns):
            return kind
    if {data.instruction_column, data.output_column} <= set(columns):
        return INSTRUCTION
    if "text" in columns:
        return TEXT
    known = "; ".join(" and ".join(names) for names in _RECOGNISED)
    raise ConfigError(
        [
            f"dataset_name: the rows of {data.dataset_name!r} have the columns {', '.join(columns)}, of which none is known. Expected {known}. "
            "Or name them: --text_column, or --instruction_column and --output_column."
        ]
    )


def text_column(data: DataSource) -> str:
    return data.text_column or "text"


def check_columns(data: DataSource, columns: list[str]) -> None:
    """Raises ConfigError for every column that the settings name and the rows lack. data: resolved."""
    if data.task == CLASSES:
        wanted = {"text_column": text_column(data), "label_column": data.label_column}
    elif (kind := kind_of(data, columns)) == TEXT:
        wanted = {"text_column": text_column(data)}
    elif kind == INSTRUCTION:
        wanted = {"instruction_column": data.instruction_column, "output_column": data.output_column}
        wanted |= {name: getattr(data, name) for name in changed(data, ["input_column"])}
    else:
        wanted = {}
    missing = [
        f"{setting}: the data has no column {name!r}, expected one of: {', '.join(columns)}."
        for setting, name in wanted.items()
        if name not in columns
    ]
    if missing:
        raise ConfigError(missing)


class Unread(NamedTuple):
    """Columns that nothing is learned from, and a warning that names them where some would, by their names, change what an answer means."""

    columns: list[str]
    warning: str | None = None


def unread(data: DataSource, rows) -> Unread:
    """What is not read of the columns. data: resolved."""
    columns = rows.column_names
    if data.task == CLASSES:
        return Unread([name for name in columns if name not in (text_column(data), data.label_column)])
    kind = kind_of(data, columns)
    read = {
        CHAT: ["messages", "tools"],
        SHAREGPT: ["conversations", "tools"],
        COMPLETION: ["prompt", "completion", *["tools"] * (not _is_text(rows, "prompt") or not _is_text(rows, "completion"))],
        INSTRUCTION: [data.instruction_column, data.input_column, data.output_column],
        TEXT: [text_column(data)],
    }[kind]
    names = [name for name in columns if name not in read]
    lost = [name for name in names if kind in _REMEDY and name in _OF_MEANING and any(value not in _NOTHING for value in rows[name])]
    if not lost:
        return Unread(names)
    told = f"columns not read: {', '.join([*lost, *(name for name in names if name not in lost)])}"
    return Unread(names, f"dataset_name: {told}. Answers may depend on {', '.join(lost)}. {_REMEDY[kind]}; or leave them out of the data.")


def _is_text(rows, name: str) -> bool:
    return getattr(rows.features.get(name), "dtype", None) in ("string", "large_string")


def class_names(data: DataSource, rows) -> list | None:
    """Every class of the rows, in the order of their numbers; None where the task has none. data: resolved."""
    if data.task != CLASSES:
        return None
    require_one_kind(rows, data.label_column)
    named, values = getattr(rows.features[data.label_column], "names", None), rows.unique(data.label_column)
    found = named or values
    wrong = [label for label in values if not isinstance(label, (int, str)) or (named and not 0 <= label < len(named))]
    if wrong or len(found) < 2:
        got = f"the value {wrong[0]!r}" if wrong else f"{len(found)} class(es)"
        raise ConfigError([f"label_column: got {got} in {data.label_column!r}, expected whole numbers or names, two or more."])
    return found if named else sorted(found)
