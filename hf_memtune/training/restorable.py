"""What a training step counts, in the trainer and in its callbacks: for steps that are taken back, or that run again."""

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

from hf_memtune.training.running import RunningTrainer

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_ROWS = ("train_dataset", "eval_dataset", "batches_of_step")  # which no step counts in, and lists of which are plain, and long


class Restorable:
    """A callback that can put back what the steps since have changed in it."""

    def keep(self) -> Callable[[], None]:
        """What puts it back to how it is now."""
        raise NotImplementedError


def keep_counters(trainer: RunningTrainer) -> Callable[[], None]:
    """What puts back all callbacks of a trainer that can be, and its own numbers, such as trl's of tokens and metrics since the last log.

    It may be called again, after every attempt.
    """
    callbacks = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Restorable)]
    undo = [keep_plain(trainer, but=_ROWS), *(callback.keep() for callback in callbacks)]

    def restore() -> None:
        for each in undo:
            each()

    return restore


def keep_plain(owner: Any, containers: bool = True, but: tuple[str, ...] = ()) -> Callable[[], None]:
    """What puts back the attributes that are numbers, strings or None, and containers of these alone; new ones go."""

    def plain() -> dict[str, Any]:
        return {name: value for name, value in vars(owner).items() if name not in but and _is_plain(value, containers)}

    held = copy.deepcopy(plain())

    def restore() -> None:
        for name in plain().keys() - held.keys():
            del vars(owner)[name]
        for name, value in held.items():
            now = vars(owner).get(name)
            if not (type(now) is type(value) and now == value):  # an equal container stays the one that others may hold
                vars(owner)[name] = copy.deepcopy(value)

    return restore


def _is_plain(value: Any, containers: bool) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if not containers:
        return False
    if isinstance(value, dict):
        return all(_is_plain(item, True) for pair in value.items() for item in pair)
    return isinstance(value, (list, tuple, set, deque)) and all(_is_plain(item, True) for item in value)
