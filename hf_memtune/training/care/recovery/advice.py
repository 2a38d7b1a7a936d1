"""What to change when a batch does not fit: levers that are not on yet, those that keep the gradient exact first."""

from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

_SMALL_STATES = ("8bit", "4bit", "adafactor", "sgd", "galore", "apollo", "lomo", "lion")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device (or the host) has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # some of torch's errors carry an operator, in which accelerate would look for its phrases
    is_text = bool(error.args) and isinstance(error.args[0], str)
    return is_text and should_reduce_batch_size(error)


def advice(trainer: Any, rows: int) -> list[str]:
    """What is not on yet, as settings, in the order in which to try it. rows: of the micro-batch that did not fit."""
    args, found = trainer.args, []
    if rows > 1:
        steps = 2 * args.gradient_accumulation_steps
        kind = "approximate" if args.is_mean_of_kept and args.token_ratio < 1 else "exact"  # the mean over kept tokens is that of each call
        found.append(f"per_device_train_batch_size={rows // 2} with gradient_accumulation_steps={steps} ({kind})")
    if not (args.token_seeking or args.streams):
        found.append("sequence_chunk_size=512 for a causal model: exact streaming, without logits (exact)")
    elif args.streams and args.stream_chunk_size > 128:
        found.append(f"sequence_chunk_size={max(64, args.stream_chunk_size // 4)} (exact)")
    if not (checkpoints(args) or args.is_reversible or args.checkpoint_levels):
        found.append("gradient_checkpointing=True (exact)")
    frozen = any(not p.requires_grad for p in trainer.model.parameters())
    if not frozen:
        found.append("LoRA (lora_r=8 on the command line; peft's get_peft_model in a program), which trains a hundredth of the parameters")
    if not frozen and not any(name in optimizer_name(args) for name in _SMALL_STATES):
        found.append("optim=adamw_bnb_8bit, a quarter of the optimizer state (bitsandbytes)")
    if not args.token_seeking:
        found.append("token_seeking=True (approximate)")
    elif args.token_ratio > 0.1:
        found.append(f"token_ratio={args.token_ratio / 2:g} (approximate)")
    return found or ["shorter rows, a smaller model, or a larger device"]


def checkpoints(args: Any) -> bool:
    """Whether activation checkpointing is on, under either of its names."""
    return bool(getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None))


def optimizer_name(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))


def steps_in_backward(args: Any) -> bool:
    """Whether the optimizer changes weights while backward runs, so that no step can be taken back."""
    return optimizer_name(args) in ("lomo", "adalomo") or optimizer_name(args).endswith("_layerwise")


def first_line(error: BaseException) -> str:
    """What an allocator says first; the rest is statistics."""
    return str(error).strip().split("\n")[0][:300]
