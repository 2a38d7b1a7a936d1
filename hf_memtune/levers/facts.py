"""What levers are judged by: settings, a run, and what one of its steps did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import nn

BLOCKWISE_FROM = 4096  # elements: bitsandbytes keeps the state of smaller parameters in float32 (min_8bit_size)


class Settings(Protocol):
    """What levers read of training arguments: settings of MemEfficientArgumentsMixin, and a few of transformers."""

    token_seeking: bool
    token_ratio: float
    token_gradient: str
    token_scorer: str
    preset: str | None
    given: frozenset[str]
    sequence_chunk_size: int | str | None
    stream_order: str | None
    kv_offload: bool
    keep_attention_outputs: bool
    checkpoint_levels: int | None
    reversible: str
    gradient_accumulation_steps: int
    optim: Any
    streams: bool
    streamed_by: str | None
    stream_chunk_size: int | None
    chunk_is_open: bool
    is_mean_of_kept: bool
    kept_always: str
    keeps_all: bool
    threshold: float | None
    token_selection: str
    token_weight: str
    is_reversible: bool


@dataclass(frozen=True)
class Run:
    """A run, as far as it decides what a lever still has to offer.

    rows: of a micro-batch. tokens: of the longest row; None: not known. lora_rank: of its adapters; 0: every parameter is trained.
    four_bits: its frozen weights have 4 bits. changes_model: whether adapters can be put in. batch_size: rows of a whole micro-batch, where
    `rows` are those of a part, or of a last one; None: `rows`.
    """

    args: Settings
    rows: int
    tokens: int | None = None
    lora_rank: int = 0
    four_bits: bool = False
    changes_model: bool = True
    batch_size: int | None = None


@dataclass
class Seen:
    """What one optimizer step did.

    is_longest: it had the longest batch there is. recomputed: modules that ran while autograd went backward. chunks: most of a call; seen,
    kept: tokens of all calls; row_length: with padding, and longest_row: without, of the longest row. host_bytes: asked for in host memory.
    has_reversible, has_adapters: what is in the model. trained, total: its parameters. optimizer_state: empty before its first step.
    """

    is_longest: bool
    recomputed: int = 0
    chunks: int = 0
    seen: int = 0
    kept: int = 0
    row_length: int = 0
    longest_row: int = 0
    host_bytes: int = 0
    has_reversible: bool = False
    has_adapters: bool = False
    trained: int = 0
    total: int = 0
    optimizer_state: Mapping[nn.Parameter, Mapping[str, Any]] = field(default_factory=dict)


class Idle(NamedTuple):
    """A lever that is on and did not act. is_short: on this batch it could not; on a longer one it may."""

    message: str
    is_short: bool


def checkpoints(args: Any) -> bool:
    """Whether activation checkpointing is on, under either of its names."""
    return bool(getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None))


def checkpointed_by(args: Any) -> str | None:
    """The setting that recomputes activations, or None."""
    levels = getattr(args, "checkpoint_levels", None)
    return "activation_checkpointing" if checkpoints(args) else "checkpoint_levels" if levels else None


def saved_by_one_chunk(args: Any) -> str:
    """What a stream of rows that fit in one chunk saves, in words."""
    by = checkpointed_by(args)
    return "only the logits are saved" if by is None else f"the logits are saved, and what {by} saves"


def checkpoint_names(args: Any) -> list[str]:
    """The names that these arguments have for activation checkpointing; the older one goes away in transformers 6."""
    return [name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(args, name)]


def optimizer_name(args: Any) -> str:
    """`args.optim` as a string: adamw_torch, ..."""
    return str(getattr(args.optim, "value", args.optim))


def steps_in_backward(args: Any) -> bool:
    """Whether the optimizer changes weights while backward runs, so that no step can be taken back."""
    return optimizer_name(args) in ("lomo", "adalomo") or optimizer_name(args).endswith("_layerwise")
