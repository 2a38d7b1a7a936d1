"""What stands in scripts/, which is no part of the package: as modules, and as programs."""

import contextlib
import importlib.util
import io
import logging
import runpy
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch
import transformers

FOLDER = Path(__file__).parents[2] / "scripts"
LOGGERS = ("hf_memtune", "bitsandbytes")  # which scripts turn down


def load(name: str) -> ModuleType:
    """A script by its name, under another one: `coverage` is a package too. What it imports beside it is found last of all."""
    _see_the_folder()
    spec = importlib.util.spec_from_file_location(f"script_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _see_the_folder() -> None:
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


@dataclass(frozen=True)
class Done:
    """A program that has ended, as `subprocess` tells of it."""

    returncode: int
    stdout: str
    stderr: str


def run(file: Path, *arguments: object, cwd: Path) -> Done:
    """What `python file arguments` does in `cwd`, with all files of `datasets` there, but in this process: importing takes 7 seconds.

    What scripts set for their process is set back afterwards.
    """
    _see_the_folder()
    out, err = io.StringIO(), io.StringIO()
    with _settings_kept(), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(file), *map(str, arguments)])
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cwd / "cache"))
        status = _status_of(file)
    return Done(status, out.getvalue(), err.getvalue())


def _status_of(file: Path) -> int:
    try:
        runpy.run_path(str(file), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    loggers = {name: logging.getLogger(name).level for name in LOGGERS}
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    bars = transformers.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        torch.set_num_threads(threads)
        (transformers.logging.enable_progress_bar if bars[0] else transformers.logging.disable_progress_bar)()
        (datasets.disable_progress_bars if bars[1] else datasets.enable_progress_bars)()
