"""The classes that a trained classifier tells apart, by name and number; rows are labelled by them, whatever order their own labels have."""

import json
from pathlib import Path

from hf_memtune.cli.arguments import CLASSES, DataSource, ModelSource
from hf_memtune.cli.checks import ADAPTERS
from hf_memtune.cli.data.mixed import require_one_kind
from hf_memtune.errors import ConfigError

LABELS = "labels.json"  # beside adapters, whose folder has no config of a model that would name the classes
CLASSIFIER = "ForSequenceClassification"
HEADS = ("score.weight", "classifier.weight", "out_proj.weight")
SHOWN = 20  # classes in a message


def known_classes(model: ModelSource, base: str | None = None) -> list[str] | None:
    """Names of the classes in the order of their numbers, LABEL_0, LABEL_1, ... where they have none; None: no head for classes.

    base: what LoRA adapters were trained on, where it is not the model that their folder names.
    """
    from transformers import AutoConfig

    name, count = model.model_name_or_path, None
    if Path(name, ADAPTERS).is_file():
        config = json.loads(Path(name, ADAPTERS).read_text(encoding="utf-8"))
        count = trained_classes(Path(name)) if config.get("task_type") == "SEQ_CLS" else None
        if count is None:
            return None
        if names := _written(Path(name), count):
            return names
        name = base or config.get("base_model_name_or_path") or name
    elif model.reversible_adapters is not None and (names := _written(Path(model.reversible_adapters), None)):
        return names
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):  # loading it says why
        return [f"LABEL_{number}" for number in range(count)] if count else None
    if any(kind.endswith(CLASSIFIER) for kind in config.architectures or ()):
        names = [str(config.id2label[number]) for number in range(config.num_labels)]
        if count in (None, len(names)) and len(set(names)) == len(names):
            return names
        count = count or len(names)
    return None if count is None else [f"LABEL_{number}" for number in range(count)]


def _written(folder: Path, count: int | None) -> list[str] | None:
    """What a training wrote beside its adapters; None where it did not, or where it is of another head (count: classes of this one)."""
    names = json.loads((folder / LABELS).read_text(encoding="utf-8")) if (folder / LABELS).is_file() else None
    return names if names is not None and count in (None, len(names)) else None


def trained_classes(folder: Path) -> int | None:
    """How many classes the head in a folder of LoRA adapters tells apart: rows of its weight. None without a head."""
    from safetensors import safe_open

    if not (folder / "adapter_model.safetensors").is_file():
        return None
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        heads = [name for name in file.keys() if name.endswith(HEADS)]
        return file.get_slice(heads[-1]).get_shape()[0] if heads else None


def relabelled(data: DataSource, known: list[str] | None, *parts):
    """Parts of the rows, labelled with the numbers of the classes that a trained classifier knows; as they are where it knows none.

    Names are looked up by name, whole numbers are numbers of classes. A classifier whose classes have no names knows their numbers alone:
    names, as many as it has classes, are taken in their own order. Raises ConfigError for labels that it does not know.
    """
    if known is None or data.task != CLASSES:
        return parts
    meanings = [_meanings(rows, data.label_column) for rows in parts]
    labels = list(dict.fromkeys(label for meaning in meanings for label in meaning.values()))
    numbers = {label: _number(label, known) for label in labels}
    if is_nameless(known) and all(isinstance(label, str) and numbers[label] is None for label in labels):
        own = max((len(getattr(rows.features[data.label_column], "names", None) or ()) for rows in parts), default=0) or len(labels)
        if own != len(known):
            wrong = f"got {own} class(es), {_told(labels)}, but the model tells {len(known)} apart, which have no names"
            raise ConfigError([f"label_column: {wrong}. Label the rows with the numbers of its classes, from 0 to {len(known) - 1}."])
        return parts
    if unknown := sorted((label for label in labels if numbers[label] is None), key=str):
        wrong = f"{data.label_column!r} has {_told(unknown)}, which the model does not know; its classes are {_told(known)}"
        remedy = "Label the rows with these names, or with their numbers from 0. To learn other classes, train a model without a head for classes"
        raise ConfigError([f"label_column: {wrong}. {remedy}."])
    return [
        _with_numbers(rows, data.label_column, {value: numbers[label] for value, label in meaning.items()}, known)
        for rows, meaning in zip(parts, meanings)
    ]


def is_nameless(known: list[str]) -> bool:
    """Whether names say no more than numbers do."""
    return any(known == [f"{word}{number}" for number in range(len(known))] for word in ("LABEL_", ""))


def _meanings(rows, column: str) -> dict:
    """What the values that are stored stand for: themselves, or names that the data set has for them."""
    require_one_kind(rows, column)
    names = dict(enumerate(getattr(rows.features[column], "names", None) or ()))
    return {value: names.get(value, value) for value in rows.unique(column)}


def _number(label, known: list[str]) -> int | None:
    by_name = {name.casefold(): number for number, name in enumerate(known)}
    if str(label) in known:
        return known.index(str(label))
    if isinstance(label, str):
        return by_name.get(label.casefold()) if len(by_name) == len(known) else None
    has_numbers_for_names = all(name.removeprefix("-").isdigit() for name in known)
    is_number = isinstance(label, int) and not isinstance(label, bool) and not has_numbers_for_names
    return label if is_number and 0 <= label < len(known) else None


def _with_numbers(rows, column: str, numbers: dict, known: list[str]):
    from datasets import ClassLabel

    found = [numbers[value] for value in rows[column]]
    return rows.remove_columns(column).add_column(column, found, feature=ClassLabel(names=known))


def _told(labels: list) -> str:
    told = ", ".join(repr(label) for label in labels[:SHOWN])
    return told if len(labels) <= SHOWN else f"{told} and {len(labels) - SHOWN} more"
