"""State of callbacks that a training step changes: for steps that are taken back, or that run again."""

from collections.abc import Callable

from hf_memtune.training.running import RunningTrainer


class Restorable:
    """A callback that can put back what the steps since have changed in it."""

    def keep(self) -> Callable[[], None]:
        """What puts it back to how it is now."""
        raise NotImplementedError


def keep_callbacks(trainer: RunningTrainer) -> Callable[[], None]:
    """What puts back all callbacks of a trainer that can be."""
    undo = [callback.keep() for callback in trainer.callback_handler.callbacks if isinstance(callback, Restorable)]

    def restore() -> None:
        for each in undo:
            each()

    return restore
