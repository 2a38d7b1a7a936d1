"""Tasks of lm-eval by name, or from task files of one's own. What can be wrong with them is said at once, before a model is loaded."""

import difflib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_memtune.errors import ConfigError, first_line

LOCAL = ("json", "csv", "parquet", "arrow", "text", "pandas")  # builders of `datasets` that read files
SHOWN_NAMES = 20
AS_FILES = "give its rows as files, in a task file of your own (dataset_path: json), and its folder as tasks_folder"


@dataclass(frozen=True)
class Tasks:
    """Tasks that are loaded, with their rows. manager: lm-eval's TaskManager. found: what its `load` returned.

    num_fewshot: examples before each question; None: as each task says. fixed: tasks that allow no other number than 0.
    """

    manager: Any
    found: dict[str, Any]
    num_fewshot: int | None = None

    @property
    def items(self) -> list:
        """Tasks and groups of the topmost level, as simple_evaluate takes them: rows are not loaded again."""
        return _topmost(self.found)

    @property
    def names(self) -> list[str]:
        return list(self.found["tasks"])

    @property
    def fixed(self) -> list[str]:
        return [name for name, task in self.found["tasks"].items() if task.get_config("num_fewshot") == 0]


def problems_of_installation() -> list[str]:
    return [] if find_spec("lm_eval") else ["tasks: lm-eval is not installed. pip install -e '.[eval]'."]


def problems_of_tasks_folder(folder: str | Path | None) -> list[str]:
    """A folder that is none, or has no task file in it."""
    if folder is None:
        return []
    if not Path(folder).is_dir():
        return [f"tasks_folder: {str(folder)!r} is not a folder."]
    if not any(Path(folder).glob("**/*.yaml")):
        return [f"tasks_folder: the folder {str(folder)!r} holds no task file, expected files that end in .yaml, as lm-eval reads them."]
    return []


def load_tasks(names: Sequence[str], folder: str | Path | None = None, num_fewshot: int | None = None) -> Tasks:
    """Tasks, groups or tags by name, with their rows, from the hub or from files.

    folder: of task files of one's own, in lm-eval's format; a task in it goes before one of lm-eval with its name.
    Raises ConfigError where lm-eval is missing, a name is unknown, a task cannot be loaded, or none of them allows num_fewshot.
    """
    if found := [*problems_of_installation(), *problems_of_tasks_folder(folder)]:
        raise ConfigError(found)
    manager = _manager(names, folder)
    if found := _unknown(names, manager, folder):
        raise ConfigError(found)
    return checked(Tasks(manager, load_specs(manager, list(names)), num_fewshot))


def checked(tasks: Tasks) -> Tasks:
    """The same, or ConfigError for what lm-eval would pass over in silence, or refuse after the model is loaded. Warns where it is passed over for some."""
    problems = [
        f"tasks: {name} {why}. Use lm-eval itself for it."
        for name, task in tasks.found["tasks"].items()
        for why, flag in (("runs code that the model writes", "UNSAFE_CODE"), ("is about pictures or sound", "MULTIMODAL"))
        if getattr(task, flag, False)
    ]
    if tasks.num_fewshot and len(tasks.fixed) == len(tasks.names):
        problems.append(f"num_fewshot: has no effect, the task files set it to 0: {', '.join(tasks.fixed)}. Leave it out.")
    if problems:
        raise ConfigError(problems)
    if tasks.num_fewshot and tasks.fixed:
        warnings.warn(f"num_fewshot has no effect on {', '.join(tasks.fixed)}, whose task files set it to 0", stacklevel=3)
    return tasks


def load_specs(manager, specs: list[str | dict], remedy: str = AS_FILES) -> dict[str, Any]:
    """What lm-eval's TaskManager.load returns of all of them. Raises ConfigError with every one that cannot be loaded.

    remedy: what can be done without the hub.
    """
    items, problems = [], []
    for spec in specs:
        try:
            items += _topmost(manager.load([spec]))
        except Exception as error:  # whatever a task file of somebody else, its code and its data may raise
            problems.append(_why_not_loaded(spec, manager, error, remedy))
    if problems:
        raise ConfigError(problems)
    try:
        return manager.load(items)
    except ValueError as error:  # a task that is in two of them
        raise ConfigError([f"tasks: {first_line(error)}. Name it once."]) from error


@contextmanager
def silenced(*names: str) -> Iterator[None]:
    """While open, loggers of these names, lm-eval's, tell of errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels):
            each.setLevel(level)


def _topmost(found: dict[str, Any]) -> list:
    inner = {child for children in found.get("group_map", {}).values() for child in children}
    return [item for name, item in {**found["tasks"], **found.get("groups", {})}.items() if name not in inner]


def _manager(names: Sequence[str], folder: str | Path | None):
    """Reading lm-eval's own 15,000 task files takes ten seconds, which are spared where the folder has all that is asked for."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if _reached(names, own) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _reached(names: Sequence[str], manager) -> set[str]:
    """The names, and those that groups among them refer to, however deep."""
    found, left = set(), list(names)
    while left:
        if (name := left.pop()) not in found:
            found.add(name)
            config = getattr(manager.task_index.get(name), "cfg", None) or {}
            left += _members(config) if "group" in config else []
    return found


def _members(group: dict) -> Iterator[str]:
    """Names that a group refers to: not those of tasks and groups that it describes itself."""
    listed = group.get("task") or []
    for each in [listed] if isinstance(listed, str) else listed:
        if isinstance(each, str):
            yield each
        elif "group" in each:
            yield from _members(each) if "task" in each else [each["group"]]
        elif "task" in each and "dataset_path" not in each:
            yield each["task"]


def _unknown(names: Sequence[str], manager, folder: str | Path | None) -> list[str]:
    known = set(manager.all_tasks)
    passed = "" if folder is None else _passed_over(manager, Path(folder))
    found = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"Did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists those of lm-eval."
            found.append(f"tasks: there is no task {name!r}. {hint}{passed}")
    return found


def _passed_over(manager, folder: Path) -> str:
    """Files that lm-eval leaves out without a word: they cannot be read, or have neither a task nor a group."""
    read = {entry.yaml_path.resolve() for entry in manager.task_index.values() if entry.yaml_path is not None}
    left = sorted(str(path.relative_to(folder)) for path in folder.glob("**/*.yaml") if path.resolve() not in read)
    shown = ", ".join(left[:SHOWN_NAMES])
    return f" Files of tasks_folder without a task that can be read: {shown}." if left else ""


def _why_not_loaded(spec: str | dict, manager, error: Exception, remedy: str) -> str:
    name, config = (spec["task"], spec) if isinstance(spec, dict) else (spec, getattr(manager.task_index[spec], "cfg", None) or {})
    source, reason = config.get("dataset_path"), f"{type(error).__name__}: {first_line(error)}"
    if not isinstance(error, OSError) or not source:
        return f"tasks: {name}: cannot be loaded ({reason}). Its task file, or rows that are not as it has them, are at fault."
    if source in LOCAL:
        where = "Paths in data_files begin in the folder in which the program runs, not in that of the task file."
        return f"tasks: {name}: its files cannot be used ({reason}). {where}"
    return f"tasks: {name}: its rows come from the hub ({source}), which gives none ({reason}). Without the hub, {remedy}."
