"""A micro-batch that does not fit is taken in halves, and training goes on: one optimizer step, one global batch, one order of rows.

When memory runs out, backward may have added a part of its gradient already. So the gradients of the accumulated batch are thrown
away, and its micro-batches run again from the first, each as before and from the state of the random generators it began with; the one
that did not fit, and from then on every one with as many rows, runs in parts of half as many rows. Its loss is that of the whole: see
`_run_parts`.

What is not the same as if there had been room: dropout masks and other draws of micro-batches that were cut (their rows draw one after
another), and what is no sum over rows: batch statistics, load-balancing losses of routers, and the mean over kept tokens of
token_selection=top, which is that of each part.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from transformers import TrainerCallback

from hf_memtune.errors import MemTuneError, first_line
from hf_memtune.levers.facts import steps_in_backward
from hf_memtune.methods.overrides import instance_attribute
from hf_memtune.training.care.recovery.advice import advice, is_out_of_memory
from hf_memtune.training.care.recovery.batch_parts import leaves_out_answers, parts_of, row_count, shares, why_not_cut
from hf_memtune.training.restorable import keep_counters
from hf_memtune.training.rng import Generators, preserved_rng
from hf_memtune.training.running import RunningTrainer

logger = logging.getLogger(__name__)

Step = Callable[[Any, dict[str, Any], Any], Tensor]


@dataclass(frozen=True)
class _MicroBatch:
    """What a micro-batch ran on, and how many rows at a time. Its inputs are held by the trainer's own loop in any case."""

    inputs: dict[str, Any]
    num_items: Any
    generators: Generators
    rows_at_most: int | None


class HalvingSteps(TrainerCallback):
    """Runs the training steps of one trainer, in parts where they do not fit.

    rows_at_most: rows that run at a time; None: as many as there are. is_on: False lets the error through: in a preflight, under
    auto_find_batch_size, whose way is another, and where backward changes weights or processes hold parts of one model.
    """

    def __init__(self, trainer: RunningTrainer):
        self.trainer, self.is_on = trainer, _can_run_again(trainer)
        self.rows_at_most: int | None = None
        self._is_sum: bool | None = None
        self._done: list[_MicroBatch] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._done = []

    def run(self, step: Step, model: Any, inputs: dict[str, Any], num_items: Any) -> Tensor:
        """The loss of one training step, whose gradient is then there."""
        if not self.is_on:
            return step(model, inputs, num_items)
        now = _MicroBatch(inputs, num_items, Generators.now(self.trainer.args.device), self.rows_at_most)
        take_back = self._kept()
        fitted, failure = self._try(step, model, now)
        while failure is not None:
            self._halve(inputs, failure)
            now = replace(now, rows_at_most=self.rows_at_most)
            clear_device_cache(garbage_collection=True)  # the graph of a failed forward is a ring of references
            fitted, failure = self._again(step, model, now, take_back)
        self._done.append(now)
        return fitted

    def _kept(self) -> Callable[[], None]:
        """What takes back what is counted from here on; nothing is, where an attempt that failed is the last."""
        return keep_counters(self.trainer) if _with_own_loss(self.trainer) is None else lambda: None

    def _try(self, step: Step, model: Any, batch: _MicroBatch) -> tuple[Tensor | None, str | None]:
        """The loss, or why there was no room for it. When this returns, the frames that hold the activations are gone."""
        try:
            return self._run(step, model, batch), None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None, first_line(error)

    def _again(self, step: Step, model: Any, now: _MicroBatch, take_back: Callable[[], None]) -> tuple[Tensor | None, str | None]:
        """From the first micro-batch of the accumulated batch to this one. What earlier ones counted, as their losses, is that of their first time."""
        model.zero_grad()
        fitted, failure = None, None
        for batch in [*self._done, now]:
            if batch is now:
                take_back()
            batch.generators.restore()
            fitted, failure = self._try(step, model, batch)
            if failure is not None:  # also of an earlier one, if it has less room than it had
                self._done = [replace(done, rows_at_most=now.rows_at_most) for done in self._done]
                break
        return fitted, failure

    def _halve(self, inputs: dict[str, Any], failure: str) -> None:
        args, fewer_differ = self.trainer.args, False
        rows = row_count(inputs) or args.per_device_train_batch_size  # a trainer that is given rows makes a batch of them itself
        at_most = min(rows, self.rows_at_most or rows)
        why = "one row at a time is the least there is" if at_most == 1 < rows else why_not_cut(inputs)
        if args.world_size > 1:
            why = "the other processes wait for its gradient, so it cannot run again alone"
        elif why is None and (kind := _with_own_loss(self.trainer)) is not None:
            why = f"{kind} computes a loss of its own, which need not be a sum over rows (of pairs, say)"
        elif why is None and leaves_out_answers(inputs):
            why = "some of its answers lie outside their rows, so that the means of two halves are not the mean of the whole"
            fewer_differ = True
        if why is not None:
            remedies = "; ".join(advice(self.trainer, 1 if fewer_differ else at_most))
            raise MemTuneError(
                f"no memory for a micro-batch of {at_most} rows ({failure}), and it cannot be halved: {why}. Try {remedies}."
            )
        self.rows_at_most = -(-at_most // 2)
        logger.warning(
            "no memory for %d rows at step %d (%s): from here on %d at a time, in %d times as many micro-batches. The global batch and the "
            "order of its rows stay as they are; where there is dropout, its masks are others.",
            at_most, self.trainer.state.global_step, failure, self.rows_at_most, -(-rows // self.rows_at_most),
        )  # fmt: skip

    # -- one micro-batch

    def _run(self, step: Step, model: Any, batch: _MicroBatch) -> Tensor:
        rows = row_count(batch.inputs)
        if batch.rows_at_most is None or rows is None or rows <= batch.rows_at_most or why_not_cut(batch.inputs):
            return step(model, batch.inputs, batch.num_items)
        return self._run_parts(step, model, batch)

    def _run_parts(self, step: Step, model: Any, batch: _MicroBatch) -> Tensor:
        """The sum of the losses of the parts, each of which goes backward by itself.

        A loss that is a sum over tokens divided by the count of the accumulated batch adds up as it is. A mean over the micro-batch is
        multiplied by each part's share of it; a part without a label has none, and is left out.
        """
        parts, num_items = parts_of(batch.inputs, batch.rows_at_most), batch.num_items
        if num_items is not None and self._adds_up(step, model, parts, num_items):
            weights = [1.0] * len(parts)
        elif self.trainer.compute_loss_func is not None:
            raise MemTuneError(
                "no memory for a micro-batch, and it cannot be halved: compute_loss_func gives a loss that is no sum divided by num_items_in_batch, and "
                "which mean it is (of weights by class, of pairs in the batch) is not known. Divide a sum over tokens by num_items_in_batch, or "
                f"{'; '.join(advice(self.trainer, 1))}."  # in smaller micro-batches its gradient would be another one, too
            )
        else:
            weights = shares(batch.inputs, parts, getattr(self.trainer, "_loss_shifts_labels", False))
        total: Tensor | float = 0.0
        for part, weight in zip(parts, weights):
            if weight:
                total = total + self._run_part(step, model, part, num_items, weight)
        return total

    def _run_part(self, step: Step, model: Any, part: dict[str, Any], num_items: Any, weight: float) -> Tensor:
        if weight == 1.0:
            return step(model, part, num_items)
        with instance_attribute(self.trainer, "compute_loss", partial(_shared, self.trainer.compute_loss, weight)):
            return step(model, part, num_items)

    def _adds_up(self, step: Step, model: Any, parts: list[dict[str, Any]], num_items: Any) -> bool:
        """Whether the loss is divided by the count it is given. Some heads ignore it (regression), which only their loss tells."""
        for part in parts if self._is_sum is None else ():
            once, twice = (self._loss_of(step, model, part, count) for count in (num_items, 2 * num_items))
            if once == 0 or math.isnan(once):
                continue  # nothing that counts has a label here, which tells nothing
            if not any(abs(twice - wanted) <= 1e-3 * abs(once) for wanted in (once, once / 2)):
                raise MemTuneError(
                    "no memory for a micro-batch, and it cannot be halved: its loss is neither a mean over it nor a sum divided by "
                    f"num_items_in_batch (got {twice:g} for twice the count, {once:g} for the count). Try {'; '.join(advice(self.trainer, 1))}."
                )
            self._is_sum = abs(twice - once / 2) < abs(twice - once)
            break
        return self._is_sum is not False

    def _loss_of(self, step: Step, model: Any, part: dict[str, Any], num_items: Any) -> float:
        """Of a step that is left where its loss is there: with all that acts in a step, so that it needs no more memory than the step itself."""
        trainer, take_back, loss = self.trainer, keep_counters(self.trainer), None
        with preserved_rng(trainer.args.device), instance_attribute(trainer, "compute_loss", partial(_left, trainer.compute_loss)):
            try:
                step(model, part, num_items)
            except _Loss as found:
                loss = found.value
        take_back()
        clear_device_cache(garbage_collection=True)  # the graph of a forward without backward is a ring, too
        if loss is None:
            raise MemTuneError(
                f"no memory for a micro-batch, and it cannot be halved: training_step of {type(trainer).__name__} does not call compute_loss, so "
                f"what its loss is a mean of is not known. Try {'; '.join(advice(trainer, 1))}."
            )
        return loss


class _Loss(Exception):
    """The way out of a step whose loss is all that is wanted."""

    def __init__(self, value: float):
        super().__init__(value)
        self.value = value


def _left(compute_loss: Callable, *args, **kwargs) -> None:
    found = compute_loss(*args, **kwargs)
    loss = found[0] if isinstance(found, tuple) else found
    raise _Loss(float(loss.detach().mean()))


def _shared(compute_loss: Callable, share: float, *args, **kwargs) -> Any:
    """A loss, or a pair of it and outputs, with the loss made the share of the part that runs."""
    found = compute_loss(*args, **kwargs)
    return (found[0] * share, *found[1:]) if isinstance(found, tuple) else found * share


def _with_own_loss(trainer: RunningTrainer) -> str | None:
    """The class, if any, whose loss is neither the model's own nor a sum over its tokens, as that of trl's SFTTrainer is."""
    kind = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    is_known = kind.__module__.split(".")[0] in ("hf_memtune", "transformers") or kind.__name__ == "SFTTrainer"
    return None if is_known else kind.__name__


def _can_run_again(trainer: RunningTrainer) -> bool:
    is_sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return not (trainer.args.auto_find_batch_size or steps_in_backward(trainer.args) or is_sharded)
