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
            rows = datasets.load_dataset(kind, data_files=glob.escape(str(path)), split=split, **options)
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            rows = _saved_rows(datasets.load_from_disk(path), split)
        else:
            rows = datasets.load_dataset(data.dataset_name, data.dataset_config, split=split, **options)
        rows = _with_numbers(rows, data) if csv else rows
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ConfigError([f"dataset_name: {data.dataset_name!r}, split {split!r}: {_cause(error)}"]) from error
    if not len(rows):
        raise ConfigError([f"dataset_name: {data.dataset_name!r} has no rows."])
    return rows


def _csv_of(path: Path) -> Path | None:
    """The csv file, or the first of a folder that has files of no other kind."""
    if path.is_file():
        return path if path.suffix.lower() == ".csv" else None
    files = sorted(file for file in path.rglob("*") if file.suffix in BUILDERS) if path.is_dir() else []
    return files[0] if files and all(file.suffix == ".csv" for file in files) else None


def _as_text(path: Path) -> dict:
    """Options to read a csv file as it is written: by themselves 007 would be 7, True a boolean, and None or NA nothing. An empty cell is nothing."""
    import pandas
    from datasets import Features, Value

    columns = pandas.read_csv(path, nrows=0).columns
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
