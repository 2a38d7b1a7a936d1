"""What can be changed about a run so that it needs less memory, exact things first: the rungs of a ladder, each with what is below it.

Exact are the logit-free loss, activation checkpointing, streaming and smaller micro-batches: the gradients are those of the settings as
given. 8-bit optimizer state changes what is made of them, LoRA and QLoRA what is trained: exact gradients of something else. Keeping a part
of the tokens changes the gradients, and comes last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

CHUNKS = (512, 128)  # the first that is shorter than the rows: still shorter ones hardly save more, and take longer
RATIOS = (0.5, 0.3, 0.1)
LORA_RANK = 16
EXACT, APPROXIMATE = "exact", "approximate"


@dataclass(frozen=True)
class Rung:
    """One way to run. name: what it adds to the rungs below. gradient: exact, exact of something else (in brackets what), or approximate.

    changes: settings, by the names of flags, that go over those given. missing: what it needs and is not there, or None.
    """

    name: str
    gradient: str
    changes: dict[str, Any]
    missing: str | None = None

    @property
    def is_exact(self) -> bool:
        return self.gradient != APPROXIMATE


def ladder(args: Any, tokens: int, lora_rank: int = 0, four_bits: bool = False, changes_model: bool = True) -> list[Rung]:
    """All rungs above the settings as given, which are the first.

    args: MemEfficientTrainingArguments. tokens: of the longest row. lora_rank, four_bits: of the model as given. changes_model: whether
    LoRA and QLoRA are rungs.
    """
    rungs = [Rung("as given", APPROXIMATE if args.token_seeking else EXACT, {})]
    for name, gradient, changes, missing in _levers(args, tokens, lora_rank, four_bits, changes_model):
        below = {} if gradient == APPROXIMATE and not rungs[-1].is_exact else rungs[-1].changes
        below = _without_streaming(rungs) if gradient == APPROXIMATE else below
        kind = APPROXIMATE if not rungs[0].is_exact else gradient or rungs[-1].gradient
        rungs.append(Rung(name, kind, {**below, **changes}, missing))
    return rungs


def _without_streaming(rungs: list[Rung]) -> dict[str, Any]:
    """The changes of the highest exact rung; token seeking goes in the place of its streaming."""
    highest = [rung for rung in rungs if rung.is_exact][-1]
    return {name: value for name, value in highest.changes.items() if name != "sequence_chunk_size"}


def _levers(args: Any, tokens: int, lora_rank: int, four_bits: bool, changes_model: bool) -> Iterator[tuple]:
    """(name, gradient, or None for that of the rung below, changes, what is missing)."""
    recomputes = args.is_reversible or args.checkpoint_levels or args.activation_checkpointing
    checkpointing = {} if recomputes else {"activation_checkpointing": True}
    if not (args.streams or args.token_seeking or args.is_reversible):
        yield "logit-free loss", None, {"sequence_chunk_size": tokens}, None
    if checkpointing:
        yield "activation checkpointing", None, checkpointing, None
    if not (args.token_seeking or args.is_reversible):
        shorter = [chunk for chunk in CHUNKS if chunk < min(tokens, args.sequence_chunk_size or tokens)]
        if shorter:
            yield f"streaming, chunks of {shorter[0]}", None, {"sequence_chunk_size": shorter[0]}, None
    yield from _smaller_micro_batches(args)
    yield from _what_is_trained(args, lora_rank, four_bits, changes_model)
    if not args.token_seeking:
        for ratio in RATIOS:
            yield f"token seeking, ratio {ratio:g}", APPROXIMATE, {"token_seeking": True, "token_ratio": ratio} | checkpointing, None


def _smaller_micro_batches(args: Any) -> Iterator[tuple]:
    rows, times = args.per_device_train_batch_size, args.gradient_accumulation_steps
    while rows % 2 == 0:
        rows, times = rows // 2, times * 2
        changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": times}
        yield f"micro-batch of {rows}, accumulated {times} times", None, changes, None


def _what_is_trained(args: Any, lora_rank: int, four_bits: bool, changes_model: bool) -> Iterator[tuple]:
    bitsandbytes = None if find_spec("bitsandbytes") else "bitsandbytes is not installed (pip install 'hf_memtune[quantization]')"
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer.startswith("adamw_torch"):
        yield "8-bit optimizer state", "exact (8-bit optimizer)", {"optim": "adamw_8bit"}, bitsandbytes
    if changes_model and not lora_rank:
        yield f"LoRA, rank {LORA_RANK}", "exact (LoRA)", {"lora_r": LORA_RANK, "optim": optimizer}, None
    if changes_model and not four_bits:
        changes = {"load_in_4bit": True, "lora_r": lora_rank or LORA_RANK, "optim": optimizer}
        yield "QLoRA, weights in 4 bits", "exact (QLoRA)", changes, bitsandbytes
