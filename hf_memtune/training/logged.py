"""Callbacks that have something to say in the logs."""

from transformers import TrainerCallback


class LoggedCallback(TrainerCallback):
    """Puts what it has found since the last log into the next one.

    MemEfficientTrainer does so before logs are sent anywhere; under a plain Trainer this is in time for the callbacks that come after this one, and
    for the history.
    """

    @property
    def has_news(self) -> bool:
        """Whether there is anything that is in no log yet."""
        raise NotImplementedError

    def since_last_log(self) -> dict[str, float]:
        """What was found since the last call."""
        raise NotImplementedError

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "loss" in logs and self.has_news:
            found = self.since_last_log()
            logs.update(found)
            if state.log_history:
                state.log_history[-1].update(found)
