"""Noticing when training on the kept tokens makes the loss of all tokens worse.

The logged loss of token seeking is that of the tokens it chose, and can fall while the loss that counts, that of all tokens,
rises: the gradient is another one. So the loss of all tokens of a few fixed rows is measured beside it.
"""

import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from itertools import islice
from statistics import mean, variance
from typing import Any, final

import torch
from torch import nn

from hf_memtune.architectures import Architecture, describe
from hf_memtune.core.loss import IGNORED
from hf_memtune.methods.events import Listener
from hf_memtune.methods.overrides import evaluating
from hf_memtune.methods.seeking.targets import LABEL_NAMES, targets
from hf_memtune.training.arguments import MemEfficientArgumentsMixin
from hf_memtune.training.loss_alone import logits_on_demand
from hf_memtune.training.rng import preserved_rng
from hf_memtune.training.running import RunningTrainer

logger = logging.getLogger(__name__)

WINDOW = 5  # logs: a mean of fewer has a standard error that is itself mostly chance
ERRORS = 2.0  # standard errors that a mean has to move by, up or down: about one chance in thirty in noise, for each of the two
IN_A_ROW = 2  # windows overlap from log to log and a run has many of them: one that stands out alone is common by chance


@final
class FullLossGuard:
    """Compares two losses, log by log: of the kept tokens and of all tokens.

    It warns when, from the last-but-one to the last WINDOW logs, the mean loss of all tokens rose and that of the kept tokens
    fell, each by more than ERRORS standard errors of the difference, at IN_A_ROW logs. After a warning it starts anew.
    """

    def __init__(self):
        self._restart()

    def _restart(self) -> None:
        self._kept, self._full = deque(maxlen=2 * WINDOW), deque(maxlen=2 * WINDOW)
        self._parted = 0

    def add(self, kept_loss: float, full_loss: float) -> str | None:
        """Take in the losses of one log. Returns a warning, or None."""
        self._kept.append(kept_loss)
        self._full.append(full_loss)
        self._parted = self._parted + 1 if rose(self._full) and rose([-loss for loss in self._kept]) else 0
        if self._parted < IN_A_ROW:
            return None
        message = self._message()
        self._restart()
        return message

    def _message(self) -> str:
        before, now = (mean(half) for half in _halves(self._full))
        return (
            f"full_loss, the loss of all tokens, rose from {before:.4f} to {now:.4f} (means of {WINDOW} logs) while the loss of "
            "the kept tokens fell: what is learned from them does not serve the others. Raise token_ratio, set select_from=labels or "
            "token_selection=sample, or lower learning_rate."
        )


def rose(losses: Iterable[float]) -> bool:
    """Whether the second half of 2 * WINDOW values lies above the first by more than ERRORS standard errors of the difference."""
    if len(losses := list(losses)) < 2 * WINDOW:
        return False
    before, now = _halves(losses)
    error = ((variance(before) + variance(now)) / WINDOW) ** 0.5
    return mean(now) - mean(before) > ERRORS * error


def _halves(losses: Iterable[float]) -> tuple[list[float], list[float]]:
    return list(losses)[:WINDOW], list(losses)[WINDOW:]


class FullLossLog(Listener):
    """Puts the loss of all tokens of a few fixed rows beside that of the kept ones, at every log, and says when they part.

    Acts where the loss is the mean over the kept tokens (token_selection=top): every other one is that of all tokens, or stands for it. So is
    one for a row, and one of the trainer's own, whose tokens are chosen in backward. is_of_kept: whether a step took such a mean.
    """

    def __init__(self, trainer: RunningTrainer):
        self.trainer = trainer
        self.begin()
        if trainer.method_callback is not None:
            trainer.method_callback.listeners.append(self)

    def begin(self) -> None:
        """Forget an earlier training: its rows, its losses, and what it took."""
        self._guard, self.is_of_kept, self._is_told = FullLossGuard(), False, False
        self._rows: list[dict[str, Any]] | None = None

    @property
    def is_on(self) -> bool:
        """Whether the settings ask for it; a search of hyperparameters changes them."""
        args = self.trainer.args
        return bool(args.is_mean_of_kept and not args.keeps_all and args.full_loss_rows)

    def loss_of_kept(self) -> None:
        self.is_of_kept = True

    def add_to(self, logs: dict[str, float]) -> None:
        """Measure, and put it into the logs."""
        trainer = self.trainer
        if not self.is_on or trainer.method is None:
            return
        if not self.is_of_kept:
            self._tell_idle(trainer.args)
            return
        count = trainer.args.full_loss_rows
        if self._rows is None and trainer.eval_dataset is not None:
            collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="Evaluation")
            self._rows = first_batches(trainer.eval_dataset, count, collate, trainer.args.device)
        last = trainer.batches_of_step[-1] if trainer.batches_of_step else None
        if self._rows is None and not isinstance(last, Mapping):
            return  # what this trainer trains on has no rows that the model's own loss could be taken of
        batches = rows_of(last, count) if self._rows is None else self._rows
        with trainer.compute_loss_context_manager():
            logs["full_loss"] = full_loss(trainer.model, map(trainer._prepare_inputs, batches))
        if warning := self._guard.add(logs["loss"], logs["full_loss"]):
            logger.warning(warning)

    def _tell_idle(self, args: MemEfficientArgumentsMixin) -> None:
        """Once, and where rows were asked for: which loss a model has, shows in its calls alone."""
        if args.full_loss_rows != MemEfficientArgumentsMixin.full_loss_rows and not self._is_told:
            self._is_told = True
            logger.warning(
                "full_loss_rows=%d has no effect here: no loss of these steps was a mean over kept tokens (one for a row, or of the trainer's own, "
                "is that of all tokens as it is). Leave it out.",
                args.full_loss_rows,
            )


def full_loss(model: nn.Module, batches: Iterable[dict[str, Any]]) -> float:
    """Mean loss over all labelled tokens of the batches (rows, for heads with one loss a row); nan where nothing is labelled.

    Plain forwards in evaluation mode, without gradient or whole logits; the model and the random numbers that come next are left as they were.
    model: a transformers model that makes its own loss, or a PEFT model around one.
    """
    architecture, total, count = describe(model), 0.0, 0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(preserved_rng(next(model.parameters()).device))
        stack.enter_context(logits_on_demand(model))
        for batch in batches:
            weight = _weight(architecture, batch)
            if weight:
                total += float(model(**batch | _without_cache(architecture)).loss) * weight
                count += weight
    return total / count if count else float("nan")


def _weight(architecture: Architecture, batch: dict[str, Any]) -> int:
    """What the loss of a batch is a mean over: its labelled tokens, or its rows."""
    labels = {name: batch[name] for name in LABEL_NAMES if batch.get(name) is not None}
    target = targets(architecture, labels)
    return int((target != IGNORED).sum()) if target is not None else len(next(iter(labels.values()), ()))


def _without_cache(architecture: Architecture) -> dict[str, bool]:
    """Nothing is generated: keys and values need not stay."""
    knows_cache = "use_cache" in inspect.signature(type(architecture.head_model).forward).parameters
    return {"use_cache": False} if knows_cache else {}


def first_batches(dataset, count: int, collate: Callable, device: torch.device) -> list[dict[str, Any]]:
    """The first rows of a data set (of the first one, of several by name), each a batch of its own: one row's states at a time.

    Collated once and for all, because a collator may draw (masked language modelling): what is measured must stay the same.
    """
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    with preserved_rng(device, collate, dataset):
        rows = (dataset[n] for n in range(min(count, len(dataset)))) if sized else islice(dataset, count)
        return [collate([row]) for row in rows]


def rows_of(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The first rows of a collated batch, each a batch of its own; what has not one entry a row is shared by all."""
    size = len(next(batch[name] for name in ("input_ids", "inputs_embeds", "labels") if batch.get(name) is not None))
    if size == 1:  # packed rows come with boundaries, which are no rows
        return [batch] if count else []

    def row(number: int, value):
        per_row = torch.is_tensor(value) and value.dim() > 0 and len(value) == size
        return value[number : number + 1] if per_row else value

    return [{name: row(number, value) for name, value in batch.items()} for number in range(min(count, size))]
