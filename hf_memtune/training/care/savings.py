"""What each setting that is on saves, and what the best one that is not on would: peaks of the same step, traced without values.

A peak is that of `estimate`, in which the trainer itself runs a step on tensors without values: exact, and no memory is used.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hf_memtune._compat import is_fake
from hf_memtune.architectures.stacks import unwrapped
from hf_memtune.errors import MemTuneError, first_line
from hf_memtune.levers.facts import checkpoint_names, optimizer_name
from hf_memtune.levers.table import LEVERS, least_offers
from hf_memtune.memory.optimizer_layout import unwrapped_optimizer
from hf_memtune.methods.overrides import not_checkpointing
from hf_memtune.training.care.recovery.advice import run_of
from hf_memtune.training.rng import preserved_rng
from hf_memtune.training.running import RunningTrainer

_WORTH_NAMING = 0.02  # of the peak: less is not worth a change


@dataclass(frozen=True)
class BatchShape:
    """Of the batch that was measured. padded: whether its rows differ in length, so that attention needs masks."""

    rows: int
    tokens: int
    padded: bool

    @classmethod
    def of(cls, batch: Any) -> BatchShape | None:
        """None where there are no input_ids, as in a list of rows that the trainer has yet to collate."""
        if not isinstance(batch, Mapping) or (ids := batch.get("input_ids")) is None:
            return None
        mask = batch.get("attention_mask")
        return cls(*ids.shape[:2], padded=mask is not None and not bool((mask != 0).all()))


@dataclass(frozen=True)
class LeverSaving:
    """A setting that is on, and the peak without it and with it, in bytes; None where that is not known, and `note` says why."""

    setting: str
    without_bytes: int | None
    with_bytes: int | None
    note: str | None = None

    @property
    def saved_bytes(self) -> int | None:
        return None if self.without_bytes is None or self.with_bytes is None else self.without_bytes - self.with_bytes


@dataclass(frozen=True)
class Advice:
    """The setting, not on yet, that saves most; one that keeps the gradient exact, if any of these is worth it."""

    setting: str
    peak_bytes: int
    saved_bytes: int
    exact: bool


class Savings:
    """Estimates around one batch shape of a trainer, between steps or after training. predicted: that of its settings, if it is known."""

    def __init__(self, trainer: RunningTrainer, shape: BatchShape, predicted: Any = None):
        self.trainer, self.args, self.shape = trainer, trainer.args, shape
        self.predicted = self._estimate() if predicted is None else predicted

    def levers(self) -> Iterator[LeverSaving]:
        """Every setting that is on, with what it saves."""
        with_bytes = self.predicted.peak_bytes
        for setting, changes, around in self._enabled():
            if changes is None:
                yield LeverSaving(setting, None, with_bytes, "not traced: it would have to be taken out of the model")
                continue
            found = self._try(changes, around=around)
            yield LeverSaving(setting, found if isinstance(found, int) else None, with_bytes, None if isinstance(found, int) else found)
        if hasattr(self.trainer.model, "peft_config"):
            found = self._try({}, model=unwrapped(self.trainer.model).config)
            note = "without: every parameter trained" if isinstance(found, int) else found
            yield LeverSaving("adapters (peft)", found if isinstance(found, int) else None, with_bytes, note)

    def advice(self) -> Advice | None:
        """The best setting that is not on."""
        peak, found = self.predicted.peak_bytes, []
        for setting, changes, exact in self._candidates():
            bytes_then = self._try(changes, rows=changes.get("per_device_train_batch_size"))
            if isinstance(bytes_then, int) and peak - bytes_then > _WORTH_NAMING * peak:
                found.append(Advice(setting, bytes_then, peak - bytes_then, exact))
        return max(found, key=lambda advice: (advice.exact, advice.saved_bytes), default=None)

    # -- one estimate

    def _estimate(self, changes: Mapping[str, Any] | None = None, rows: int | None = None, model: Any = None) -> Any:
        shape = self.shape if rows is None else replace(self.shape, rows=rows, padded=self.shape.padded and rows > 1)
        return predicted_step(self.trainer, shape, changes, model)

    def _try(self, changes: Mapping[str, Any], rows: int | None = None, model: Any = None, around: Any = nullcontext) -> int | str:
        """The peak, or why there is none."""
        try:
            with around():
                return self._estimate(changes, rows, model).peak_bytes
        except Exception as error:  # whatever a step without values runs into: a report must not cost a finished run
            return f"not traced: {first_line(error)}"

    # -- settings

    def _enabled(self) -> Iterator[tuple[str, Mapping[str, Any] | None, Any]]:
        """Setting, what takes it out, and what has to be around a step without it."""
        for lever in LEVERS:
            if lever.is_on(self.args) and (written := lever.written(self.args)):
                is_checkpointing = lever.name == "gradient_checkpointing"
                yield written, lever.off(self.args), self._without_checkpoints if is_checkpointing else nullcontext

    @contextmanager
    def _without_checkpoints(self) -> Iterator[None]:
        """Without the hooks, too, that give the embeddings' output a gradient for checkpointing alone."""
        hooked = [(m, m._forward_hooks) for m in self.trainer.model.modules() if m._forward_hooks]
        with not_checkpointing(self.trainer.model):
            try:
                for module, hooks in hooked:
                    module._forward_hooks = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_for_checkpoints(hook))
                yield
            finally:
                for module, hooks in hooked:
                    module._forward_hooks = hooks

    def _candidates(self) -> Iterator[tuple[str, dict[str, Any], bool]]:
        """Setting, what it changes of the arguments, whether the gradient stays exact. What changes the model itself is not traced here."""
        for offer in least_offers(run_of(self.trainer, self.shape.rows, self.shape.tokens)):
            changes = dict(offer.changes)
            if all(hasattr(self.args, name) for name in changes):
                if "activation_checkpointing" in changes:
                    changes |= dict.fromkeys(checkpoint_names(self.args), True)
                yield offer.setting, changes, offer.is_exact


def predicted_step(trainer: RunningTrainer, shape: BatchShape, changes: Mapping[str, Any] | None = None, model: Any = None) -> Any:
    """The estimate of a step of a trainer on a batch of this shape, with some of its settings changed; between steps. model: in place of its own."""
    if trainer.estimate is None:
        raise MemTuneError("no forecast was handed to this trainer: import its class from hf_memtune")
    args = copy.copy(trainer.args)
    at_home = {"memory_preflight": False, "memory_report": False, "use_cpu": args.device.type == "cpu"}
    vars(args).update(at_home | dict(changes or {}))
    levels = trainer.checkpoint_callback
    with preserved_rng(args.device), nullcontext() if levels is None else levels.aside():  # a trainer that is made sets the seed
        found = trainer.estimate(
            trainer.model if model is None else model,
            args,
            batch_size=shape.rows,
            sequence_length=shape.tokens,
            padded=None if shape.padded == (shape.rows > 1) else shape.padded,  # None: of evaluation by its own rows
            evaluation=trainer.evaluates,
            evaluation_logits=trainer.wants_logits,
        )
    _require_untouched(trainer.model)
    return found


def _require_untouched(model: nn.Module) -> None:
    """A forward that was put on the model as a closure is not copied with it, and runs the model itself."""
    touched = [p for p in model.parameters() if p.grad is not None and is_fake(p.grad)]
    for parameter in touched:
        parameter.grad = None
    if touched:
        raise MemTuneError("the forward of the model is a function that no copy of it has")


def _is_for_checkpoints(hook: Any) -> bool:
    """transformers calls it make_inputs_require_grads, peft make_inputs_require_grad."""
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad")


def savings_of(trainer: RunningTrainer, shape: BatchShape | None, notes: list[str], predicted: Any = None) -> Savings | None:
    """What can be predicted; None, and a note that says why, where nothing can."""
    why, own = None, why_unpredicted(trainer)
    if shape is None:
        why = "the batch has no input_ids"
    elif own is not None:
        why = f"estimates are of MemEfficientTrainer, and {own}"
    elif trainer.args.world_size > 1:
        why = "estimates are made of one process"
    elif trainer.reversible is not None:
        why = "the layers of the model are reversible already"
    if why is None:
        try:
            return Savings(trainer, shape, predicted)
        except Exception as error:  # whatever a step without values runs into: a report must not cost a run
            why = first_line(error)
    if (note := f"Nothing is predicted: {why}.") not in notes:
        notes.append(note)
    return None


def why_unpredicted(trainer: RunningTrainer) -> str | None:
    """What in a step of this trainer is neither ours nor transformers', nor told by its arguments, as a clause; None: nothing."""
    if getattr(trainer, "compute_loss_func", None) is not None:
        return "compute_loss_func has a step or a loss of its own"
    for kind in type(trainer).__mro__:
        is_known = kind.__module__.split(".")[0] in ("hf_memtune", "transformers")
        if not is_known and {"training_step", "compute_loss"} & vars(kind).keys():
            return f"{kind.__name__} has a step or a loss of its own"
    return _optimizer_of_its_own(trainer)


def _optimizer_of_its_own(trainer: RunningTrainer) -> str | None:
    """An optimizer that was given, or made by an override. fused: an AdamW that is not has temporary tensors of the size of its state."""
    made = unwrapped_optimizer(trainer.optimizer)
    kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    if made is None or not isinstance(kind, type) or not issubclass(kind, Optimizer):  # transformers has factories, too
        return None
    if type(made) is kind and made.defaults.get("fused") == settings.get("fused"):
        return None
    fused = f"(fused={made.defaults['fused']})" if "fused" in made.defaults else ""
    return f"its optimizer, {type(made).__name__}{fused}, is not the one of optim={optimizer_name(trainer.args)}"
