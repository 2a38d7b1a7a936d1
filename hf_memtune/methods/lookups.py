"""The lookups of an embedding, done in another way; whatever a model's own embedding does before and after them stays."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_memtune.methods.overrides import forward_as

Lookup = Callable[[Tensor, Tensor, int | None], Tensor | None]
"""Maps a matrix (V, D), ids and padding_idx to the embeddings (*ids.shape, D); None where they are to be looked up as ever."""


class _Lookups(TorchFunctionMode):
    """While on, `torch.nn.functional.embedding` is a Lookup, where its gradient is the plain one."""

    def __init__(self, lookup: Lookup):
        super().__init__()
        self._lookup = lookup

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.embedding and (found := self._embed(*args, **(kwargs or {}))) is not None:
            return found
        return func(*args, **(kwargs or {}))

    def _embed(
        self, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
        scale_grad_by_freq: bool = False, sparse: bool = False,
    ) -> Tensor | None:  # fmt: skip
        is_plain = max_norm is None and not scale_grad_by_freq and not sparse
        return self._lookup(weight, input, padding_idx) if is_plain and weight.requires_grad else None


@contextmanager
def looking_up(embedding: nn.Module, lookup: Lookup) -> Iterator[None]:
    """While open, `embedding` looks up rows of trained matrices by `lookup`."""
    with forward_as(embedding, partial(_embed_by, lookup, embedding.forward)):
        yield


def _embed_by(lookup: Lookup, forward: Callable, *args, **kwargs) -> Tensor:
    with _Lookups(lookup):
        return forward(*args, **kwargs)
