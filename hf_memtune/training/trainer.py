"""MemEfficientTrainer: transformers' Trainer, with the strategies that the arguments turn on."""

import logging
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from hf_memtune._compat import forbid_4bit_repacking
from hf_memtune.architectures import describe
from hf_memtune.config import TokenSeekingConfig
from hf_memtune.core.scorers import TokenScorer
from hf_memtune.core.selection import Selection
from hf_memtune.errors import ConfigError, MemTuneError
from hf_memtune.strategies.seeking_step import SeekingStep
from hf_memtune.training.callbacks import MemoryCallback, TokenSeekingCallback
from hf_memtune.training.normalizer import RunningMean

logger = logging.getLogger(__name__)


class MemEfficientMixin:
    """Adds the strategies to a Trainer: `class Mine(MemEfficientMixin, SFTTrainer)`.

    args: training arguments with the fields of MemEfficientArgumentsMixin. token_scorer: a callable in place of
    `args.token_scorer`; it maps a SeekingContext to scores (batch, tokens), larger is kept.
    last_selection: which tokens the last training step kept (a dict by stack for encoder-decoder models), or None.
    Everything else is Trainer's. Evaluation and prediction are plain full forwards; checkpoints are plain checkpoints.
    """

    def __init__(self, *args, token_scorer: TokenScorer | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._opened = False
        if not isinstance(self.args, TokenSeekingConfig):
            raise ConfigError([
                f"args: got {type(self.args).__name__}, which lacks the fields of hf_memtune. Expected "
                "MemEfficientTrainingArguments, or a dataclass made as `@dataclass class Mine(MemEfficientArgumentsMixin, SFTConfig)`."
            ])
        self.last_selection: Selection | dict[str, Selection] | None = None
        self._mean, self._in_step = RunningMean(), False
        self._reported: Tensor | None = None
        self.memory_callback = MemoryCallback(self.args.memory_trace_steps)
        self.add_callback(self.memory_callback)
        self.seeking_callback: TokenSeekingCallback | None = None
        if found := self._problems(token_scorer):
            raise ConfigError(found)
        if self.args.token_seeking:
            self._prepare_seeking(token_scorer)

    def _problems(self, token_scorer: TokenScorer | None) -> list[str]:
        """What only a Trainer can see: the arguments are checked when they are made."""
        if not self.args.token_seeking:
            idle = "token_scorer: got a function, but token_seeking is off. Set token_seeking=True."
            return [] if token_scorer is None else [idle]
        found, data = [], self.train_dataset
        if token_scorer is not None and not callable(token_scorer):
            found.append(f"token_scorer: got {token_scorer!r}, expected a function. Names go to args.token_scorer.")
        if token_scorer is not None and self.args.token_scorer != "combined":
            found.append(f"token_scorer: got a function and args.token_scorer={self.args.token_scorer!r}. Leave one of them out.")
        if self.args.seek_schedule != "step" and data is not None and not hasattr(data, "__len__"):
            schedule = self.args.seek_schedule
            found.append(f"seek_schedule: got {schedule!r} with a data set without length, which may never end. Use 'step'.")
        if self.args.n_gpu > 1:
            found.append(
                f"{self.args.n_gpu} GPUs in one process (DataParallel): token_seeking runs one process per GPU. Launch with "
                "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or max(self.get_tp_size(), self.get_cp_size()) > 1:
            found.append(
                "accelerate is configured for DeepSpeed, FSDP or tensor parallelism, which token_seeking does not support. Launch "
                "with plain data parallelism (accelerate launch --multi_gpu)."
            )
        return found

    def _prepare_seeking(self, token_scorer: TokenScorer | None) -> None:
        if describe(self.model).task.loss_per_token:
            self.loss_is_scaled_for_ga = True  # by the count of kept, labelled tokens: see normalizer.py
        forbid_4bit_repacking(self.model)  # for good: an evaluation before or between trainings must not spoil the weights
        config = TokenSeekingConfig.of(self.args)
        self.seeking_callback = TokenSeekingCallback(config, token_scorer, trainer=self)
        self.add_callback(self.seeking_callback)

    def _load_callback_state(self) -> None:
        """transformers makes stateful callbacks anew from a checkpoint; ours belongs to this trainer and reads its state itself."""
        if self.seeking_callback is None:
            return super()._load_callback_state()
        self.callback_handler.callbacks.remove(self.seeking_callback)
        super()._load_callback_state()
        self.add_callback(self.seeking_callback)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:  # transformers does not call on_train_end when training fails
            self.memory_callback.close()
            if self.seeking_callback is not None:
                self.seeking_callback.remove()

    def get_batch_samples(self, *args, **kwargs):
        self._mean.restart()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        self._in_step, self._opened, self._reported, self._returned = True, False, None, None
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._in_step = False
        if self.args.token_seeking and not self._opened:
            raise MemTuneError(
                f"{type(self).__name__}.compute_loss called the model past token seeking, which so did nothing. Call "
                "super().compute_loss in it, or pass compute_loss_func."
            )
        # whatever a subclass has added to the loss stays in what is reported
        return loss if self._reported is None else loss + (self._reported - self._returned).to(loss.dtype)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        seeking = self.seeking_callback.seeking if self.seeking_callback is not None and self._in_step else None
        if seeking is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if seeking.architecture.task.loss_per_token and inputs.get("labels") is None:
            raise MemTuneError(f"the batch has no labels, so there is nothing to learn from it. Its columns: {', '.join(inputs)}.")
        own_loss = self.compute_loss_func is not None
        smoothing = 0.0 if own_loss else self.args.label_smoothing_factor
        scores = self.seeking_callback.offline_scores(inputs)
        with seeking.step(inputs, smoothing, whole_logits=own_loss, scores=scores) as step:
            if not seeking.architecture.task.loss_per_token:
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                self._note(step)
                return result
            outputs = model(**step.inputs)
        self._note(step)
        loss = self._kept_loss(step, outputs)
        if step.fused:
            outputs.logits = None  # there are none: in their place came the loss
        return (loss, outputs) if return_outputs else loss

    def _kept_loss(self, step: SeekingStep, outputs) -> Tensor:
        """Mean loss over the kept, labelled tokens of the accumulated batch so far."""
        count, processes = step.kept_labels, 1
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # the divisor counts all processes' tokens, and their gradients are averaged, not summed
            count, processes = self.accelerator.gather(count).sum(), self.accelerator.num_processes
        divisor = self._mean.add_tokens(count, self.model.parameters())
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, step.shiftable_labels(), num_items_in_batch=divisor)
            loss_sum = loss * divisor
        else:
            loss_sum = step.loss_sum(outputs)
            loss = loss_sum / divisor
        self._reported = self._mean.report(loss_sum * processes)
        self._returned = loss.detach() * processes
        return loss * processes

    def _note(self, step: SeekingStep) -> None:
        """Keep what this step selected, and count its tokens for the logs."""
        chosen, self._opened = step.selection, True
        self.last_selection = chosen if len(chosen) > 1 else chosen["decoder"]
        learned = None if step.kept_target is None else step.kept_labels
        self.memory_callback.count_tokens(step.tokens_seen, sum(sum(s.counts) for s in chosen.values()), learned)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
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
