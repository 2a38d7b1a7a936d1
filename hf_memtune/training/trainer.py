"""MemEfficientTrainer: transformers' Trainer, with the methods that the arguments turn on.

It computes no loss: methods change the backward pass of the model, and the Trainer, whichever it is, trains it as ever.
"""

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from hf_memtune._compat import forbid_4bit_repacking
from hf_memtune.architectures import describe
from hf_memtune.core.scorers import TokenScorer
from hf_memtune.core.selection import Selection
from hf_memtune.errors import ConfigError
from hf_memtune.methods.method import Method
from hf_memtune.methods.reversible.handle import ReversibleHandle
from hf_memtune.settings.methods import StreamingConfig, TokenSeekingConfig
from hf_memtune.training.callbacks import MemoryCallback, MethodCallback, StreamingCallback, TokenSeekingCallback
from hf_memtune.training.care.preflight.preflight import Preflight
from hf_memtune.training.care.recovery.halving import HalvingSteps
from hf_memtune.training.care.report.memory_report import MemoryReportCallback
from hf_memtune.training.guard import FullLossCallback
from hf_memtune.training.launch import problems_of, problems_of_launch
from hf_memtune.training.requests import problems_of_seeking
from hf_memtune.training.reversible.trainer import ReversibleMixin
from hf_memtune.training.smoothing import LabelSmootherOnDemand


class MemEfficientMixin(ReversibleMixin):
    """Adds the methods to a Trainer: `class Mine(MemEfficientMixin, SFTTrainer)`.

    args: training arguments with the fields of MemEfficientArgumentsMixin. token_scorer: a callable in place of
    `args.token_scorer`; it maps a SeekingContext to scores (batch, tokens), larger is kept.
    reversible: what load_reversible returned for the model, to train it further; `args.reversible` is then left out.
    Everything else is Trainer's. Evaluation and prediction are plain full forwards, through reversible layers where there are any;
    checkpoints are plain checkpoints, but those of reversible layers hold adapters and head alone.
    """

    estimate = None  # predicts the memory of a step; handed down by the top package, since forecasts run a trainer

    def __init__(self, *args, token_scorer: TokenScorer | None = None, reversible: ReversibleHandle | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, TokenSeekingConfig):
            raise ConfigError([
                f"args: got {type(self.args).__name__}, which lacks the fields of hf_memtune. Expected "
                "MemEfficientTrainingArguments, or a dataclass made as `@dataclass class Mine(MemEfficientArgumentsMixin, SFTConfig)`."
            ])
        self.batches_of_step: list[dict[str, Any]] = []
        self.memory_callback = MemoryCallback(self.args.memory_trace_steps)
        self.add_callback(self.memory_callback)
        self.strategy_callback: MethodCallback | None = None
        if found := [*self._problems(token_scorer), *self._problems_of_layers(reversible)]:
            raise ConfigError(found)
        self._prepare_layers(token_scorer, reversible)
        if self.args.switch:
            self._prepare_strategy(token_scorer)
        self.full_loss = FullLossCallback(self)
        self.halving, self.preflight, self.report_callback = HalvingSteps(self), Preflight(self), MemoryReportCallback(self)
        self.add_callback(self.report_callback)

    @property
    def last_selection(self) -> Selection | dict[str, Selection] | None:
        """Which tokens the last call of the model in training kept (a dict by stack for encoder-decoder models), or None."""
        return getattr(self.strategy_callback, "last_selection", None)

    @property
    def _strategy(self) -> Method | None:
        """What is on the model at present."""
        return None if self.strategy_callback is None else self.strategy_callback.strategy

    # -- what is asked for

    def _problems(self, token_scorer: TokenScorer | None) -> list[str]:
        """What only a Trainer can see: the arguments are checked when they are made."""
        found = problems_of_seeking(self.args, token_scorer, self.train_dataset)
        if self.args.switch:
            found += [*problems_of(self.args, self.args.switch), *problems_of_launch(self, self.args.switch)]
        return found

    def _prepare_strategy(self, token_scorer: TokenScorer | None) -> None:
        forbid_4bit_repacking(self.model)  # for good: an evaluation before or between trainings must not spoil the weights
        if getattr(self, "label_smoother", None) is not None:
            self.label_smoother = LabelSmootherOnDemand(self.label_smoother.epsilon, self.label_smoother.ignore_index)
        config = self._strategy_config()
        seeks = self.args.token_seeking
        self.strategy_callback = TokenSeekingCallback(config, token_scorer, trainer=self) if seeks else StreamingCallback(config)
        self.strategy_callback.listeners.append(self.memory_callback)
        self.add_callback(self.strategy_callback)

    def _strategy_config(self) -> StreamingConfig | None:
        """The settings of the method that the arguments turn on."""
        if self.args.token_seeking:
            settings = TokenSeekingConfig.of(self.args)
            return settings if describe(self.model).task.loss_per_token else settings.for_row_loss()
        return StreamingConfig.of(self.args) if self.args.streams else None

    # -- around transformers' own loop

    def _load_callback_state(self) -> None:
        """transformers makes stateful callbacks anew from a checkpoint; ours belongs to this trainer and reads its state itself."""
        if self.strategy_callback is None:
            return super()._load_callback_state()
        self.callback_handler.callbacks.remove(self.strategy_callback)
        super()._load_callback_state()
        self.add_callback(self.strategy_callback)

    def train(self, *args, **kwargs):
        self._require_same_layers()
        if (wanted := self._strategy_config()) != (had := getattr(self.strategy_callback, "config", None)):
            raise ConfigError([f"args: got {wanted}, changed since the trainer was made with {had}. Make a new trainer."])
        self.preflight.begin_training()
        try:
            result = super().train(*args, **kwargs)
        finally:  # transformers does not call on_train_end when training fails
            self.report_callback.close()
            self.memory_callback.close()
            self._remove_checkpointing()
            if self.strategy_callback is not None:
                self.strategy_callback.remove()
        self.report_callback.write()
        return result

    def get_batch_samples(self, *args, **kwargs):
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.preflight.before_step(batches)
        self.halving.begin()
        self.batches_of_step = batches  # a reference to the loop's own list: nothing lives longer for it than until the next step
        with nullcontext() if self._strategy is None else self._strategy.aside():
            self._verify_layers(batches)  # here, and not in the step, whose memory is measured
        return batches, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        with self.preflight.first_step():
            return self.halving.run(self._step_at_once, model, inputs, num_items_in_batch)

    def _step_at_once(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch) -> Tensor:
        """Forward and backward of all rows."""
        self.full_loss.saw(inputs)
        if isinstance(self.strategy_callback, TokenSeekingCallback):
            self.strategy_callback.inputs = inputs if isinstance(inputs, dict) else None
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            self._log_headroom(logs)
            self.full_loss.add_to(logs)
            logs.update(self.memory_callback.since_last_log())
        super().log(logs, *args, **kwargs)


class MemEfficientTrainer(MemEfficientMixin, Trainer):
    """transformers' Trainer with hf_memtune's methods: replace `Trainer` by this class and turn one on.

    Example:
        args = MemEfficientTrainingArguments(output_dir="out", token_seeking=True, token_ratio=0.1)
        MemEfficientTrainer(model=model, args=args, train_dataset=ds, processing_class=tokenizer).train()
    """
