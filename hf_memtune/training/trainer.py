"""MemEfficientTrainer: transformers' Trainer, with the methods that the arguments turn on.

It computes no loss: methods change the backward pass of the model, and the Trainer, whichever it is, trains it as ever.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_memtune.core.scorers import TokenScorer
from hf_memtune.errors import ConfigError
from hf_memtune.methods.reversible.handle import ReversibleHandle
from hf_memtune.settings.seeking import TokenSeekingConfig
from hf_memtune.training.care.preflight.preflight import Preflight
from hf_memtune.training.care.recovery.halving import HalvingSteps
from hf_memtune.training.care.report.memory_report import MemoryReportCallback
from hf_memtune.training.checkpoints import being_written, newest_complete, require_complete, require_same_model
from hf_memtune.training.guard import FullLossLog
from hf_memtune.training.logged import LoggedCallback
from hf_memtune.training.loss_alone import logits_on_demand
from hf_memtune.training.memory_callback import MemoryCallback
from hf_memtune.training.method_mixin import MethodMixin
from hf_memtune.training.reversible.trainer import ReversibleMixin


class MemEfficientMixin(MethodMixin, ReversibleMixin):
    """Adds the methods to a Trainer: `class Mine(MemEfficientMixin, SFTTrainer)`.

    args: training arguments with the fields of MemEfficientArgumentsMixin. token_scorer: a callable in place of
    `args.token_scorer`; it maps a SeekingContext to scores (batch, tokens), larger is kept.
    reversible: what load_reversible returned for the model, to train it further; `args.reversible` is then left out.
    Everything else is Trainer's. Evaluation and prediction are plain full forwards, through reversible layers where there are any, and
    without logits where only the loss is wanted; checkpoints are plain checkpoints, but those of reversible layers hold adapters and head alone.
    """

    measures_held_out = False  # whether `eval_dataset` is evaluated around a training too, as the commands do
    estimate: Callable | None = None  # predicts the memory of a step; handed down by the top package, since forecasts run a trainer

    def __init__(self, *args, token_scorer: TokenScorer | None = None, reversible: ReversibleHandle | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, TokenSeekingConfig):
            raise ConfigError(
                [
                    f"args: got {type(self.args).__name__}, which lacks the fields of hf_memtune. Expected "
                    "MemEfficientTrainingArguments, or a dataclass made as `@dataclass class Mine(MemEfficientArgumentsMixin, SFTConfig)`."
                ]
            )
        self.batches_of_step: list[dict[str, Any]] = []
        if found := [*self._problems_of_method(token_scorer), *self._problems_of_layers(reversible)]:
            raise ConfigError(found)
        self.memory_callback = MemoryCallback(self.args.memory_trace_steps)
        self._prepare_layers(token_scorer, reversible)
        self._prepare_method(token_scorer)
        self._add_care()

    def _add_care(self) -> None:
        """What watches over steps: it takes part in no loss."""
        self.full_loss, self.halving = FullLossLog(self), HalvingSteps(self)
        self.preflight = Preflight(self, self.halving)
        self.report_callback = MemoryReportCallback(self, self.memory_callback, self.preflight, self.halving)
        self.add_callback(self.halving)
        # the preflight takes steps of its own, before anyone measures; who measures does so before others score or draw at the end of a step
        self.callback_handler.callbacks[:0] = [self.preflight, self.report_callback, self.memory_callback]

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args, **kwargs):
        """As in Trainer; True resumes from the newest checkpoint of output_dir that is whole, and a folder that is not is refused."""
        self._require_same_layers()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete(self.args.output_dir, self.args.save_only_model)
        elif resume_from_checkpoint:
            require_complete(resume_from_checkpoint, self.args.save_only_model)
        if resume_from_checkpoint:
            require_same_model(resume_from_checkpoint, self.model)
        # a search changes arguments after this, and between its trials there is no model
        if trial is None and (wanted := self._method_settings()) != (had := getattr(self.method_callback, "config", None)):
            raise ConfigError([f"args: got {wanted}, changed since the trainer was made with {had}. Make a new trainer."])
        self.full_loss.begin()
        try:
            result = super().train(resume_from_checkpoint, trial, *args, **kwargs)
        finally:  # transformers does not call on_train_end when training fails
            for each in (self.report_callback, self.memory_callback, self.preflight):
                each.close()
            self._remove_checkpointing()
            if self.method_callback is not None:
                self.method_callback.remove()
        self.report_callback.write()
        return result

    def _hp_search_setup(self, trial: Any) -> None:
        before = vars(self.args).copy()
        super()._hp_search_setup(trial)
        try:
            if trial is not None:
                self._require_same_layers()
                self._retake_method()
        except ConfigError:
            vars(self.args).update(before)  # or the trials after it would be refused for it
            raise

    def get_batch_samples(self, *args, **kwargs):
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.batches_of_step = batches  # a reference to the loop's own list: nothing lives longer for it than until the next step
        self._verify_layers(batches)  # here, and not in the step, whose memory is measured
        return batches, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        return self.halving.run(self._step_at_once, model, inputs, num_items_in_batch)

    def _step_at_once(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch) -> Tensor:
        """Forward and backward of all rows."""
        if self.method_callback is not None:
            self.method_callback.takes(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    @property
    def evaluates(self) -> bool:
        """Whether anything is evaluated, in a training or around it."""
        during = self.args.eval_strategy != "no" or self.args.eval_on_start
        return during or (self.measures_held_out and self.eval_dataset is not None)

    @property
    def wants_logits(self) -> bool:
        """Whether an evaluation gives logits to compute_metrics."""
        return self.compute_metrics is not None and not self.args.prediction_loss_only

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args, **kwargs) -> tuple:
        """As in Trainer. Where only the loss is wanted logits are not made, which would be the largest tensor of an evaluation."""
        with logits_on_demand(self.model) if prediction_loss_only and self._is_whole else nullcontext():
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    @property
    def _is_whole(self) -> bool:
        """Whether the model that is called has all its weights, as they are, on one device of this process, and is not compiled."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.n_gpu > 1 or self.args.torch_compile)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with being_written(folder, self.args.should_save):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes the state of its own generators

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            self._log_headroom(logs)
            self.full_loss.add_to(logs)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LoggedCallback):  # here, so that trackers, which are callbacks before it, see what it says
                    logs.update(callback.since_last_log())
        super().log(logs, *args, **kwargs)


class MemEfficientTrainer(MemEfficientMixin, Trainer):
    """transformers' Trainer with hf_memtune's methods: replace `Trainer` by this class and turn one on.

    Example:
        args = MemEfficientTrainingArguments(output_dir="out", token_seeking=True, token_ratio=0.1)
        MemEfficientTrainer(model=model, args=args, train_dataset=ds, processing_class=tokenizer).train()
    """
