"""The typed view of a trainer: what callbacks and care read of it, and nothing else. MemEfficientMixin over any Trainer fits it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerState
from transformers.trainer_callback import CallbackHandler

from hf_memtune.memory.estimate import MemoryEstimate
from hf_memtune.methods.method import Method
from hf_memtune.methods.reversible.handle import ReversibleHandle


class RunningTrainer(Protocol):
    """transformers' Trainer, in its own names, and after these what MemEfficientMixin adds.

    batches_of_step: micro-batches of the optimizer step at hand, as the data loader gave them, from before `on_step_begin` on.
    method_callback: has the method that the arguments turn on, or None. method: what is on the model at present, or None.
    reversible: the reversible layers in it, or None. checkpoint_callback: has the two-level checkpoints in it, or None.
    evaluates: whether anything is evaluated, in a training or around it. wants_logits: whether for more than its loss.
    estimate: hf_memtune.estimate, or None where no forecast was handed to the class.
    """

    args: Any
    model: nn.Module
    model_wrapped: nn.Module
    state: TrainerState
    accelerator: Accelerator
    optimizer: Optimizer
    lr_scheduler: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Callable
    callback_handler: CallbackHandler
    compute_metrics: Callable | None
    compute_loss_func: Callable | None
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    current_gradient_accumulation_steps: int
    _train_batch_size: int

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any: ...
    def compute_loss_context_manager(self) -> AbstractContextManager: ...
    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor: ...
    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool) -> tuple: ...
    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]: ...
    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader: ...
    def get_test_dataloader(self, test_dataset: Any) -> DataLoader: ...
    def is_world_process_zero(self) -> bool: ...
    def get_optimizer_cls_and_kwargs(self, args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]: ...
    def get_tp_size(self) -> int: ...
    def get_cp_size(self) -> int: ...
    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]: ...
    def _clip_grad_norm(self, model: nn.Module) -> Any: ...
    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable: ...

    batches_of_step: list[dict[str, Any]]
    method_callback: Any
    method: Method | None
    reversible: ReversibleHandle | None
    checkpoint_callback: Any
    estimate: Callable[..., MemoryEstimate] | None

    @property
    def evaluates(self) -> bool: ...
    @property
    def wants_logits(self) -> bool: ...
