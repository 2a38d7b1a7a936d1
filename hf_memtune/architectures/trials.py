"""What is needed to try a loaded model on a few tokens, and to compare what it says."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_memtune._compat import allow_4bit_repacking, forbid_4bit_repacking, is_fake


def has_values(model: nn.Module) -> bool:
    """Whether its weights are numbers, and no shapes alone."""
    return not any(parameter.is_meta or is_fake(parameter) for parameter in model.parameters())


@contextmanager
def trying(model: nn.Module) -> Iterator[None]:
    """Without gradients, and with 4-bit weights left as they are."""
    repacking = forbid_4bit_repacking(model)
    try:
        with torch.no_grad():
            yield
    finally:
        allow_4bit_repacking(repacking)


def changes_of(found: Tensor, expected: Tensor) -> Tensor:
    """Of logits (..., V), how far each position lies from what was expected, relative to its norm: (...)."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def computing_dtypes(module: nn.Module) -> set[torch.dtype]:
    """Of the numbers that a module computes in: those of 4-bit layers are not those of their parameters."""
    computed = {dtype for each in module.modules() if isinstance(dtype := getattr(each, "compute_dtype", None), torch.dtype)}
    return computed | {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
