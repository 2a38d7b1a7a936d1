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


def problem_of_packed_rows(model: nn.Module, collate: Callable[[list[dict]], dict[str, Any]], max_length: int) -> str | None:
    """What is wrong with packing rows for this model; None: nothing, or nothing that can be seen here (weights without values).

    A part predicts the same after another part as before it, or it sees its neighbour, or is numbered on from it. Both rows have the same
    shape, so that the same kernels compute them. Sets the model to evaluation mode. collate: as in training, from rows of `input_ids`,
    `labels` and `seq_lengths`, the lengths of the parts of each. max_length: tokens of a row at most.
    """
    if not has_values(model):
        return None
    name = type(unwrapped(model)).__name__
    short, long = _parts(model, max(8, min(LONGEST, max_length)))
    try:
        with trying(model.eval()):
            after, before = (_logits(model, collate, parts) for parts in ([short, long], [long, short]))
    except Exception as error:  # of many kinds, one for each way of not running
        return f"{name} runs no packed rows: {first_line(error)}" if _runs(model, long) else None
    changes = changes_of(after[len(short) :], before[: len(long)])
    if max(changes.mean(), changes[:NEAR].mean()) <= _rounding(model):  # a neighbour tells most at once, or, of blocks of keys, later on
        return None
    return f"in {name} the rows that are packed into one see one another, or are numbered on from one to the next"


def _parts(model: nn.Module, tokens: int) -> tuple[list[int], list[int]]:
    """Tokens from the middle of the vocabulary, where none are special."""
    middle = model.config.get_text_config().vocab_size // 2  # type: ignore[union-attr, operator]
    several = max(1, min(61, middle))
    row = [middle + (7 * n * n + n) % several for n in range(tokens)]
    return row[: 3 * tokens // 8], row[3 * tokens // 8 :]


def _logits(model: nn.Module, collate: Callable[[list[dict]], dict[str, Any]], parts: list[list[int]]) -> Tensor:
    """(L, V) float32: of all parts, packed into one row of L tokens."""
    row = [token for part in parts for token in part]
    batch = collate([{"input_ids": row, "labels": row, "seq_lengths": [len(part) for part in parts]}])
    batch.pop("labels")
    device = _device(model)
    on_device = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return model(**on_device, use_cache=False).logits[0].float()


def _runs(model: nn.Module, row: list[int]) -> bool:
    """Whether it runs a row that is not packed."""
    try:
        with trying(model):
            model(input_ids=torch.tensor([row], device=_device(model)), use_cache=False)
    except Exception:  # as above; training says why
        return False
    return True


def _device(model: nn.Module) -> torch.device:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return embedding.weight.device


def _rounding(model: nn.Module) -> float:
    """Of the norm of a position's logits, in the mean over positions: what the order of sums may change.

    With the 256 tokens of SmolLM2-135M (30 layers, a CPU) that was 7e-7 in float32 and 0.009 in bfloat16, where rows that see one another change
    0.38. By the coarsest number that is computed in; float32 may be TensorFloat-32.
    """
    return 3e-3 if computing_dtypes(model) <= {torch.float32, torch.float64} else 3e-2
