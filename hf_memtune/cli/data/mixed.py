"""Columns in which text stands beside something else. `datasets` keeps them as JSON, and hands out text that is JSON as what it stands for: of an
answer `{"a": 1}` a dict, of `42` a number, of `null` nothing. Texts are learned letter by letter, so what is stored is read here.

What cannot be told apart, since it is stored alike: text in quotes and the text, and JSON text without any space and the object (which counts)."""

import json
from collections.abc import Callable, Collection
from typing import Any

from hf_memtune.errors import ConfigError

TEXTS = ("content", "value")  # of a message
_PARTS = {"text", "image", "image_url", "audio", "input_audio", "video"}  # types of parts of a message


def as_stored(rows) -> tuple[Any, frozenset[str]]:
    """Rows whose texts are as they are stored wherever they are kept as JSON, and the names of the columns which that changed."""
    from datasets import Features

    changed = {name: stored for name, feature in rows.features.items() if (stored := _stored(feature)) is not None}
    return (rows.cast(Features(rows.features | changed)) if changed else rows), frozenset(changed)


def _stored(feature: Any) -> Any:
    """The feature of what is stored; None where nothing is kept as JSON."""
    from datasets import Value

    if _is_json(feature):
        return Value("string")
    turn = getattr(feature, "feature", None)
    if isinstance(turn, dict) and any(_is_json(turn.get(name)) for name in TEXTS):
        return type(feature)({name: Value("string") if name in TEXTS and _is_json(each) else each for name, each in turn.items()})
    return None


def _is_json(feature: Any) -> bool:
    return type(feature).__name__ == "Json"  # datasets before 4.7 has no such class


def written(row: dict, columns: Collection[str]) -> dict:
    """A row as it was written: text as it is, and lists of parts or of messages. columns: of `as_stored`."""
    return row | {name: _written(row[name]) for name in columns}


def _written(value: Any) -> Any:
    if not isinstance(value, list):
        return _read(value, _is_as_stored)
    return [
        turn | {name: _read(turn[name], _is_of_parts) for name in TEXTS if name in turn} if isinstance(turn, dict) else turn
        for turn in value
    ]


def _read(stored: Any, is_no_text: Callable[[Any, str], bool]) -> Any:
    """A text out of its quotes; an object or a list where `is_no_text` says so of it and what is stored; else what is stored."""
    if not isinstance(stored, str) or stored[:1] not in ('"', "[", "{"):
        return stored
    try:
        value = json.loads(stored)
    except json.JSONDecodeError:
        return stored
    return value if isinstance(value, str) or is_no_text(value, stored) else stored


def _is_of_parts(value: Any, stored: str) -> bool:
    """Parts of a message; any other JSON in a message is what somebody says."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and part.get("type") in _PARTS for part in value)


def _is_as_stored(value: Any, stored: str) -> bool:
    """What `datasets` would write of the object."""
    from datasets.utils.json import ujson_dumps

    return ujson_dumps(value) == stored


def require_one_kind(rows, column: str) -> None:
    """Raises ConfigError for labels of which some are names and some numbers."""
    if _is_json(rows.features[column]):
        raise ConfigError(
            [
                f"label_column: {column!r} has names and numbers beside one another, expected one of them. Write all as names, or all as numbers."
            ]
        )
