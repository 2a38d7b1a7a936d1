"""What to change when a batch does not fit: what the levers have left to offer, changes that keep the gradient exact first."""

import torch
from accelerate.utils.memory import should_reduce_batch_size

from hf_memtune.levers.facts import Run
from hf_memtune.levers.table import least_offers
from hf_memtune.training.running import RunningTrainer


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device (or the host) has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # some of torch's errors carry an operator, in which accelerate would look for its phrases
    is_text = bool(error.args) and isinstance(error.args[0], str)
    return is_text and should_reduce_batch_size(error)


def advice(trainer: RunningTrainer, rows: int) -> list[str]:
    """What is not on yet, as settings, in the order in which to try it. rows: that ran at a time and did not fit; 1: fewer are no remedy."""
    found = [str(offer) for offer in least_offers(run_of(trainer, rows))]
    return found or ["shorter rows, a smaller model, or a larger device"]


def advice_on_evaluation(trainer: RunningTrainer) -> list[str]:
    """What to change when a batch of evaluation does not fit: none of what makes a step smaller."""
    rows = trainer.args.per_device_eval_batch_size
    found = [f"per_device_eval_batch_size={rows // 2}"] if rows > 1 else []
    if trainer.wants_logits:
        found.append("prediction_loss_only=True where nothing but the loss is wanted")
    return found or ["shorter rows to evaluate, or none (eval_strategy=no)"]


def run_of(trainer: RunningTrainer, rows: int, tokens: int | None = None) -> Run:
    """The run of a trainer. A frozen part that is none of peft's is taken for adapters, too: they are what it leaves to train."""
    model = trainer.model
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    ranks = [config.r for config in getattr(model, "peft_config", {}).values() if getattr(config, "r", 0)]
    four_bits = bool(getattr(model, "is_loaded_in_4bit", False))
    rank, size, changes_model = max(ranks, default=int(frozen)), trainer.args.per_device_train_batch_size, not trainer.args.is_reversible
    return Run(trainer.args, rows, tokens, rank, four_bits, changes_model, batch_size=size)
