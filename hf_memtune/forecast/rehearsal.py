"""One step of training on tensors without values: the trainer itself runs, so what is predicted is what will happen.

Nothing of the loop is written again here: `Rehearsal` is a MemEfficientTrainer that is given fake batches and leaves when the step is
over.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from hf_memtune.architectures.stacks import unwrapped
from hf_memtune.core.offload import HostMemory
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.forecast.apart import apart
from hf_memtune.forecast.blank_model import Shapes
from hf_memtune.levers.facts import optimizer_name
from hf_memtune.memory.fake import fake_copy, sdpa_without_padding, shorten, use_sdpa
from hf_memtune.memory.optimizer_layout import laid_out, unwrapped_optimizer
from hf_memtune.memory.step_ledger import StepLedger
from hf_memtune.methods.method import Method
from hf_memtune.methods.seeking.method import TokenSeeking
from hf_memtune.methods.streaming.method import Streaming
from hf_memtune.training.callbacks import MethodCallback
from hf_memtune.training.care.report.step_account import StepAccountCallback
from hf_memtune.training.trainer import MemEfficientTrainer

MICRO_BATCHES = 2  # that are run: from the second on, each finds what the one before it found


class _Over(Exception):
    """Leaves the training loop when the step is over."""


class Rehearsal(MemEfficientTrainer):
    """A trainer for one step on fake tensors. Where a real one looks at values (to verify, to log), this one does not."""

    batches: list[dict[str, Tensor]]
    waiting: list[dict[str, Tensor]]  # micro-batches that are there, as all of a step are, and do not run
    is_for_cpu: bool  # where the real run takes place

    def get_batch_samples(self, *args, **kwargs):
        found = super().get_batch_samples(*args, **kwargs)
        self.batches_of_step = [*found[0], *self.waiting]
        return found

    def get_train_dataloader(self):
        return self.batches

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = laid_out(self.model, optimizer_name(self.args))
        made = super().create_optimizer(model)
        for group in self.optimizer.param_groups:
            # off a CPU torch's optimizers take all parameters at once, unless they are told not to, or are fused
            if not self.is_for_cpu and group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True
        return made

    def _verify_layers(self, batches: list[dict[str, Any]]) -> None:
        """Needs values."""

    def _move_model_to_device(self, model, device):
        return model


class _Take(StepAccountCallback):
    """Takes the account, and leaves. Before it, it makes the optimizer's state, which every step but the first finds there.

    unpadded: name of the attention function for rows without padding.
    """

    def __init__(self, trainer: Rehearsal, scene: Scene, first_layer: nn.Module | None, unpadded: str):
        super().__init__(trainer, step=0, names=scene.layers is None)
        self.scene, self.first_layer, self.unpadded = scene, first_layer, unpadded
        self.evaluation: StepLedger | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        model.zero_grad()

    def on_step_begin(self, *args, **kwargs):
        super().on_step_begin(*args, **kwargs)
        if self.trainer.method is not None:
            self.trainer.method.host = _Elsewhere(self.ledger)
        if self.first_layer is not None:
            self.ledger.stretch_at(self.first_layer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.close()
        model.zero_grad()
        if self.scene.evaluation is not None:
            self._evaluate(model, optimizer)
        raise _Over

    def _evaluate(self, model: nn.Module, optimizer: Any) -> None:
        batch = _micro_batch(self.scene.evaluation, self.scene.evaluation_padded)
        use_sdpa(model, "sdpa" if self.scene.evaluation_padded else self.unpadded)
        model.eval()
        self.evaluation = StepLedger(model, unwrapped_optimizer(optimizer), list(batch.values()), names=self.names)
        if self.first_layer is not None:
            self.evaluation.stretch_at(self.first_layer)
        with self.evaluation, self.evaluation.phase("evaluation"):
            self.trainer.prediction_step(model, batch, prediction_loss_only=not self.scene.evaluation_logits)


class _Elsewhere(HostMemory):
    """Host memory, which is no memory of the device: what lies there is left out of the account."""

    def __init__(self, ledger: StepLedger):
        super().__init__()
        self._ledger = ledger

    def empty(self, *args: Any) -> Tensor:
        with self._ledger.paused():
            return super().empty(*args)


class _Install(MethodCallback):
    """In place of a callback whose probe of the model needs values, and which may look at data. It hears, and keeps, what it would."""

    def __init__(self, given: MethodCallback):
        super().__init__()
        self.config, self.listeners = given.config, [given, *given.listeners]

    def make(self, model: nn.Module) -> Method:
        kind = TokenSeeking if getattr(self.config, "token_seeking", False) else Streaming
        return kind(model, self.config, check=False)


@dataclass(frozen=True)
class Scene:
    """What is rehearsed. batch: of one micro-batch. padded: whether rows differ in length, so that attention needs masks.

    evaluation: shapes of a batch of evaluation that is to run after the step; None: none. evaluation_padded: as padded, of that.
    evaluation_logits: whether its logits are wanted beside its loss. layers: run the model with its first so many layers only; None: all.
    """

    batch: Shapes
    padded: bool = False
    evaluation: Shapes | None = None
    evaluation_padded: bool = False
    evaluation_logits: bool = False
    layers: int | None = None


@dataclass(frozen=True)
class Rehearsed:
    """The closed ledgers of a training step, and of an evaluation batch."""

    step: StepLedger
    evaluation: StepLedger | None


def rehearse(model: nn.Module, args: Any, scene: Scene) -> Rehearsed:
    """Run one optimizer step of MemEfficientTrainer, with `args`, on a fake copy of `model`.

    Raises UnsupportedModelError for a model, or settings, that look at values to decide what to compute.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with apart(), tempfile.TemporaryDirectory() as folder, fake, sdpa_without_padding() as attention:
        copied = fake_copy(model)
        if not scene.padded:
            use_sdpa(copied, attention)
        first = None if scene.layers is None else shorten(copied, scene.layers)
        trainer = _trainer(copied, _quiet(args, folder))
        trainer.is_for_cpu = args.use_cpu
        batches = [_micro_batch(scene.batch, scene.padded) for _ in range(args.gradient_accumulation_steps)]
        trainer.batches, trainer.waiting = batches[:MICRO_BATCHES], batches[MICRO_BATCHES:]
        taken = _Take(trainer, scene, first, attention)
        trainer.add_callback(taken)
        try:
            with _explained(copied), contextlib.suppress(_Over):
                trainer.train()
        finally:
            taken.close()  # else it would account for whatever comes after a step that failed
    return Rehearsed(taken.ledger, taken.evaluation)


@contextlib.contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UnsupportedModelError(
            f"{type(unwrapped(model)).__name__}: what it computes depends on the values of its tensors ({error.func}), which shapes alone do "
            "not tell, so its memory cannot be predicted. Measure a step with StepAccountCallback, or on a GPU."
        ) from error


def _trainer(model: nn.Module, args: Any) -> Rehearsal:
    trainer = Rehearsal(model=model, args=args)
    trainer.accelerator.device_placement = False  # it is where it will be, and torch cannot move parameters without values
    if trainer.method_callback is not None:
        trainer.remove_callback(trainer.method_callback)
        trainer.method_callback = _Install(trainer.method_callback)
        trainer.add_callback(trainer.method_callback)
    return trainer


def _micro_batch(batch: dict[str, tuple], padded: bool) -> dict[str, Tensor]:
    made = {name: torch.zeros(*shape, dtype=dtype) for name, (shape, dtype) in batch.items()}
    if "attention_mask" in made:
        made["attention_mask"].stands_for_padding = padded
    return made


def _quiet(args: Any, folder: str) -> Any:
    """The arguments, on a CPU, without what writes, logs or looks at values. bfloat16 stands for float16, whose scaler looks at gradients."""
    quiet = copy.copy(args)
    quiet.use_cpu = True
    vars(quiet).pop("_setup_devices", None)
    assert quiet.device.type == "cpu"  # asked anew, before there is an accelerator, whose state asking resets
    if quiet.mixed_precision == "fp16":
        quiet.fp16, quiet.bf16, quiet.mixed_precision = False, True, "bf16"
    quiet.output_dir, quiet.report_to, quiet.disable_tqdm, quiet.push_to_hub = folder, [], True, False
    quiet.logging_nan_inf_filter, quiet.memory_trace_steps, quiet.full_loss_rows = False, 0, 0
    quiet.max_steps, quiet.resume_from_checkpoint, quiet.eval_strategy, quiet.save_strategy = 1, None, "no", "no"
    quiet.eval_on_start, quiet.include_num_input_tokens_seen, quiet.debug = False, "no", []
    quiet.gradient_accumulation_steps = min(args.gradient_accumulation_steps, MICRO_BATCHES)
    return quiet
