"""The gradient of a trained embedding, summed row by row: of a large vocabulary, a dense one for each chunk is most of what a chunk needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_memtune.core.tied import embed_summed
from hf_memtune.methods.overrides import forward_as


class _SummedLookups(TorchFunctionMode):
    """While on, lookups in a trained leaf add to its `.grad`: whatever a model's own embedding does before and after them stays."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.embedding:
            return _lookup(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _lookup(
    embedding: Callable, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.embedding`, its gradient summed in place where it is the plain one."""
    is_plain = max_norm is None and not scale_grad_by_freq and not sparse
    if is_plain and weight.requires_grad and weight.is_leaf:
        return embed_summed(weight, input, padding_idx)
    return embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


def _embed(forward: Callable, *args, **kwargs) -> Tensor:
    with _SummedLookups():
        return forward(*args, **kwargs)


@contextmanager
def rows_summed_in_place(embedding: nn.Embedding) -> Iterator[None]:
    """While open, `embedding`, whose weight is a leaf of ours, sums its gradient in place."""
    with forward_as(embedding, partial(_embed, embedding.forward)):
        yield
