"""What each lever could still give a run: changes of settings, the least one first."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from hf_memtune.levers.facts import Run, checkpoints, optimizer_name
from hf_memtune.levers.lever import APPROXIMATE, EXACT, Offer

CHUNKS = (512, 128)  # the first that is shorter than the rows: still shorter ones hardly save more, and take longer
RATIOS = (0.5, 0.3, 0.1)
LORA_RANK = 16


def one_chunk(run: Run) -> Iterator[Offer]:
    """The loss without logits, which is a stream of one chunk."""
    args = run.args
    if run.tokens is not None and not (args.streams or args.token_seeking or args.is_reversible):
        yield Offer("logit-free loss", f"sequence_chunk_size={run.tokens}", {"sequence_chunk_size": run.tokens})


def activation_checkpointing(run: Run) -> Iterator[Offer]:
    args = run.args
    if not (checkpoints(args) or args.is_reversible or args.checkpoint_levels):
        yield Offer("activation checkpointing", "activation_checkpointing=True", {"activation_checkpointing": True})


def streaming(run: Run) -> Iterator[Offer]:
    args = run.args
    if args.token_seeking or args.is_reversible or args.chunk_is_open:  # open: the trainer tries sizes itself
        return
    limits = [size for size in (run.tokens, args.stream_chunk_size) if size]
    if shorter := [chunk for chunk in CHUNKS if not limits or chunk < min(limits)]:
        words = "" if args.streams else " for a causal model: exact streaming, without logits"
        name, size = f"streaming, chunks of {shorter[0]}", shorter[0]
        yield Offer(name, f"sequence_chunk_size={size}{words}", {"sequence_chunk_size": size})


def smaller_micro_batches(run: Run) -> Iterator[Offer]:
    """Fewer rows at a time than there are now, as many in a step."""
    rows, times = run.batch_size or run.rows, run.args.gradient_accumulation_steps
    # the mean over kept tokens is that of each call
    gradient = APPROXIMATE if run.args.is_mean_of_kept and not run.args.keeps_all else EXACT
    while (part := _largest_part(rows)) is not None:
        rows, times = part, times * (rows // part)
        if rows >= run.rows:
            continue
        changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": times}
        setting = f"per_device_train_batch_size={rows} with gradient_accumulation_steps={times}"
        yield Offer(f"micro-batch of {rows}, accumulated {times} times", setting, changes, gradient)


def _largest_part(rows: int) -> int | None:
    return next((rows // parts for parts in range(2, rows + 1) if rows % parts == 0), None)


def optimizer_state(run: Run) -> Iterator[Offer]:
    name = optimizer_name(run.args)
    if name.startswith("adamw_torch") and not name.endswith("bit") and not run.lora_rank:  # torchao's have few bits already
        setting = "optim=adamw_8bit, a quarter of the optimizer state (bitsandbytes)"
        yield Offer("8-bit optimizer state", setting, {"optim": "adamw_8bit"}, "exact (8-bit optimizer)", _without_bitsandbytes())


def what_is_trained(run: Run) -> Iterator[Offer]:
    if not run.changes_model:
        return
    optimizer = {"optim": optimizer_name(run.args)}  # adapters have hardly any state
    if not run.lora_rank:
        setting = f"LoRA (lora_r={LORA_RANK} on the command line; peft's get_peft_model in a program), a hundredth of the parameters"
        yield Offer(f"LoRA, rank {LORA_RANK}", setting, {"lora_r": LORA_RANK} | optimizer, "exact (LoRA)")
    if not run.four_bits:
        rank, missing = run.lora_rank or LORA_RANK, _without_bitsandbytes()
        setting = "QLoRA (load_in_4bit=True on the command line; a BitsAndBytesConfig in a program)"
        yield Offer("QLoRA, weights in 4 bits", setting, {"load_in_4bit": True, "lora_r": rank} | optimizer, "exact (QLoRA)", missing)


def token_seeking(run: Run) -> Iterator[Offer]:
    args = run.args
    on = {} if args.token_seeking else {"token_seeking": True}
    for ratio in RATIOS:
        if not args.token_seeking or ratio < args.token_ratio:
            setting = ", ".join(f"{name}={value}" for name, value in (on | {"token_ratio": ratio}).items())
            yield Offer(f"token seeking, ratio {ratio:g}", setting, on | {"token_ratio": ratio}, APPROXIMATE)


def _without_bitsandbytes() -> str | None:
    return None if find_spec("bitsandbytes") else "bitsandbytes is not installed (pip install -e '.[quantization]')"
