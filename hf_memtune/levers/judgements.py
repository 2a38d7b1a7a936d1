"""Whether a lever that is on acted in a step. Functions of the settings and of what was seen: no model is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from hf_memtune.levers.facts import BLOCKWISE_FROM, Idle, Seen, Settings, optimizer_name, saved_by_one_chunk


def runs_again(setting: str) -> Callable[[Settings, Seen], Iterator[Idle]]:
    """Of levers that keep no activations and run layers a second time."""

    def judge(args: Settings, seen: Seen) -> Iterator[Idle]:
        if not seen.recomputed:
            message = (
                f"{setting}: it is on, but no module ran again in backward, so no activation was saved. Expected layers that run twice: "
                "call model.enable_input_require_grads() where everything below the adapters is frozen and use_reentrant is True, and do "
                "not override the forward of the layers."
            )
            yield Idle(message, False)

    return judge


def ran_in_chunks(args: Settings, seen: Seen) -> Iterator[Idle]:
    if not seen.row_length or args.token_gradient == "skip" and args.token_seeking or seen.chunks > 1:
        return
    chunk, which = args.stream_chunk_size, "all" if seen.is_longest else "the first batch"
    if seen.is_longest and chunk == seen.row_length:  # asked for: the loss without logits
        return
    is_short = chunk is not None and seen.row_length <= chunk
    ran = (
        f"{args.streamed_by}: the longest row of {which} has {seen.row_length} tokens, which ran in {seen.chunks} chunk with "
        f"sequence_chunk_size={chunk}"
    )
    if is_short:
        saved = "" if args.token_seeking else f", so {saved_by_one_chunk(args)}"
        message = f"{ran}{saved}. For less memory set sequence_chunk_size below the length of the rows."
    else:
        message = f"{ran}. Set sequence_chunk_size below the length of the rows, or leave it out."
    yield Idle(message, is_short)


def left_tokens_out(args: Settings, seen: Seen) -> Iterator[Idle]:
    if args.streams:
        yield from ran_in_chunks(args, seen)
    if not seen.row_length or args.keeps_all or seen.kept < seen.seen:
        return
    if args.token_selection == "labelled":
        message = (
            f"token_seeking: all {seen.seen} tokens have a label, so token_selection=labelled is plain training. Leave token_seeking out."
        )
        yield Idle(message, is_short=True)
        return
    message = (
        f"token_seeking: all {seen.seen} tokens were kept with token_ratio={args.token_ratio:g}, so backward was that of plain "
        "training. Lower token_ratio, or leave token_seeking out."
    )
    ends = 2 if args.kept_always == "first_last" else 0
    yield Idle(message, math.ceil(args.token_ratio * seen.longest_row) >= seen.longest_row - ends)


def moved_to_host(args: Settings, seen: Seen) -> Iterator[Idle]:
    if seen.row_length and not seen.host_bytes:
        is_short = args.stream_chunk_size is not None and seen.row_length <= args.stream_chunk_size
        yield Idle("kv_offload: it is on, but no key or value was moved to host memory. Leave it out, or use longer rows.", is_short)


def kept_state_in_8_bits(args: Settings, seen: Seen) -> Iterator[Idle]:
    tensors = [value for held in seen.optimizer_state.values() for value in held.values() if isinstance(value, torch.Tensor)]
    if not seen.optimizer_state or any(map(_has_8_bits, tensors)):
        return
    message = (
        f"optim: got {optimizer_name(args)}, but no tensor of its state has 8 bits: every parameter it trains may be smaller than "
        f"{BLOCKWISE_FROM} values, whose state stays in 32. Use optim=adamw_torch."
    )
    yield Idle(message, all(parameter.numel() < BLOCKWISE_FROM for parameter in seen.optimizer_state))


def _has_8_bits(value: torch.Tensor) -> bool:
    """torchao's is a tensor of its own that names the dtype it stands for."""
    return value.dtype.itemsize == 1 or type(value).__module__.startswith("torchao")


def trains_adapters(args: Settings, seen: Seen) -> Iterator[Idle]:
    """PEFT marks what it trains; a merged or forgotten adapter leaves all of the model, or nothing, to train."""
    if seen.has_adapters and not 0 < seen.trained < seen.total:
        message = (
            f"peft: the model has adapters, but {seen.trained:,} of its {seen.total:,} parameters are trained, expected fewer than all "
            "and more than none. Freeze the base model, and load adapters with is_trainable=True."
        )
        yield Idle(message, False)
