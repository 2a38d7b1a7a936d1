"""What a trainer does of the method that its arguments turn on: checks it, and gives it to a callback. Steps are transformers' own."""

from typing import Any

from hf_memtune._compat import forbid_4bit_repacking
from hf_memtune.architectures import describe
from hf_memtune.core.scorers import TokenScorer
from hf_memtune.core.selection import Selection
from hf_memtune.errors import ConfigError
from hf_memtune.levers.table import lever_of, refusals_of_arguments
from hf_memtune.methods.method import Method
from hf_memtune.settings.seeking import TokenSeekingConfig
from hf_memtune.settings.streaming import StreamingConfig
from hf_memtune.training.callbacks import MethodCallback, StreamingCallback, TokenSeekingCallback
from hf_memtune.training.launch import problems_of, problems_of_launch
from hf_memtune.training.smoothing import LabelSmootherOnDemand


class MethodMixin:
    """Exact streaming and token seeking in a Trainer; a part of MemEfficientMixin.

    method_callback: has the method that is on, or None.
    """

    method_callback: MethodCallback | None = None

    @property
    def last_selection(self) -> Selection | dict[str, Selection] | None:
        """Which tokens the last call of the model in training kept (a dict by stack for encoder-decoder models), or None."""
        return getattr(self.method_callback, "last_selection", None)

    @property
    def method(self) -> Method | None:
        """What is on the model at present."""
        return None if self.method_callback is None else self.method_callback.method

    def _problems_of_method(self, token_scorer: TokenScorer | None) -> list[str]:
        """What only a Trainer can see: the arguments are checked when they are made."""
        found = _problems_of_seeking(self.args, token_scorer, self.train_dataset)
        if self.args.switch:
            lever = lever_of(self.args.switch)
            found += [*problems_of(self.args, lever), *problems_of_launch(self, lever)]
        return found

    def _prepare_method(self, token_scorer: TokenScorer | None) -> None:
        forbid_4bit_repacking(self.model)  # for good: an evaluation before or between trainings must not spoil the weights
        if not self.args.switch:
            return
        if getattr(self, "label_smoother", None) is not None:
            self.label_smoother = LabelSmootherOnDemand(self.label_smoother.epsilon, self.label_smoother.ignore_index)
        config = self._method_settings()
        seeks = self.args.token_seeking
        self.method_callback = TokenSeekingCallback(config, token_scorer, trainer=self) if seeks else StreamingCallback(config, self)
        self.method_callback.listeners.append(self.memory_callback)
        self.add_callback(self.method_callback)

    def _method_settings(self) -> StreamingConfig | None:
        """The settings of the method that the arguments turn on."""
        if self.args.token_seeking:
            settings = TokenSeekingConfig.of(self.args)
            return settings if describe(self.model).task.loss_per_token else settings.for_row_loss()
        return StreamingConfig.of(self.args) if self.args.streams else None

    def _retake_method(self) -> None:
        """Take over settings of the method that a hyperparameter search has set in the arguments.

        Raises ConfigError where they cannot work, or would turn a method on or off: what is around it was made with the trainer.
        """
        callback = self.method_callback
        found = [*self.args.problems(), *refusals_of_arguments(self.args)]
        found = found or self._problems_of_method(getattr(callback, "scorer", None))
        config = None if found else self._method_settings()
        had = None if callback is None else callback.config
        if not found and (type(config) is not type(had) or (callback is not None and config.switch != had.switch)):
            found = [
                f"hp_space: a trial asks for {self.args.switch or 'no method'}, and the trainer was made with {getattr(had, 'switch', 'no method')}. "
                "Search within one method: set token_seeking, or sequence_chunk_size, in the arguments, and leave it out of the search."
            ]
        if found:
            raise ConfigError(found)
        if callback is not None:
            callback.config = config

    def _load_callback_state(self) -> None:
        """transformers makes stateful callbacks anew from a checkpoint; ours belongs to this trainer and reads its state itself."""
        if self.method_callback is None:
            return super()._load_callback_state()
        self.callback_handler.callbacks.remove(self.method_callback)
        super()._load_callback_state()
        self.add_callback(self.method_callback)


def _problems_of_seeking(args: TokenSeekingConfig, scorer: TokenScorer | None, train_dataset: Any) -> list[str]:
    """Problems of a scorer given as a function, and of a schedule on these data, one message each."""
    if not args.token_seeking:
        return [] if scorer is None else ["token_scorer: got a function, but token_seeking is off. Set token_seeking=True."]
    found = []
    if scorer is not None and not callable(scorer):
        found.append(f"token_scorer: got {scorer!r}, expected a function. Names go to args.token_scorer.")
    if scorer is not None and "token_scorer" in args.given:
        found.append(f"token_scorer: got a function and args.token_scorer={args.token_scorer!r}. Leave one of them out.")
    if scorer is None:
        found += TokenSeekingConfig.of(args).schedule_problems()
    if args.seek_schedule != "step" and train_dataset is not None and not hasattr(train_dataset, "__len__"):
        found.append(f"seek_schedule: got {args.seek_schedule!r} with a data set without length, which may never end. Use 'step'.")
    return found
