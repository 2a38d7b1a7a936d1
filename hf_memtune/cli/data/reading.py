"""The rows of a data set as they are stored: in a file, a folder of files, a folder of save_to_disk, or on the hub."""

import glob
import re
import warnings
from pathlib import Path

from hf_memtune.cli.arguments import DataSource
from hf_memtune.errors import ConfigError

_WHOLE, _NUMBER = re.compile(r"-?(0|[1-9]\d*)"), re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_NO_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "readme.txt", "license.txt", "requirements.txt")
_NAMED = 5  # files of a folder, in a message


def load_rows(data: DataSource, split: str):
    """The rows of one split. Of a text file, each line that is not empty is a row with the column `text`."""
    import datasets

    path = Path(data.dataset_name)
    if found := _problem_of_path(data.dataset_name, path):
        raise ConfigError([found])
    if data.dataset_config is not None and path.exists():
        wrong = f"got {data.dataset_config!r}, which chooses on the hub, and {data.dataset_name!r} is a file or a folder here"
        raise ConfigError([f"dataset_config: {wrong}. Leave it out."])
    try:
        kind, options = _read_as(path)
        if path.is_file():
            rows = _loaded(split, options, kind, data_files=glob.escape(str(path)))
        elif _is_saved(path):
            rows = _saved_rows(datasets.load_from_disk(path), split)
        else:
            rows = _loaded(split, options, data.dataset_name, data.dataset_config)
        rows = _with_numbers(rows, data) if kind == "csv" else rows
    except ConfigError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ConfigError([f"dataset_name: {data.dataset_name!r}, split {split!r}: {_cause(error)}"]) from error
    if not len(rows):
        raise ConfigError([f"dataset_name: {data.dataset_name!r} has no rows."])
    return rows


def _loaded(split: str, options: dict, *where, **files):
    """The rows; texts of json files that look like dates as they are written: by themselves 2024-03-05 would be a datetime."""
    import datasets

    rows = datasets.load_dataset(*where, split=split, **files, **options)
    if not options and rows.info.builder_name == "json" and (as_written := _without_dates(rows.features)) != rows.features:
        rows = datasets.load_dataset(*where, split=split, **files, features=datasets.Features(as_written))
    return rows


def _without_dates(feature):
    """The feature with JSON, which keeps texts, in place of dates; as it is where `datasets` has no such type."""
    import datasets

    if isinstance(feature, dict):
        return {name: _without_dates(each) for name, each in feature.items()}
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return type(feature)(_without_dates(inner))
    is_date = isinstance(feature, datasets.Value) and feature.dtype.startswith("timestamp")
    return datasets.Json() if is_date and hasattr(datasets, "Json") else feature


def kind_of_file(path: Path) -> str | None:
    """What reads a file, by its name without .gz; None where nothing does."""
    return BUILDERS.get((path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower())


def _is_saved(path: Path) -> bool:
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def _read_as(path: Path) -> tuple[str | None, dict]:
    """What reads a file or a folder of files, and the options with which it reads texts as they are written; None for what lies elsewhere."""
    import datasets

    if path.is_file():
        kind, files, separator = kind_of_file(path), [path], ","
    elif path.is_dir() and not _is_saved(path):
        builder = datasets.load_dataset_builder(str(path))
        given = [Path(file) for part in (builder.config.data_files or {}).values() for file in part]
        kind, files, separator = builder.name, sorted(file for file in given if file.is_file()), getattr(builder.config, "sep", ",")
        _warn_of_unread(path, kind, files)
    else:
        return None, {}
    if kind == "csv" and files:
        return kind, _as_text(files, separator)
    return kind, {"encoding": "utf-8-sig"} if kind == "text" else {}  # or the mark at the beginning of some files would be learned


def _warn_of_unread(folder: Path, kind: str, read: list[Path]) -> None:
    """Name the files of data that are not among those that `datasets` chose."""
    if kind not in BUILDERS.values() or not read:
        return
    chosen = {file.resolve() for file in read}
    found = [file for file in sorted(folder.rglob("*")) if kind_of_file(file) and file.is_file() and file.resolve() not in chosen]
    names = [file.relative_to(folder) for file in found if file.name.lower() not in _NO_DATA]
    names = [name for name in names if not any(part.startswith((".", "__")) for part in name.parts)]
    if names:
        used = [file.relative_to(folder.resolve()) for file in sorted(chosen) if file.is_relative_to(folder.resolve())]
        warnings.warn(
            f"dataset_name: of the folder {str(folder)!r} {_listed(names)} not read; {_listed(used)}. Of a folder, files of one kind are read, and "
            "where names stand for splits (train, validation, test), those files alone. Put what belongs together into files of one kind and "
            "names without splits, and the rest elsewhere; or name one file.",
            stacklevel=4,
        )


def _listed(names: list[Path]) -> str:
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return f"{', '.join([*map(str, names[:_NAMED]), *more])} {'is' if len(names) == 1 else 'are'}"


def _columns_of(path: Path, separator: str) -> list[str]:
    """Names of columns. Raises ConfigError for a name given twice, of which pandas would make another, and for rows with more cells than names,
    of which it would take the last ones."""
    import pandas

    first = list(pandas.read_csv(path, header=None, nrows=1, dtype=str, sep=separator).iloc[0].dropna())
    if twice := [name for name in dict.fromkeys(first) if first.count(name) > 1]:
        raise ConfigError(
            [f"dataset_name: the first line of {str(path)!r} names {', '.join(twice)} twice. Rename the one that is not to be read."]
        )
    found = pandas.read_csv(path, nrows=100, dtype=str, sep=separator)
    if not isinstance(found.index, pandas.RangeIndex):
        wrong = f"the rows of {str(path)!r} have more cells than its first line has names ({', '.join(found.columns)})"
        raise ConfigError([f"dataset_name: {wrong}. Put cells that have a comma in quotes, or name every column."])
    return list(found.columns)


def _as_text(files: list[Path], separator: str) -> dict:
    """Options to read csv files as they are written: by themselves 007 would be 7, True a boolean, and None or NA nothing. An empty cell is nothing.

    Raises ConfigError for files with other columns than the first.
    """
    from datasets import Features, Value

    columns = [_columns_of(file, separator) for file in files]
    for file, found in zip(files, columns):
        if set(found) != set(columns[0]):
            wrong = f"{str(files[0])!r} has the columns {', '.join(columns[0])}, and {str(file)!r} {', '.join(found)}"
            raise ConfigError([f"dataset_name: {wrong}: expected the same of every file. Add those that lack, or train on one file."])
    return {"features": Features({name: Value("string") for name in columns[0]}), "keep_default_na": False, "na_values": [""]}


def _with_numbers(rows, data: DataSource):
    """Labels of a csv file as numbers, where all of them are: they are then classes by number, or values."""
    from datasets import Value

    column = data.label_column
    if data.task == "causal_lm" or column in (data.text_column, data.instruction_column, data.input_column, data.output_column):
        return rows
    values = [value for value in rows.unique(column) if value is not None] if column in rows.column_names else []
    for kind, form in (("int64", _WHOLE), ("float64", _NUMBER)):
        if values and all(form.fullmatch(value) for value in values):
            return rows.cast_column(column, Value(kind))
    return rows


def _problem_of_path(name: str, path: Path) -> str | None:
    if path.is_dir() and not any(path.iterdir()):
        return f"dataset_name: the folder {name!r} is empty, expected files of one of {', '.join(BUILDERS)}."
    if path.is_file():
        if kind_of_file(path) is None:
            return f"dataset_name: got a {path.suffix or 'nameless'} file, expected one of {', '.join(BUILDERS)}."
        return f"dataset_name: the file {name!r} is empty." if path.stat().st_size == 0 else None
    if path.is_dir() and glob.escape(str(path.resolve())) != str(path.resolve()):
        return f"dataset_name: the folder {name!r} has one of * ? [ in its path, by which `datasets` would look for others. Rename it, or name a file."
    # a hub name is NAME or OWNER/NAME
    is_local = kind_of_file(path) is not None or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    return f"dataset_name: {name!r} does not exist." if is_local and not path.exists() else None


def _saved_rows(saved, split: str):
    splits = saved if isinstance(saved, dict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"the folder has the splits {', '.join(splits)}")
    return splits[split]


def _cause(error: BaseException) -> str:
    """What lies under the errors of `datasets`, which say first that an error occurred."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip() or type(error).__name__
