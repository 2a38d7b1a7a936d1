"""The command line of the benchmarks, as data: every option with its default and a word on it."""

import argparse
import warnings
from collections.abc import Iterable
from pathlib import Path


def one(default, said: str = "") -> dict:
    return {"type": type(default), "default": default, "help": f"{said} (default: {default})".strip().replace("%", "%%")}


def several(default: Iterable, said: str = "") -> dict:
    """Values of the type of the first one."""
    values = [*default]
    return one(values, said) | {"nargs": "+", "type": type(values[0])}


def some_of(choices: Iterable[str], said: str = "default: all", default: Iterable[str] | None = None) -> dict:
    choices = [*choices]
    among = f"among {', '.join(choices)}; {said}".replace("%", "%%")
    return {"nargs": "+", "choices": choices, "default": [*(default or choices)], "metavar": "NAME", "help": among}


def parse(doc: str, result: str, given: list[str] | None, **options: dict) -> argparse.Namespace:
    """doc: of the script. result: the name of its result file. options: what add_argument takes."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, settings in (options | {"out": one(Path(f"results/{result}.jsonl"), "the result file")}).items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args(given)
