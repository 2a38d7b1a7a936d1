"""The rows of a data set as they are stored: in a file, a folder of files, a folder of save_to_disk, or on the hub."""

import glob
import re
from pathlib import Path

from hf_memtune.cli.arguments import DataSource
from hf_memtune.errors import ConfigError

_WHOLE, _NUMBER = re.compile(r"-?(0|[1-9]\d*)"), re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


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
        csv = _csv_of(path)
        options = _as_text(csv) if csv else {}
        if path.is_file():
            kind = BUILDERS[path.suffix.lower()]
            rows = _loaded(split, options, kind, data_files=glob.escape(str(path)))
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            rows = _saved_rows(datasets.load_from_disk(path), split)
        else:
            rows = _loaded(split, options, data.dataset_name, data.dataset_config)
        rows = _with_numbers(rows, data) if csv else rows
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


def _csv_of(path: Path) -> Path | None:
    """The csv file, or the first of a folder that has files of no other kind. Raises ConfigError for files with other columns than the first."""
    if path.is_file():
        return path if path.suffix.lower() == ".csv" else None
    files = sorted(file for file in path.rglob("*") if file.suffix in BUILDERS) if path.is_dir() else []
    if not files or any(file.suffix != ".csv" for file in files):
        return None
    columns = [_columns_of(file) for file in files]
    for file, found in zip(files, columns):
        if set(found) != set(columns[0]):
            wrong = f"{str(files[0])!r} has the columns {', '.join(columns[0])}, and {str(file)!r} {', '.join(found)}"
            raise ConfigError([f"dataset_name: {wrong}: expected the same of every file. Add those that lack, or train on one file."])
    return files[0]


def _columns_of(path: Path) -> list[str]:
    """Names of columns. Raises ConfigError for rows with more cells than names, of which pandas would take the last ones."""
    import pandas

    found = pandas.read_csv(path, nrows=100, dtype=str)
    if not isinstance(found.index, pandas.RangeIndex):
        wrong = f"the rows of {str(path)!r} have more cells than its first line has names ({', '.join(found.columns)})"
        raise ConfigError([f"dataset_name: {wrong}. Put cells that have a comma in quotes, or name every column."])
    return list(found.columns)


def _as_text(path: Path) -> dict:
    """Options to read a csv file as it is written: by themselves 007 would be 7, True a boolean, and None or NA nothing. An empty cell is nothing."""
    from datasets import Features, Value

    columns = _columns_of(path)
    return {"features": Features({name: Value("string") for name in columns}), "keep_default_na": False, "na_values": [""]}


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
        if path.suffix.lower() not in BUILDERS:
            return f"dataset_name: got a {path.suffix or 'nameless'} file, expected one of {', '.join(BUILDERS)}."
        return f"dataset_name: the file {name!r} is empty." if path.stat().st_size == 0 else None
    if path.is_dir() and glob.escape(str(path.resolve())) != str(path.resolve()):
        return f"dataset_name: the folder {name!r} has one of * ? [ in its path, by which `datasets` would look for others. Rename it, or name a file."
    # a hub name is NAME or OWNER/NAME
    is_local = path.suffix.lower() in BUILDERS or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
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
