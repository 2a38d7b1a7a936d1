"""Whether a model keeps rows apart that are packed into one: transformers leaves it to each body, and not every one does."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_memtune.architectures.stacks import unwrapped
from hf_memtune.architectures.trials import changes_of, computing_dtypes, has_values, trying
from hf_memtune.errors import first_line

LONGEST = 256
"""Tokens of the row that is looked at: two parts, long enough that a model which picks blocks of keys has some to pick from."""
NEAR = 4
"""Tokens of a part that short convolutions would show the part before."""
SEEN = 1e-3
"""Of the norm of a position's logits: what a neighbour changes at least. Of most models other tokens in its place change no bit."""
TIMES = 4
"""How much further than by itself a part may lie from itself when packed first, where it sees no other: that is the rounding of this model, which
is coarse where rounding chooses experts."""


def problem_of_packed_rows(model: nn.Module, collate: Callable[[list[dict]], dict[str, Any]], max_length: int) -> str | None:
    """What is wrong with packing rows for this model; None: nothing, or nothing that can be seen here (weights without values, or a model that
    does not predict the row by itself either, of which training says why).

    A part predicts the same after one part, after another, and before it, or it sees its neighbour, or is numbered on from it. All rows have one
    shape, so that the same kernels compute them. Sets the model to evaluation mode. collate: as in training, from rows of `input_ids`,
    `labels` and `seq_lengths`, the lengths of the parts of each. max_length: tokens of a row at most.
    """
    name = type(unwrapped(model)).__name__
    one, other, long = _parts(model, max(8, min(LONGEST, max_length)))
    if not has_values(model) or (alone := _alone(model.eval(), long)) is None:
        return None
    try:
        with trying(model):
            packed = [_packed(model, collate, parts) for parts in ([one, long], [other, long], [long, one])]
    except Exception as error:  # of many kinds, one for each way of not running
        return f"{name} runs no packed rows: {first_line(error)}"
    after_one, after_other, before = packed[0][len(one) :], packed[1][len(other) :], packed[2][: len(long)]
    if not all(logits.isfinite().all() for logits in packed):
        return f"{name} runs no packed rows: what it predicts of them is not finite"
    rounding, noise = _rounding(model), _most(before, alone)
    if noise > 2 * rounding:  # no rounding any more
        return f"{name} predicts otherwise of the first row that is packed into one than of the same row by itself"
    if _most(after_other, after_one) <= max(SEEN, TIMES * noise) and _most(after_one, before) <= max(rounding, TIMES * noise):
        return None
    return f"in {name} the rows that are packed into one see one another, or are numbered on from one to the next"


def _parts(model: nn.Module, tokens: int) -> tuple[list[int], list[int], list[int]]:
    """Two short parts of one length and a long one, of tokens from the middle of the vocabulary, where none are special."""
    middle = model.config.get_text_config().vocab_size // 2  # type: ignore[union-attr, operator]
    several = max(1, min(61, middle))
    row = [middle + (7 * n * n + n) % several for n in range(tokens)]
    short = 3 * tokens // 8
    return row[:short], [middle + (5 * n * n + 3 * n + 2) % several for n in range(short)], row[short:]


def _packed(model: nn.Module, collate: Callable[[list[dict]], dict[str, Any]], parts: list[list[int]]) -> Tensor:
    """(L, V) float32: logits of all parts, packed into one row of L tokens."""
    row = [token for part in parts for token in part]
    batch = collate([{"input_ids": row, "labels": row, "seq_lengths": [len(part) for part in parts]}])
    batch.pop("labels")
    device = _device(model)
    on_device = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return model(**on_device, use_cache=False).logits[0].float()


def _alone(model: nn.Module, row: list[int]) -> Tensor | None:
    """(L, V) float32: logits of a row that is not packed; None where it does not run, or has none that are finite."""
    try:
        with trying(model):
            logits = model(input_ids=torch.tensor([row], device=_device(model)), use_cache=False).logits[0].float()
    except Exception:  # as above
        return None
    return logits if logits.isfinite().all() else None


def _most(found: Tensor, expected: Tensor) -> float:
    """How far logits lie apart: a neighbour tells most at once, or, of blocks of keys, later on."""
    changes = changes_of(found, expected)
    return max(float(changes.mean()), float(changes[:NEAR].mean()))


def _device(model: nn.Module) -> torch.device:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return embedding.weight.device


def _rounding(model: nn.Module) -> float:
    """Of the norm of a position's logits, in the mean over positions: what the order of sums may change in most models.

    With the 256 tokens of SmolLM2-135M (30 layers, a CPU) that was 7e-7 in float32, 0.009 in bfloat16 and 0.008 in 4 bits. By the coarsest number that is computed in; float32 may be TensorFloat-32.
    """
    return 3e-3 if computing_dtypes(model) <= {torch.float32, torch.float64} else 3e-2
