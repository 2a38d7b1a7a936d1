"""MemEfficientTrainer: transformers' Trainer, with the strategies that the arguments turn on."""

import logging
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from hf_memtune._compat import forbid_4bit_repacking
from hf_memtune.architectures import describe
from hf_memtune.settings.methods import StreamingConfig, TokenSeekingConfig
from hf_memtune.core.scorers import TokenScorer
from hf_memtune.core.selection import Selection
from hf_memtune.errors import ConfigError, MemTuneError
from hf_memtune.methods.model_step import ModelStep
from hf_memtune.methods.reversible.handle import ReversibleHandle
from hf_memtune.training.callbacks import MemoryCallback, StreamingCallback, TokenSeekingCallback
from hf_memtune.training.guard import FullLossGuard, first_batches, full_loss, rows_of
from hf_memtune.training.normalizer import RunningMean
from hf_memtune.training.care.preflight.preflight import Preflight
from hf_memtune.training.care.recovery.halving import HalvingSteps
from hf_memtune.training.care.report.memory_report import MemoryReportCallback
from hf_memtune.training.reversible.trainer import ReversibleMixin
from hf_memtune.training.turns import Turns

logger = logging.getLogger(__name__)


class MemEfficientMixin(ReversibleMixin):
    """Adds the strategies to a Trainer: `class Mine(MemEfficientMixin, SFTTrainer)`.

    args: training arguments with the fields of MemEfficientArgumentsMixin. token_scorer: a callable in place of
    `args.token_scorer`; it maps a SeekingContext to scores (batch, tokens), larger is kept.
    reversible: what load_reversible returned for the model, to train it further; `args.reversible` is then left out.
    last_selection: which tokens the last training step kept (a dict by stack for encoder-decoder models), or None.
    Everything else is Trainer's. Evaluation and prediction are plain full forwards, through reversible layers where there are any;
    checkpoints are plain checkpoints, but those of reversible layers hold adapters and head alone.
    """

    estimate = None  # predicts the memory of a step; handed down by the top package, since forecasts run a trainer

    def __init__(self, *args, token_scorer: TokenScorer | None = None, reversible: ReversibleHandle | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._opened = False
        if not isinstance(self.args, TokenSeekingConfig):
            raise ConfigError([
                f"args: got {type(self.args).__name__}, which lacks the fields of hf_memtune. Expected "
                "MemEfficientTrainingArguments, or a dataclass made as `@dataclass class Mine(MemEfficientArgumentsMixin, SFTConfig)`."
            ])
        self.last_selection: Selection | dict[str, Selection] | None = None
        self.running_mean, self._in_step, self.loss_func_is_checked = RunningMean(), False, False
        self._reported: Tensor | None = None
        self.batches_of_step: list[dict[str, Any]] = []
        self.memory_callback = MemoryCallback(self.args.memory_trace_steps)
        self.add_callback(self.memory_callback)
        self.strategy_callback: TokenSeekingCallback | StreamingCallback | None = None
        if found := [*self._problems(token_scorer), *self._problems_of_layers(reversible)]:
            raise ConfigError(found)
        self._prepare_layers(token_scorer, reversible)
        self._guard = FullLossGuard() if self.args.token_seeking and self.args.full_loss_rows else None
        self._guarded_rows: list[dict[str, Any]] | None = None
        self._last_inputs: dict[str, Any] | None = None
        if self.args.switch:
            self._prepare_strategy(token_scorer)
        self.halving, self.preflight = HalvingSteps(self), Preflight(self)
        self.report_callback = MemoryReportCallback(self)
        self.add_callback(self.report_callback)

    def _problems(self, token_scorer: TokenScorer | None) -> list[str]:
        """What only a Trainer can see: the arguments are checked when they are made."""
        if self.args.token_seeking:
            found = [*self._problems_of_scorer(token_scorer), *self._problems_of_selection(token_scorer)]
        elif token_scorer is not None:
            found = ["token_scorer: got a function, but token_seeking is off. Set token_seeking=True."]
        else:
            found = []
        return found + (self._problems_of_launch(self.args.switch) if self.args.switch else [])

    def _problems_of_scorer(self, token_scorer: TokenScorer | None) -> list[str]:
        found = []
        if token_scorer is not None and not callable(token_scorer):
            found.append(f"token_scorer: got {token_scorer!r}, expected a function. Names go to args.token_scorer.")
        if token_scorer is not None and "token_scorer" in self.args.given:
            found.append(f"token_scorer: got a function and args.token_scorer={self.args.token_scorer!r}. Leave one of them out.")
        return found

    def _problems_of_selection(self, token_scorer: TokenScorer | None) -> list[str]:
        settings, schedule = self._strategy_config(), self.args.seek_schedule
        found = [] if token_scorer else settings.schedule_problems()
        if schedule != "step" and self.train_dataset is not None and not hasattr(self.train_dataset, "__len__"):
            found.append(f"seek_schedule: got {schedule!r} with a data set without length, which may never end. Use 'step'.")
        if self.compute_loss_func is not None and settings.token_selection == "sample":
            found.append(
                "compute_loss_func: a loss function of one's own cannot weigh the tokens of token_selection=sample. Use "
                "token_selection=top, or leave the function out."
            )
        return found

    def _problems_of_launch(self, strategy: str, why: str = "") -> list[str]:
        """How the processes were started, or accelerate was configured. why: the reason for refusing sharded models."""
        found = []
        if self.args.n_gpu > 1:
            found.append(
                f"{self.args.n_gpu} GPUs in one process (DataParallel): {strategy} runs one process per GPU. Launch with "
                "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        sharded = getattr(self, "is_distributed_loading_by_transformers", False)
        if sharded or self.is_deepspeed_enabled or self.is_fsdp_enabled or max(self.get_tp_size(), self.get_cp_size()) > 1:
            found.append(
                f"accelerate is configured for DeepSpeed, FSDP or tensor parallelism, or the model was loaded sharded, which {strategy} "
                f"does not support{why}. Launch with plain data parallelism (accelerate launch --multi_gpu)."
            )
        return found

    def _prepare_strategy(self, token_scorer: TokenScorer | None) -> None:
        if describe(self.model).task.loss_per_token or self.args.streams:
            self.loss_is_scaled_for_ga = True  # by turns.py, which knows the tokens that the loss is taken at
        forbid_4bit_repacking(self.model)  # for good: an evaluation before or between trainings must not spoil the weights
        config = self._strategy_config()
        if self.args.token_seeking:
            self.strategy_callback = TokenSeekingCallback(config, token_scorer, trainer=self)
        else:
            self.strategy_callback = StreamingCallback(config)
        self.add_callback(self.strategy_callback)

    def _strategy_config(self) -> StreamingConfig | None:
        """The settings of the strategy that the arguments turn on."""
        if self.args.token_seeking:
            settings = TokenSeekingConfig.of(self.args)
            if not describe(self.model).task.loss_per_token:
                return settings.for_row_loss()
            return settings if self.compute_loss_func is None else settings.without_token_weights()
        return StreamingConfig.of(self.args) if self.args.streams else None

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
        self.running_mean.restart()
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.preflight.before_step(batches)
        self.halving.begin()
        self.batches_of_step = batches  # a reference to the loop's own list: nothing lives longer for it than until the next step
        self._verify_layers(batches)  # here, and not in the step, whose memory is measured
        return batches, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        with self.preflight.first_step():
            return self.halving.run(self._step_at_once, model, inputs, num_items_in_batch)

    def _step_at_once(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch) -> Tensor:
        """Forward and backward of all rows."""
        self._in_step, self._opened, self._reported, self._returned = True, False, None, None
        if self._guard is not None and self.eval_dataset is None:
            self._last_inputs = inputs
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._in_step = False
        if self.strategy_callback is not None and not self._opened:
            raise MemTuneError(
                f"{type(self).__name__}.compute_loss called the model past the strategy that is on, which so did nothing. Call "
                "super().compute_loss in it, or pass compute_loss_func."
            )
        # whatever a subclass has added to the loss stays in what is reported
        return loss if self._reported is None else loss + (self._reported - self._returned).to(loss.dtype)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        strategy = self.strategy_callback.strategy if self.strategy_callback is not None and self._in_step else None
        if strategy is None:
            return self.halving.shared(super().compute_loss(model, inputs, return_outputs, num_items_in_batch))
        if strategy.architecture.task.loss_per_token and inputs.get("labels") is None:
            raise MemTuneError(f"the batch has no labels, so there is nothing to learn from it. Its columns: {', '.join(inputs)}.")
        with self._open_step(strategy, inputs) as step:
            turns = Turns(self, step, model, inputs, num_items_in_batch)
            loss = turns.run()
        self._note(step)
        if self.preflight.watch is not None:
            self.preflight.watch.saw(step, turns.count)
        self._reported, self._returned = turns.reported, loss.detach()
        return (loss, turns.outputs) if return_outputs else loss

    def plain_loss(self, model, inputs, num_items_in_batch):
        """Loss and outputs as Trainer itself computes them."""
        return self.halving.shared(super().compute_loss(model, inputs, True, num_items_in_batch))

    def _open_step(self, strategy, inputs: dict[str, Any]):
        own_loss = self.compute_loss_func is not None
        smoothing = 0.0 if own_loss else self.args.label_smoothing_factor
        if not self.args.token_seeking:
            return strategy.step(inputs, smoothing, whole_logits=own_loss)
        return strategy.step(inputs, smoothing, whole_logits=own_loss, scores=self.strategy_callback.offline_scores(inputs))

    def _note(self, step: ModelStep) -> None:
        """Keep what this step selected, and count its tokens for the logs."""
        self._opened = True
        self.memory_callback.count_tokens(**step.token_counts())
        if self.args.token_seeking:
            chosen = step.selection
            self.last_selection = chosen if len(chosen) > 1 else chosen["decoder"]

    def _watch(self, logs: dict[str, float]) -> None:
        """Put the loss of all tokens beside that of the kept ones, and say when they part."""
        count, strategy = self.args.full_loss_rows, self.strategy_callback.strategy
        if self._guarded_rows is None and self.eval_dataset is not None:
            collate = self._get_collator_with_removed_columns(self.data_collator, description="Evaluation")
            self._guarded_rows = first_batches(self.eval_dataset, count, collate, self.args.device)
        batches = rows_of(self._last_inputs, count) if self._guarded_rows is None else self._guarded_rows
        head = strategy.architecture.output_head if strategy.facts.has_plain_head else None
        with self.compute_loss_context_manager():
            logs["full_loss"] = full_loss(self.model, map(self._prepare_inputs, batches), head)
        if warning := self._guard.add(logs["loss"], logs["full_loss"]):
            logger.warning(warning)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            self._log_headroom(logs)
            if self._guard is not None and self.strategy_callback.strategy is not None:
                self._watch(logs)
            logs.update(self.memory_callback.since_last_log())
            if logs.get("tokens_learned") == 0:
                logger.warning(
                    "no kept token carried a label since the last log, so nothing was learned: the scorer chose prompt tokens alone. "
                    "Set select_from=labels, or raise token_ratio."
                )
        super().log(logs, *args, **kwargs)


class MemEfficientTrainer(MemEfficientMixin, Trainer):
    """transformers' Trainer with hf_memtune's strategies: replace `Trainer` by this class and turn a strategy on.

    Example:
        args = MemEfficientTrainingArguments(output_dir="out", token_seeking=True, token_ratio=0.1)
        MemEfficientTrainer(model=model, args=args, train_dataset=ds, processing_class=tokenizer).train()
    """
